"""One optimizer step's samples, cut into this rank's packs; and per-sample values put together again."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_vespo.data.context_parallel import TokenLayout
from megatron_vespo.data.micro_batch import MicroBatch, build_micro_batch
from megatron_vespo.data.packing import PackingStats, SequenceWork, pack_sequences, packing_stats
from megatron_vespo.trainer.initialize import device
from megatron_vespo.trainer.samples import check_sample
from megatron_vespo.types import TrainingSample


@dataclass
class MiniBatch:
    """One optimizer step's samples and this rank's packs of them, in host memory."""

    num_samples: int
    micro_batches: list[MicroBatch]
    packing: PackingStats
    advantages: np.ndarray  # of all samples, on every rank: [num_samples] float32
    versions: Versions | None = None  # of the tokens; with --old-policy snapshot only


@dataclass
class Versions:
    """Which policy version sampled each token of a mini-batch."""

    samples: Sequence[TrainingSample]  # all of the mini-batch, on every rank
    # packs run side by side on the data-parallel ranks: the versions in any rank's i-th pack
    in_packs: list[set[int]]
    pack_multiple: int  # the schedule wants so many packs, or a multiple of them

    def packs_of(self, version: int) -> list[int]:
        """Packs to run for `version`, the same on every rank: those that hold one of its tokens on any."""
        chosen = [i for i, versions in enumerate(self.in_packs) if version in versions]
        others = [i for i, versions in enumerate(self.in_packs) if version not in versions]
        return chosen + others[: -len(chosen) % self.pack_multiple]

    def of(self, micro_batch: MicroBatch) -> Tensor:
        """Of the tokens that its `loss_positions` predict, int64 like them."""
        flat = torch.from_numpy(np.concatenate([sample.policy_versions for sample in self.samples]))
        starts = np.cumsum([0, *(sample.completion_length for sample in self.samples[:-1])])
        # the position before the first completion token predicts it
        offsets = starts + 1 - np.array([sample.prompt_length for sample in self.samples])
        index, place = token_places(micro_batch, micro_batch.loss_positions)
        return flat[torch.from_numpy(offsets)[index] + place]


class Packer:
    """Cuts samples the same way on every rank and builds the packs of this one."""

    def __init__(self, args: Namespace, groups: ProcessGroupCollection, with_versions: bool = False):
        """`with_versions`: mini-batches know which policy version sampled each token."""
        self._args, self._groups, self._with_versions = args, groups, with_versions
        self.layout = TokenLayout(
            groups.cp.size(), groups.cp.rank(), groups.tp.size() if args.sequence_parallel else 1
        )
        self._work = SequenceWork.of_model(
            num_layers=args.num_layers,
            hidden_size=args.hidden_size,
            num_heads=args.num_attention_heads,
            num_query_groups=args.num_query_groups,
            head_dim=args.kv_channels,
            ffn_hidden_size=args.moe_ffn_hidden_size if args.num_experts else args.ffn_hidden_size,
            topk=args.moe_router_topk if args.num_experts else 1,
            num_experts=args.num_experts or 0,
            vocab_size=args.padded_vocab_size,
        )
        # the interleaved schedule feeds the stages in groups of micro-batches
        virtual = args.virtual_pipeline_model_parallel_size is not None
        self._micro_batch_multiple = groups.pp.size() if virtual else 1

    def pack(self, samples: Sequence[TrainingSample], replay: bool = True) -> MiniBatch:
        """ValueError on every rank alike for a sample that cannot be trained on, see `check_sample`.

        Without `replay` the engine's routes are left out.
        """
        args, layout = self._args, self.layout
        engine_routes = replay and args.routing_replay == "R3"
        for index, sample in enumerate(samples):
            check_sample(sample, f"sample {index}", args, engine_routes)
        lengths = [sample.num_tokens for sample in samples]
        padded = [layout.padded_length(length) for length in lengths]
        budget = args.max_tokens_per_gpu * layout.cp_size
        bins = pack_sequences(padded, self._work, self._groups.dp.size(), budget, self._micro_batch_multiple)
        tokens = self._pack_lengths(bins, padded)
        rank = self._groups.dp.rank()
        num_experts = args.num_experts if engine_routes else None
        micro_batches = [
            build_micro_batch(samples, indices, num_tokens, layout, num_experts)
            for indices, num_tokens in zip(bins[rank], tokens[rank], strict=True)
        ]
        stats = packing_stats(bins, lengths, sum(map(sum, tokens)), self._work)
        advantages = np.array([sample.advantage for sample in samples], np.float32)
        versions = self._versions(samples, bins) if self._with_versions else None
        return MiniBatch(len(samples), micro_batches, stats, advantages, versions)

    def _versions(self, samples: Sequence[TrainingSample], bins: list[list[list[int]]]) -> Versions:
        in_packs = [
            {version for pack in packs for i in pack for version in samples[i].policy_versions.tolist()}
            for packs in zip(*bins, strict=True)
        ]
        return Versions(samples, in_packs, self._micro_batch_multiple)

    def _pack_lengths(self, bins: list[list[list[int]]], padded: list[int]) -> list[list[int]]:
        """Tokens of each rank's packs, as `bins`."""
        tokens = [[self.layout.padded_pack(sum(padded[i] for i in pack)) for pack in rank] for rank in bins]
        if self._args.moe_token_dispatcher_type != "allgather":
            return tokens
        # this dispatcher takes for granted that all ranks have equally many tokens
        return [[max(step) for step in zip(*tokens, strict=True)]] * len(tokens)

    def fill(self, samples: Sequence[TrainingSample]) -> list[TrainingSample]:
        """Repeats the first sample until the ranks can share equally; for callers that drop the surplus."""
        multiple = self._groups.dp.size() * self._micro_batch_multiple
        return [*samples, *[samples[0]] * (-len(samples) % multiple)]

    def gather_sequences(
        self, mini_batch: MiniBatch, parts: Sequence[Tensor], num_rows: int = 1
    ) -> np.ndarray:
        """Values of every sample, float32 [num_rows, num_samples], the same on every rank.

        `parts` are this rank's, float32 [num_rows, S] per micro-batch on the last pipeline stage, else empty.
        """
        table = torch.zeros(num_rows, mini_batch.num_samples, device=device())
        if parts:  # one transfer of indices: each waits for the device
            indices = [i for micro_batch in mini_batch.micro_batches for i in micro_batch.sample_indices]
            table[:, indices] = torch.cat([*parts], dim=1)
        self.share(table)
        return table.cpu().numpy()

    def share(self, table: Tensor, *more_groups: dist.ProcessGroup) -> None:
        """Spread entries that are set on one data-parallel rank's last stage and 0 elsewhere, in place.

        `more_groups` are further ones whose ranks hold parts: context parallel for values per token.
        """
        for group in (*more_groups, self._groups.dp, self._groups.pp):
            if group.size() > 1:
                dist.all_reduce(table, group=group)

    def sum_over_tokens(self, values: Tensor) -> Tensor:
        """The sum over all ranks that hold other tokens of the mini-batch at the same pipeline stage."""
        if self._groups.dp_cp.size() > 1:
            dist.all_reduce(values, group=self._groups.dp_cp)
        return values


def token_places(micro_batch: MicroBatch, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Sample and place in its token_ids of the tokens at `positions` of the pack, int64 like them."""
    sample_S = torch.tensor(micro_batch.sample_indices, device=positions.device)
    return sample_S[micro_batch.sequence_ids_T[positions]], micro_batch.position_ids_T[positions]
