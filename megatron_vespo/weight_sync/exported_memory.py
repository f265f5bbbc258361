"""Memory that another process of the same user opens by its handle, a line of text.

On a host: a memfd instead of a file in /dev/shm. A process that is killed leaves nothing behind, and the
/dev/shm of a container, often 64 MiB, is no limit. On a GPU: CUDA IPC. Its memory comes from cudaMalloc, as
what torch's allocator or torch_memory_saver hand out may consist of segments that cannot be exported.
"""

from __future__ import annotations

import base64
import ctypes
import mmap
import os
from typing import Any

import torch
from torch import Tensor

CUDA = "cuda:"


class ExportedMemory:
    """`bytes` is uint8 [size]; `handle` is valid while this process keeps the object open."""

    def __init__(self, size: int, device: torch.device):
        self._descriptor = -1
        self._cuda: _CudaMemory | None = None
        self.bytes: Tensor
        if device.type == "cuda":
            self._cuda = _CudaMemory(size, device)
            self.bytes, self.handle = self._cuda.bytes, self._cuda.handle
            return
        self._descriptor = os.memfd_create("megatron_vespo weights", os.MFD_CLOEXEC)
        os.ftruncate(self._descriptor, max(size, 1))
        self.bytes = torch.frombuffer(mmap.mmap(self._descriptor, max(size, 1)), dtype=torch.uint8)[:size]
        self.handle = f"/proc/{os.getpid()}/fd/{self._descriptor}"

    def close(self) -> None:
        """Withdraw the handle. Memory of a host ends with the last process that has opened it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        if self._cuda is not None:
            self._cuda.free()
            self._cuda = None


def opened(handle: str, size: int, device: torch.device) -> Tensor:
    """Another process's memory, uint8 [size]. That of a GPU has to be on `device`.

    The tensor stays valid after that process has closed it or ended, on a GPU until then.
    """
    if handle.startswith(CUDA):
        return _opened_cuda(handle, size, device)
    descriptor = os.open(handle, os.O_RDWR)
    try:
        return torch.frombuffer(mmap.mmap(descriptor, max(size, 1)), dtype=torch.uint8)[:size]
    finally:
        os.close(descriptor)


class _CudaMemory:
    def __init__(self, size: int, device: torch.device):
        runtime = _runtime()
        with torch.cuda.device(device):
            self._pointer = _checked(runtime.cudaMalloc(max(size, 1)))
            exported = _checked(runtime.cudaIpcGetMemHandle(self._pointer))
        self.bytes = _view(self._pointer, size, device)
        self.handle = handle_text(exported)

    def free(self) -> None:
        _checked(_runtime().cudaFree(self._pointer))


class _Opened:
    """Keeps memory of another process open as long as a tensor shows it."""

    def __init__(self, pointer: int, size: int):
        self._pointer = pointer
        self.__cuda_array_interface__ = _interface(pointer, size)

    def __del__(self) -> None:
        _runtime().cudaIpcCloseMemHandle(self._pointer)


def _opened_cuda(text: str, size: int, device: torch.device) -> Tensor:
    runtime = _runtime()
    with torch.cuda.device(device):
        flag = runtime.cudaIpcMemLazyEnablePeerAccess
        pointer = int(_checked(runtime.cudaIpcOpenMemHandle(handle_of(text), flag)))
    return torch.as_tensor(_Opened(pointer, size), device=device)


def handle_text(handle: Any) -> str:
    """The bytes of a CUDA IPC handle, which its Python class does not show, as text."""
    content = ctypes.string_at(handle.getPtr(), _runtime().CUDA_IPC_HANDLE_SIZE)
    return CUDA + base64.b64encode(content).decode()


def handle_of(text: str) -> Any:
    """The inverse of `handle_text`."""
    handle = _runtime().cudaIpcMemHandle_t()
    content = base64.b64decode(text.removeprefix(CUDA))
    ctypes.memmove(handle.getPtr(), content, len(content))
    return handle


class _Pointer:
    def __init__(self, pointer: int, size: int):
        self.__cuda_array_interface__ = _interface(pointer, size)


def _view(pointer: int, size: int, device: torch.device) -> Tensor:
    return torch.as_tensor(_Pointer(pointer, size), device=device)


def _interface(pointer: int, size: int) -> dict[str, Any]:
    return {"shape": (size,), "typestr": "|u1", "data": (pointer, False), "version": 2}


def _runtime() -> Any:
    from cuda.bindings import runtime  # pyright: ignore[reportAttributeAccessIssue]

    return runtime


def _checked(answer: tuple) -> Any:
    """What a CUDA call returns behind its error code; RuntimeError if there is an error."""
    error, *values = answer
    if int(error):
        raise RuntimeError(f"CUDA error {error.name}")
    return values[0] if values else None
