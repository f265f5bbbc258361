"""Compares the flags of a resumed run with those that its checkpoint was saved with.

The command's flags apply; a few cannot change. Pure: called before anything starts, and by every rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FRESH_OPTIMIZER = "--no-load-optim takes the weights alone and starts the optimizer afresh"
# people want to know of these, as they change how the run goes on
_SAID = (
    "lr", "min_lr", "lr_decay_style", "lr_warmup_iters", "lr_warmup_fraction", "lr_warmup_init",
    "weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "clip_grad",
    "steps_per_rollout", "rollout_batch_size", "group_size", "seed", "advantage_estimator", "policy_loss",
    "loss_aggregation", "clip_range", "dual_clip", "sapo_tau", "loss_target", "vespo_positive",
    "vespo_negative", "vespo_budget", "ratio_denominator", "old_policy", "mismatch_truncation",
    "mismatch_correction", "mismatch_bounds", "routing_replay", "pair_length_gap",
    "kl_coef", "kl_loss_coef", "kl_loss_type", "unbiased_kl", "reference_checkpoint",
    "reference_update_interval",
    "rollout_temperature", "rollout_top_p", "rollout_top_k", "rollout_min_p", "rollout_quantization",
    "teacher_checkpoint", "teacher_url", "distillation_coefficient", "distillation_clip",
    "reward_coefficient",
)  # fmt: skip
# as version 0.1 stored them
_OLD_NAMES = {"mini_batches": "steps_per_rollout", "num_completions": "group_size"}
# --use-checkpoint-opt-param-scheduler takes these from the checkpoint
_SCHEDULED = ("lr", "min_lr", "lr_decay_style", "weight_decay")


def check_resumable(folder: Path, saved: Mapping[str, Any], flags: Mapping[str, Any]) -> None:
    """ValueError where a run with `flags` cannot continue from `folder`, whose arguments are `saved`."""
    if "rollout_state" not in saved:
        raise ValueError(f"--load {folder} was not written by this program: it has no rollout state")
    if flags["no_load_optim"]:
        return
    if _separate_experts(saved) != _separate_experts(flags):
        before, now = (of["expert_model_parallel_size"] for of in (saved, flags))
        raise ValueError(
            f"--load {folder} was saved with --expert-model-parallel-size {before}, now it is {now}: "
            f"Megatron's optimizer state only fits if both or none are above 1; {FRESH_OPTIMIZER}"
        )
    if saved["optimizer"] != flags["optimizer"]:
        raise ValueError(
            f"--load {folder} was saved with --optimizer {saved['optimizer']}, now it is "
            f"{flags['optimizer']}, "
            f"whose state is another; {FRESH_OPTIMIZER}"
        )
    # these multiply a group's own learning rates, by which Megatron files its state
    of_groups = [f"--{name.replace('_', '-')}" for name in ("decoupled_lr", "use_mup") if flags[name]]
    for name in ("lr", "min_lr"):
        if of_groups and saved[name] != flags[name]:
            raise ValueError(
                f"--load {folder} was saved with --{name.replace('_', '-')} {saved[name]:g}, now "
                f"it is {flags[name]:g}: with {of_groups[0]} it cannot change; {FRESH_OPTIMIZER}"
            )


def _separate_experts(flags: Mapping[str, Any]) -> bool:
    """Whether the experts have an optimizer of their own in Megatron, which changes the structure saved."""
    tensor = flags["tensor_model_parallel_size"]
    expert_tensor = flags["expert_tensor_parallel_size"] or tensor
    apart = flags["expert_model_parallel_size"] > 1 or expert_tensor != tensor
    return apart and flags["num_experts"] is not None


def stored_schedule(saved: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, float]:
    """With --use-checkpoint-opt-param-scheduler the checkpoint decides on these arguments."""
    if not flags["use_checkpoint_opt_param_scheduler"] or flags["no_load_optim"]:
        return {}
    return {name: saved[name] for name in ("lr", "min_lr")}


def changes(saved: Mapping[str, Any], flags: Mapping[str, Any]) -> list[str]:
    """What people should know, like "--lr 1e-06 (the checkpoint had 2e-06)"."""
    saved = {_OLD_NAMES.get(name, name): value for name, value in saved.items()}
    scheduled = _SCHEDULED if flags["use_checkpoint_opt_param_scheduler"] else ()
    return [
        f"--{name.replace('_', '-')} {_plain(flags[name])} (the checkpoint had {_plain(saved[name])})"
        for name in _SAID
        if name in saved and name not in scheduled and saved[name] != flags[name]
    ]


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def take_flags(state: Mapping[str, Any], flags: Mapping[str, Any]) -> None:
    """Put `flags` into `state`, a checkpoint as Megatron loaded it.

    Megatron looks a parameter group up by its learning rates, and leaves Adam's betas and epsilon as they
    were saved. The scheduler sets all else of a group.
    """
    if "args" not in state:
        return
    saved = state["args"]
    for group in _parameter_groups({name: part for name, part in state.items() if name != "args"}):
        for name, flag in (("max_lr", "lr"), ("min_lr", "min_lr"), ("eps", "adam_eps")):
            if name in group and group[name] == getattr(saved, flag):
                group[name] = flags[flag]
        if group.get("betas") == (saved.adam_beta1, saved.adam_beta2):
            group["betas"] = flags["adam_beta1"], flags["adam_beta2"]


def _parameter_groups(part: Any) -> Iterator[dict]:
    if isinstance(part, Mapping):
        yield from part.get("param_groups", ())
        for inner in part.values():
            yield from _parameter_groups(inner)
    elif isinstance(part, list):
        for inner in part:
            yield from _parameter_groups(inner)
