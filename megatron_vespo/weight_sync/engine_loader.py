"""Runs in every process of an SGLang engine: copies the trainer's pieces into the engine's own parameters.

SGLang calls `load`, which it knows by --custom-weight-loader. The engine is the installed one, unpatched. An
exception there would end its process, so errors are written where the trainer reads them.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from megatron_vespo.weight_sync.messages import Introduction, Load, unpack, write_slot
from megatron_vespo.weight_sync.shared_memory import opened

# of FusedMoE: the experts' matrices are transposed, or up comes before gate
_OTHER_ORDER = ("use_triton_kernels", "load_up_proj_weight_first")


class _Receiver:
    def __init__(self, introduction: Introduction):
        self._told = introduction
        self._dtype: torch.dtype = getattr(torch, introduction.dtype)
        self._board = opened(introduction.board)
        self._sources = [opened(path) for path in introduction.sources]
        self._groups: dict[int, list[Sequence[int]]] = {}
        for piece in introduction.pieces:
            self._groups.setdefault(piece[0], []).append(piece[1:])

    def report(self, text: str) -> None:
        write_slot(self._board, self._told.slot, text)

    def matrices(self, model: nn.Module) -> list[Tensor]:
        """The parameters as they are now, an engine may bind them anew; ValueError if they are others."""
        parameters = dict(model.named_parameters())
        expected = {name: (rows, cols) for name, rows, cols in self._told.matrices}
        if parameters.keys() != expected.keys():
            name = min(parameters.keys() ^ expected.keys())
            where = "in the plan only" if name in expected else "in the engine only"
            raise ValueError(f"parameter {name} is {where}")
        found = []
        for name, (rows, cols) in expected.items():
            tensor = parameters[name].data
            matrix = tensor.flatten(0, -2) if tensor.dim() > 1 else tensor.view(-1, 1)
            if matrix.shape != (rows, cols) or matrix.data_ptr() != tensor.data_ptr():
                raise ValueError(f"{name} has shape {list(tensor.shape)}, planned are {rows} x {cols}")
            found.append(matrix)
        return found

    @torch.no_grad()
    def copy(self, model: nn.Module, group: int) -> None:
        matrices = self.matrices(model)
        size = self._told.buffer_bytes
        start = group % 2 * size
        buffers = [source[start : start + size].view(self._dtype) for source in self._sources]
        element = self._dtype.itemsize
        targets, values = [], []
        for source, offset, parameter, to_row, to_col, rows, cols in self._groups.get(group, ()):
            first = offset // element
            targets.append(matrices[parameter][to_row : to_row + rows, to_col : to_col + cols])
            values.append(buffers[source][first : first + rows * cols].view(rows, cols))
        if targets:
            torch._foreach_copy_(targets, values)  # pyright: ignore[reportPrivateImportUsage]
        if group == 0:
            for parameter, to_row, rows in self._told.padding:
                matrices[parameter][to_row : to_row + rows] = 0
        if matrices[0].device.type != "cpu":
            torch.get_device_module(matrices[0].device).synchronize()  # the buffer is overwritten next


_receivers: WeakKeyDictionary[nn.Module, _Receiver] = WeakKeyDictionary()


def load(model: nn.Module, named_tensors: Sequence[tuple[str, Tensor]]) -> None:
    """What SGLang calls with the message of its rank; see `messages`."""
    [(text, _)] = named_tensors
    message = unpack(text)
    if isinstance(message, Introduction):
        _receivers[model] = _Receiver(message)
    receiver = _receivers[model]
    try:
        if isinstance(message, Load):
            receiver.copy(model, message.group)
        else:
            receiver.matrices(model)
            check_order(model)
    except Exception as error:  # whatever it is, the trainer says it
        traceback.print_exc()
        receiver.report(f"{type(error).__name__}: {error}")


def check_order(model: nn.Module) -> None:
    """ValueError if a layer keeps its experts in another order than planned."""
    for name, module in model.named_modules():
        for flag in _OTHER_ORDER:
            if getattr(module, flag, False):
                raise ValueError(f"{name} has {flag}")
