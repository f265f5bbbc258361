"""Every policy loss's formula, one response and one token after the other, in float64.

Shape suffixes: T packed tokens, S sequences.
"""

import math

import torch

from megatron_vespo.algorithms.losses.inputs import LossInputs
from megatron_vespo.algorithms.vespo import GammaKernel

LONGEST = 16  # longest response allowed
LENGTHS, ADVANTAGES = (5, 1, 4, 3, 1, 12), (1.3, -0.7, 0.0, -1.6, 0.4, -0.2)
CAP = 20.0  # no ratio is taken for more than exp(20): no formula's, ours against overflow
TARGETS = {"bapo": 0.4, "m2po": 0.04}


# Of one response, a number a token: log-probs under pi, with gradient, and under the ratio's denominator, and
# A; one loss term a token comes out. A weight that is a number has no gradient.


def ratios(pi, old):
    logs = [p - o for p, o in zip(pi, old, strict=True)]
    return [(log - max(log.item() - CAP, 0.0)).exp() for log in logs]


def whole(pi, old) -> float:
    return math.prod(ratio.item() for ratio in ratios(pi, old))


def phi(w, a, kernel) -> float:
    c1, c2 = kernel.positive if a >= 0 else kernel.negative
    w = min(w, math.exp(CAP))
    return w**c1 * math.exp(c2 * (1.0 - w))


def score(pi, a, weights):
    return [-weight * x * p for weight, x, p in zip(weights, a, pi, strict=True)]


def ppo(rs, a, low, high, dual_clip=None):
    terms = []
    for r, x in zip(rs, a, strict=True):
        objective = min(r * x, r.clamp(1.0 - low, 1.0 + high) * x)
        if dual_clip is not None and x < 0:
            objective = max(objective, objective.new_tensor(dual_clip * x))
        terms.append(-objective)
    return terms


def gspo(pi, old, a):
    s = math.prod(ratios(pi, old)) ** (1 / len(pi))
    if len(set(a)) == 1:
        # one term a response, with gradient through s: its tokens share it, so their mean is the term
        return ppo([s], a[:1], 3e-4, 4e-4) * len(pi)
    # GSPO-token: the value of s, the gradient of the token's own ratio
    return ppo([s.item() * (p - p.item()).exp() for p in pi], a, 3e-4, 4e-4)


def sapo(pi, old, a):
    terms = []
    for r, x in zip(ratios(pi, old), a, strict=True):
        tau = 1.0 if x > 0 else 1.05
        terms.append(-x * (4.0 / tau) / (1.0 + (-tau * (r - 1.0)).exp()))
    return terms


def cispo(pi, old, a):
    # the upper bound only
    return score(pi, a, [min(r.item(), 1.28) for r in ratios(pi, old)])


def topr(pi, old, a):
    return score(pi, a, [1.0 if x > 0 else min(whole(pi, old), 1.0) for x in a])


def bernoulli_kl(p, q) -> float:
    """KL between coins that show the sampled token with probability p and q."""
    p, q = min(p, 1 - 1e-6), min(q, 1 - 1e-6)
    heads = p * (math.log(p) - math.log(q)) if p > 0 else 0.0
    return heads + (1 - p) * (math.log(1 - p) - math.log(1 - q))


def dppo(divergence, thresholds):
    low, high = thresholds

    def terms(pi, old, a, thresholds=None):
        below, above = thresholds or (low, high)
        values = []
        for p, o, x in zip(pi, old, a, strict=True):
            now, before = math.exp(p.item()), min(math.exp(min(o, 0.0)), 1.0)
            ratio = math.exp(min(p.item() - o, CAP))
            leaves = ratio > 1 if x > 0 else ratio < 1
            masked = leaves and divergence(before, now) > (above if x > 0 else below)
            values.append(-(0.0 if masked else min(ratio, 20.0)) * x * p)
        return values

    return terms


KERNEL_POWERS = {"vespo": lambda n: 1.0, "vespo-mean": lambda n: 1 / n, "vespo-sqrt": lambda n: n**-0.5}
PAPERS = {
    "grpo": lambda pi, old, a, dual_clip=None: ppo(ratios(pi, old), a, 0.2, 0.28, dual_clip),
    "dr-grpo": lambda pi, old, a, dual_clip=None: ppo(ratios(pi, old), a, 0.2, 0.2, dual_clip),
    "gspo": gspo,
    "sapo": sapo,
    "cispo": cispo,
    "dppo-tv": dppo(lambda mu, pi: abs(mu - pi), (0.15, 0.15)),
    "dppo-kl": dppo(bernoulli_kl, (0.05, 0.05)),
    "topr": topr,
    "sequence-is": lambda pi, old, a: score(pi, a, [min(whole(pi, old), math.exp(CAP))] * len(pi)),
    "reinforce": lambda pi, old, a: score(pi, a, [1.0] * len(pi)),
}


