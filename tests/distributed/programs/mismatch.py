"""Loss and gradient norm with every correction of the engine mismatch on one layout; the weights never move.

pi_old comes from the samples, so that no bound is crossed by rounding at one layout only; in the cases named
"computed" it is the policy's own.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from common import hand_back, start_policy

from tests.support.random_task import token_noise

TOKEN_NOISE = 0.1  # of pi_old against mu
# tight enough that a part is rejected and a part is kept at that noise
BOUNDS = {
    "tis": (0.0, 1.1),
    "sequence-tis": (0.0, 1.1),
    "icepop": (0.9, 1.1),
    "token-mask": (0.9, 1.1),
    "reject-product": (0.0, 1.1),
    "reject-geometric": (0.98, 1.02),
    "reject-k3": (0.0, 0.005),
    # the model knows nothing: probabilities are small, and so are divergences of one token against all others
    "kpop": (0.0, 5e-5),
    "reject-binary-kl": (0.0, 5e-5),
    "opsm": (0.0, 0.01),
}
CASES = [("recomputed", "vespo"), ("recomputed", "grpo"), ("decoupled", "vespo"), ("rollout", "vespo")]


def main() -> None:
    policy, samples = start_policy("--lr", "0")
    from megatron_vespo.algorithms.corrections import CORRECTIONS, why_forbidden
    from megatron_vespo.algorithms.losses.table import METHODS

    draw = np.random.default_rng(3)
    results = {"log_probs": np.concatenate(policy.log_probs(samples))}

    def step(case: str, mini_batch) -> None:
        done = policy.train_step(mini_batch)
        results[case] = np.array([done.loss, done.grad_norm, done.loss_terms])
        for name in ("weight", "correction", "rejected"):
            results[f"{case} {name}"] = getattr(done, name)

    def use(correction: str, denominator: str, loss: str) -> None:
        policy.use_loss(
            replace(
                policy.settings,
                policy_loss=loss,
                loss_aggregation=METHODS[loss].aggregation,
                ratio_denominator=denominator,
                mismatch_correction=correction,
                mismatch_bounds=BOUNDS.get(correction),
            )
        )

    use("tis", "recomputed", "vespo")
    mini_batch = policy.pack(samples)
    policy.compute_old_log_probs(mini_batch)
    step("tis recomputed vespo computed", mini_batch)

    for sample in samples:
        noise = token_noise(draw, TOKEN_NOISE, sample)
        sample.old_log_probs = (sample.behavior_log_probs + noise).astype(np.float32)
    results["old_log_probs"] = np.concatenate([sample.old_log_probs for sample in samples])
    for denominator, loss in CASES:
        for correction in CORRECTIONS:
            if why_forbidden(correction, denominator, METHODS[loss].token_ratio) is None:
                use(correction, denominator, loss)
                step(f"{correction} {denominator} {loss}", policy.pack(samples))
    hand_back(**results)


if __name__ == "__main__":
    main()
