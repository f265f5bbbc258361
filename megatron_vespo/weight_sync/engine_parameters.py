"""The parameters of an engine rank as a plan knows them: matrices."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

# of FusedMoE: the experts' matrices are transposed, or up comes before gate
_OTHER_ORDER = ("use_triton_kernels", "load_up_proj_weight_first")


class EngineParameters:
    """`matrices` are names, rows and columns, in the order in which pieces number them."""

    def __init__(self, matrices: Sequence[tuple[str, int, int]]):
        self._expected = {name: (rows, cols) for name, rows, cols in matrices}

    def check(self, model: nn.Module) -> None:
        """ValueError if the model is another one than planned for, or keeps its experts in another order."""
        self.of(model)
        for name, module in model.named_modules():
            for flag in _OTHER_ORDER:
                if getattr(module, flag, False):
                    raise ValueError(f"{name} has {flag}")

    def of(self, model: nn.Module) -> list[Tensor]:
        """The parameters as they are now: an engine may bind them anew. ValueError if they are others."""
        parameters = dict(model.named_parameters())
        if parameters.keys() != self._expected.keys():
            name = min(parameters.keys() ^ self._expected.keys())
            where = "in the plan only" if name in self._expected else "in the engine only"
            raise ValueError(f"parameter {name} is {where}")
        found = []
        for name, (rows, cols) in self._expected.items():
            tensor = parameters[name].data
            matrix = tensor.flatten(0, -2) if tensor.dim() > 1 else tensor.view(-1, 1)
            if matrix.shape != (rows, cols) or matrix.data_ptr() != tensor.data_ptr():
                raise ValueError(f"{name} has shape {list(tensor.shape)}, planned are {rows} x {cols}")
            found.append(matrix)
        return found
