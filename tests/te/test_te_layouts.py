"""Transformer Engine's layers against Megatron's local ones: the same policy, at every layout."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests.support.launch import Result

PROGRAM = Path(__file__).parent / "programs" / "compare.py"
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
SELECTIVE = "--recompute-granularity selective --recompute-modules core_attn layernorm moe_act"
# layout, perhaps another model, and what Transformer Engine's run does so that no number changes
CASES = {
    "tp1": "",
    "tp2": "",
    "pp2": "",
    "pp2,vpp2": "",
    "ep2": "",
    "etp2": "",
    "dp2": "--overlap-grad-reduce --overlap-param-gather",
    "tp2,ep2": FULL + " --moe-permute-fusion",
    "pp2,ep2": SELECTIVE,
    "tp2,pp2,ep2": "--moe-permute-fusion",
    "tp2,etp2,ep2": "",
    "pp2,vpp2,ep2": FULL,
    "tp2 qwen3": "",
    # the embedding is the output layer: on one rank the same weight, on a pipeline a copy at each end
    "tp1 llama, tied": "",
    "pp2,vpp2 llama, tied": "",
}
LOG_PROBS, GRADIENTS = 1e-6, 1e-6
AFTER_A_STEP = 1e-5  # Adam divides by the gradient's own size, and small gradients differ more


@dataclass(frozen=True)
class Pair:
    """What every rank handed back with the local spec and with Transformer Engine."""

    local: list[Result]
    te: list[Result]

    @functools.cached_property
    def ranks(self) -> list[tuple[Result, Result]]:
        return list(zip(self.local, self.te, strict=True))


@pytest.fixture(scope="module")
def pair(on_task):
    @functools.cache
    def start(case: str) -> Pair:
        layout, _, kind = case.partition(" ")
        kind = kind or "qwen3 moe"
        local = on_task(False, PROGRAM, layout, kind=kind)
        return Pair(local, on_task(True, PROGRAM, layout, *CASES[case].split(), kind=kind))

    return start


def local_name(name: str) -> str:
    """What the local spec calls one of Transformer Engine's parameters."""
    name = name.replace("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight")
    name = name.replace("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")
    return re.sub(r"experts\.(linear_fc\d)\.weight(\d+)", r"experts.local_experts.\2.\1.weight", name)


@pytest.mark.parametrize("layout", CASES)
def test_the_policy_is_the_same(pair, layout):
    for local, te in pair(layout).ranks:
        worst = np.abs(te["log_probs"] - local["log_probs"]).max()
        after = np.abs(te["log_probs_after"] - local["log_probs_after"]).max()
        print(f"{layout}: log-probs {worst:.1e}, after two steps {after:.1e}")
        assert worst <= LOG_PROBS
        assert after <= AFTER_A_STEP
        assert not np.array_equal(te["log_probs"], te["log_probs_after"])


@pytest.mark.parametrize("layout", CASES)
def test_loss_and_gradient_of_every_parameter(pair, layout):
    for local, te in pair(layout).ranks:
        expected = dict(zip(local["names"], local["norms"], strict=True))
        norms = {local_name(name): norm for name, norm in zip(te["names"], te["norms"], strict=True)}
        assert norms.keys() == expected.keys()
        worst = max(norms, key=lambda name: abs(norms[name] - expected[name]) / (expected[name] or 1.0))
        print(f"{layout}: {worst} {norms[worst] / (expected[worst] or 1.0) - 1:.1e}")
        assert norms[worst] == pytest.approx(expected[worst], rel=GRADIENTS)
        assert te["loss"][0] == pytest.approx(local["loss"][0], rel=GRADIENTS)
        np.testing.assert_allclose(te["grad_norm"][0], local["grad_norm"][0], rtol=GRADIENTS)
        np.testing.assert_allclose(te["grad_norm"][1], local["grad_norm"][1], rtol=AFTER_A_STEP)


@pytest.mark.parametrize("layout", CASES)
def test_the_export_is_bit_for_bit_the_same(pair, layout):
    for local, te in pair(layout).ranks:
        exported = [dict(zip(one["exported"], one["digests"], strict=True)) for one in (local, te)]
        assert len(exported[0]) > 0
        assert exported[1] == exported[0]


@pytest.mark.parametrize("layout", CASES)
def test_te_adds_its_weight_gradients_itself_and_nothing_else_does(pair, layout):
    """Gradient accumulation fusion, of which Megatron's output layer has none: no kernel of Apex is here."""
    matrices = re.compile(r"linear_(qkv|proj|fc1|fc2)\.weight\d*$")
    for local, te in pair(layout).ranks:
        assert not local["fused"].any() and not te["output_layer_fused"].any()
        fused = set(te["parameters"][te["fused"]])
        assert fused == {name for name in te["parameters"] if matrices.search(name)}


def test_the_output_layer_is_not_fused_where_apex_is_there(pair, on_task):
    """Its kernel would be called in a backward pass that the log-probs' own replaces."""
    [expected] = pair("tp1").te
    [actual] = on_task(True, PROGRAM.with_name("with_apex.py"), "tp1")
    assert list(actual["output_layer_fused"]) == [False]
    for name in ("fused", "names", "norms", "grad_norm", "log_probs_after"):
        np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)


def test_without_the_fusion_torch_adds_the_gradients(pair, on_task):
    [expected] = pair("tp1").te
    [actual] = on_task(True, PROGRAM, "tp1", "--no-gradient-accumulation-fusion")
    assert not actual["fused"].any()
    np.testing.assert_allclose(actual["norms"], expected["norms"], rtol=GRADIENTS)
