"""One training run of the study: the real policy on one Megatron rank, the engine in the same process."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import qwen3_moe
import running_sum
import torch
from sampler import Sampler, sample_responses
from transformers import Qwen3MoeConfig

from megatron_vespo.algorithms import advantages
from megatron_vespo.algorithms.diagnostics import effective_sample_share
from megatron_vespo.algorithms.losses.settings import LossSettings
from megatron_vespo.algorithms.vespo import MAX_LOG_W
from megatron_vespo.arguments.parse import parse_args
from megatron_vespo.driver.training_samples import training_sample
from megatron_vespo.system.ports import find_free_port
from megatron_vespo.types import Prompt, TrainingSample

if TYPE_CHECKING:
    from megatron_vespo.trainer.policy import MegatronPolicy, StepResult

HOST = "127.0.0.1"
GROUP_SIZE = 8  # completions a prompt
PROMPTS_PER_STEP = 4  # 32 completions an optimizer step
ADVANTAGES = "group-mean-std"
ROUTER_NOISE = 0.3
EVALUATION_PROMPTS = 256
EVALUATION_INTERVAL = 32  # optimizer steps; with more of them a rollout batch, after every batch
EVALUATION_SEEDS = {"tuning": 1001, "test": 1002}  # of two prompt sets that share no prompt


@dataclass(frozen=True)
class Trial:
    """Everything that decides on one run, and so its identity."""

    method: str  # a --policy-loss
    mini_batches: int  # N
    lr: float
    seed: int
    prompts: str  # what it is evaluated on: "tuning" or "test"
    num_steps: int = 256
    options: tuple[str, ...] = ()  # more flags of megatron-vespo train
    engine: str = "exact"  # or "fp8", "router-noise"; "sglang" in real_stack.py

    @property
    def key(self) -> str:
        return "|".join(map(str, asdict(self).values()))


def flags(trial: Trial, base: Path) -> list[str]:
    """The command line of `megatron-vespo train` that this run corresponds to."""
    denominator = [] if "--ratio-denominator" in trial.options else ["--ratio-denominator", "rollout"]
    return [
        "--hf-checkpoint", str(base), "--prompt-data", "none", "--output-dir", "none",
        "--policy-loss", trial.method, *denominator,
        "--steps-per-rollout", str(trial.mini_batches),
        "--rollout-batch-size", str(trial.mini_batches * PROMPTS_PER_STEP),
        "--group-size", str(GROUP_SIZE), "--advantage-estimator", ADVANTAGES,
        "--train-iters", str(trial.num_steps), "--lr", str(trial.lr), "--seed", str(trial.seed + 1),
        "--max-prompt-tokens", str(running_sum.LENGTH + 1),
        "--max-completion-tokens", str(running_sum.MAX_RESPONSE),
        "--max-tokens-per-gpu", "8192", *trial.options,
    ]  # fmt: skip


def held_out_prompts(trial: Trial) -> list[Prompt]:
    """What all runs on `trial.prompts` are evaluated on."""
    draw = np.random.default_rng(EVALUATION_SEEDS[trial.prompts])
    return running_sum.prompts(running_sum.draw_digits(draw, EVALUATION_PROMPTS))


def run(trial: Trial, base: Path) -> dict[str, Any]:
    """Start Megatron in this process, train, and return the run's record."""
    # seconds to import, and not needed to plan a study or to read one
    from megatron_vespo.trainer.initialize import initialize
    from megatron_vespo.trainer.policy import MegatronPolicy

    torch.set_num_threads(1)
    started = time.monotonic()
    args = initialize(parse_args(flags(trial, base)), 0, 0, HOST, find_free_port(HOST))
    policy = MegatronPolicy(args, LossSettings.of(args))
    loop = _Loop(trial, policy, base)
    error = None
    try:
        loop.train()
    except RuntimeError as failure:
        if "non-finite gradient" not in str(failure):
            raise
        error = str(failure)  # the end of this run, and part of the result
    return {
        **asdict(trial),
        "seconds": round(time.monotonic() - started, 1),
        "error": error,
        **{name: [float(f"{value:.4g}") for value in values] for name, values in loop.curves.items()},
    }


