"""What --colocate goes together with, and what it makes of SGLang's command line."""

from argparse import Namespace

import pytest

from megatron_vespo.arguments.placement import check_colocation
from megatron_vespo.rollout.server_arguments import server_arguments
from megatron_vespo.weight_sync.bucket_sender import sync_backend


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
    ("args", "message"),
    [
        (
            run(max_staleness=8),
            "--colocate: generation and training take turns on a GPU, --max-staleness 8 lets both work: "
            "leave one out",
        ),
        (run(train_from="x"), "--colocate is for trainer and engines, --train-from has one of them: "),
        (run(rollout_only=True), "--colocate is for trainer and engines, --rollout-only has one of them: "),
        (
            run(rollout_engines=5),
            "--colocate: --rollout-engines 5 of 2 GPUs lie on those of --trainer-ranks 8: at most "
            "--rollout-engines 4",
        ),
        (run("--tp-size 16"), "of 16 GPUs lie on those of --trainer-ranks 8: a smaller --sglang-tp-size"),
        (run(colocate=False, colocate_offload=False), "--no-colocate-offload is about --colocate: "),
        (run(fp8_param_gather=True), "--fp8-param-gather: --colocate moves the trainer's weights"),
        (run(nccl_ub=True), "--use-nccl-ub: --colocate moves the trainer's weights"),
        (run("--tp-size 2"), "--colocate needs --sglang-mem-fraction-static: "),
    ],
)  # fmt: skip
def test_what_does_not(args, message):
    with pytest.raises(ValueError) as refused:
        check_colocation(args)
    assert message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("saver", [False, True])
def test_the_server_is_told_that_its_memory_is_to_be_given_back(saver):
    said = server_arguments(
        [], device="cuda", routes=False, dtype="bfloat16", seed=0, longest_step_s=60.0, memory_saver=saver
    )  # fmt: skip
    assert ("--enable-memory-saver" in said) == saver


def test_nccl_wants_a_gpu_for_each():
    assert sync_backend(on_gpus=True, colocated=False) == "nccl"
    for on_gpus, colocated in ((True, True), (False, True), (False, False)):
        assert sync_backend(on_gpus, colocated) == "gloo"


def test_a_memory_saver_of_the_user_has_graphs_that_can_be_paused():
    """Its engines' environment follows the flag; with breakable graphs SGLang would refuse to start."""
    ours, theirs = (
        server_arguments(
            flags,
            device="cuda",
            routes=False,
            dtype="bfloat16",
            seed=0,
            longest_step_s=60.0,
            memory_saver=saver,
        )
        for flags, saver in (([], True), (["--enable-memory-saver"], False))
    )
    assert sorted(ours) == sorted(theirs)
