"""On-policy distillation: an advantage for each token from a teacher's log-probs.

With y_t the sampled token, mu the policy that sampled it and T the teacher:

    A_t = coefficient * (log T(y_t) - log mu(y_t))

Its mean over the sampled tokens is -coefficient * KL(mu || T) per token, the reverse KL. Source: K. Lu and
Thinking Machines Lab, "On-Policy Distillation", 2025 (thinkingmachines.ai/blog/on-policy-distillation): the
negative reverse KL of each token is its advantage, with a discount of 0. A bound on the term of a token is
REOPOLD's (arXiv 2603.11137), which clips rewards of teachers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# A token that both sample with at least this probability: nothing is left to learn or to draw there.
NEAR_DETERMINISTIC = 0.99


def token_advantages(
    teacher: np.ndarray, behavior: np.ndarray, coefficient: float, clip: float | None = None
) -> np.ndarray:
    """Return the tokens' advantages, float32 [N], from log-probs float32 [N] of teacher and sampler.

    With `clip`, a term is at most that many nats before the coefficient. ValueError unless all are finite.
    """
    terms = teacher.astype(np.float64) - behavior.astype(np.float64)
    if not np.isfinite(terms).all():
        bad = int(np.flatnonzero(~np.isfinite(terms))[0])
        raise ValueError(f"token {bad} has log-probs {teacher[bad]} of the teacher, {behavior[bad]} of mu")
    if clip is not None:
        terms = np.clip(terms, -clip, clip)
    return (coefficient * terms).astype(np.float32)


def distillation_metrics(teacher: Sequence[np.ndarray], behavior: Sequence[np.ndarray]) -> dict[str, float]:
    """Metrics of M responses: log-probs float32 [N] of teacher and sampler for each.

    Means and shares are over all tokens. `distillation/reverse_kl` is the mean of log mu - log T, without a
    clip, in nats.
    """
    of_teacher, of_sampler = (np.concatenate([np.empty(0), *values]) for values in (teacher, behavior))
    terms, certain = of_teacher - of_sampler, np.log(NEAR_DETERMINISTIC)
    return {
        "distillation/reverse_kl": float(-terms.mean()),
        "distillation/log_ratio_abs_max": float(np.abs(terms).max()),
        "distillation/near_deterministic_share": float(
            ((of_teacher >= certain) & (of_sampler >= certain)).mean()
        ),
    }
