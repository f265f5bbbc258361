"""Flags of a run against those of the checkpoint that it goes on from."""

from argparse import Namespace
from pathlib import Path

import pytest

from megatron_vespo.checkpoints.resumable import changes, check_resumable, stored_schedule, take_flags
from megatron_vespo.driver.run_state import RunState

SAVED = {
    "rollout_state": {"iteration": 8}, "optimizer": "adam", "lr": 2e-6, "min_lr": 0.0,
    "lr_decay_style": "constant", "lr_warmup_iters": 0, "weight_decay": 0.0,
    "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_eps": 1e-8,
    "clip_grad": 1.0, "steps_per_rollout": 8, "seed": 1, "policy_loss": "vespo",
    "tensor_model_parallel_size": 1, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1,
    "num_experts": 8,
}  # fmt: skip
FRESH = "--no-load-optim takes the weights alone and starts the optimizer afresh"


def flags(**others) -> dict:
    more = {"no_load_optim": False, "use_checkpoint_opt_param_scheduler": False, "decoupled_lr": None}
    return SAVED | more | {"use_mup": False, "load": "saved"} | others


def test_flags_that_differ_are_said():
    assert changes(SAVED, flags()) == []
    assert changes(SAVED, flags(lr=1e-6, steps_per_rollout=4, lr_decay_style="cosine", load="elsewhere")) == [
        "--lr 1e-06 (the checkpoint had 2e-06)",
        "--lr-decay-style cosine (the checkpoint had constant)",
        "--steps-per-rollout 4 (the checkpoint had 8)",
    ]


def test_another_loss_is_said():
    before = SAVED | {"loss_aggregation": "token-mean", "ratio_denominator": "decoupled"}
    now = flags(loss_aggregation="sequence-mean-token-mean", ratio_denominator="recomputed")
    assert changes(before, now) == [
        "--loss-aggregation sequence-mean-token-mean (the checkpoint had token-mean)",
        "--ratio-denominator recomputed (the checkpoint had decoupled)",
    ]


def test_other_sampling_and_another_teacher_are_said():
    before = SAVED | {"rollout_top_p": 1.0, "teacher_checkpoint": None, "reward_coefficient": 1.0}
    now = flags(rollout_top_p=0.9, teacher_checkpoint=["a=big", "b=code"], reward_coefficient=0.0)
    assert changes(before, now) == [
        "--rollout-top-p 0.9 (the checkpoint had 1)",
        "--teacher-checkpoint a=big b=code (the checkpoint had None)",
        "--reward-coefficient 0 (the checkpoint had 1)",
    ]


def test_the_schedule_of_the_checkpoint_on_request():
    asked = flags(lr=1e-6, min_lr=1e-7, seed=2, use_checkpoint_opt_param_scheduler=True)
    assert changes(SAVED, asked) == ["--seed 2 (the checkpoint had 1)"]
    assert stored_schedule(SAVED, asked) == {"lr": 2e-6, "min_lr": 0.0}
    assert stored_schedule(SAVED, asked | {"no_load_optim": True}) == {}
    assert stored_schedule(SAVED, flags(lr=1e-6)) == {}


@pytest.mark.parametrize(
    ("others", "reason"),
    [
        ({"expert_model_parallel_size": 1},
         "--expert-model-parallel-size 2, now it is 1: Megatron's optimizer state only fits if both or none "
         "are above 1"),
        ({"optimizer": "sgd"}, "--optimizer adam, now it is sgd, whose state is another"),
        ({"lr": 1e-6, "decoupled_lr": 1e-5},
         "--lr 2e-06, now it is 1e-06: with --decoupled-lr it cannot change"),
        ({"min_lr": 1e-7, "use_mup": True}, "--min-lr 0, now it is 1e-07: with --use-mup it cannot change"),
    ],
)  # fmt: skip
def test_what_cannot_change_is_refused(others, reason):
    folder = Path("saved/iter_0000008")
    with pytest.raises(ValueError) as refused:
        check_resumable(folder, SAVED, flags(**others))
    assert str(refused.value) == f"--load saved/iter_0000008 was saved with {reason}; {FRESH}"
    check_resumable(folder, SAVED, flags(**others, no_load_optim=True))


def test_everything_else_may_change():
    check_resumable(Path("saved"), SAVED, flags(lr=1e-6, min_lr=1e-7, adam_beta2=0.99, weight_decay=0.1))


def test_a_checkpoint_of_another_program_is_refused():
    foreign = {name: value for name, value in SAVED.items() if name != "rollout_state"}
    with pytest.raises(
        ValueError, match="^--load saved was not written by this program: it has no rollout state$"
    ):
        check_resumable(Path("saved"), foreign, flags())


def test_flags_reach_every_parameter_group():
    def group(**others) -> dict:
        return {"max_lr": 2e-6, "min_lr": 0.0, "betas": (0.9, 0.95), "eps": 1e-8, "wd_mult": 1.0} | others

    def state() -> dict:
        part = {"param_groups": [group(), group(wd_mult=0.0, max_lr=7e-6)]}  # one with a rate of its own
        return {
            "args": Namespace(**SAVED),
            "optimizer": {0: {"optimizer": part}, 1: [{"param_groups": [group()]}]},
        }

    same, changed = state(), state()
    take_flags(same, flags())
    assert same["optimizer"] == state()["optimizer"]
    take_flags(changed, flags(lr=1e-6, min_lr=1e-7, adam_beta1=0.8, adam_eps=1e-6))
    new = {"max_lr": 1e-6, "min_lr": 1e-7, "betas": (0.8, 0.95), "eps": 1e-6}
    [first, second] = changed["optimizer"][0]["optimizer"]["param_groups"]
    [third] = changed["optimizer"][1][0]["param_groups"]
    assert first == third == group(**new)
    assert second == group(**new | {"wd_mult": 0.0, "max_lr": 7e-6})


def test_what_version_0_1_has_stored_is_read_by_its_names():
    old = {name: value for name, value in SAVED.items() if name != "steps_per_rollout"} | {"mini_batches": 4}
    assert changes(old, flags()) == ["--steps-per-rollout 8 (the checkpoint had 4)"]
    state = RunState.of({"iteration": 3, "heldout_before": {"heldout/accuracy": 1.0}, "heldout_after": None})
    assert (state.eval_before, state.eval_after) == ({"eval/accuracy": 1.0}, None)
