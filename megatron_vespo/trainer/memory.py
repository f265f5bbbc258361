"""Offloads a trainer rank's GPU memory while an engine on the same GPU generates.

Megatron's own `optimizer.offload_to_cpu` gives tensors new memory. Some shards are views of the parameters,
as in fp32 and with --use-precision-aware-optimizer. They would lose that link, and updates would not reach
the parameters. This module frees the storage under the tensors, as Megatron does with its buffers, so views
stay views.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor, UntypedStorage

from megatron_vespo.trainer.initialize import device

BLOCK = 64 * 2**20  # bytes; torch rounds pinned memory up to a power of two


class HostCopy:
    """Offloads tensors: copies their content to host memory and frees their memory on the device.

    `tensors` returns them; tensors that share their memory are offloaded, too. The host's blocks are kept
    for the next time, as pinning takes longer than copying.
    """

    def __init__(self, tensors: Callable[[], Iterable[Tensor]]):
        self._tensors = tensors
        self._away: list[tuple[UntypedStorage, int]] = []
        self._blocks: list[Tensor] = []

    def offload(self) -> None:
        """Offload the tensors. Nothing may use them until `onload`."""
        if self._away:
            return
        self._away = [(storage, storage.nbytes()) for storage in storages(self._tensors())]
        for here, host in self._pieces():
            host.copy_(here, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        for storage, _ in self._away:
            storage.resize_(0)

    def onload(self) -> None:
        """Bring the tensors back, bit for bit. Does not wait: later work on the stream follows the copies."""
        for storage, num_bytes in self._away:
            storage.resize_(num_bytes)
        for here, host in self._pieces():
            here.copy_(host, non_blocking=True)
        self._away = []

    def _pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of bytes on the device and their place on the host, storage by storage, block by block."""
        place = 0
        for storage, _ in self._away:
            rest = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            while len(rest):
                index, start = divmod(place, BLOCK)
                if index == len(self._blocks):
                    pinned = torch.cuda.is_available()
                    self._blocks.append(torch.empty(BLOCK, dtype=torch.uint8, pin_memory=pinned))
                host = self._blocks[index][start : start + len(rest)]
                yield rest[: len(host)], host
                rest, place = rest[len(host) :], place + len(host)


def storages(tensors: Iterable[Tensor]) -> list[UntypedStorage]:
    """The storages of `tensors` on this rank's device, each once."""
    found = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == device().type]
    return list({storage._cdata: storage for storage in found}.values())


class GpuMemory:
    """Memory of one rank's weights, gradients and optimizer; all are on the GPU at first.

    With `offload_states` False, weights and optimizer always stay there. Use it only between optimizer steps.
    """

    def __init__(
        self, chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer, offload_states: bool
    ):
        self._chunks, self._optimizer, self._offload_states = chunks, optimizer, offload_states
        self.weights = HostCopy(self._weight_tensors)
        self.optimizer = HostCopy(self._optimizer_tensors)

    def onload(self) -> None:
        """Bring back everything that an optimizer step needs; gradient buffers hold zeros."""
        self.weights.onload()
        self.optimizer.onload()
        for chunk in self._chunks:
            chunk.restore_grad_buffers(synchronize=False)

    def offload(self, keep_weights: bool) -> None:
        """Free this memory and torch's cache."""
        on_gpu = torch.cuda.is_available()
        self._optimizer.zero_grad()  # frees the gradients that it holds itself
        for part in getattr(self._optimizer, "chained_optimizers", [self._optimizer]):
            # with --optimizer-offload-fraction below 1 it holds fp32 gradients that nothing else clears
            on_the_gpu = getattr(getattr(part, "optimizer", None), "gpu_optimizer", None)
            if on_the_gpu is not None:
                on_the_gpu.zero_grad(set_to_none=True)
        for chunk in self._chunks:
            chunk.offload_grad_buffers(synchronize=on_gpu, empty_cache=False)
        if self._offload_states:
            self.optimizer.offload()
        if self._offload_states and not keep_weights:
            self.weights.offload()
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()

    def _weight_tensors(self) -> Iterator[Tensor]:
        for chunk in self._chunks:
            yield from chunk.parameters()

    def _optimizer_tensors(self) -> Iterator[Tensor]:
        """The optimizer's state and fp32 weights, without shards that are views of the parameters."""
        of_weights = {storage._cdata for storage in storages(self._weight_tensors())}
        for tensor in optimizer_tensors(self._optimizer):
            if tensor.untyped_storage()._cdata not in of_weights:
                yield tensor


def optimizer_tensors(optimizer: MegatronOptimizer) -> Iterator[Tensor]:
    """Tensors of all chained optimizers, and of both parts of a hybrid CPU-GPU optimizer."""
    for megatron in getattr(optimizer, "chained_optimizers", [optimizer]):
        if getattr(megatron, "is_stub_optimizer", False):
            continue
        inner = megatron.optimizer
        for part in (inner, *getattr(inner, "sub_optimizers", ())):
            for group in part.param_groups:
                yield from group["params"]
            for state in part.state.values():
                yield from (value for value in state.values() if isinstance(value, Tensor))
