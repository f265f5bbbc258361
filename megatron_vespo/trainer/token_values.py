"""Collects what this rank knows of every token after an optimizer step, see data/token_values.py."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_vespo.algorithms.losses.output import LossOutput
from megatron_vespo.data.token_values import TokenValues, saturated
from megatron_vespo.trainer.mini_batch import MiniBatch, sampled_places
from megatron_vespo.trainer.routing_replay import RoutingReplay


def token_values(
    mini_batch: MiniBatch,
    outputs: Sequence[LossOutput],
    replay: RoutingReplay,
    groups: ProcessGroupCollection,
) -> TokenValues | None:
    """Return the values of the tokens of which this rank is the first to know; None if there are none.

    A collective of the ranks of all pipeline stages. `outputs` has one entry per micro-batch, none before the
    last stage. The mini-batch has its outlines.
    """
    differences = _differences(mini_batch, groups)
    if not outputs:
        return None
    packs, first = mini_batch.micro_batches, groups.tp.rank() == 0
    places = sampled_places(packs, mini_batch.outlines)
    pi = [output.log_probs for output in outputs if output.log_probs is not None]
    old = [
        pack.old_log_probs_T[pack.loss_positions].float()
        for pack in packs
        if pack.old_log_probs_T is not None
    ]
    routed_places = None
    if differences is not None and (first or replay.sees_a_slice):
        routed_places, differences = _at_loss_positions(mini_batch, places, differences, replay)
    else:
        differences = None
    if not first and routed_places is None:
        return None
    return TokenValues(
        places=_array(places if first else [], np.int32),
        pi=_array(pi if first else [], np.float32),
        pi_old=_array(old if first else [], np.float32) if old else None,
        routed_places=routed_places,
        expert_differences=differences,
    )


def _differences(mini_batch: MiniBatch, groups: ProcessGroupCollection) -> Tensor | None:
    """The packs' expert differences end to end, int32 [sum R], over all stages on the last one.

    None if no routes were imposed.
    """
    per_pack = [pack.expert_differences.values() for pack in mini_batch.micro_batches]
    if not all(per_pack):
        return None
    differences = torch.cat([torch.stack(list(chunks)).sum(0, dtype=torch.int32) for chunks in per_pack])
    if groups.pp.size() > 1:
        dist.reduce(differences, group=groups.pp, group_dst=groups.pp.size() - 1)
    return differences.cpu()


def _at_loss_positions(
    mini_batch: MiniBatch, places: Sequence[Tensor], differences: Tensor, replay: RoutingReplay
) -> tuple[np.ndarray, np.ndarray]:
    """Return places, int32, and differences, uint8, of the tokens that this rank's routers predict."""
    chosen_places, chosen, start = [], [], 0
    for pack, place in zip(mini_batch.micro_batches, places, strict=True):
        place_T = torch.full((len(pack.tokens_T),), -1, dtype=torch.int64)
        place_T[pack.loss_positions] = place
        place_R = replay.seen(place_T)
        predicts = place_R >= 0
        chosen_places.append(place_R[predicts])
        chosen.append(differences[start : start + len(place_R)][predicts])
        start += len(place_R)
    return _array(chosen_places, np.int32), saturated(_array(chosen, np.int32))


def _array(parts: Sequence[Tensor], dtype: type) -> np.ndarray:
    """Return the tensors end to end, in host memory."""
    return torch.cat(list(parts)).cpu().numpy().astype(dtype, copy=False) if parts else np.empty(0, dtype)
