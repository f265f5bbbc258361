"""Memory that another process opens by its handle."""

from __future__ import annotations

import base64
import subprocess
import sys

import pytest
import torch

from megatron_vespo.weight_sync.exported_memory import ExportedMemory, handle_of, handle_text, opened

CPU = torch.device("cpu")
CONSUMER = """
import sys, torch
from megatron_vespo.weight_sync.exported_memory import opened
memory = opened(sys.argv[1], 1000, torch.device("cpu"))
memory[7] = 9
print(int(memory.sum()))
sys.stdin.read()
print(int(memory.sum()))
"""


def test_another_process_reads_and_writes_it_and_keeps_it():
    memory = ExportedMemory(1000, CPU)
    memory.bytes[:] = 1
    child = subprocess.Popen(
        [sys.executable, "-c", CONSUMER, memory.handle], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.readline() == "1008\n"
    assert memory.bytes[7] == 9
    memory.close()
    del memory
    told, _ = child.communicate("", timeout=60)
    assert told == "1008\n", "memory ended with the process that had made it"


def test_a_closed_handle_opens_nothing():
    memory = ExportedMemory(10, CPU)
    assert opened(memory.handle, 10, CPU).tolist() == [0] * 10
    memory.close()
    with pytest.raises(OSError):
        opened(memory.handle, 10, CPU)


def test_a_handle_of_a_gpu_survives_as_text():
    runtime = pytest.importorskip("cuda.bindings.runtime")
    handle = runtime.cudaIpcMemHandle_t()
    text = handle_text(handle)
    assert handle_text(handle_of(text)) == text
    content = bytes(range(64))
    written = "cuda:" + base64.b64encode(content).decode()
    assert handle_text(handle_of(written)) == written
