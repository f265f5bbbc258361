"""Packs samples into the flat fields that one forward pass needs.

Packs are built in host memory and stay there; a forward pass copies its pack with `on(device)`.

Shape suffixes: T tokens of the pack that this rank holds (padding included), S sequences, L layers, K experts
per token, R tokens that this rank's routers see. Position t predicts token t + 1, so every per-token field of
position t is about token t + 1, except the routes, which are about the token that enters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_vespo.data.context_parallel import TokenLayout
from megatron_vespo.data.host_memory import to_device
from megatron_vespo.data.supports import chosen_supports, joined_supports
from megatron_vespo.types import TrainingSample, fetched

# of samples, a number for each sampled token
OPTIONAL_COLUMNS = ("old_log_probs", "reference_log_probs", "token_advantages")


@dataclass
class MicroBatch:
    """One packed forward pass. `sample_indices[s]` is the index of sequence s in the mini-batch."""

    tokens_T: Tensor  # int64
    labels_T: Tensor  # int64, the next token; 0 where the mask is 0
    position_ids_T: Tensor  # int64, from 0 in every sequence; padding continues the numbers of its sequence
    loss_mask_T: Tensor  # float32, 1 on positions that predict a sampled token
    sequence_ids_T: Tensor  # int64; padding at the end belongs to the last sequence
    temperature_T: Tensor  # float32, sampling temperature of the sequence; 1 on padding
    behavior_log_probs_T: Tensor  # float32, 0 where the mask is 0
    loss_positions: Tensor  # int64 [num_loss_tokens], where the mask is 1
    cu_seqlens: Tensor  # int32 [S + 1], or [S + 2] if padding is its own segment; of the whole pack
    max_seqlen: int
    advantages_S: Tensor  # float32
    num_tokens_S: Tensor  # float32, trained tokens of the whole sequence, on all ranks
    sample_indices: list[int]
    old_log_probs_T: Tensor | None = None  # float32 from the samples, or float64 set by the trainer
    reference_log_probs_T: Tensor | None = None  # as old_log_probs_T, the reference policy's
    token_advantages_T: Tensor | None = None  # float32, added to the sequence's advantage; None: all 0
    # int32 [num_loss_tokens], size of the support of the token that each of `loss_positions` predicts, 0: the
    # whole vocabulary; None: no sequence has supports
    support_counts: Tensor | None = None
    support_ids: Tensor | None = None  # int32 [sum of the counts], in the vocabulary
    routed_experts_T: Tensor | None = None  # uint8 [T, L, K], from the engine; None if no sequence has any
    replays_S: Tensor | None = None  # bool, has the engine's routes; None: all have, or routes are unused
    # set by the trainer: its own routes per model chunk, uint8 [L of the chunk, R, K], always in host memory
    old_routes: dict[int, Tensor] = field(default_factory=dict)
    # set by the trainer where it records tokens: per model chunk int32 [R], how many of the imposed experts
    # its routers would not have chosen for the token that enters
    expert_differences: dict[int, Tensor] = field(default_factory=dict)

    @property
    def num_sequences(self) -> int:
        return len(self.sample_indices)

    @property
    def num_loss_tokens(self) -> int:
        return len(self.loss_positions)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = [*vars(self).values(), *self.old_routes.values()]
        return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))

    def on(self, device: torch.device) -> MicroBatch:
        """Return the pack with its tensors copied asynchronously to `device`; both share the dicts."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: to_device(tensor, device) for name, tensor in tensors.items()})


def build_micro_batch(
    samples: Sequence[TrainingSample] | Mapping[int, TrainingSample],
    indices: Sequence[int],
    num_tokens: int,
    layout: TokenLayout,
    num_experts: int | None = None,
) -> MicroBatch:
    """Pack `samples[i] for i in indices` and keep the tokens that `layout` assigns to this rank.

    `num_tokens` is the length of the whole pack, a multiple of `layout.pack_multiple` with room for the
    padded sequences. With `num_experts`, the pack includes the samples' routes.
    """
    chosen = [samples[i] for i in indices]
    lengths = [sample.num_tokens for sample in chosen]
    starts = np.concatenate([[0], np.cumsum([layout.padded_length(length) for length in lengths])])
    assert num_tokens >= starts[-1] and num_tokens % layout.pack_multiple == 0
    segments = np.append(starts, num_tokens) if num_tokens > starts[-1] else starts

    fields = _token_fields(chosen, starts, num_tokens)
    replays_S = np.array([sample.replays for sample in chosen])
    if num_experts is not None and replays_S.any():
        fields["routed_experts_T"] = _routes(chosen, starts, num_tokens, num_experts)
    kept = layout.local_indices(segments)
    supports = _supports(chosen, fields["loss_mask_T"] > 0, kept)
    fields = {name: np.ascontiguousarray(values[kept]) for name, values in fields.items()} | supports
    fields["loss_positions"] = np.flatnonzero(fields["loss_mask_T"])
    fields["cu_seqlens"] = segments.astype(np.int32)
    fields["advantages_S"] = np.array([sample.advantage for sample in chosen], np.float32)
    if num_experts is not None and not replays_S.all():
        fields["replays_S"] = replays_S
    fields["num_tokens_S"] = np.array([sample.num_trained for sample in chosen], np.float32)
    tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in fields.items()}
    return MicroBatch(
        **tensors,
        max_seqlen=int(np.diff(segments).max()),
        sample_indices=list(indices),
    )


