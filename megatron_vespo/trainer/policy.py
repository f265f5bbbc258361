"""MegatronPolicy: the trained model as the rest of the program sees it. Plain Python, no Ray."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.utils import get_model_config, unwrap_model
from megatron.training.training import force_param_sync, setup_model_and_optimizer
from torch import Tensor

from megatron_vespo.algorithms.vespo import RatioDenominator, sequence_log_ratio
from megatron_vespo.data.micro_batch import MicroBatch, build_micro_batch
from megatron_vespo.data.packing import imbalance, pack_sequences
from megatron_vespo.trainer import checkpoint
from megatron_vespo.trainer.initialize import device, process_groups
from megatron_vespo.trainer.model import model_config, model_provider
from megatron_vespo.trainer.samples import check_sample
from megatron_vespo.trainer.step import log_prob_only, policy_loss, run_schedule
from megatron_vespo.trainer.weights import iterate_hf_weights, load_hf_weights, model_shape
from megatron_vespo.types import TrainingSample


@dataclass
class MiniBatch:
    """One optimizer step's samples and this rank's packs of them."""

    num_samples: int
    micro_batches: list[MicroBatch]
    padding_share: float  # of the tokens this rank runs
    imbalance: float  # busiest data-parallel rank over the mean, minus 1


@dataclass
class StepResult:
    """One optimizer step, identical on every rank; arrays are float32 [num_samples] in sample order."""

    loss: float  # per loss token of the whole mini-batch
    grad_norm: float
    learning_rate: float
    num_tokens: int
    log_w: np.ndarray
    phi: np.ndarray
    engine_gap: np.ndarray  # log(pi_old / mu) of the response; NaN where pi_old was not computed
    engine_difference: np.ndarray  # a token's largest |log pi_old - log mu|; log pi's where pi_old is unknown
    padding_share: float
    imbalance: float


class MegatronPolicy:
    """The policy on this rank's part of the layout; every method is called on all ranks together.

    Built after `trainer.initialize`. Weights come from `args.load` when it holds a checkpoint, else from
    `args.hf_checkpoint`. `rollout_state` is what the last `save` stored, None for a fresh start.
    """

    def __init__(self, args: Namespace):
        self.args = args
        self.groups = process_groups()
        self.shape = model_shape(args)
        resuming = checkpoint.exists(args.load)
        self.rollout_state = checkpoint.rollout_state(args) if resuming else None
        self.model, self.optimizer, self.scheduler = setup_model_and_optimizer(
            ModelType.encoder_or_decoder, model_provider(args, model_config(args))
        )
        self.iteration = args.iteration  # optimizer steps done
        # one rank a pipeline stage hands full tensors on: to the engines, to an export
        self.is_sender = self.groups.tp.rank() == 0 and self.groups.dp.rank() == 0
        if not resuming:
            for chunk in unwrap_model(self.model):
                load_hf_weights(chunk, args.hf_checkpoint, self.shape, self.groups)
            self.optimizer.reload_model_params()
        self._connect_schedule()

    def _connect_schedule(self) -> None:
        """The hooks by which Megatron's schedule reaches gradient reduction, as in Megatron's own loop."""
        config = get_model_config(self.model[0])
        config.grad_scale_func = self.optimizer.scale_loss
        config.finalize_model_grads_func = finalize_model_grads

        def per_chunk(functions: list):
            return functions if len(functions) > 1 else functions[0]

        if self.args.overlap_grad_reduce:
            config.no_sync_func = per_chunk([chunk.no_sync for chunk in self.model])
            if self.args.align_grad_reduce:
                config.grad_sync_func = per_chunk([chunk.start_grad_sync for chunk in self.model])
        if self.args.overlap_param_gather and self.args.align_param_gather:
            config.param_sync_func = per_chunk([chunk.start_param_sync for chunk in self.model])

    def pack(self, samples: Sequence[TrainingSample]) -> MiniBatch:
        """This rank's micro-batches of one mini-batch; the cut is the same on every rank.

        ValueError on every rank alike for a sample that cannot be trained on, see `check_sample`.
        """
        for index, sample in enumerate(samples):
            check_sample(sample, f"sample {index}", self.args.vocab_size)
        lengths = [sample.num_tokens for sample in samples]
        bins = pack_sequences(lengths, self.groups.dp.size(), self.args.max_tokens_per_gpu)
        # sequence parallelism cuts a pack into equal parts
        multiple = self.groups.tp.size() if self.args.sequence_parallel else 1
        mine = bins[self.groups.dp.rank()]
        micro_batches = [build_micro_batch(samples, indices, multiple, device()) for indices in mine]
        tokens = sum(len(m.tokens_T) for m in micro_batches)
        real = sum(lengths[i] for indices in mine for i in indices)
        return MiniBatch(len(samples), micro_batches, 1.0 - real / tokens, imbalance(bins, lengths))

    @torch.no_grad()
    def compute_old_log_probs(self, mini_batch: MiniBatch) -> None:
        """Set `old_log_probs_T` of its micro-batches, where they are needed: on the last pipeline stage."""
        outputs = self._run(mini_batch, log_prob_only, forward_only=True)
        for micro_batch, output in zip(mini_batch.micro_batches, outputs, strict=False):
            micro_batch.old_log_probs_T = output["log_probs_T"]

    def train_step(self, mini_batch: MiniBatch) -> StepResult:
        """One optimizer step on the whole mini-batch."""
        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        loss = partial(policy_loss, kernel=self.args.gamma_kernel, args=self.args)
        outputs = self._run(mini_batch, loss, forward_only=False)
        learning_rate = self.optimizer.param_groups[0]["lr"]
        updated, grad_norm, _ = self.optimizer.step()
        if not updated:
            raise RuntimeError(
                f"optimizer step {self.iteration + 1} found a non-finite gradient (norm {grad_norm})"
            )
        self.scheduler.step(increment=self.args.global_batch_size)
        self.iteration += 1

        columns = self._gather_per_sample(
            mini_batch, outputs, ("log_w", "phi", "engine_gap", "engine_difference")
        )
        totals = self._sum_over_ranks(
            [
                sum(o["loss_sum"].item() for o in outputs),
                sum(m.num_loss_tokens for m in mini_batch.micro_batches),
            ]
            if outputs
            else [0.0, 0.0]
        )
        return StepResult(
            loss=totals[0] / totals[1],
            grad_norm=float(grad_norm),
            learning_rate=learning_rate,
            num_tokens=int(totals[1]),
            **columns,
            padding_share=mini_batch.padding_share,
            imbalance=mini_batch.imbalance,
        )

    @torch.no_grad()
    def log_probs(self, samples: Sequence[TrainingSample]) -> list[np.ndarray]:
        """log pi of every completion token at its sampling temperature, float32 [C]; same on all ranks."""
        padded = self._share_evenly(samples)
        longest = max(sample.completion_length for sample in samples)
        table = torch.zeros(len(padded), longest, device=device())
        mini_batch = self.pack(padded)
        outputs = self._run(mini_batch, log_prob_only, forward_only=True)
        for micro_batch, output in zip(mini_batch.micro_batches, outputs, strict=False):
            for s, index in enumerate(micro_batch.sample_indices):
                chosen_T = (micro_batch.loss_mask_T > 0) & (micro_batch.sequence_ids_T == s)
                table[index, : padded[index].completion_length] = output["log_probs_T"][chosen_T]
        self._share(table)
        rows = table[: len(samples)].cpu().numpy()
        return [row[: sample.completion_length] for row, sample in zip(rows, samples, strict=True)]

    @torch.no_grad()
    def sequence_log_ratio(
        self, samples: Sequence[TrainingSample], denominator: RatioDenominator
    ) -> np.ndarray:
        """log W of every sample under the current weights, float32 [num_samples], identical on every rank.

        Only `rollout` can be asked of samples alone; pi_old of the others lives in a MiniBatch.
        """
        if denominator != "rollout":
            raise ValueError(
                f"denominator {denominator!r} needs the policy the mini-batch started from: use train_step"
            )
        mini_batch = self.pack(self._share_evenly(samples))

        def loss(micro_batch: MicroBatch, log_probs_T: Tensor):
            ratio = sequence_log_ratio(
                log_probs_T,
                micro_batch.behavior_log_probs_T,
                None,
                micro_batch.loss_mask_T,
                micro_batch.sequence_ids_T,
                micro_batch.num_sequences,
                denominator,
                self.args.mismatch_truncation,
            )
            return log_probs_T.new_zeros(()), torch.tensor(1, dtype=torch.int), {"log_w": ratio.log_w_S}

        outputs = self._run(mini_batch, loss, forward_only=True)
        return self._gather_per_sample(mini_batch, outputs, ("log_w",))["log_w"][: len(samples)]

    def named_hf_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Full HF-named tensors of this rank's pipeline stage; a collective of the stage's ranks."""
        if self.args.overlap_param_gather:
            force_param_sync(self.model, self.optimizer)
        for chunk in unwrap_model(self.model):
            yield from iterate_hf_weights(chunk, self.shape, self.groups)

    def save(self, rollout_state: dict) -> None:
        """Weights, optimizer, schedule, RNG and `rollout_state` as a torch_dist checkpoint in `args.save`."""
        checkpoint.save(self.args, self.iteration, self.model, self.optimizer, self.scheduler, rollout_state)

    def _share_evenly(self, samples: Sequence[TrainingSample]) -> list[TrainingSample]:
        """Repeats the first sample until the data-parallel ranks share equally; callers drop the surplus."""
        return [*samples, *[samples[0]] * (-len(samples) % self.groups.dp.size())]

    def _run(self, mini_batch: MiniBatch, loss, forward_only: bool) -> list[dict[str, Tensor]]:
        for chunk in self.model:
            chunk.eval() if forward_only else chunk.train()
        return run_schedule(self.model, mini_batch.micro_batches, self.args, loss, forward_only)

    def _gather_per_sample(
        self, mini_batch: MiniBatch, outputs: list, names: tuple[str, ...]
    ) -> dict[str, np.ndarray]:
        table = torch.zeros(len(names), mini_batch.num_samples, device=device())
        for micro_batch, output in zip(mini_batch.micro_batches, outputs, strict=False):
            for row, name in zip(table, names, strict=True):
                row[micro_batch.sample_indices] = output[name]
        self._share(table)
        return dict(zip(names, table.cpu().numpy(), strict=True))

    def _sum_over_ranks(self, values: list[float]) -> list[float]:
        totals = torch.tensor(values, dtype=torch.float64, device=device())
        self._share(totals)
        return totals.tolist()

    def _share(self, table: Tensor) -> None:
        """Each entry is set on one data-parallel rank's last stage, 0 elsewhere: sums spread it."""
        dist.all_reduce(table, group=self.groups.dp)
        dist.all_reduce(table, group=self.groups.pp)
