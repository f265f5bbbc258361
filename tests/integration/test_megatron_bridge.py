"""Conversions against NVIDIA's megatron-bridge, which shares no code with them.

It lives in an environment of its own, as it would pull other versions of what is used here into this one:
MEGATRON_BRIDGE_PYTHON names the interpreter of one with megatron-bridge, megatron-core and transformers.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_vespo.checkpoints.convert import Options, hf_to_megatron, megatron_to_hf
from megatron_vespo.checkpoints.ranks import Ranks
from tests.support.tensors import read_tensors

REPOSITORY = Path(__file__).parents[2]
PROGRAM = Path(__file__).parent / "programs" / "megatron_bridge.py"
PYTHON = os.environ.get("MEGATRON_BRIDGE_PYTHON", sys.executable)
TIMEOUT_S = 600  # of one program, most of it imports
LAYOUT = ["--tp", "2", "--pp", "2"]
EXPERT_LAYOUT = [*LAYOUT, "--ep", "2"]  # experts over the ranks that other tensors are split over
NUM_RANKS = 4

SMALL = {
    "vocab_size": 130,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
# case -> architecture, what its config adds to SMALL, dtype
CASES = {
    "qwen3 moe": ("Qwen3Moe", EXPERTS, torch.bfloat16),
    "qwen3": ("Qwen3", {}, torch.bfloat16),
    "qwen3, tied": ("Qwen3", {"tie_word_embeddings": True}, torch.float32),
    "llama": ("Llama", {}, torch.float32),
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * TIMEOUT_S)]


def bridge(
    work: str, *paths: Path, layout: Sequence[str] = (), ranks: int = 1
) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.run(
        [PYTHON, *launcher, str(PROGRAM), work, *map(str, paths), *layout],
        capture_output=True, text=True, timeout=TIMEOUT_S, env=environment,
    )  # fmt: skip


def run_bridge(*arguments, **settings) -> str:
    done = bridge(*arguments, **settings)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


@pytest.fixture(scope="module", autouse=True)
def importable() -> None:
    search = "import importlib.util as u; raise SystemExit(u.find_spec('megatron.bridge') is None)"
    if subprocess.run([PYTHON, "-c", search], capture_output=True, timeout=TIMEOUT_S).returncode:
        pytest.skip(
            f"{PYTHON} has no megatron-bridge: MEGATRON_BRIDGE_PYTHON names an interpreter that has it"
        )


@pytest.fixture(scope="module", params=CASES)
def hf_folder(request, tmp_path_factory) -> Path:
    """A random model, in several files."""
    import transformers

    name, more, dtype = CASES[request.param]
    config = getattr(transformers, f"{name}Config")(**SMALL | more)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name:  # not all ones, so that a norm in the wrong place shows
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    folder = tmp_path_factory.mktemp("model") / "hf"
    model.to(dtype).save_pretrained(folder, max_shard_size="200KB")
    return folder


def assert_same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype and tensor.shape == two[name].shape, name
        assert tensor.view(torch.uint8).equal(two[name].view(torch.uint8)), name


def test_megatron_loads_what_the_bridge_reads(hf_folder, tmp_path):
    hf_to_megatron(hf_folder, tmp_path / "megatron", Options(quiet=True), Ranks())
    assert " parameters equal" in run_bridge("check", hf_folder, tmp_path / "megatron" / "release")


def test_what_the_bridge_saved_on_four_ranks_comes_back(hf_folder, tmp_path):
    has_experts = "num_experts" in json.loads((hf_folder / "config.json").read_text())
    layout = EXPERT_LAYOUT if has_experts else LAYOUT
    run_bridge("import", hf_folder, tmp_path / "saved", layout=layout, ranks=NUM_RANKS)
    megatron_to_hf(tmp_path / "saved", tmp_path / "hf", Options(quiet=True), Ranks(), hf_config=hf_folder)
    assert_same(read_tensors(tmp_path / "hf"), read_tensors(hf_folder))


@pytest.mark.parametrize("hf_folder", ["qwen3 moe"], indirect=True)
def test_the_bridge_exports_our_checkpoint_from_four_ranks(hf_folder, tmp_path):
    hf_to_megatron(hf_folder, tmp_path / "megatron", Options(quiet=True), Ranks())
    paths = hf_folder, tmp_path / "megatron" / "release", tmp_path / "hf"
    run_bridge("export", *paths, layout=EXPERT_LAYOUT, ranks=NUM_RANKS)
    assert_same(read_tensors(tmp_path / "hf"), read_tensors(hf_folder))


@pytest.mark.parametrize("hf_folder", ["qwen3"], indirect=True)
def test_one_changed_bit_is_noticed(hf_folder, tmp_path):
    """The oracle itself: it would be none if it could not fail."""
    hf_to_megatron(hf_folder, tmp_path / "megatron", Options(quiet=True), Ranks())
    changed = shutil.copytree(hf_folder, tmp_path / "changed")
    name = "model.layers.3.self_attn.k_proj.weight"
    file = changed / json.loads((changed / "model.safetensors.index.json").read_text())["weight_map"][name]
    with safe_open(file, framework="pt") as opened:
        content = {key: opened.get_tensor(key) for key in opened.keys()}
    content[name].view(torch.int16)[5, 7] ^= 1
    save_file(content, file, metadata={"format": "pt"})
    done = bridge("check", changed, tmp_path / "megatron" / "release")
    assert done.returncode != 0
    expected = "1 of 35 parameters differ: ['decoder.layers.3.self_attention.linear_qkv.weight']"
    assert expected in done.stdout + done.stderr
