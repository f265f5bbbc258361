"""Layout words, and the differences between what two layouts computed."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from megatron_vespo.commands.check_layout.bounds import rounding_bounds
from megatron_vespo.commands.check_layout.layout import Layout
from megatron_vespo.observability.layout_report import (
    HEADINGS,
    Differences,
    LayoutMeasurement,
    Row,
    StepMeasurement,
    compare,
    markdown,
)


@pytest.mark.parametrize(
    ("text", "world_size", "dp", "flags"),
    [
        ("tp1", 1, 1, ""),
        ("dp4", 4, 4, ""),
        ("tp2", 2, 1,
         "--tensor-model-parallel-size 2 --expert-tensor-parallel-size 1 --sequence-parallel"),
        ("pp2,vpp2", 2, 1, "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"),
        ("cp2", 2, 1, "--context-parallel-size 2"),
        # experts need more ranks than attention: data parallelism makes up for it
        ("ep2", 2, 2, "--expert-model-parallel-size 2"),
        ("etp2", 2, 2, "--expert-tensor-parallel-size 2"),
        ("tp2,ep4", 4, 2, "--tensor-model-parallel-size 2 --expert-model-parallel-size 4 "
         "--expert-tensor-parallel-size 1 --sequence-parallel"),
        ("tp3,ep2", 6, 2, "--tensor-model-parallel-size 3 --expert-model-parallel-size 2 "
         "--expert-tensor-parallel-size 1 --sequence-parallel"),
        # they share attention's ranks
        ("tp2, etp2 ,pp2", 4, 1, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 "
         "--expert-tensor-parallel-size 2 --sequence-parallel"),
        ("tp2,cp2,ep4,dp2", 8, 2, "--tensor-model-parallel-size 2 --context-parallel-size 2 "
         "--expert-model-parallel-size 4 --expert-tensor-parallel-size 1 --sequence-parallel"),
    ],
)  # fmt: skip
def test_words_become_flags(text, world_size, dp, flags):
    layout = Layout.parse(text)
    assert (layout.name, layout.world_size, layout.dp) == (text, world_size, dp)
    assert layout.flags() == ["--trainer-ranks", str(world_size), *flags.split()]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "layout '': no word ''; a layout is some of tpN ppN vppN cpN epN etpN dpN, with commas"),
        ("tp2,zp2", "layout 'tp2,zp2': no word 'zp2'; a layout is some of "),
        ("tp0", "layout 'tp0': no word 'tp0'; "),
        ("tp", "layout 'tp': no word 'tp'; "),
        ("tp2 pp2", "layout 'tp2 pp2': no word 'tp2 pp2'; "),
        ("tp2,pp2,tp4", "layout 'tp2,pp2,tp4': tp is there twice"),
        ("ep4,tp2,dp1", "layout 'ep4,tp2,dp1': etp x ep = 4 does not divide tp x cp x dp = 2; "
                        "dp must be a multiple of 2"),
        ("ep3,dp4", "layout 'ep3,dp4': etp x ep = 3 does not divide tp x cp x dp = 4; "
                    "dp must be a multiple of 3"),
        ("vpp2", "layout 'vpp2': virtual stages need a pipeline, pp2 or more"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(text, message):
    with pytest.raises(ValueError) as raised:
        Layout.parse(text)
    assert str(raised.value).startswith(message) and "\n" not in str(raised.value)


def measurement(**changes) -> LayoutMeasurement:
    """Two steps, two samples of 3 and 2 tokens, 2 layers, 2 experts a token."""
    step = StepMeasurement(
        log_w=np.array([0.5, -0.25], np.float32),
        loss=-2.0,
        loss_terms=4.0,
        grad_norm=10.0,
        parameter_norms={"large": 8.0, "small": 0.001, "none": 0.0},
    )
    second = dataclasses.replace(step, **changes)
    experts = [np.tile(np.array([1, 5]), (tokens, 2, 1)) for tokens in (3, 2)]
    return LayoutMeasurement([step, second], experts)


def test_the_same_is_no_difference():
    differences, _ = compare(measurement(), measurement())
    assert differences == Differences(0.0, 0.0, 0.0, 0.0, 0.0)
    assert differences.above(differences) == []


@pytest.mark.parametrize(
    ("changes", "name", "expected"),
    [
        ({"log_w": np.array([0.5, -0.5], np.float32)}, "log_w", 0.25),
        ({"loss": -2.5}, "loss", 0.125),
        ({"loss": 2.0}, "loss", 1.0),
        ({"grad_norm": 9.0}, "grad_norm", 0.1),
        ({"parameter_norms": {"large": 6.0, "small": 0.001, "none": 0.0}}, "parameter_norm", 0.25),
        # a norm of a 10,000th of the whole counts as a 1000th of it
        ({"parameter_norms": {"large": 8.0, "small": 0.002, "none": 0.0}}, "parameter_norm", 0.1),
        ({"parameter_norms": {"large": 8.0, "small": 0.001, "none": 0.02}}, "parameter_norm", 2.0),
        ({"log_w": np.array([0.5, np.nan], np.float32)}, "log_w", math.nan),
        ({"loss": math.nan}, "loss", math.nan),
        ({"parameter_norms": {"large": 9.0, "small": math.nan, "none": 0.0}}, "parameter_norm", math.nan),
    ],
)  # fmt: skip
def test_one_difference_in_the_second_step_is_found(changes, name, expected):
    differences, worst = compare(measurement(), measurement(**changes))
    values = dataclasses.asdict(differences)
    assert values.pop(name) == pytest.approx(expected, nan_ok=True)
    assert set(values.values()) == {0.0}
    bounds = Differences(*[0.05] * 5)
    assert differences.above(bounds) == [name]
    if name == "parameter_norm":
        changed = changes["parameter_norms"]
        assert worst == next(
            parameter
            for parameter in ("small", "none", "large")
            if changed[parameter] != measurement().steps[0].parameter_norms[parameter]
        )


def test_bounds_are_included():
    differences = Differences(1e-5, 0.0, 0.0, 0.0, 0.1)
    assert differences.above(Differences(1e-5, 0.0, 0.0, 0.0, 0.1)) == []
    assert differences.above(Differences(0.9e-5, 0.0, 0.0, 0.0, 0.05)) == ["log_w", "experts"]


def test_other_experts_are_counted_by_token_and_layer():
    other = measurement()
    other.experts[0][2, 1] = [1, 6]
    other.experts[1][0] = [[0, 5], [2, 3]]
    assert compare(measurement(), other)[0].experts == pytest.approx(3 / 10)


def test_a_parameter_that_only_one_layout_has_is_no_user_mistake():
    with pytest.raises(AssertionError, match="large"):
        compare(measurement(), measurement(parameter_norms={"small": 0.001, "none": 0.0}))


def test_markdown_has_a_cell_for_every_heading():
    rows = [
        Row("tp1", 1, 9.6, verdict="reference"),
        Row("tp2", 2, 11.2, Differences(1e-6, 2e-7, 3e-6, 4e-6, 0.0125), "output_layer.weight", "ok"),
        Row("pp2", 2, 3.0, verdict="broke"),
    ]
    text, blank, head, rule, *body = markdown(rows, "A caption.").splitlines()
    assert (text, blank, len(body)) == ("A caption.", "", 3)
    for line in (head, rule, *body):
        assert line.count("|") == len(HEADINGS) + 1
    assert body[1] == (
        "| tp2 | 2 | 1.0e-06 | 2.0e-07 | 3.0e-06 | output_layer.weight | 4.0e-06 | 1.250% | 11 | ok |"
    )
    assert body[2] == "| pp2 | 2 |  |  |  |  |  |  | 3 | broke |"


def log_probs(num_tokens: int, size: float, num_sequences: int = 32) -> list[np.ndarray]:
    return [np.full(num_tokens, -size, np.float32)] * num_sequences


def test_bounds_grow_as_rounding_does():
    small = dataclasses.astuple(rounding_bounds(log_probs(40, 5.0), 4, bf16=False))
    longer = dataclasses.astuple(rounding_bounds(log_probs(160, 5.0), 4, bf16=False))
    assert longer == pytest.approx([2 * bound for bound in small[:4]] + [small[4]])
    deeper = dataclasses.astuple(rounding_bounds(log_probs(40, 5.0), 64, bf16=False))
    assert deeper == pytest.approx([4 * bound for bound in small])
    surer = rounding_bounds(log_probs(40, 0.0), 4, bf16=False)
    assert surer.log_w == pytest.approx(small[0] / 6)
    bf16 = dataclasses.astuple(rounding_bounds(log_probs(40, 5.0), 4, bf16=True))
    assert bf16 == pytest.approx([2**15 * bound for bound in small])
    # the longest sequence decides on log W, the number of sequences on what is over all of them
    mixed = rounding_bounds([*log_probs(1, 5.0, 31), *log_probs(40, 5.0, 1)], 4, bf16=False)
    assert (mixed.log_w, mixed.loss) == pytest.approx(small[:2])
    assert rounding_bounds(log_probs(40, 5.0, 8), 4, bf16=False).loss == pytest.approx(2 * small[1])


# what `check layout` showed of right layouts: bf16, layers, tokens, root mean square of log p, the largest
# differences of log W, loss, gradient norm and parameter norm, and share of other experts
RIGHT = {
    "random, 4 layers": (False, 4, 40, 4.9, 2.6e-6, 3.0e-7, 3.4e-7, 1.4e-6, 0.0),
    "trained, 4 layers": (False, 4, 40, 12.3, 3.4e-5, 4.2e-6, 1.1e-5, 1.1e-5, 0.0),
    "random, 8 layers": (False, 8, 430, 4.9, 6.4e-6, 2.3e-6, 2.0e-6, 2.0e-5, 0.0),
    "random, 4 layers, bf16": (True, 4, 40, 4.9, 0.12, 7.4e-3, 8.5e-3, 7.2e-2, 0.007),
    "trained, 4 layers, bf16": (True, 4, 40, 12.3, 1.7, 6.8e-2, 0.26, 0.26, 0.013),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_layouts_are_within_their_bounds_and_wrong_ones_are_not(name):
    bf16, num_layers, num_tokens, size, *measured = RIGHT[name]
    bounds = rounding_bounds(log_probs(num_tokens, size), num_layers, bf16)
    assert Differences(*measured).above(bounds) == []
    # fp32 tells what is wrong: of lines broken on purpose none is off by less than 6e-3
    assert bf16 or Differences(*[6e-3 / 20] * 5).above(bounds) == list(vars(bounds))


@pytest.mark.parametrize(("layers", "tokens", "size"), [(48, 40, 12.0), (48, 4096, 1.0), (1, 1, np.inf)])
def test_no_bound_lets_a_gradient_pass_that_is_missing(layers, tokens, size):
    bounds = rounding_bounds([np.full(tokens, -size)], layers, bf16=True)
    assert max(bounds.grad_norm, bounds.parameter_norm, bounds.loss) <= 0.5
