"""What the machine can do at best: the other figures are read beside these."""

from __future__ import annotations

import torch

from tests.gpu.items.context import Context, Figures, gigabytes_per_second, teraflops


def ceilings(context: Context) -> Figures:
    """Copies on the device (bytes read plus bytes written) and to and from the host, and a bf16 matmul."""
    num_bytes, width = context.size(2**32, 2**22), context.size(8192, 128)
    source = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, device=context.device)
    target = torch.empty_like(source)
    left, right = (torch.randn(width, width, device=context.device).bfloat16() for _ in range(2))
    figures: Figures = {
        "device copy GB/s": gigabytes_per_second(
            2 * num_bytes, context.milliseconds(lambda: target.copy_(source))
        ),
        "bf16 matmul TFLOP/s": teraflops(2 * width**3, context.milliseconds(lambda: left @ right)),
    }
    assert torch.equal(source, target)
    if context.on_gpu:
        figures |= _host_copies(context, source[: 2**30])
    return figures


def _host_copies(context: Context, on_device: torch.Tensor) -> Figures:
    figures: Figures = {}
    for kind, pinned in (("pinned", True), ("pageable", False)):
        on_host = torch.empty(on_device.shape, dtype=torch.uint8, pin_memory=pinned)
        for direction, target, source in (("to host", on_host, on_device), ("to device", on_device, on_host)):
            elapsed = context.milliseconds(
                lambda target=target, source=source: target.copy_(source, non_blocking=True), runs=5
            )
            figures[f"{kind} {direction} GB/s"] = gigabytes_per_second(on_device.nbytes, elapsed)
    return figures
