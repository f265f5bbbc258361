"""How many GPUs a trainer rank may see."""

import pytest
import torch

from megatron_vespo.cluster.visible_gpus import check_visible_gpus


@pytest.fixture
def shown(monkeypatch):
    """`shown(number)`: torch finds so many GPUs."""

    def show(number: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(number))))

    return show


def test_one_on_gpus_and_none_on_cpus(shown):
    for number in (0, 1):
        shown(number)
        check_visible_gpus(3, number)


@pytest.mark.parametrize(
    ("number", "expected", "message"),
    [
        (0, 1, "CUDA_VISIBLE_DEVICES='', must see 1: torch finds no CUDA device there"),
        (8, 1, "CUDA_VISIBLE_DEVICES='0,1,2,3,4,5,6,7', must see 1: something on that node"),
        (1, 0, "CUDA_VISIBLE_DEVICES='0', must see 0: Ray was started there without"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(shown, number, expected, message):
    shown(number)
    with pytest.raises(ValueError, match="trainer rank 3 on ") as error:
        check_visible_gpus(3, expected)
    assert f"sees {number} GPUs with {message}" in str(error.value) and "\n" not in str(error.value)
