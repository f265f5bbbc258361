"""Every policy loss and aggregation is the same at every layout."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from tests.support import named_layouts

LAYOUTS = {
    "small packs": (1, "--max-tokens-per-gpu 64"),
    "cp2": (2, "--context-parallel-size 2"),
    "dp2 ep2, small packs": (2, "--expert-model-parallel-size 2 --max-tokens-per-gpu 100"),
    "tp2 pp2": (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 "
                   "--expert-tensor-parallel-size 1"),
}  # fmt: skip

# of tokens, samples or the whole step: neither losses nor gradient norms
VALUES = {"log_w", *(f"supports {name}" for name in ("log_probs", "entropy", "log_w", "unchanged log_w"))}

OTHERS = {
    name: layout for name, layout in named_layouts.LAYOUTS.items() if name not in {"one rank", *LAYOUTS}
}


@pytest.fixture(scope="module")
def run(on_task):
    return lambda num_ranks, flags: on_task("losses.py", num_ranks, *flags.split())


@pytest.fixture(scope="module")
def result_of(run):
    """Every rank's results at a layout, run once."""
    return cache(lambda layout: run(*(OTHERS | LAYOUTS).get(layout, (1, ""))))


@pytest.fixture(scope="module")
def one_rank(result_of):
    return result_of("one rank")[0]


@pytest.mark.parametrize(
    "layout", ["one rank", *LAYOUTS, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)
def test_losses_are_the_naive_reference(task, naive_steps, result_of, layout):
    """Of transformers, token by token; a third of the samples has given tokens."""
    assert any(sample.num_trained < sample.completion_length for sample in task.samples)
    worst = np.zeros(2)
    assert len(naive_steps) == 18 + 15 + 4 + 3
    for result in result_of(layout):
        assert sum(case.endswith("A per token") for case in result) in {4, 15}
        np.testing.assert_allclose(result["log_w"], naive_steps["log_w"], rtol=0, atol=1e-5)
        for case in set(result) & set(naive_steps) - VALUES:
            found, (loss, grad_norm, terms) = result[case], naive_steps[case]
            errors = [abs(found[0] - loss) / terms, abs(found[1] / grad_norm - 1)]
            assert max(errors) <= 1e-5, f"{case}: loss {errors[0]:.1e}, grad_norm {errors[1]:.1e}"
            worst = np.maximum(worst, errors)
    print(f"{layout}: loss {worst[0]:.1e} of its terms, grad_norm {worst[1]:.1e}")


@pytest.mark.parametrize(
    "layout", ["one rank", *LAYOUTS, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)
def test_supports_are_the_naive_reference(naive_steps, result_of, layout):
    """Log-probs and entropies are of what truncated sampling left; log W of unchanged weights is 0."""
    expected = naive_steps["supports log_probs"]
    certain = np.abs(expected) < 1e-12
    assert 0.1 < certain.mean() < 0.5, "some tokens are alone in their supports"
    worst = 0.0
    for result in result_of(layout):
        np.testing.assert_array_equal(result["supports log_probs"][certain], 0.0)
        np.testing.assert_allclose(result["supports log_probs"], expected, rtol=0, atol=1e-5)
        np.testing.assert_allclose(result["supports log_w"], naive_steps["log_w"], rtol=0, atol=1e-5)
        np.testing.assert_allclose(result["supports entropy"], naive_steps["supports entropy"], rtol=1e-6)
        np.testing.assert_array_equal(result["supports unchanged log_w"], 0.0)
        worst = max(worst, np.abs(result["supports log_probs"] - expected).max())
    print(f"{layout}: log-probs {worst:.1e}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_do_not_depend_on_the_layout(one_rank, result_of, layout):
    worst = np.zeros(3)
    for result in result_of(layout):
        missing = {case.split()[0] for case in set(one_rank) - set(result)}
        assert len(missing) in {0, 15 - 4} and all(
            "A per token" in case for case in set(one_rank) - set(result)
        )
        for case in set(one_rank) & set(result):
            values = one_rank[case]
            if case in VALUES:
                np.testing.assert_allclose(result[case], values, rtol=0, atol=1e-5)
                continue
            if case.endswith("weight"):
                np.testing.assert_allclose(result[case], values, rtol=2e-5, atol=1e-6, err_msg=case)
                continue
            if case.endswith("chosen"):
                np.testing.assert_array_equal(result[case], values, err_msg=case)
                continue
            loss, grad_norm, terms = np.abs(result[case] - values) / np.abs(values[[2, 1, 2]])
            assert loss <= 1e-6 and terms <= 1e-6, f"{case}: loss {loss:.1e}"
            assert grad_norm <= 1e-5, f"{case}: grad_norm {grad_norm:.1e}"
            worst = np.maximum(worst, [loss, grad_norm, terms])
    print(f"{layout}: loss {worst[0]:.1e} of its terms, grad_norm {worst[1]:.1e}")


def test_what_losses_have_chosen_is_known(one_rank):
    """The program's targets raise c_high once, and make M2PO and DPPO mask a part of the tokens."""
    chosen = {case.split()[0]: values for case, values in one_rank.items() if case.endswith("chosen")}
    np.testing.assert_allclose(chosen.pop("bapo")[1:], [0.6, 1.25])
    assert 0.0 < chosen["m2po"][0] < 0.5 and 0.0 < chosen["grpo"][0] < 0.5
    assert 0.0 < chosen["dppo-tv"][0] < 0.5 and 0.0 < chosen["dppo-kl"][0] < 0.5
    assert chosen["reinforce"][0] == 0.0
    assert not any(values[1:].any() for values in chosen.values())


def test_token_advantages_of_zero_are_bit_identical_to_none(one_rank, result_of):
    for layout in ("one rank", "cp2"):
        for result in result_of(layout):
            zeros = [case for case in result if case.endswith("A per token of 0")]
            assert len(zeros) == 4
            for case in zeros:
                name = case.split()[0]
                aggregation = "sequence-mean-token-mean" if name == "gspo" else "token-mean"
                np.testing.assert_array_equal(result[case], result[f"{name} {aggregation}"], err_msg=case)


def test_the_losses_differ(one_rank):
    """Else one would have been run under many names."""
    norms = {
        case: values[1]
        for case, values in one_rank.items()
        if not case.endswith(("weight", "chosen", "of 0")) and case not in VALUES
    }
    ordered = sorted(norms.values())
    assert len(norms) == 18 + 15 + 2 and min(np.diff(ordered)) > 1e-6 * ordered[-1]
