"""--rollout-quantization fp8 with flags and models that do not go with it: one line each."""

from __future__ import annotations

import json
from argparse import Namespace

import pytest

from megatron_vespo.arguments.quantization import check_quantization
from megatron_vespo.models.family import family_of, shape_of
from megatron_vespo.rollout.fp8_engines import fp8_arguments
from megatron_vespo.rollout.server_arguments import known_flags, other_layout, server_arguments
from tests.support.tiny_checkpoints import MOE, tiny_config

# as Qwen3-30B-A3B: 768 columns of an expert, 4 key heads
WIDTHS = {
    "hidden_size": 256, "moe_intermediate_size": 768, "num_attention_heads": 32, "num_key_value_heads": 4,
    "head_dim": 128, "num_experts": 8,
}  # fmt: skip
NOTHING = "--load-format dummy --json-model-override-args"


def check(sglang: str = "", quantization: str | None = "fp8", widths: dict = WIDTHS, **flags) -> None:
    others = {"rollout_only": False, "train_from": None, "weight_sync_staging": False}
    args = Namespace(rollout_quantization=quantization, sglang_flags=sglang.split(), **others | flags)
    check_quantization(args, tiny_config(MOE, **widths))


@pytest.mark.parametrize(
    "sglang",
    [
        "", "--tp-size 2", "--tp-size 8 --ep-size 8", "--tp-size 2 --ep-size 2", "--dtype float16",
        "--kv-cache-dtype fp8_e4m3",
    ],
)  # fmt: skip
def test_what_goes_together(sglang):
    check(sglang)


@pytest.mark.parametrize(
    ("case", "line"),
    [
        ({"sglang": "--quantization fp8"}, "--sglang-quantization: --rollout-quantization fp8 decides how"),
        ({"sglang": "--load-format auto"}, "--sglang-load-format: --rollout-quantization fp8 decides how"),
        ({"sglang": "--json-model-override-args {}"}, "--sglang-json-model-override-args: --rollout-quan"),
        ({"sglang": "--dtype float32"}, "--rollout-quantization fp8: SGLang's FP8 layers compute in 16 bits"),
        ({"rollout_only": True}, "--rollout-only has no weight sync, which --rollout-quantization fp8 needs"),
        ({"train_from": "batches"}, "--train-from has no weight sync, which"),
        ({"weight_sync_staging": True}, "--rollout-quantization fp8: weights are broadcast when engines pa"),
        (
            {"sglang": "--tp-size 4"},
            "--rollout-quantization fp8: an engine rank has 192 x 256 of "
            "model.layers.0.mlp.experts.0.gate_proj.weight, no multiple of 128 x 128; "
            "engines have TP 4 and EP 1",
        ),
        (
            {"widths": WIDTHS | {"hidden_size": 160}},
            "an engine rank has 160 x 4096 of model.layers.0.self_attn.o_proj.weight, no multiple of 128",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_what_does_not(case, line):
    with pytest.raises(ValueError) as error:
        check(**case)
    assert line in str(error.value) and "\n" not in str(error.value)


def test_without_it_nothing_is_checked():
    check("--quantization fp8 --tp-size 4", quantization=None, rollout_only=True)


def test_engines_build_the_layers_of_a_block_fp8_checkpoint_and_load_nothing():
    config = tiny_config(MOE, **WIDTHS)
    names = family_of(config).hf_tensors(shape_of(config))
    flags = fp8_arguments(names)
    assert " ".join(flags[:3]) == NOTHING
    assert {flag for flag in flags if flag.startswith("--")} <= known_flags().keys()
    quantisation = json.loads(flags[3])["quantization_config"]
    assert quantisation["weight_block_size"] == [128, 128]
    assert "lm_head" in quantisation["modules_to_not_convert"]
    command = server_arguments(
        [], device="cuda", routes=False, dtype="bfloat16", seed=1, longest_step_s=1.0, loading=flags
    )
    assert command[command.index("--json-model-override-args") + 1] == flags[3]


def test_no_plan_holds_for_them():
    assert other_layout([], "fp8") == "--rollout-quantization fp8 quantises whole tensors"
    assert other_layout([], None) is None
