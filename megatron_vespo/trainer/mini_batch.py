"""Cuts one optimizer step's samples into this rank's packs, and gathers per-sample values from all ranks."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_vespo.data.completion_arrays import split
from megatron_vespo.data.context_parallel import TokenLayout
from megatron_vespo.data.host_memory import to_device
from megatron_vespo.data.micro_batch import MicroBatch, build_micro_batch
from megatron_vespo.data.packing import PackingRule, PackingStats, SequenceWork
from megatron_vespo.data.shards import MiniBatchOutline, SampleOutline
from megatron_vespo.trainer.initialize import device
from megatron_vespo.trainer.samples import check_sample, with_routes
from megatron_vespo.types import TrainingSample

Sample = TrainingSample | SampleOutline


@dataclass
class MiniBatch:
    """One optimizer step's samples and this rank's packs of them, in host memory."""

    num_samples: int
    micro_batches: list[MicroBatch]
    packing: PackingStats
    sign_shares: np.ndarray  # float64 [num_samples, 2], of all samples on every rank; see the outline's
    versions: Versions | None = None  # of the tokens; only with --old-policy snapshot
    outlines: Sequence[SampleOutline] = ()  # of all samples; only if values of tokens are recorded


@dataclass
class Versions:
    """Which policy version generated each token of a mini-batch."""

    samples: Sequence[SampleOutline]  # all of the mini-batch, on every rank
    # i -> the versions in the i-th pack of any rank: data-parallel ranks run their i-th packs side by side
    in_packs: list[set[int]]
    pack_multiple: int  # the schedule needs a multiple of this number of packs

    @classmethod
    def of_outline(cls, outline: MiniBatchOutline, pack_multiple: int) -> Versions:
        in_packs = [
            {v for pack in packs for i in pack for v in outline.samples[i].policy_versions.versions}
            for packs in zip(*outline.cut.bins, strict=True)
        ]
        return cls(outline.samples, in_packs, pack_multiple)

    def packs_of(self, version: int) -> list[int]:
        """Return the packs to run for `version`, the same on all ranks: any rank has a token of it there."""
        chosen = [i for i, versions in enumerate(self.in_packs) if version in versions]
        others = [i for i, versions in enumerate(self.in_packs) if version not in versions]
        return chosen + others[: -len(chosen) % self.pack_multiple]

    def of(self, micro_batch: MicroBatch) -> Tensor:
        """Return the versions of the tokens that `loss_positions` predict, int64 of their shape."""
        own = [self.samples[i] for i in micro_batch.sample_indices]
        return at_loss_positions(micro_batch, own, [one.policy_versions.array() for one in own])


class Packer:
    """Cuts samples the same way on every rank and builds this rank's packs."""

    def __init__(
        self,
        args: Namespace,
        groups: ProcessGroupCollection,
        with_versions: bool = False,
        with_outlines: bool = False,
    ):
        """`with_versions`: mini-batches know which policy version generated each token."""
        self._args, self._groups = args, groups
        self._with_versions, self._with_outlines = with_versions, with_outlines
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
            topk=_experts_per_token(args),
            num_experts=args.num_experts or 0,
            vocab_size=args.padded_vocab_size,
        )

    @property
    def rule(self) -> PackingRule:
        """Return how mini-batches are cut, by the arguments as they are now."""
        args, groups = self._args, self._groups
        # the interleaved schedule feeds the stages in groups of micro-batches
        virtual = args.virtual_pipeline_model_parallel_size is not None
        return PackingRule(
            self._work,
            num_ranks=groups.dp.size(),
            max_tokens=args.max_tokens_per_gpu * self.layout.cp_size,
            layout=self.layout,
            packs_multiple=groups.pp.size() if virtual else 1,
            # this dispatcher assumes that all ranks have the same number of tokens
            equal_packs=args.moe_token_dispatcher_type == "allgather",
        )

    @property
    def rank(self) -> int:
        """Return this rank's number among the data-parallel ranks."""
        return self._groups.dp.rank()

    def pack(self, samples: Sequence[TrainingSample], replay: bool = True) -> MiniBatch:
        """Return this rank's packs of `samples`, which all ranks have; see `build`."""
        outline = MiniBatchOutline.of(samples, self.rule)
        return self.build(outline, {i: samples[i] for i in outline.cut.of_rank(self.rank)}, replay)

    def build(
        self, outline: MiniBatchOutline, own: Mapping[int, TrainingSample], replay: bool = True
    ) -> MiniBatch:
        """Return this rank's packs of a mini-batch. `own` has its samples by their index in the mini-batch.

        All ranks call it together. Without `replay` the packs leave out the engine's routes. ValueError on
        every rank for a sample that cannot be trained on, see `check_sample`.
        """
        engine_routes = replay and self._args.routing_replay == "R3"
        num_experts = self._args.num_experts if engine_routes else None
        cut, problems, micro_batches = outline.cut, {}, []
        for indices, num_tokens in zip(cut.bins[self.rank], cut.pack_tokens[self.rank], strict=True):
            # routes are fetched for one pack at a time
            pack = {i: with_routes(own[i]) if engine_routes else own[i] for i in indices}
            problems |= self._problems(pack, engine_routes)
            if not problems:
                micro_batches.append(build_micro_batch(pack, indices, num_tokens, self.layout, num_experts))
        self._raise_everywhere(problems, len(outline.samples))
        versions = Versions.of_outline(outline, self.rule.packs_multiple) if self._with_versions else None
        outlines = outline.samples if self._with_outlines else ()
        return MiniBatch(
            len(outline.samples), micro_batches, cut.stats, outline.sign_shares, versions, outlines
        )

    def _problems(self, samples: Mapping[int, TrainingSample], engine_routes: bool) -> dict[int, str]:
        problems = {}
        for index, sample in samples.items():
            try:
                check_sample(sample, f"sample {index}", self._args, engine_routes)
            except ValueError as error:
                problems[index] = str(error)
        return problems

    def _raise_everywhere(self, problems: dict[int, str], num_samples: int) -> None:
        """Raise the first sample's problem on all data-parallel ranks: only one of them has the sample."""
        first = min(problems, default=num_samples)
        if self._groups.dp.size() > 1:
            lowest = torch.tensor([first], device=device())
            dist.all_reduce(lowest, dist.ReduceOp.MIN, group=self._groups.dp)
            if (first := int(lowest)) < num_samples:
                found: list[dict[int, str]] = [{}] * self._groups.dp.size()
                dist.all_gather_object(found, problems, group=self._groups.dp)
                problems = {index: problem for part in found for index, problem in part.items()}
        if first < num_samples:
            raise ValueError(problems[first])

    def fill(self, samples: Sequence[TrainingSample]) -> list[TrainingSample]:
        """Repeat the first sample until all ranks get equal shares; callers drop the surplus."""
        return [*samples, *[samples[0]] * (-len(samples) % self.rule.samples_multiple)]

    def gather_sequences(self, mini_batch: MiniBatch, values: Tensor | None, num_rows: int = 1) -> Tensor:
        """Return values of every sample, float32 [num_rows, num_samples], on every rank's device.

        `values` are this rank's, float32 [num_rows, S], S the sequences of all its micro-batches in order;
        None before the last pipeline stage.
        """
        table = torch.zeros(num_rows, mini_batch.num_samples, device=device())
        if values is not None:
            indices = [i for micro_batch in mini_batch.micro_batches for i in micro_batch.sample_indices]
            table.index_copy_(1, to_device(torch.tensor(indices), device()), values)
        self.share(table)
        return table

    def gather_tokens(
        self, mini_batch: MiniBatch, values: Sequence[Tensor], samples: Sequence[Sample]
    ) -> list[np.ndarray]:
        """Return values of every sampled token, float32 [N] for each of `samples`, on every rank's host.

        `values` are [T] of this rank's packs, on its device; empty before the last pipeline stage. `samples`
        are all of the mini-batch.
        """
        lengths = np.array([sample.num_trained for sample in samples])
        table = torch.zeros(int(lengths.sum()), device=device())
        places = sampled_places(mini_batch.micro_batches, samples)
        for micro_batch, values_T, place in zip(mini_batch.micro_batches, values, places, strict=False):
            cells = torch.stack([place, micro_batch.loss_positions])
            there, position = to_device(cells, device())
            table[there] = values_T[position].float()
        self.share(table, self._groups.cp)
        return split(table.cpu().numpy(), lengths)

    def share(self, table: Tensor, *more_groups: dist.ProcessGroup) -> None:
        """Give every rank, in place, the entries that one data-parallel rank's last stage has set.

        Entries are 0 on the other ranks. `more_groups` are further groups whose ranks hold parts, for
        example context parallel for values per token.
        """
        for group in (*more_groups, self._groups.dp, self._groups.pp):
            if group.size() > 1:
                dist.all_reduce(table, group=group)

    def sum_over_tokens(self, values: Tensor) -> Tensor:
        """Return the sum over this pipeline stage's ranks that hold different tokens of the mini-batch."""
        if self._groups.dp_cp.size() > 1:
            dist.all_reduce(values, group=self._groups.dp_cp)
        return values


