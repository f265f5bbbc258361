"""What a script printed against what it should print."""

import pytest

from megatron_vespo.rewards.jail.tester import same
from megatron_vespo.rewards.same_output import same_output


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        ("3", "3\n"),
        ("3\n\n", "3"),
        ("\n3\n", "3"),
        ("1  2 \r\n3\n", "1 2\n3\n"),
        ("0.3333333", "0.3333333333"),
        ("1", "1.0"),
        ("1e-9", "0.0"),
        ("a 0.50000001 b", "a 0.5 b"),
        ("", ""),
    ],
)
def test_the_same(printed, expected):
    assert same_output(printed, expected)


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        ("", "3"),
        ("3", ""),
        ("3 3", "3"),
        ("3\n3", "3"),
        ("1 2", "1\n2"),
        ("1.0000001", "1"),
        ("nan", "0.5"),
        ("inf", "0.5"),
        ("0.51", "0.5"),
        ("yes", "YES"),
        ("x", "1.5"),
        ("1\n\n2", "1\n2"),
    ],
)
def test_not_the_same(printed, expected):
    assert not same_output(printed, expected)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ((1, (2, 3)), [1, [2, 3]]),
        (0.1 + 0.2, 0.3),
        (1, 1.0),
        ({1: "a"}, {"1": "a"}),
        (None, None),
        ("a", "a"),
        ([], []),
    ],
)
def test_the_same_value(value, expected):
    assert same(value, expected)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([1], [1, 2]),
        (1.1, 1),
        (float("nan"), 1.0),
        ("1", 1),
        ({1: "a", 2: "b"}, {"1": "a"}),
        ({2, 1}, [1, 2]),
        (None, []),
        ([], 0.5),
    ],
)
def test_another_value(value, expected):
    assert not same(value, expected)
