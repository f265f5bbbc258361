"""What a GPU has, for plans and simulations. The only place where such numbers stand."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
# What train chooses by itself where there are GPUs, for commands that run elsewhere; a recipe's flags come
# later and win.
ON_GPUS = ("--distributed-backend", "nccl", "--transformer-impl", "transformer_engine")


def runs_on_gpus(distributed_backend: str) -> bool:
    """Trainer and engines of a run; parsing its flags has decided it."""
    return distributed_backend == "nccl"


@dataclass(frozen=True)
class Gpu:
    """One GPU of a machine with eight.

    `memory` is what torch sees of it, in its words the "total capacity". `flops` are dense bf16 at most.
    Bandwidths are bytes a second at most, in one direction: of its memory, of NVLink, and of the network card
    that it has for itself in a DGX, and of PCIe between it and the host. `host` is its share of the machine's
    own memory.
    """

    name: str
    memory: float
    flops: float
    memory_bandwidth: float
    nvlink: float
    network: float
    host_link: float
    host: float


# Memory: torch's out-of-memory messages. Others: NVIDIA's data sheets; these print NVLink in both directions
# together, and FLOP of the newer ones with sparsity, twice the dense. Network: DGX A100 has a ConnectX-6 of
# 200 Gb/s a GPU, DGX H100, H200 and B200 a ConnectX-7 of 400 Gb/s. Host: PCIe 4 or 5 with 16 lanes; a DGX has
# 1 TB with the small A100s, 2 TB otherwise (clouds' machines of eight H100s have 1,870 GiB and more).
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40gb", 39.4 * GIB, 312e12, 1.555e12, 300e9, 25e9, 32e9, 125e9),
        Gpu("a100", 79.2 * GIB, 312e12, 2.039e12, 300e9, 25e9, 32e9, 250e9),
        Gpu("h100", 79.1 * GIB, 989.4e12, 3.35e12, 450e9, 50e9, 64e9, 250e9),
        Gpu("h200", 139.7 * GIB, 989.4e12, 4.8e12, 450e9, 50e9, 64e9, 250e9),
        Gpu("b200", 178.3 * GIB, 2250e12, 8.0e12, 900e9, 50e9, 64e9, 250e9),
    )
}
# Bytes a second of one hop of a gloo broadcast, through the hosts' memory and TCP: an assumption, half of the
# 4.3e9 that two processes on two CPU cores had over loopback.
GLOO = 2e9
