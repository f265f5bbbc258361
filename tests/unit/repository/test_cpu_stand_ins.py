"""Everything that patches/cpu replaces, and why only a machine without CUDA needs it.

What the CPU runtime hides, no test on a CPU can find. So the list is closed: a process imports torch,
Megatron and SGLang, activates the runtime, and compares every name of every module with what it was before.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys

import pytest
import torch

NO_DRIVER = "torch raises without a driver"
ONE_GENERATOR = "the CPU's generator plays the device's"
NO_DEVICE = "there is no device to make the tensor on"
NO_STREAMS = "on CPU every operation has ended when it returns"
GLOO = "gloo has no gather or scatter of uneven parts; NCCL has"
NO_FP8 = "SGLang multiplies FP8 weights on GPUs and by AMX; parameters and loading stay its own"
NO_TRITON = "its batch-invariant kernels are written in Triton"

REPLACED = {
    "torch.cuda.current_device": NO_DRIVER,
    "torch.cuda.set_device": NO_DRIVER,
    "torch.cuda.device_count": "with 0 devices Megatron leaves out its process groups and seeds",
    "torch.cuda.get_device_capability": NO_DRIVER,
    "torch.cuda.get_device_properties": NO_DRIVER,
    "torch.cuda.synchronize": NO_DRIVER,
    "torch.cuda.empty_cache": NO_STREAMS,
    "torch.cuda.stream": NO_STREAMS,
    "torch.cuda.Stream": NO_STREAMS,
    "torch.cuda.Event": NO_STREAMS,
    "torch.cuda.current_stream": NO_STREAMS,
    "torch.cuda.default_stream": NO_STREAMS,
    "torch.Tensor.record_stream": NO_STREAMS,
    "torch.cuda.get_rng_state": ONE_GENERATOR,
    "torch.cuda.set_rng_state": ONE_GENERATOR,
    "torch.cuda.manual_seed": ONE_GENERATOR,
    "torch.cuda.random.get_rng_state": ONE_GENERATOR,
    "torch.cuda.random.set_rng_state": ONE_GENERATOR,
    "torch.cuda.random.manual_seed": ONE_GENERATOR,
    "megatron.core.tensor_parallel.random._get_cuda_rng_state": ONE_GENERATOR,
    "megatron.core.tensor_parallel.random._set_cuda_rng_state": ONE_GENERATOR,
    **{
        f"torch.{factory}": NO_DEVICE
        for factory in "tensor zeros ones empty full arange empty_like zeros_like ones_like".split()
    },
    "torch.Tensor.cuda": NO_DEVICE,
    "torch.nn.modules.module.Module.cuda": NO_DEVICE,
    "torch.Tensor.type": "Megatron sorts parameters by the name of their type, torch.cuda.FloatTensor",
    "torch.get_device_module": "a torch built with CUDA answers torch.cuda where no driver is",
    "megatron.core.tensor_parallel.mappings._gather_along_first_dim": GLOO,
    "megatron.core.tensor_parallel.mappings._reduce_scatter_along_first_dim": GLOO,
    # the copy to the CPU makes numbers of a CUDA tensor, and leaves a CPU tensor as it is
    "megatron.core.transformer.moe.moe_utils.maybe_move_tensor_to_cpu": "it does nothing on the CPU",
    "megatron.core.transformer.moe.token_dispatcher.maybe_move_tensor_to_cpu": "it does nothing on the CPU",
    "sglang.srt.utils.numa_utils.init_threads_binding": "allows one rank per NUMA node; for AMX kernels",
    "sglang.srt.layers.moe.fused_moe_native.moe_forward_native": "on GPUs Triton's MoE runs, with EP",
    "sglang.srt.model_executor.model_runner.ModelRunner.maybe_enable_batch_invariant_mode": NO_TRITON,
    **{
        f"sglang.srt.layers.quantization.fp8.{name}": NO_FP8
        for name in (
            "dispatch_w8a8_block_fp8_linear",
            "Fp8LinearMethod.process_weights_after_loading_block_quant",
            "Fp8MoEMethod.process_weights_after_loading_block_quant",
            "Fp8MoEMethod.apply",
        )
    },
    **{
        f"sglang.srt.{module}.ALLOC_MEMORY_FUNCS": "host memory is pinned by cudaHostRegister"
        for module in (
            "mem_cache.pool_host.common",
            "mem_cache.pool_host.mha",
            "mem_cache.pool_host.unified",
            "state_capturer.base",
        )
    },
    **{
        f"sglang.srt.{module}.{name}": "torch's own attention, for CPUs, is deterministic"
        for module in ("arg_groups.choices", "server_args")
        for name in (
            "DETERMINISTIC_ATTENTION_BACKEND_CHOICES",
            "RADIX_SUPPORTED_DETERMINISTIC_ATTENTION_BACKEND",
        )
    },
}
VARIABLES = {
    "CUDA_VISIBLE_DEVICES": "no process is to look for a device",
    "OMP_NUM_THREADS": "many processes share few cores",
    "TORCHDYNAMO_DISABLE": "compiling for the CPU takes longer than the small models that run here",
    "HF_HUB_OFFLINE": "models are folders",
    "SGLANG_USE_CPU_ENGINE": "SGLang's own switch",
    "SGLANG_DISABLED_MODEL_ARCHS": "many models import GPU kernels, and all take minutes on few cores",
    "SGLANG_NCCL_SO_PATH": "there is an NCCL library, and no device for it",
}
PROGRAM = """
import importlib, json, logging, os, sys, warnings
warnings.simplefilter("ignore")
logging.disable(logging.WARNING)
for name in (
    "megatron.core.tensor_parallel.random", "megatron.core.transformer.moe.token_dispatcher",
    "megatron.core.datasets.utils", "megatron.core.optimizer", "megatron.core.dist_checkpointing",
    "megatron.training.training",
    "sglang.srt.server_args", "sglang.srt.model_executor.model_runner", "sglang.srt.arg_groups.choices",
    "sglang.srt.layers.moe.fused_moe_native", "sglang.srt.utils.numa_utils",
    "sglang.srt.layers.quantization.fp8",
):
    importlib.import_module(name)