def at_loss_positions(micro_batch: MicroBatch, own: Sequence[Sample], values: Sequence[np.ndarray]) -> Tensor:
    """Return the values of the tokens that `loss_positions` predict, in the shape of `loss_positions`.

    `own` are the samples of the pack's sequences, `values` has an array [N] of their sampled tokens for each.
    """
    masks = [sample.sampled_mask() for sample in own]
    per_token = np.zeros(sum(map(len, masks)), np.int64)  # of all C tokens of each sample
    per_token[np.concatenate(masks)] = np.concatenate(values)
    starts = np.cumsum([0, *map(len, masks[:-1])])
    # the position before the first completion token predicts it
    offsets = torch.from_numpy(starts + 1 - np.array([sample.prompt_length for sample in own]))
    positions = micro_batch.loss_positions
    sequences, places = micro_batch.sequence_ids_T[positions], micro_batch.position_ids_T[positions]
    return torch.from_numpy(per_token)[offsets[sequences] + places]


def sampled_places(micro_batches: Sequence[MicroBatch], samples: Sequence[Sample]) -> list[Tensor]:
    """Return, for each pack, the places of the tokens that `loss_positions` predict, int64.

    Places count the sampled tokens of all `samples`, the whole mini-batch, from 0, sample after sample.
    """
    lengths = [sample.num_trained for sample in samples]
    starts = np.cumsum([0, *lengths])
    return [
        at_loss_positions(
            micro_batch,
            [samples[i] for i in micro_batch.sample_indices],
            [np.arange(starts[i], starts[i + 1]) for i in micro_batch.sample_indices],
        )
        for micro_batch in micro_batches
    ]


def token_places(micro_batch: MicroBatch, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Sample, and index in its token_ids, of the tokens at `positions` of the pack; int64, same shape."""
    sample_S = torch.tensor(micro_batch.sample_indices, device=positions.device)
    return sample_S[micro_batch.sequence_ids_T[positions]], micro_batch.position_ids_T[positions]


def _experts_per_token(args: Namespace) -> int:
    """MLPs of one expert's width that every token goes through, shared experts included."""
    if not args.num_experts:
        return 1
    return args.moe_router_topk + (args.moe_shared_expert_intermediate_size or 0) // args.moe_ffn_hidden_size