# Of all responses of the step, as they choose something by all of them.


def bapo(responses, target, dual_clip=None):
    low, high = bapo_bounds(responses, target)
    return [ppo(ratios(pi, old), a, 1.0 - low, high - 1.0, dual_clip) for pi, old, a in responses]


def bapo_bounds(responses, target) -> tuple[float, float]:
    tokens = [(r.item(), x) for pi, old, a in responses for r, x in zip(ratios(pi, old), a, strict=True)]

    def positive_share(low, high):
        positive = sum(min(r, high) * a for r, a in tokens if a > 0)
        negative = sum(max(r, low) * -a for r, a in tokens if a < 0)
        return positive / (positive + negative) if positive + negative else 1.0

    low, high = 0.6, 1.2
    while positive_share(low, high) < target and round(low + 0.02, 6) <= 0.9:
        if round(high + 0.05, 6) <= 3.0:
            high = round(high + 0.05, 6)
        else:
            low = round(low + 0.02, 6)
    return low, high


def m2po(responses, target):
    # (log r)^2 and which token it is
    places = [(i, t) for i, (pi, _, _) in enumerate(responses) for t in range(len(pi))]
    logs = {(i, t): responses[i][0][t].item() - responses[i][1][t] for i, t in places}
    left = sorted((logs[i, t] ** 2, (i, t)) for i, t in places if logs[i, t] * responses[i][2][t] > 0)
    masked = set()
    while left and sum(square for square, _ in left) / len(left) > target:
        masked.add(left.pop()[1])
    return [
        [(0.0 if (i, t) in masked else -1.0) * r * a[t] for t, r in enumerate(ratios(pi, old))]
        for i, (pi, old, a) in enumerate(responses)
    ]


WHOLE_STEP = {"bapo": bapo, "m2po": m2po}
OWN_AGGREGATION = {"dr-grpo": "constant"} | dict.fromkeys(
    ("gspo", "sapo", "topr"), "sequence-mean-token-mean"
)


def naive_pairs(rewards, lengths, gap):
    """Advantages of one prompt's responses: the closest pair left, again and again."""
    advantages, left = [0.0] * len(rewards), set(range(len(rewards)))
    while True:
        best = None
        for i in sorted(left):
            for j in sorted(left):
                apart = abs(lengths[i] - lengths[j]) / max(lengths[i], lengths[j], 1)
                # i is the better one
                if rewards[i] - rewards[j] > 1e-9 * max(1.0, *map(abs, rewards)) and apart <= gap:
                    rank = (apart, -(rewards[i] - rewards[j]), min(i, j), max(i, j))
                    best = min(best or (rank, i, j), (rank, i, j))
        if best is None:
            return advantages
        _, i, j = best
        mean = (rewards[i] + rewards[j]) / 2
        advantages[i], advantages[j] = rewards[i] - mean, rewards[j] - mean
        left -= {i, j}


def naive_kl(pi, ref, mu, kind, bound):
    """Of one response, a term a token: estimates of KL(pi || ref), whose gradient autograd takes.

    With a bound of pi / mu: k1 without the gradient of mean 0, k2 without that of the ratio, k3 as DeepSeek
    has it; beyond the bound the gradient is that of k2.
    """
    terms = []
    for p, r, m in zip(pi, ref, mu, strict=True):
        k = {"k1": p - r, "k2": (p - r) ** 2 / 2, "k3": (r - p).exp() - 1 - (r - p)}[kind]
        if bound is None:
            terms.append(k)
            continue
        ratio = (p - m).exp()
        change = p - p.item()
        if ratio.item() > bound:
            terms.append(bound * (k.item() + (p.item() - r) * change))
        elif kind == "k1":
            terms.append(ratio * k - ratio.item() * change)
        else:
            terms.append((ratio if kind == "k3" else ratio.item()) * k)
    return terms


