"""Defines MegatronPolicy, the trained model as the rest of the program sees it. Plain Python, no Ray."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.utils import get_model_config, unwrap_model
from torch import Tensor

from megatron_vespo.algorithms.losses.output import LossOutput
from megatron_vespo.algorithms.losses.settings import BoundLoss, LossSettings
from megatron_vespo.algorithms.vespo import RatioDenominator
from megatron_vespo.checkpoints.block_fp8 import quantised
from megatron_vespo.checkpoints.run_folder import SaveReport
from megatron_vespo.data.host_memory import to_device, to_host
from megatron_vespo.data.micro_batch import MicroBatch
from megatron_vespo.data.packing import PackingRule
from megatron_vespo.data.shards import MiniBatchOutline, SampleOutline
from megatron_vespo.data.token_values import TokenValues
from megatron_vespo.models.family import family_of, shape_of
from megatron_vespo.models.hf_config import read_hf_config
from megatron_vespo.models.part import ModelPart
from megatron_vespo.trainer import checkpoint
from megatron_vespo.trainer.adaptive_kernel import ESTIMATED, STATE, AdaptiveKernel
from megatron_vespo.trainer.gradient_norms import GroupGradientNorms
from megatron_vespo.trainer.initialize import device, give_to_megatron, process_groups
from megatron_vespo.trainer.mini_batch import MiniBatch, Packer, token_places
from megatron_vespo.trainer.old_policy import Snapshots, old_policy
from megatron_vespo.trainer.reference import VERSION, reference_policy
from megatron_vespo.trainer.rounding import rounded_otherwise
from megatron_vespo.trainer.routing_replay import Routing, RoutingReplay, free_routing
from megatron_vespo.trainer.setup import set_up
from megatron_vespo.trainer.step import (
    LossFunction,
    Schedule,
    inputs_only,
    log_prob_only,
    policy_loss,
    ratio_only,
)
from megatron_vespo.trainer.step_result import StepResult, reduced
from megatron_vespo.trainer.token_values import token_values
from megatron_vespo.trainer.weight_copies import completes
from megatron_vespo.trainer.weights import held_weights, iterate_hf_weights, load_hf_weights, model_part
from megatron_vespo.types import TrainingSample


class MegatronPolicy:
    """The policy on this rank's part of the layout. All ranks call every method together.

    Build it after `trainer.initialize`. Weights come from `args.load` if it holds a checkpoint, else from
    `args.hf_checkpoint`. `args` are copied: Megatron reads the copy from now on, and this class does not
    write to it. `rollout_state` is what the last `save` stored, None for a fresh start. `iteration` is the
    number of optimizer steps done, which is the policy version.

    With `records_tokens`, `recorded` has the values of this rank's tokens in the last optimizer step.
    """

    def __init__(self, args: Namespace, settings: LossSettings, records_tokens: bool = False):
        resuming = checkpoint.exists(args)
        self.stored = checkpoint.stored(args) if resuming else None
        self.args = args = give_to_megatron(args, **(self.stored.schedule if self.stored else {}))
        state = self.stored.state if self.stored else {}
        kernel_state = {name: state.pop(name) for name in (STATE, ESTIMATED) if name in state}
        version = state.pop(VERSION, None)
        self.rollout_state: dict[str, Any] | None = state if self.stored else None
        self._use(settings, kernel_state)
        self.groups = process_groups()
        hf_config = read_hf_config(args.hf_checkpoint)
        self.family, self.shape = family_of(hf_config), shape_of(hf_config, args.padded_vocab_size)
        self.model, self.optimizer, self.scheduler, self.iteration = set_up(args)
        # one rank per pipeline stage sends full tensors to the engines, or writes them in an export
        self.is_sender = self.groups.tp.rank() == 0 and self.groups.dp_cp.rank() == 0
        self._records_tokens, self.recorded = records_tokens, cast("TokenValues | None", None)
        self._packer = Packer(args, self.groups, settings.old_policy == "snapshot", records_tokens)
        self._schedule = Schedule(self.model, args, self._packer.layout)
        self._replay = RoutingReplay(self.model, self.groups, args.sequence_parallel)
        load_hf = partial(load_hf_weights, self.model, self.family, self.shape, self.groups)
        if not resuming:
            load_hf(args.hf_checkpoint)
            self.optimizer.reload_model_params()
        self._complete = completes(self.model, self.optimizer, args.overlap_param_gather)
        self._old_policy = old_policy(settings, self.model, self.iteration, self._complete)
        loaded = None if resuming else args.hf_checkpoint
        self._reference = reference_policy(
            settings, args, self.model, loaded, load_hf, version, self._complete
        )
        self._gradient_norms = GroupGradientNorms(self.model, self.groups, args.num_layers)
        self._connect_schedule()
        self.saver = checkpoint.Saver(args, self.iteration)

    def use_loss(self, settings: LossSettings) -> None:
        """Train with another loss from the next step on. ValueError for other policies: they are built."""
        for name in (
            "old_policy", "old_policy_snapshots", "ewma_decay",
            "uses_reference", "reference_checkpoint", "reference_update_interval",
        ):  # fmt: skip
            before, now = getattr(self.settings, name), getattr(settings, name)
            if before != now:
                raise ValueError(f"{name} is {before!r} and cannot become {now!r}: build another policy")
        self._use(settings, {})

    def _use(self, settings: LossSettings, kernel_state: dict[str, Any]) -> None:
        self.settings, self._bound = settings, settings.bind()
        self._adaptive_kernel = AdaptiveKernel(
            settings.kernel, settings.vespo_budget, self.args.steps_per_rollout, kernel_state
        )

    def _connect_schedule(self) -> None:
        """Sets the hooks by which Megatron's schedule calls gradient reduction, as in Megatron's own loop."""
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
        """This rank's micro-batches of one mini-batch, in host memory; every rank cuts it the same way.

        ValueError on every rank for a sample that cannot be trained on, see `samples.check_sample`.
        """
        return self._packer.pack(samples)

    def build(
        self, outline: MiniBatchOutline, own: Mapping[int, TrainingSample], replay: bool = True
    ) -> MiniBatch:
        """The same from this rank's samples alone, by their index in the mini-batch; see `Packer.build`."""
        return self._packer.build(outline, own, replay)

    @property
    def packing_rule(self) -> PackingRule:
        """How `pack` cuts a mini-batch."""
        return self._packer.rule

    @torch.no_grad()
    def compute_old_log_probs(self, mini_batch: MiniBatch) -> None:
        """Store pi_old's log-probs and, for R2, its routes in the mini-batch. --old-policy chooses pi_old."""
        if isinstance(self._old_policy, Snapshots):
            self._compute_by_version(mini_batch, self._old_policy)
            return
        with self._old_policy.weights():
            self._keep_log_probs(mini_batch)

    def _keep_log_probs(self, mini_batch: MiniBatch) -> None:
        """Store the log-probs of the weights in place as pi_old's."""
        routing = self._replay.record if self.args.routing_replay == "R2" else self._routing
        outputs = self._run(mini_batch.micro_batches, log_prob_only, True, routing)
        for micro_batch, output in zip(mini_batch.micro_batches, outputs, strict=False):
            micro_batch.old_log_probs_T = to_host(output)

    def _compute_by_version(self, mini_batch: MiniBatch, snapshots: Snapshots) -> None:
        """Store each token's log-prob under the version that generated it, in the training pass's packs."""
        packs, versions = mini_batch.micro_batches, mini_batch.versions
        assert versions is not None
        old = [torch.zeros(len(pack.tokens_T), dtype=torch.float64) for pack in packs]
        for version in snapshots.versions(versions.samples):
            chosen = versions.packs_of(version)
            with snapshots.weights(version):
                outputs = self._run([packs[i] for i in chosen], log_prob_only, True, self._routing)
            for i, output in zip(chosen, outputs, strict=False):  # on the last pipeline stage
                mine = packs[i].loss_positions[versions.of(packs[i]) == version]
                old[i][mine] = output.cpu()[mine].double()
                packs[i].old_log_probs_T = old[i]

    @torch.no_grad()
    def compute_reference_log_probs(self, mini_batches: Sequence[MiniBatch]) -> None:
        """Store the reference policy's log-probs in the mini-batches. Its routers choose for themselves."""
        assert self._reference is not None, "no flag asks for a reference policy"
        with self._reference.weights():
            for mini_batch in mini_batches:
                outputs = self._run(mini_batch.micro_batches, log_prob_only, True, free_routing)
                for micro_batch, output in zip(mini_batch.micro_batches, outputs, strict=False):
                    micro_batch.reference_log_probs_T = to_host(output)

    def reference_log_probs(
        self, mini_batch: MiniBatch, samples: Sequence[SampleOutline]
    ) -> list[np.ndarray]:
        """What `compute_reference_log_probs` has stored, of all samples, float32 [N]; same on every rank."""
        stored = [micro_batch.reference_log_probs_T for micro_batch in mini_batch.micro_batches]
        values = [to_device(values_T, device()) for values_T in stored if values_T is not None]
        return self._packer.gather_tokens(mini_batch, values, samples)

    def train_step(self, mini_batch: MiniBatch) -> StepResult:
        """One optimizer step on the whole mini-batch."""
        return self.optimizer_step(mini_batch, self.forward_backward(mini_batch))

    def forward_backward(self, mini_batch: MiniBatch) -> list[LossOutput]:
        """Leaves the mini-batch's gradient in the model's buffers; returns the outputs of the losses."""
        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        routing = self._replay.replay if self.args.routing_replay == "R2" else self._routing
        loss = partial(
            policy_loss,
            bound=self._adapted_loss(mini_batch, routing),
            settings=self.settings,
            longest=self.args.max_completion_tokens,
            cp_group=self.groups.cp,
            keeps_log_probs=self._records_tokens,
        )
        with self._replay.comparing() if self._records_tokens else nullcontext():
            return self._run(mini_batch.micro_batches, loss, False, routing)

    def _adapted_loss(self, mini_batch: MiniBatch, routing: Routing) -> BoundLoss:
        """The policy loss for this mini-batch. A loss that adapts to it costs one more forward pass."""
        loss = self._adaptive_kernel.applied_to(self._bound.loss)
        if loss.adapt is None:
            return replace(self._bound, loss=loss)
        measure = partial(inputs_only, settings=self.settings, cp_group=self.groups.cp)
        with torch.no_grad():
            batch = self._run(mini_batch.micro_batches, measure, True, routing)
        if batch:  # other pipeline stages have no inputs, and compute no loss
            loss = loss.adapted(batch, self._packer.sum_over_tokens)
        return replace(self._bound, loss=loss)

    def optimizer_step(self, mini_batch: MiniBatch, outputs: list[LossOutput]) -> StepResult:
        """Update the weights with the gradient of `forward_backward`."""
        learning_rate = self.optimizer.param_groups[0]["lr"]
        gradient_norms = self._gradient_norms()
        updated, grad_norm, _ = self.optimizer.step()
        if not updated:
            raise RuntimeError(
                f"optimizer step {self.iteration + 1} found a non-finite gradient (norm {grad_norm})"
            )
        self.scheduler.step(increment=self.args.global_batch_size)
        self.iteration += 1
        self._old_policy.advance(self.iteration)
        if self._reference is not None:
            self._reference.advance(self.iteration)

        chooses_bounds = self._bound.loss.adapt is not None
        measured = reduced(outputs, mini_batch, self._packer, self.groups, chooses_bounds, gradient_norms)
        if self._records_tokens:
            self.recorded = token_values(mini_batch, outputs, self._replay, self.groups)
        sums = measured.sums
        return StepResult(
            loss=sums.loss / sums.loss_count,
            loss_terms=sums.loss_terms / sums.loss_count,
            kl_loss=sums.kl_loss / sums.loss_count,
            grad_norm=float(grad_norm),
            learning_rate=learning_rate,
            num_tokens=int(sums.num_tokens),
            zero_weight_share=sums.zero_weights / sums.num_tokens,
            entropy=sums.entropy / sums.num_tokens,
            **measured.columns,
            ratio_sums=sums.ratio,
            log_mismatch_sums=sums.log_mismatch,
            reference_sums=sums.reference,
            gradient_norms=measured.gradient_norms,
            clip_bounds=measured.clip_bounds,
            **self._adaptive_kernel.step(measured.columns["log_w"], mini_batch.sign_shares),
            padding_share=mini_batch.packing.padding_share,
            imbalance=mini_batch.packing.imbalance,
        )

    @torch.no_grad()
    def log_probs(self, samples: Sequence[TrainingSample], replay: bool = True) -> list[np.ndarray]:
        """log pi of every sampled token at its sampling temperature, float32 [N]; same on every rank.

        Without `replay` the routers choose for themselves, whatever --routing-replay says.
        """
        filled = self._packer.fill(samples)
        mini_batch = self._packer.pack(filled, replay)
        outputs = self._run(
            mini_batch.micro_batches, log_prob_only, True, self._routing if replay else free_routing
        )
        return self._packer.gather_tokens(mini_batch, outputs, filled)[: len(samples)]

    @torch.no_grad()
    def sequence_log_ratio(
        self, samples: Sequence[TrainingSample], denominator: RatioDenominator
    ) -> np.ndarray:
        """log W of every sample under the current weights, float32 [num_samples], identical on every rank.

        `recomputed` and `decoupled` need the samples' `old_log_probs`; ValueError names a sample without.
        With R3 the samples' routes are replayed. With R2 the routers choose for themselves here, as samples
        do not carry pi_old's routes.
        """
        if denominator != "rollout":
            missing = [i for i, sample in enumerate(samples) if sample.old_log_probs is None]
            if missing:
                raise ValueError(f"denominator {denominator!r}: sample {missing[0]} has no old_log_probs")
        mini_batch = self.pack(self._packer.fill(samples))
        return self._log_ratio(mini_batch, denominator, self._routing)[: len(samples)]

    @torch.no_grad()
    def log_w_floor(self, samples: Sequence[TrainingSample]) -> np.ndarray:
        """log W of every sample between two passes over the current weights, float32 [num_samples].

        Identical on every rank. The passes differ only in their roundings, see `rounded_otherwise`. Routes
        are replayed as between pi_old and a training pass.
        """
        mini_batch = self.pack(self._packer.fill(samples))
        self._keep_log_probs(mini_batch)
        routing = self._replay.replay if self.args.routing_replay == "R2" else self._routing
        with rounded_otherwise(self.model, self.args.params_dtype):
            return self._log_ratio(mini_batch, "recomputed", routing)[: len(samples)]

    def _log_ratio(
        self, mini_batch: MiniBatch, denominator: RatioDenominator, routing: Routing
    ) -> np.ndarray:
        """log W of every sample of the mini-batch, float32 [num_samples], identical on every rank."""
        settings = replace(self.settings, ratio_denominator=denominator)
        loss = partial(ratio_only, settings=settings, cp_group=self.groups.cp)
        outputs = self._run(mini_batch.micro_batches, loss, True, routing)
        log_w = torch.cat(outputs)[None] if outputs else None
        return self._packer.gather_sequences(mini_batch, log_w)[0].cpu().numpy()

    @torch.no_grad()
    def chosen_experts(self, samples: Sequence[TrainingSample]) -> list[np.ndarray]:
        """The routers' experts of every token, int32 [P + C, L, K], ascending in K; same on every rank."""
        filled = self._packer.fill(samples)
        mini_batch = self.pack(filled)
        lengths = torch.tensor([sample.num_tokens for sample in filled], device=device())
        table = torch.zeros(
            len(filled), int(lengths.max()), self.args.num_layers, self.args.moe_router_topk,
            dtype=torch.int32, device=device(),
        )  # fmt: skip

        @contextmanager
        def observed(chunk: int, micro_batch: MicroBatch):
            with self._routing(chunk, micro_batch), self._replay.observe(chunk) as chosen:
                yield
            positions = torch.arange(len(micro_batch.tokens_T), device=device())
            index, place = token_places(micro_batch, self._replay.seen(positions))
            real = place < lengths[index]
            for layer, experts in chosen.items():
                table[index[real], place[real], layer] = experts[real].int()

        self._run(mini_batch.micro_batches, log_prob_only, True, observed)
        self._packer.share(table, self.groups.tp, self.groups.cp)
        rows = table[: len(samples)].cpu().numpy()
        return [row[: sample.num_tokens] for row, sample in zip(rows, samples, strict=True)]

    def named_hf_weights(self, fp8: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Full HF-named tensors of this rank's pipeline stage; a collective of the stage's ranks.

        With `fp8` as `block_fp8.quantised` makes them: of whole tensors, so every layout has the same.
        """
        tensors = (
            named
            for chunk in self._updated_chunks()
            for named in iterate_hf_weights(chunk, self.family, self.shape, self.groups)
        )
        return quantised(tensors) if fp8 else tensors

    def held_weights(self) -> dict[str, Tensor]:
        """This rank's own parameters by the first HF tensor that each is made of; no copies."""
        return {
            name: tensor
            for chunk in self._updated_chunks()
            for name, tensor in held_weights(chunk, self.family, self.shape, self.groups).items()
        }

    @property
    def part(self) -> ModelPart:
        """Which part of the model this rank holds."""
        return model_part(unwrap_model(self.model), self.groups)

    def _updated_chunks(self) -> list[Any]:
        """The model's, after the gathers of the last update, which may still be going on."""
        self._complete()
        return unwrap_model(self.model)

    def save(self, rollout_state: dict, files: dict[str, bytes] | None = None) -> list[SaveReport]:
        """Save weights, optimizer, schedule, RNG and the arguments; see `checkpoint.Saver.save`."""
        state, beside = rollout_state | self._adaptive_kernel.state(), nullcontext()
        if self._reference is not None:
            state, beside = state | self._reference.state(), self._reference.saved()
        model, optimizer, scheduler = self.model, self.optimizer, self.scheduler
        return self.saver.save(self.iteration, model, optimizer, scheduler, state, files or {}, beside)

    def _run[Output](
        self, packs: Sequence[MicroBatch], loss: LossFunction[Output], forward_only: bool, routing: Routing
    ) -> list[Output]:
        outputs = self._schedule.run(packs, loss, forward_only, routing)
        self._replay.finish()
        return outputs

    @property
    def _routing(self):
        """Routing of a pass that need not follow the pass that computed pi_old."""
        return self._replay.replay if self.args.routing_replay == "R3" else free_routing