def _token_fields(chosen: list[TrainingSample], starts: np.ndarray, total: int) -> dict[str, np.ndarray]:
    fields = {
        "tokens_T": np.zeros(total, np.int64),
        "labels_T": np.zeros(total, np.int64),
        "position_ids_T": np.zeros(total, np.int64),
        "sequence_ids_T": np.zeros(total, np.int64),
        "loss_mask_T": np.zeros(total, np.float32),
        "temperature_T": np.ones(total, np.float32),
        "behavior_log_probs_T": np.zeros(total, np.float32),
    }
    columns = {name: [getattr(sample, name) for sample in chosen] for name in OPTIONAL_COLUMNS}
    columns = {name: values for name, values in columns.items() if _is_known(name, values)}
    for name in columns:
        fields[f"{name}_T"] = np.zeros(total, np.float32)
    ends = [*starts[1:-1], total]  # the padding at the end of the pack belongs to the last sequence
    for s, (sample, start, end) in enumerate(zip(chosen, starts[:-1], ends, strict=True)):
        tokens = slice(start, start + sample.num_tokens)
        sampled = np.flatnonzero(sample.sampled_mask())  # given tokens enter the model, none is a label
        predicting = start + sample.prompt_length - 1 + sampled
        fields["tokens_T"][tokens] = sample.token_ids
        fields["labels_T"][predicting] = sample.token_ids[sample.prompt_length :][sampled]
        fields["position_ids_T"][start:end] = np.arange(end - start)
        fields["sequence_ids_T"][start:end] = s
        fields["loss_mask_T"][predicting] = 1.0
        fields["temperature_T"][tokens] = sample.temperature
        fields["behavior_log_probs_T"][predicting] = sample.behavior_log_probs
        for name, values in columns.items():
            if values[s] is not None:
                fields[f"{name}_T"][predicting] = values[s]
    return fields


def _is_known(name: str, values: list[np.ndarray | None]) -> bool:
    """Whether a pack has the column: advantages are 0 where a sample has none, log-probs have no default."""
    known = [value is not None for value in values]
    return any(known) if name == "token_advantages" else all(known)


def _supports(
    chosen: list[TrainingSample], predicting_T: np.ndarray, kept: np.ndarray
) -> dict[str, np.ndarray]:
    """Return the supports of the tokens that the kept positions predict; none if no sample has any."""
    supports = joined_supports(chosen)
    if supports is None:
        return {}
    token_T = np.cumsum(predicting_T) - 1  # index among all sampled tokens of the pack
    supports = chosen_supports(supports, token_T[kept][predicting_T[kept]])
    return {"support_counts": supports.counts, "support_ids": supports.token_ids}


def _routes(chosen: list[TrainingSample], starts: np.ndarray, total: int, num_experts: int) -> np.ndarray:
    """Return the routes, uint8 [total, L, K]; tokens without an engine's route are spread over the experts.

    These tokens are padding and the last token of a sequence: no loss depends on their experts. `replays_S`
    is False for sequences without routes.
    """
    known = [sample.routed_experts if sample.replays else None for sample in chosen]
    arrays = [None if routes is None else fetched(routes) for routes in known]
    num_layers, topk = next(array for array in arrays if array is not None).shape[1:]
    spread = (np.arange(total)[:, None] * topk + np.arange(topk)) % num_experts
    routes = np.repeat(spread[:, None].astype(np.uint8), num_layers, axis=1)
    for sample, array, start in zip(chosen, arrays, starts[:-1], strict=True):
        if array is not None:
            routes[start : start + sample.num_tokens - 1] = array
    return routes