def identity(module, value):
    # torch registers types in dictionaries of its own whenever something is imported
    if module.startswith("sglang") and isinstance(value, dict):
        return [id(value), *((str(key), id(item)) for key, item in value.items())]
    if module.startswith("sglang") and isinstance(value, list):
        return [id(value), *map(id, value)]
    return id(value)

def names():
    found = {}
    for module, content in list(sys.modules.items()):
        if module.partition(".")[0] not in ("torch", "megatron", "sglang") or content is None:
            continue
        for name, value in list(vars(content).items()):
            if name.startswith("__"):
                continue
            found[f"{module}.{name}"] = identity(module, value)
            if isinstance(value, type) and value.__module__ == module:
                for member, inner in list(vars(value).items()):
                    found[f"{module}.{name}.{member}"] = identity(module, inner)
    return found

known, before, variables = set(sys.modules), names(), dict(os.environ)
import megatron_vespo_cpu
from megatron_vespo_cpu import sglang_plugin
megatron_vespo_cpu.activate()
sglang_plugin.activate()
changed = []
for name, value in names().items():
    # Tensor inherits some of them from C
    inherited = name.startswith("torch.Tensor.") and name not in before
    if inherited or (name in before and before[name] != value):
        changed.append(name)
print(json.dumps({
    "names": sorted(changed),
    "variables": sorted(name for name in os.environ if os.environ[name] != variables.get(name)),
}))
"""


@pytest.mark.long
@pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-ins are for machines without CUDA")
def test_the_list_of_replacements_is_complete():
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=240, env=environment
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert sorted(set(found["names"]) - REPLACED.keys()) == [], "replaced, and no reason here"
    assert sorted(REPLACED.keys() - set(found["names"])) == [], "not replaced any more"
    assert found["variables"] == sorted(VARIABLES)


def test_of_the_kernel_library_it_has_two_functions():
    """The library's wheel is built for CUDA; what else SGLang imports of it raises when it is called."""
    import sgl_kernel

    functions = {name for name, value in vars(sgl_kernel).items() if inspect.isfunction(value)}
    public = {name for name in functions if not name.startswith("_")}
    assert public == {"assign_req_to_token_pool_cpu", "murmur_hash32"}
