"""What MegatronPolicy says to samples it must refuse, as every rank is told: {case: message}."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from common import hand_back, start_program

from megatron_vespo.types import Segments, TrainingSample


def message(call, *arguments) -> str:
    try:
        call(*arguments)
    except ValueError as error:
        return str(error)
    return "accepted"


def broken_samples(sample: TrainingSample, vocab_size: int) -> dict[str, TrainingSample]:
    def with_log_prob(value: float) -> TrainingSample:
        log_probs = sample.behavior_log_probs.copy()
        log_probs[1:3] = value
        return replace(sample, behavior_log_probs=log_probs)

    return {
        "nan log-prob": with_log_prob(np.nan),
        "infinite log-prob": with_log_prob(-np.inf),
        "missing log-prob": replace(sample, behavior_log_probs=sample.behavior_log_probs[:-1]),
        "nan advantage": replace(sample, advantage=float("nan")),
        "temperature 0": replace(sample, temperature=0.0),
        "no prompt": replace(sample, prompt_length=0),
        "no completion": replace(sample, prompt_length=sample.num_tokens),
        "short segments": replace(sample, segments=Segments.single("policy", sample.completion_length - 1)),
        "nothing sampled": replace(sample, segments=Segments.single("tool", sample.completion_length)),
        "unknown token": replace(sample, token_ids=np.append(sample.token_ids[:-1], vocab_size)),
    }


def main() -> None:
    _, policy, samples = start_program()
    results = {"good samples": message(policy.pack, samples)}
    for case, broken in broken_samples(samples[5], policy.args.vocab_size).items():
        changed = [*samples[:5], broken, *samples[6:]]
        results[case] = message(policy.pack, changed)
        results[f"{case}, ratio"] = message(policy.sequence_log_ratio, changed, "rollout")
    two = [replace(s, advantage=float("nan")) if i in (3, 5) else s for i, s in enumerate(samples)]
    results["the first of two"] = message(policy.pack, two)
    hand_back(**results)


if __name__ == "__main__":
    main()