def naive_total(terms_by_response, aggregation, longest=LONGEST):
    sums, lengths = [sum(terms) for terms in terms_by_response], [len(terms) for terms in terms_by_response]
    if aggregation == "token-mean":
        return sum(sums) / sum(lengths)
    if aggregation == "sequence-mean-token-mean":
        sums = [total / max(length, 1) for total, length in zip(sums, lengths, strict=True)]
    return sum(sums) / (len(sums) * (longest if aggregation == "constant" else 1))


def naive_terms(method, responses, kernel, target, **capped):
    if method in WHOLE_STEP:
        return WHOLE_STEP[method](responses, target or TARGETS[method], **capped)
    if method in KERNEL_POWERS:
        ws = [whole(pi, old) ** KERNEL_POWERS[method](len(pi) or 1) for pi, old, _ in responses]
        return [
            score(pi, a, [phi(w, x, kernel) for x in a]) for (pi, _, a), w in zip(responses, ws, strict=True)
        ]
    return [PAPERS[method](*response, **capped) if response[0] else [] for response in responses]


def responses_of(inputs: LossInputs, pi_T: torch.Tensor | None = None):
    """Log-probs under pi and under the ratio's denominator, and A, of every response's tokens."""
    pi_T, ids = inputs.log_probs_T.detach().double() if pi_T is None else pi_T, inputs.sequence_ids_T
    responses = []
    for s, advantage in enumerate(inputs.advantages_S.tolist()):
        mine = [t for t in range(len(pi_T)) if ids[t] == s and inputs.loss_mask_T[t] > 0]
        old = [pi_T[t].item() - inputs.log_ratio_T[t].item() for t in mine]
        own_T = inputs.token_advantages_T
        a = [advantage + (0.0 if own_T is None else own_T[t].item()) for t in mine]
        responses.append(([pi_T[t] for t in mine], old, a))
    return responses


def naive(inputs: LossInputs, method: str, aggregation: str, kernel: GammaKernel, target=None, **capped):
    """Loss, its gradient [T] float64, and what the loss would be if no terms cancelled."""
    pi_T = inputs.log_probs_T.detach().double().requires_grad_()
    terms = naive_terms(method, responses_of(inputs, pi_T), kernel, target, **capped)
    loss = naive_total(terms, aggregation)
    [gradient_T] = torch.autograd.grad(loss, pi_T)
    sizes = [[abs(term.item()) for term in of_response] for of_response in terms]
    return loss.item(), gradient_T, naive_total(sizes, aggregation)


def batch(
    lengths=LENGTHS,
    advantages=ADVANTAGES,
    seed=0,
    spread=0.4,
    log_ratio=None,
    dtype=torch.float64,
    given=(),
    token_spread=None,
):
    """Responses of these lengths behind prompts of two tokens, and padding of three, the last one's.

    Token log-ratios have standard deviation `spread`, or all are `log_ratio`. `given`: how many given tokens
    follow each sampled token of a response, in turn. `token_spread` is the standard deviation of advantages
    per token, which are NaN where nothing is trained; None: there are none.
    """
    generator = torch.Generator().manual_seed(seed)
    holes = [[0.0] * number for number in given] or [[]]
    masks = [[0.0] * 2 + [m for i in range(n) for m in [1.0, *holes[i % len(holes)]]] for n in lengths]
    mask_T = torch.tensor([m for mask in masks for m in mask] + [0.0] * 3)
    ids = [s for s, mask in enumerate(masks) for _ in mask] + [len(lengths) - 1] * 3
    log_ratio_T = spread * torch.randn(len(ids), generator=generator, dtype=dtype)
    if log_ratio is not None:
        log_ratio_T = torch.full_like(log_ratio_T, log_ratio)
    token_advantages_T = None
    if token_spread is not None:
        own = torch.Generator().manual_seed(seed + 1000)
        drawn_T = token_spread * torch.randn(len(ids), generator=own)
        token_advantages_T = drawn_T.masked_fill(mask_T == 0, math.nan)
    of_S = [(mask_T > 0) & (torch.tensor(ids) == s) for s in range(len(lengths))]
    return LossInputs(
        log_probs_T=(-2 * torch.rand(len(ids), generator=generator, dtype=dtype)).requires_grad_(),
        log_ratio_T=log_ratio_T,
        log_w_S=torch.stack([log_ratio_T[mine_T].double().sum() for mine_T in of_S]).float(),
        advantages_S=torch.tensor(advantages),
        num_tokens_S=torch.tensor(lengths, dtype=torch.float32),
        loss_mask_T=mask_T,
        sequence_ids_T=torch.tensor(ids),
        token_advantages_T=token_advantages_T,
    )
