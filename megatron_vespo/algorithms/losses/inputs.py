"""What every policy loss gets and gives.

Shape suffixes: T packed tokens of a micro-batch on this rank, S its sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megatron_vespo.algorithms import segments
from megatron_vespo.algorithms.segments import boundaries, cached_runs, mask_of_some

# the sum of a tensor over all ranks that hold parts of the optimizer step; they all get the same
Reduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LossInputs:
    """One micro-batch. Entries of a T field where `loss_mask_T` is 0 mean nothing, they may be NaN."""

    log_probs_T: Tensor  # log pi, with gradient
    log_ratio_T: Tensor  # log pi - log of the ratio's denominator, without gradient
    log_w_S: Tensor  # float32, its sum over the whole response, without gradient
    advantages_S: Tensor  # float32
    num_tokens_S: Tensor  # float32, trained tokens of the whole response, on all context-parallel ranks
    loss_mask_T: Tensor  # 1 on trained tokens
    sequence_ids_T: Tensor  # int64, ascending
    token_advantages_T: Tensor | None = None  # float32, added to the response's advantage; None: all 0

    @property
    def advantages_T(self) -> Tensor:
        """A of each token: its response's, plus its own on trained tokens."""
        advantages_T = self.per_token(self.advantages_S)
        if self.token_advantages_T is None:
            return advantages_T
        return advantages_T + self.masked(self.token_advantages_T)

    def by_sign(self, values: Callable[[Tensor], Tensor]) -> Tensor:
        """For each token the value of its response that belongs to the sign of its own A, [T].

        `values` are of the responses, [S], as a function of advantages [S]; only the advantages' signs count.
        """
        if self.token_advantages_T is None:
            return self.per_token(values(self.advantages_S))
        of_signs = [values(torch.full_like(self.advantages_S, sign)) for sign in (-1.0, 0.0, 1.0)]
        return torch.stack(of_signs)[self.advantages_T.sign().long() + 1, self.sequence_ids_T]

    def per_token(self, values_S: Tensor) -> Tensor:
        """Each token's own sequence's value, [T]."""
        return values_S.index_select(0, self.sequence_ids_T)

    def masked(self, values_T: Tensor) -> Tensor:
        """The values, 0 where no token is trained; filled, not multiplied, as they may be NaN there."""
        return values_T.masked_fill(self.loss_mask_T == 0, 0.0)

    def slices(self) -> Iterator[tuple[slice, LossInputs]]:
        """Tokens of every slice, see `segments`, and the inputs with these tokens and all S fields.

        The log-probs of a slice carry no gradient.
        """
        log_probs_T = self.log_probs_T.detach()
        if not segments.in_host_memory(log_probs_T):
            yield slice(None), replace(self, log_probs_T=log_probs_T)
            return
        bounds = boundaries(self.sequence_ids_T, len(self.advantages_S)).tolist()
        for sequences, tokens in cached_runs(bounds):
            fields = {
                "log_probs_T": log_probs_T[tokens],
                "log_ratio_T": self.log_ratio_T[tokens],
                "loss_mask_T": self.loss_mask_T[tokens],
                "sequence_ids_T": self.sequence_ids_T[tokens],
            }
            if self.token_advantages_T is not None:
                fields["token_advantages_T"] = self.token_advantages_T[tokens]
            yield (
                tokens,
                HostSlice(
                    **vars(self) | fields,
                    sequences=sequences,
                    counts=np.diff(bounds[sequences.start : sequences.stop + 1]),
                    all_trained=mask_of_some(fields["loss_mask_T"]) is None,
                ),
            )

    @property
    def lengths_S(self) -> Tensor:
        """`num_tokens_S` to divide by: a response without trained tokens has sums of 0, not 0 / 0."""
        return self.num_tokens_S.clamp(min=1.0)

    def attached(self, values_T: Tensor) -> Tensor:
        """The values, with the gradient of log pi; 0 without gradient where no token is trained."""
        zero_T = self.log_probs_T - self.log_probs_T.detach()
        return self.masked(values_T.detach() + zero_T)


@dataclass(frozen=True, kw_only=True)
class HostSlice(LossInputs):
    """Whole sequences of a pack in host memory; what is known of them saves passes over their tokens."""

    sequences: slice
    counts: np.ndarray  # int64, the tokens of each of them
    all_trained: bool

    def per_token(self, values_S: Tensor) -> Tensor:
        return torch.from_numpy(np.repeat(values_S[self.sequences].numpy(), self.counts))

    def masked(self, values_T: Tensor) -> Tensor:
        return values_T if self.all_trained else super().masked(values_T)


@dataclass(frozen=True)
class TokenLoss:
    """One term per token; the caller masks and aggregates them."""

    loss_T: Tensor  # with gradient
    weight: Tensor | Callable[[], Tensor]  # `weight_T`, or what computes it when it is asked for
    gradient_T: Tensor | None = None  # of loss_T by log pi where it is at hand: - weight A

    @property
    def weight_T(self) -> Tensor:
        """What multiplies A grad log pi in -grad loss_T, without gradient."""
        return self.weight() if callable(self.weight) else self.weight
