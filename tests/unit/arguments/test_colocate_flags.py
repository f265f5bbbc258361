"""What --colocate goes together with, and what it makes of SGLang's command line."""

from argparse import Namespace

import pytest

from megatron_vespo.arguments.placement import check_colocation
from megatron_vespo.rollout.server_arguments import server_arguments
from megatron_vespo.weight_sync.bucket_sender import sync_backend
from tests.support.refusals import check_refusal


def run(sglang: str = "--tp-size 2 --mem-fraction-static 0.5", **changes) -> Namespace:
    plain = {
        "colocate": True, "max_staleness": 0, "train_from": None, "rollout_only": False, "trainer_ranks": 8,
        "rollout_engines": 4, "distributed_backend": "nccl", "colocate_offload": True,
        "fp8_param_gather": False, "nccl_ub": False,
    }  # fmt: skip
    return Namespace(**(plain | changes), sglang_flags=sglang.split())


def test_what_goes_together():
    check_colocation(run())
    check_colocation(run(rollout_engines=3))
    check_colocation(run("", rollout_engines=8, distributed_backend="gloo"))
    check_colocation(run("", colocate=False, max_staleness=8, rollout_engines=99))
    check_colocation(run(colocate_offload=False, nccl_ub=True))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (run(max_staleness=8), ("--colocate", "--max-staleness 8", "leave one out")),
        (run(train_from="x"), ("--colocate", "--train-from has one of them")),
        (run(rollout_only=True), ("--colocate", "--rollout-only has one of them")),
        (run(rollout_engines=5),
         ("--colocate", "--rollout-engines 5 of 2", "--trainer-ranks 8", "at most --rollout-engines 4")),
        (run("--tp-size 16"), ("of 16 GPUs", "--trainer-ranks 8", "a smaller --sglang-tp-size")),
        (run(colocate=False, colocate_offload=False), ("--no-colocate-offload", "--colocate")),
        (run(fp8_param_gather=True), ("--fp8-param-gather", "--colocate")),
        (run(nccl_ub=True), ("--use-nccl-ub", "--colocate")),
        (run("--tp-size 2"), ("--colocate", "--sglang-mem-fraction-static")),
    ],
)  # fmt: skip
def test_what_does_not(args, words):
    with pytest.raises(ValueError) as refused:
        check_colocation(args)
    check_refusal(str(refused.value), *words)


def served(*flags: str, saver: bool) -> list[str]:
    options = {"device": "cuda", "routes": False, "dtype": "bfloat16", "seed": 0, "longest_step_s": 60.0}
    return server_arguments(flags, **options, memory_saver=saver)


@pytest.mark.parametrize("saver", [False, True])
def test_the_server_is_told_that_its_memory_is_to_be_given_back(saver):
    assert ("--enable-memory-saver" in served(saver=saver)) == saver


def test_nccl_wants_a_gpu_for_each():
    assert sync_backend(on_gpus=True, colocated=False) == "nccl"
    for on_gpus, colocated in ((True, True), (False, True), (False, False)):
        assert sync_backend(on_gpus, colocated) == "gloo"


def test_a_memory_saver_of_the_user_has_graphs_that_can_be_paused():
    """Its engines' environment follows the flag; with breakable graphs SGLang would refuse to start."""
    assert sorted(served(saver=True)) == sorted(served("--enable-memory-saver", saver=False))