class _Loop:
    """Generate, reward, train, evaluate. `curves` has one entry an evaluation, and one for what led to it."""

    def __init__(self, trial: Trial, policy: MegatronPolicy, base: Path):
        self._trial, self._policy = trial, policy
        self._config = Qwen3MoeConfig.from_pretrained(base)
        self._draw = np.random.default_rng([trial.seed, 1])
        self._held_out = held_out_prompts(trial)
        self._since_evaluation: list[dict[str, float]] = []
        self.curves: dict[str, list[float]] = defaultdict(list)

    def train(self) -> None:
        self._evaluate()
        while self._policy.iteration < self._trial.num_steps:
            self._train_on(self._generate())
            if self._policy.iteration % EVALUATION_INTERVAL == 0:
                self._evaluate()

    def _sampler(self) -> Sampler:
        weights = {name: tensor.detach().clone() for name, tensor in self._policy.named_hf_weights()}
        return Sampler(qwen3_moe.stack_experts(weights, self._config), self._config, self._policy.iteration)

    def _engine(self) -> Sampler:
        exact = self._sampler()
        if self._trial.engine == "fp8":
            return exact.with_fp8_weights()
        if self._trial.engine == "router-noise":
            return replace(exact, router_noise=ROUTER_NOISE)
        return exact

    def _generate(self) -> list[TrainingSample]:
        num_prompts = self._trial.mini_batches * PROMPTS_PER_STEP
        prompts = running_sum.prompts(running_sum.draw_digits(self._draw, num_prompts))
        seed = int(self._draw.integers(2**31))
        torch.manual_seed(seed)  # of the routers' noise
        repeated = [prompt for prompt in prompts for _ in range(GROUP_SIZE)]
        completions = sample_responses(self._engine(), repeated, seed)
        rewards = np.array([completion.reward for completion in completions]).reshape(-1, GROUP_SIZE)
        estimated = advantages.advantages(rewards, ADVANTAGES).flatten()
        return [
            training_sample(completion, float(advantage), i // GROUP_SIZE, "R3")
            for i, (completion, advantage) in enumerate(zip(completions, estimated, strict=True))
        ]

    def _train_on(self, samples: list[TrainingSample]) -> None:
        size = PROMPTS_PER_STEP * GROUP_SIZE
        mini_batches = [samples[i : i + size] for i in range(0, len(samples), size)]
        prepared = [self._policy.pack(mini_batch) for mini_batch in mini_batches]
        if self._policy.settings.ratio_denominator != "rollout":
            for pack in prepared:
                self._policy.compute_old_log_probs(pack)
        for pack, mini_batch in zip(prepared, mini_batches, strict=True):
            self._since_evaluation.append(_numbers(self._policy.train_step(pack), mini_batch))

    def _evaluate(self) -> None:
        """Always with exact weights: what was learnt is judged, not the engine."""
        completions = sample_responses(self._sampler(), self._held_out, seed=1)
        self.curves["steps"].append(self._policy.iteration)
        self.curves["accuracy"].append(float(np.mean([completion.reward for completion in completions])))
        seen, self._since_evaluation = self._since_evaluation, []
        for name in seen[0] if seen else ():
            self.curves[name].append(float(np.mean([numbers[name] for numbers in seen])))
        if seen:
            self.curves["stalest_ess"].append(seen[-1]["ess"])
            self.curves["stalest_weight"].append(seen[-1]["weight"])
            self.curves["largest_grad_norm"].append(max(numbers["grad_norm"] for numbers in seen))


def _numbers(step: StepResult, samples: list[TrainingSample]) -> dict[str, float]:
    """Of one optimizer step. `ess` is that of W itself, whatever the loss makes of it."""
    taught = np.array([sample.advantage != 0 for sample in samples])
    return {
        "reward": float(np.mean([sample.reward for sample in samples])),
        "entropy": step.entropy,
        "grad_norm": step.grad_norm,
        "log_w_std": float(step.log_w.std()),
        "weight": float(step.weight[taught].mean()) if taught.any() else 1.0,
        "ess": effective_sample_share(np.exp(np.minimum(step.log_w, MAX_LOG_W))),
        "weight_ess": effective_sample_share(step.weight),
    }
