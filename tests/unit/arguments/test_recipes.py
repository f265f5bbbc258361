"""Every recipe of examples/ is a run that this version accepts, on the model's real shape."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from pathlib import Path

import pytest

from megatron_vespo.arguments.parse import parse_args
from megatron_vespo.arguments.recipe import read_recipe
from megatron_vespo.rollout.server_arguments import engine_size, flag_value
from megatron_vespo.system.hardware import ON_GPUS
from tests.support.recipes import CONFIGS, EXAMPLES, RECIPES

DEFINITIONS = EXAMPLES.parent / "docs/guides/losses.md"


def parse(recipe: str, folder: Path, *more: str):
    (folder / "config.json").write_text(json.dumps(CONFIGS[recipe.partition("/")[0]]))
    flags = read_recipe(EXAMPLES / f"{recipe}.flags")
    return parse_args([*ON_GPUS, *flags, "--hf-checkpoint", str(folder), *more])


def test_all_are_here():
    found = {path.relative_to(EXAMPLES).with_suffix("").as_posix() for path in EXAMPLES.rglob("*.flags")}
    assert found == RECIPES.keys()


def check_kernels(args: Namespace) -> None:
    """Those that the recipes' README names."""
    assert args.transformer_impl == "transformer_engine" and args.apply_rope_fusion
    assert args.moe_grouped_gemm and args.moe_permute_fusion and not args.moe_router_fusion
    assert args.bias_swiglu_fusion and args.moe_router_dtype == "fp32"
    assert args.moe_router_load_balancing_type in ("none", ["none"]) and not args.overlap_grad_reduce
    assert args.distributed_timeout_minutes == 60
    if not args.colocate:
        assert flag_value(args.sglang_flags, "--cuda-graph-max-bs-decode") == "512"


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_accepted_and_has_the_papers_settings(tmp_path, recipe):
    args = parse(recipe, tmp_path)
    of_engines = args.rollout_engines * engine_size(args.sglang_flags)
    gpus = args.trainer_ranks if args.colocate else args.trainer_ranks + of_engines
    assert gpus == RECIPES[recipe] and args.colocate == ("colocated" in recipe)
    assert args.global_batch_size == 256 * 8 and args.lr == 1e-6 and 1500 <= args.train_iters <= 1536
    assert (args.max_prompt_tokens, args.max_completion_tokens) == (1024, 15360)
    assert (args.policy_loss, args.vespo_positive, args.vespo_negative) == ("vespo", [2.0, 3.0], [3.0, 2.0])
    assert args.loss_aggregation == "token-mean"
    adam = (args.adam_beta1, args.adam_beta2, args.adam_eps, args.weight_decay, args.clip_grad)
    assert adam == (0.9, 0.999, 1e-8, 0.01, 1.0)
    assert args.bf16 and args.save == args.load
    # a rollout batch is given up or saved as a whole
    assert args.save_interval % args.steps_per_rollout == args.save_retain_interval % args.save_interval == 0
    assert args.generate_timeout > args.preemption_deadline
    check_kernels(args)


def test_the_papers_baselines_are_those_of_its_code(tmp_path):
    rows = [row for row in DEFINITIONS.read_text().splitlines() if "`--policy-loss" in row]
    found = {}
    for flags in re.findall("`(--policy-loss [^`]+)`", " ".join(rows)):
        args = parse("qwen3_30b_a3b/synchronous_n8", tmp_path, *flags.split())
        found[args.policy_loss] = args.loss_aggregation, args.dual_clip
    assert found == {
        "grpo": ("token-mean", 3.0),
        "gspo": ("sequence-mean-token-mean", None),
        "sapo": ("sequence-mean-token-mean", None),
        "bapo": ("token-mean", 3.0),
        "topr": ("sequence-mean-token-mean", None),
    }


@pytest.mark.parametrize("steps", [8, 16, 32, 64])
def test_a_recipe_is_called_by_its_steps(tmp_path, steps):
    args = parse(f"qwen3_30b_a3b/synchronous_n{steps}", tmp_path)
    assert args.steps_per_rollout == steps and args.rollout_batch_size == 256 * steps
    assert args.max_staleness == 0 and args.ratio_denominator == "recomputed"


def test_the_asynchronous_one(tmp_path):
    args = parse("qwen3_30b_a3b/asynchronous", tmp_path)
    assert args.sync_interval == args.steps_per_rollout == 4 and args.max_staleness == 8
    assert args.ratio_denominator == "rollout" and args.on_weight_update == "retract"
