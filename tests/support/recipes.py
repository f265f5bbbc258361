"""The recipes of examples/ and the configs of their models."""

from __future__ import annotations

from pathlib import Path

from tests.support.published_config import LLAMA_3B, QWEN3_8B, QWEN3_30B_A3B

EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIGS = {"qwen3_30b_a3b": QWEN3_30B_A3B, "qwen3_8b": QWEN3_8B, "llama3_2_3b": LLAMA_3B}
# folder/recipe -> GPUs of its nodes
RECIPES = {
    "qwen3_30b_a3b/synchronous_n8": 32,
    "qwen3_30b_a3b/synchronous_n16": 32,
    "qwen3_30b_a3b/synchronous_n32": 32,
    "qwen3_30b_a3b/synchronous_n64": 32,
    "qwen3_30b_a3b/asynchronous": 64,
    "qwen3_30b_a3b/one_node_80gb": 8,
    "qwen3_30b_a3b/colocated_n8": 32,
    "qwen3_8b/synchronous_n8": 16,
    "qwen3_8b/one_node": 8,
    "qwen3_8b/colocated_one_node": 8,
    "llama3_2_3b/synchronous_n8": 8,
}
