"""The data of GPUs for plans and simulations. Such numbers stand only here."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
# What train chooses by default on machines with GPUs, for commands that run on others. A recipe's flags come
# later and override these.
ON_GPUS = ("--distributed-backend", "nccl", "--transformer-impl", "transformer_engine")


def runs_on_gpus(distributed_backend: str) -> bool:
    """Whether a run's trainer and engines use GPUs, as decided when its flags were parsed."""
    return distributed_backend == "nccl"


@dataclass(frozen=True)
class Gpu:
    """One GPU of a machine with eight.

    `memory` is what torch reports as "total capacity", in bytes. `flops` is the dense bf16 peak.
    Bandwidths are peak bytes per second in one direction: of its memory, of NVLink, of the GPU's own network
    card in a DGX, and of PCIe between GPU and host. `host` is its share of the machine's memory.
    """

    name: str
    memory: float
    flops: float
    memory_bandwidth: float
    nvlink: float
    network: float
    host_link: float
    host: float


# Memory: torch's out-of-memory messages. Others: NVIDIA's data sheets. These give NVLink as the sum of both
# directions, and FLOP/s of newer GPUs with sparsity, twice the dense value. Network: DGX A100 has a
# ConnectX-6 of 200 Gb/s per GPU; DGX H100, H200 and B200 have a ConnectX-7 of 400 Gb/s. Host: PCIe 4 or 5
# with 16 lanes; a DGX has 1 TB with the small A100s, 2 TB otherwise (cloud machines with eight H100s have
# 1,870 GiB or more).
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
# What copies and collectives reach of the peak of NVLink and of the network: an assumption.
LINK_SHARE = 0.8
# Bytes per second of one hop of a gloo broadcast, through host memory and TCP. This is an assumption: half of
# the 4.3e9 measured between two processes on two CPU cores over loopback.
GLOO = 2e9
