"""Cuts one optimizer step's samples into this rank's packs, and gathers per-sample values from all ranks."""

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
    advantages: np.ndarray  # float32 [num_samples], of all samples on every rank
    versions: Versions | None = None  # of the tokens; only with --old-policy snapshot


@dataclass
class Versions:
    """Which policy version generated each token of a mini-batch."""

    samples: Sequence[TrainingSample]  # all of the mini-batch, on every rank
    # i -> the versions in the i-th pack of any rank: data-parallel ranks run their i-th packs side by side
    in_packs: list[set[int]]
    pack_multiple: int  # the schedule needs a multiple of this number of packs

    def packs_of(self, version: int) -> list[int]:
        """Packs to run for `version`, the same on every rank: those with one of its tokens on any rank."""
        chosen = [i for i, versions in enumerate(self.in_packs) if version in versions]
        others = [i for i, versions in enumerate(self.in_packs) if version not in versions]
        return chosen + others[: -len(chosen) % self.pack_multiple]

    def of(self, micro_batch: MicroBatch) -> Tensor:
        """Versions of the tokens that the micro-batch's `loss_positions` predict, int64 of their shape."""
        flat = torch.from_numpy(np.concatenate([sample.policy_versions.array() for sample in self.samples]))
        starts = np.cumsum([0, *(sample.completion_length for sample in self.samples[:-1])])
        # the position before the first completion token predicts it
        offsets = starts + 1 - np.array([sample.prompt_length for sample in self.samples])
        index, place = token_places(micro_batch, micro_batch.loss_positions)
        return flat[torch.from_numpy(offsets)[index] + place]


class Packer:
    """Cuts samples the same way on every rank and builds this rank's packs."""

    def __init__(self, args: Namespace, groups: ProcessGroupCollection, with_versions: bool = False):
        """`with_versions`: mini-batches know which policy version generated each token."""
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
        """This rank's packs of `samples`; without `replay` they leave out the engine's routes.

        ValueError on every rank for a sample that cannot be trained on, see `check_sample`.
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
            {version for pack in packs for i in pack for version in samples[i].policy_versions.versions}
            for packs in zip(*bins, strict=True)
        ]
        return Versions(samples, in_packs, self._micro_batch_multiple)

    def _pack_lengths(self, bins: list[list[list[int]]], padded: list[int]) -> list[list[int]]:
        """Number of tokens of each rank's packs, in the order of `bins`."""
        tokens = [[self.layout.padded_pack(sum(padded[i] for i in pack)) for pack in rank] for rank in bins]
        if self._args.moe_token_dispatcher_type != "allgather":
            return tokens
        # this dispatcher assumes that all ranks have the same number of tokens
        return [[max(step) for step in zip(*tokens, strict=True)]] * len(tokens)

    def fill(self, samples: Sequence[TrainingSample]) -> list[TrainingSample]:
        """Repeats the first sample until the ranks get equal shares; callers drop the surplus."""
        multiple = self._groups.dp.size() * self._micro_batch_multiple
        return [*samples, *[samples[0]] * (-len(samples) % multiple)]

    def gather_sequences(
        self, mini_batch: MiniBatch, parts: Sequence[Tensor], num_rows: int = 1
    ) -> np.ndarray:
        """Values of every sample, float32 [num_rows, num_samples], the same on every rank.

        `parts` are this rank's, float32 [num_rows, S] per micro-batch on the last pipeline stage, else empty.
        """
        table = torch.zeros(num_rows, mini_batch.num_samples, device=device())
        if parts:  # all indices in one transfer, as each transfer waits for the device
            indices = [i for micro_batch in mini_batch.micro_batches for i in micro_batch.sample_indices]
            table[:, indices] = torch.cat([*parts], dim=1)
        self.share(table)
        return table.cpu().numpy()

    def share(self, table: Tensor, *more_groups: dist.ProcessGroup) -> None:
        """Give every rank, in place, the entries that one data-parallel rank's last stage has set.

        Entries are 0 on the other ranks. `more_groups` are further groups whose ranks hold parts, for
        example context parallel for values per token.
        """
        for group in (*more_groups, self._groups.dp, self._groups.pp):
            if group.size() > 1:
                dist.all_reduce(table, group=group)

    def sum_over_tokens(self, values: Tensor) -> Tensor:
        """The sum over all ranks of this pipeline stage that hold different tokens of the mini-batch."""
        if self._groups.dp_cp.size() > 1:
            dist.all_reduce(values, group=self._groups.dp_cp)
        return values


def token_places(micro_batch: MicroBatch, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Sample, and index in its token_ids, of the tokens at `positions` of the pack; int64, same shape."""
    sample_S = torch.tensor(micro_batch.sample_indices, device=positions.device)
    return sample_S[micro_batch.sequence_ids_T[positions]], micro_batch.position_ids_T[positions]
