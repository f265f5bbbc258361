"""A tiny random model and a server of it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from megatron_vespo.rollout.generate_reply import RouteShape
from megatron_vespo.rollout.server_arguments import server_arguments
from megatron_vespo.rollout.sglang_server import SGLangServer
from megatron_vespo.system.ports import find_free_port

HOST = "127.0.0.1"
START_TIMEOUT_S = 300.0
NUM_LAYERS, NUM_EXPERTS, TOPK, VOCAB_SIZE = 2, 8, 2, 128
ROUTES = RouteShape(NUM_LAYERS, TOPK)


_EXPERTS = {
    "moe_intermediate_size": 32,
    "num_experts": NUM_EXPERTS,
    "num_experts_per_tok": TOPK,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
    "mlp_only_layers": [],
}
_GLM = {
    "moe_intermediate_size": 32,
    "n_routed_experts": NUM_EXPERTS,
    "num_experts_per_tok": TOPK,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
    "norm_topk_prob": True,
    "attention_bias": True,
    "use_qk_norm": True,
    "num_nextn_predict_layers": 0,
}


def make_tiny_model(folder: Path, seed: int, dense: bool = False, dtype: str = "float32", **changes) -> Path:
    """A random Qwen3-MoE, or Qwen3, in HF format, with a character tokenizer and a chat template.

    `changes` are of its configuration.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    write_character_tokenizer(folder)
    kinds = (Qwen3Config, Qwen3ForCausalLM) if dense else (Qwen3MoeConfig, Qwen3MoeForCausalLM)
    return _write_random_model(folder, seed, dtype, *kinds, {} if dense else _EXPERTS, changes)


def make_tiny_glm(folder: Path, seed: int, dtype: str = "float32", **changes) -> Path:
    """The same of GLM-4.5's family. Its first layer has no experts; its routers have biases."""
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    write_character_tokenizer(folder)
    return _write_random_model(folder, seed, dtype, Glm4MoeConfig, Glm4MoeForCausalLM, _GLM, changes)


def write_character_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<unk>"]
    characters = [chr(code) for code in range(32, 127)]
    vocabulary = {token: index for index, token in enumerate(special + characters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    fast.save_pretrained(folder)


def _write_random_model(folder: Path, seed: int, dtype: str, config, kind, more: dict, changes: dict) -> Path:
    import torch

    shape = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "initializer_range": 0.2,  # large enough that the experts and the sampled tokens vary
    }
    torch.manual_seed(seed)
    model = kind(config(**(more | shape | changes)))
    biases = [*model.named_parameters(), *model.named_buffers()]
    for tensor in (tensor for name, tensor in biases if name.endswith("bias")):
        torch.nn.init.uniform_(tensor, -0.3, 0.3)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def tiny_engine(model: Path, log_path: Path, *more: str, api_key: str | None = None) -> SGLangServer:
    flags = ["--max-total-tokens", "16384", "--max-running-requests", "32", "--context-length", "1024"]
    arguments = server_arguments(
        [*flags, *more], device="cpu", routes=True, dtype="float32", seed=1, longest_step_s=START_TIMEOUT_S
    )
    port = find_free_port(HOST)
    return SGLangServer(str(model), HOST, port, arguments, log_path, START_TIMEOUT_S, api_key)


@contextmanager
def two_engines(model: Path, folder: Path) -> Iterator[tuple[SGLangServer, SGLangServer]]:
    """Started side by side."""
    first, second = (tiny_engine(model, folder / f"{number}.log") for number in (0, 1))
    with ThreadPoolExecutor() as threads:
        list(threads.map(SGLangServer.start, (first, second)))
    try:
        yield first, second
    finally:
        for engine in (first, second):
            engine.stop(timeout_s=0)


def start_in_short_lived_thread(engine: SGLangServer) -> None:
    """As an actor's executor does: the server must outlive the thread that started it."""
    with ThreadPoolExecutor(1) as executor:
        executor.submit(engine.start).result()
