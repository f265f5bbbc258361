"""What each package must offer: the names in our own source, and what is used without an import."""

from __future__ import annotations

from megatron_vespo.commands.doctor.own_source import Uses, uses_of
from megatron_vespo.system.optional_packages import DEEP_EP, IMPORTS

HTTP_SERVER = "sglang.srt.entrypoints.http_server"
# SGLang's endpoints that we call
ROUTES = (
    "/abort_request",
    "/begin_weight_update",
    "/continue_generation",
    "/destroy_weights_update_group",
    "/end_weight_update",
    "/flush_cache",
    "/generate",
    "/health",
    "/init_weights_update_group",
    "/model_info",
    "/pause_generation",
    "/release_memory_occupation",
    "/resume_memory_occupation",
    "/update_weights_from_disk",
    "/update_weights_from_distributed",
    "/update_weights_from_tensor",
    "/weights_checker",
)
# the fields that we fill in
_REQUESTS = {
    "AbortReq": "abort_all",
    "DestroyWeightsUpdateGroupReqInput": "group_name",
    "GenerateReqInput": "input_ids sampling_params return_logprob return_routed_experts return_sampling_mask",
    "InitWeightsUpdateGroupReqInput": "master_address master_port rank_offset world_size group_name backend",
    "PauseGenerationReqInput": "mode",
    "ReleaseMemoryOccupationReqInput": "tags",
    "ResumeMemoryOccupationReqInput": "tags",
    "UpdateWeightFromDiskReqInput": "model_path load_format flush_cache weight_version",
    "UpdateWeightsFromDistributedReqInput": "names dtypes shapes group_name load_format flush_cache "
    "weight_version",
    "UpdateWeightsFromTensorReqInput": "serialized_named_tensors load_format flush_cache weight_version "
    "selector",
}
_SAMPLING = {"temperature", "max_new_tokens", "stop_token_ids", "top_p", "top_k", "min_p", "sampling_seed"}
# where Megatron-Core imports kernels of packages that we do not import ourselves
_TRANSFORMER_ENGINE = (
    "Linear LayerNormLinear LayerNorm RMSNorm DotProductAttention GroupedLinear optimizers.FusedAdam"
)
_APEX = {
    ("apex.optimizers", "FusedAdam"): set[str](),
    ("apex.multi_tensor_apply", "multi_tensor_applier"): set[str](),
    ("apex.normalization.fused_layer_norm", "FusedLayerNormAffineFunction"): set[str](),
}
_LIBRARIES = {"megatron-core": "megatron", "ray": "ray", "torch": "torch", "transformers": "transformers"}


def surface(package: str) -> Uses:
    """(module, dotted name) -> keywords that it must accept. Runs in the process that imports the package."""
    if package in _LIBRARIES:
        return uses_of(_LIBRARIES[package])
    if package == "sglang":
        requests = {("sglang.srt.managers.io_struct", name): set(f.split()) for name, f in _REQUESTS.items()}
        sampling = {("sglang.srt.sampling.sampling_params", "SamplingParams"): _SAMPLING}
        return requests | sampling | {(HTTP_SERVER, "app"): set()}
    if package == "transformer-engine":
        return {("transformer_engine.pytorch", name): set() for name in _TRANSFORMER_ENGINE.split()}
    if package == "deep-ep":
        return {(module, name): set() for module, names in IMPORTS[DEEP_EP].items() for name in names}
    if package == "apex":
        return _APEX
    from megatron_vespo.commands.convert.modelopt_export import FORMATS

    configs = {("modelopt.torch.quantization", config): set[str]() for config in FORMATS.values()}
    return configs | {
        ("modelopt.torch.quantization", "quantize"): set(),
        ("modelopt.torch.export", "export_hf_checkpoint"): set(),
    }


def missing_in_sglang() -> list[str]:
    """Endpoints and flags that we use and that this SGLang lacks."""
    import importlib

    paths = {getattr(route, "path", None) for route in importlib.import_module(HTTP_SERVER).app.routes}
    return [f"endpoint {path}" for path in ROUTES if path not in paths] + [
        f"flag {flag}" for flag in missing_flags()
    ]


def missing_flags() -> list[str]:
    """SGLang's flags that we pass, watch or refuse and that this SGLang lacks. Does not import SGLang."""
    from megatron_vespo.rollout.fp8_engines import FP8_FLAGS
    from megatron_vespo.rollout.server_arguments import (
        EXPERT_FLAGS,
        GRAPH_FLAGS,
        LAYOUT_FLAGS,
        OWNED,
        SIZE_FLAGS,
        known_flags,
        server_arguments,
    )

    options = {"device": "cpu", "dtype": "float32", "routes": True, "seed": 0, "longest_step_s": 1.0}
    passed = {
        part
        for part in server_arguments([], prefix_cache=False, supports=True, **options)
        if part.startswith("--")
    }
    named = {*OWNED, *LAYOUT_FLAGS, *FP8_FLAGS, *GRAPH_FLAGS, *SIZE_FLAGS, *EXPERT_FLAGS}
    return sorted((passed | named) - known_flags().keys())
