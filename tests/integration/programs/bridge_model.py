"""NVIDIA's megatron-bridge without CUDA and Transformer Engine: the oracle of the conversion tests.

Importing `megatron.bridge` imports every model that it knows, with all that these need. Here its packages are
found without their `__init__`, so that only what is named is loaded.
"""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

import torch

# whose __init__ imports more than its modules need
_WITHOUT_INIT = (
    "megatron.bridge",
    "megatron.bridge.models",
    "megatron.bridge.models.qwen",
    "megatron.bridge.peft",
)
# defines layers on top of Transformer Engine's; of it, conversion needs one class to ask isinstance of
_ADAPTERS = "megatron.bridge.peft.canonical_lora"
_FAMILIES = {
    "Qwen3MoeForCausalLM": ("qwen.qwen3_moe_bridge", "Qwen3MoEBridge"),
    "Qwen3ForCausalLM": ("qwen.qwen3_bridge", "Qwen3Bridge"),
    "LlamaForCausalLM": ("llama.llama_bridge", "LlamaBridge"),
}
_LAYER, _HF_LAYER = "decoder.layers.*.", "model.layers.*."
# what the local layer spec calls the norms, which Transformer Engine has inside its linear layers
_LOCAL_NORMS = {
    _LAYER + "input_layernorm.weight": _HF_LAYER + "input_layernorm.weight",
    _LAYER + "pre_mlp_layernorm.weight": _HF_LAYER + "post_attention_layernorm.weight",
}
_FUSIONS = (
    "apply_rope_fusion",
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "cross_entropy_loss_fusion",
    "gradient_accumulation_fusion",
    "masked_softmax_fusion",
    "moe_grouped_gemm",
    "moe_permute_fusion",
    "persist_layer_norm",
)


class _WithoutInit:
    """Finds packages as if they were namespaces: a folder of modules and no code of its own."""

    @staticmethod
    def find_spec(name: str, path=None, target=None) -> ModuleSpec | None:
        if name not in _WITHOUT_INIT:
            return None
        found = PathFinder.find_spec(name, path, target)
        if found is None:
            return None
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = list(found.submodule_search_locations)
        return spec


def auto_bridge(hf_folder: Path, architecture: str, dtype: torch.dtype):
    """megatron-bridge's AutoBridge of the folder; it knows the one architecture."""
    sys.meta_path.insert(0, _WithoutInit)
    adapters = ModuleType(_ADAPTERS)
    adapters.ModuleDict = type("ModuleDict", (), {})
    sys.modules[_ADAPTERS] = adapters
    module, name = _FAMILIES[architecture]
    family = getattr(importlib.import_module(f"megatron.bridge.models.{module}"), name)
    _add_local_norms(family)
    from megatron.bridge.models.conversion.auto_bridge import AutoBridge

    return AutoBridge.from_hf_pretrained(hf_folder, torch_dtype=dtype)


def _add_local_norms(family: type) -> None:
    from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
    from megatron.bridge.models.conversion.param_mapping import AutoMapping

    original = family.mapping_registry

    def mapping_registry(self) -> MegatronMappingRegistry:
        known = original(self).mappings
        names = {mapping.megatron_param for mapping in known}
        more = [
            AutoMapping(megatron_param=name, hf_param=hf_name)
            for name, hf_name in _LOCAL_NORMS.items()
            if name not in names
        ]
        return MegatronMappingRegistry(*known, *more)

    family.mapping_registry = mapping_registry


def build_model(bridge, dtype: torch.dtype, tp: int, pp: int, ep: int) -> torch.nn.Module:
    """This rank's part of the GPTModel, weights undefined; the layout's process groups are up after it."""
    from megatron.bridge.models.gpt_provider import local_layer_spec
    from megatron.core import parallel_state
    from megatron.core.utils import unwrap_model

    sizes = {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "expert_model_parallel_size": ep,
        "expert_tensor_parallel_size": 1,
    }
    provider = bridge.to_megatron_provider(load_weights=False)
    settings = {
        **sizes,
        **dict.fromkeys(_FUSIONS, False),
        "transformer_layer_spec": local_layer_spec,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "autocast_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": False,
        "perform_initialization": False,
        "sequence_parallel": False,
        "moe_token_dispatcher_type": "allgather",
    }
    for name, value in settings.items():
        setattr(provider, name, value)
    provider.finalize()
    parallel_state.initialize_model_parallel(**sizes)
    wrapper = {} if dtype == torch.bfloat16 else {"mixed_precision_wrapper": None}
    (model,) = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True, **wrapper)
    return unwrap_model(model)
