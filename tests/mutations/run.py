"""Breaks the code on purpose, one line at a time, in a copy; a test must fail for each.

    .venv/bin/python tests/mutations/run.py [part of a name]

Prints a line a mutation and exits with 1 when one survives. The unbroken copy must pass first.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
TIMEOUT_S = 600

LAYOUTS = "tests/distributed/test_layouts.py"
REPLAY = "tests/distributed/test_routing_replay.py"
MISMATCH = "tests/distributed/test_mismatch.py"
OLD_POLICY = "tests/distributed/test_old_policy.py"
REFERENCE = "tests/distributed/test_reference.py"
INVARIANCE = "tests/distributed/test_invariance.py"
BUDGET = "tests/unit/algorithms/test_vespo_budget.py"
PLAN = "tests/unit/weight_sync/test_sync_plan.py"
TRAFFIC = "tests/unit/weight_sync/test_traffic.py"
PLAN_SYNC = "tests/unit/commands/test_plan_weight_sync.py"
SCORING = "tests/unit/rollout/test_scoring.py"
ASYNC_REWARDS = "tests/unit/rewards/test_async_rewards.py"
SANDBOX = "tests/unit/rewards/test_sandbox.py"
ATTACKS = "tests/unit/rewards/test_malicious_programs.py"
TRUNCATED = "tests/unit/rollout/test_truncated_sampling.py"
SUPPORTED = "tests/unit/algorithms/test_supported_log_probs.py"
TEACHERS = "tests/unit/rollout/test_teachers.py"
BUDGET_STATE = "tests/distributed/test_vespo_budget_state.py"


@dataclass(frozen=True)
class Mutation:
    """`old`, which occurs once in `file`, becomes `new`; `tests` (a file and a -k expression) must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, str]


MUTATIONS = [
    Mutation(
        "FP8: a block's scale is that of its first row",
        "checkpoints/block_fp8.py",
        "    largest = blocks.abs().amax(dim=(1, 3))\n",
        "    largest = blocks[:, :1].abs().amax(dim=(1, 3))\n",
        ("tests/unit/checkpoints/test_block_fp8.py", "like_a_loop"),
    ),
    Mutation(
        "FP8: an engine that cuts blocks is accepted",
        "weight_sync/engine_layout.py",
        "        if part.rows % BLOCK or part.cols % BLOCK:\n",
        "        if part.cols % BLOCK:\n",
        ("tests/unit/arguments/test_quantization_flags.py", "what_does_not"),
    ),
    Mutation(
        "segment boundaries: log W of a sequence gets its neighbour's tokens",
        "data/micro_batch.py",
        'fields["sequence_ids_T"][start:end] = s\n',
        'fields["sequence_ids_T"][start:end] = max(s - 1, 0)\n',
        (LAYOUTS, "sum_over_the_completion and one"),
    ),
    Mutation(
        "segment boundaries: attention sees the whole pack as one sequence",
        "trainer/attention.py",
        "        bounds = cu_seqlens.cpu().numpy()\n",
        "        bounds = cu_seqlens.cpu().numpy()[[0, -1]]\n        max_seqlen = int(bounds[-1])\n",
        (LAYOUTS, "equal_transformers and one"),
    ),
    Mutation(
        "segment boundaries: positions are not restarted",
        "trainer/attention.py",
        '"position_T": _positions(bounds)[layout.local_indices(bounds)]',
        '"position_T": np.minimum(layout.local_indices(bounds), max_seqlen - 1)',
        (LAYOUTS, "equal_transformers and one"),
    ),
    Mutation(
        "RoPE: the backward pass rotates forward",
        "trainer/rotary.py",
        "sin_T1R, torch.Tensor.sub_",
        "sin_T1R, torch.Tensor.add_",
        ("tests/distributed/test_rotary.py", "megatrons"),
    ),
    Mutation(
        "context parallelism: log W is not summed over the ranks",
        "algorithms/vespo.py",
        "    if group is not None and group.size() > 1:\n        dist.all_reduce(sums_S, group=group)\n",
        "",
        (LAYOUTS, "cp2 and not tp2 and not pp2 and not ep2"),
    ),
    Mutation(
        "context parallelism: loss and token counts are not summed over the ranks",
        "trainer/step_result.py",
        "    packer.share(sums, groups.cp)\n",
        "    packer.share(sums)\n",
        (LAYOUTS, "depend and cp2 and not tp2 and not pp2 and not ep2"),
    ),
    Mutation(
        "context parallelism: gathered keys stay in the ranks' order",
        "trainer/attention.py",
        "group=self.cp_group)[pack.key_order_G]",
        "group=self.cp_group)",
        (LAYOUTS, "depend and cp2 and not tp2 and not pp2 and not ep2"),
    ),
    Mutation(
        "context parallelism: plain halves instead of zig-zag",
        "data/context_parallel.py",
        "parts += [chunks[self.cp_rank], chunks[-1 - self.cp_rank]]",
        "parts += [chunks[2 * self.cp_rank], chunks[2 * self.cp_rank + 1]]",
        (LAYOUTS, "depend and cp2 and not tp2 and not pp2 and not ep2"),
    ),
    Mutation(
        "pipeline: the other stages are not told",
        "trainer/mini_batch.py",
        "for group in (*more_groups, self._groups.dp, self._groups.pp):",
        "for group in (*more_groups, self._groups.dp):",
        (LAYOUTS, "knows and pp2 and not vpp2 and not ep2"),
    ),
    Mutation(
        "data parallelism: ranks keep their own samples' values",
        "trainer/mini_batch.py",
        "for group in (*more_groups, self._groups.dp, self._groups.pp):",
        "for group in (*more_groups, self._groups.pp):",
        (LAYOUTS, "knows and small"),
    ),
    Mutation(
        "denominator: the mismatch is left out of W",
        "algorithms/vespo.py",
        "        staleness_S + log_mismatch_in_w_S, log_mismatch_in_w_S,",
        "        staleness_S, log_mismatch_in_w_S,",
        (INVARIANCE, "denominators and one"),
    ),
    Mutation(
        "denominator: decoupled does not truncate",
        "algorithms/vespo.py",
        "log_mismatch_S.clamp(max=most)",
        "log_mismatch_S",
        (INVARIANCE, "denominators and one"),
    ),
    Mutation(
        "denominator: decoupled-token does not truncate",
        "algorithms/vespo.py",
        "(old_log_probs_T, behavior_log_probs_T, most),",
        "(old_log_probs_T, behavior_log_probs_T, math.inf),",
        ("tests/unit/algorithms/test_vespo.py", "parts"),
    ),
    Mutation(
        "clipping: the dual clip also caps responses better than average",
        "algorithms/losses/clipped.py",
        "floor_T = torch.where(advantages_T < 0, dual_clip * advantages_T, -math.inf)",
        "floor_T = dual_clip * advantages_T",
        ("tests/unit/algorithms/test_losses.py", "dual_clip"),
    ),
    Mutation(
        "denominator: pi_old is forgotten",
        "trainer/policy.py",
        "micro_batch.old_log_probs_T = to_host(output)",
        "micro_batch.old_log_probs_T = to_host(output) * 0",
        ("tests/distributed/test_denominators.py", "recomputed or decoupled"),
    ),
    Mutation(
        "denominator: tokens of the micro-batch instead of the optimizer step",
        "trainer/step.py",
        "    return loss_sum, loss_count.int(), output\n",
        "    return loss_sum / loss_count, loss_count.int() * 0 + 1, output\n",
        (INVARIANCE, "rounding and 100"),
    ),
    Mutation(
        "denominator: every context-parallel rank counts the responses",
        "algorithms/losses/aggregation.py",
        "len(inputs.advantages_S) if first_context_rank else 0",
        "len(inputs.advantages_S)",
        ("tests/distributed/test_policy_losses.py", "cp2"),
    ),
    Mutation(
        "denominator: a response's length is that of its part on the rank",
        "data/micro_batch.py",
        "[sample.num_trained for sample in chosen], np.float32)",
        "[max(1, sample.num_trained // layout.cp_size) for sample in chosen], np.float32)",
        ("tests/distributed/test_policy_losses.py", "cp2"),
    ),
    Mutation(
        "given tokens: one that ends a response is trained on",
        "data/micro_batch.py",
        'fields["loss_mask_T"][predicting] = 1.0',
        'fields["loss_mask_T"][np.append(predicting, start + sample.num_tokens - 2)] = 1.0',
        ("tests/unit/data/test_micro_batch.py", "given_tokens_enter"),
    ),
    Mutation(
        "given tokens: they count in the length",
        "data/micro_batch.py",
        "[sample.num_trained for sample in chosen]",
        "[sample.completion_length for sample in chosen]",
        ("tests/unit/data/test_micro_batch.py", "given_tokens_enter"),
    ),
    Mutation(
        "given tokens: they count in the metrics of lengths",
        "observability/rollout_metrics.py",
        "lengths = np.array([[completion.num_sampled for completion in group]",
        "lengths = np.array([[len(completion.token_ids) for completion in group]",
        ("tests/unit/observability/test_rollout_metrics.py", "given_tokens"),
    ),
    Mutation(
        "given tokens: the versions of pi_old's snapshots do not skip them",
        "trainer/mini_batch.py",
        "per_token[np.concatenate(masks)] = ",
        "per_token[: sum(sample.num_trained for sample in own)] = ",
        (OLD_POLICY, "versions_are_those"),
    ),
    Mutation(
        "mismatch: the correction does not reach the loss",
        "trainer/step.py",
        "longest, correction_T, terms)",
        "longest, None, terms)",
        (MISMATCH, "closed_form"),
    ),
    Mutation(
        "mismatch: rho is the engine's against the trainer's",
        "algorithms/corrections.py",
        "old_log_probs_T.detach().double() - behavior_log_probs_T.double()",
        "behavior_log_probs_T.double() - old_log_probs_T.detach().double()",
        (MISMATCH, "closed_form and tis"),
    ),
    Mutation(
        "mismatch: OPSM masks responses better than average",
        "algorithms/corrections.py",
        "torch.where(advantages_S < 0, kl_S,",
        "torch.where(advantages_S > 0, kl_S,",
        ("tests/unit/algorithms/test_corrections.py", "opsm"),
    ),
    Mutation(
        "mismatch: OPSM does not see staleness",
        "algorithms/vespo.py",
        "log_mismatch_S, staleness_S + log_mismatch_S\n",
        "log_mismatch_S, log_mismatch_S\n",
        (MISMATCH, "closed_form and opsm"),
    ),
    Mutation(
        "mismatch: KPop asks one direction",
        "algorithms/corrections.py",
        "torch.maximum(binary_kl(log_old_T, log_mu_T), ",
        "(",
        ("tests/unit/algorithms/test_corrections.py", "kpop"),
    ),
    Mutation(
        "mismatch: the divergence of a response is that of its part on the rank",
        "algorithms/corrections.py",
        "len(inputs.advantages_S), self.group)",
        "len(inputs.advantages_S), None)",
        (MISMATCH, "depend and cp2"),
    ),
    Mutation(
        "advantages per token: phi goes by the sign of the response's",
        "algorithms/losses/inputs.py",
        "[self.advantages_T.sign().long()",
        "[self.per_token(self.advantages_S).sign().long()",
        ("tests/unit/algorithms/test_token_advantages.py", "sign"),
    ),
    Mutation(
        "advantages per token: for the budget a response counts in full for both signs",
        "algorithms/vespo_budget.py",
        "c1, c2, sign_shares[chosen, i])",
        "c1, c2)",
        (BUDGET, "share"),
    ),
    Mutation(
        "advantages per token: they do not reach the loss",
        "trainer/step.py",
        "token_advantages_T=micro_batch.token_advantages_T,",
        "token_advantages_T=None,",
        ("tests/distributed/test_policy_losses.py", "naive and cp2"),
    ),
    Mutation(
        "old policy: a token gets the newest version's log-prob",
        "trainer/policy.py",
        "packs[i].loss_positions[versions.of(packs[i]) == version]",
        "packs[i].loss_positions",
        (OLD_POLICY, "snapshots and one"),
    ),
    Mutation(
        "old policy: the weights of now stay in place",
        "trainer/weight_copies.py",
        "        _write(model, tensors)\n        yield\n",
        "        yield\n",
        (OLD_POLICY, "one"),
    ),
    Mutation(
        "old policy: the weights are not restored",
        "trainer/weight_copies.py",
        "        _settle(model)\n        _write(model, own)\n",
        "        _settle(model)\n",
        (OLD_POLICY, "one"),
    ),
    Mutation(
        "old policy: snapshots are put a token too far",
        "trainer/mini_batch.py",
        "starts + 1 - np.array(",
        "starts + 2 - np.array(",
        (OLD_POLICY, "snapshots and one"),
    ),
    Mutation(
        "old policy: the first weights count once more in the average",
        "trainer/old_policy.py",
        "1.0 / self._total)",
        "1.0 / (self._total + 1.0))",
        (OLD_POLICY, "average and one"),
    ),
    Mutation(
        "reference: its log-probs are the policy's",
        "trainer/reference.py",
        "        return swapped(self._model, self._tensors)\n",
        "        return swapped(self._model, copies(self._model))\n",
        (REFERENCE, "naive and one"),
    ),
    Mutation(
        "reference: a checkpoint holds the policy in its place",
        "trainer/reference.py",
        "places[part.data.data_ptr()].view(part.data.shape)",
        "part.data.detach().clone()",
        (REFERENCE, "resumed and moved and one"),
    ),
    Mutation(
        "reference: the KL term is not aggregated as the loss",
        "trainer/step.py",
        "kl_sum = weighted_sum(kl_T, inputs, bound.aggregation, longest)",
        'kl_sum = weighted_sum(kl_T, inputs, "token-mean", longest)',
        (REFERENCE, "naive and one"),
    ),
    Mutation(
        "reference: k3 has the gradient of k2",
        "algorithms/losses/kl.py",
        "return change_T + x_T, -change_T",
        "return change_T + x_T, x_T",
        ("tests/unit/algorithms/test_kl.py", "on_policy"),
    ),
    Mutation(
        "reference: the penalty is a bonus",
        "algorithms/advantages.py",
        "rewards - penalties",
        "rewards + penalties",
        ("tests/unit/driver/test_kl_penalty.py", "penalised"),
    ),
    Mutation(
        "mismatch: the engine's weight is counted twice without a word",
        "algorithms/corrections.py",
        "        denominators=DECOUPLED,\n",
        '        denominators=("recomputed",),\n',
        ("tests/unit/algorithms/test_corrections.py", "reason"),
    ),
    Mutation(
        "diagnostics: the sums of tokens include those that are not trained on",
        "algorithms/token_sums.py",
        ".double().masked_fill(loss_mask_T == 0, 0.0)",
        ".double().nan_to_num()",
        ("tests/unit/algorithms/test_token_sums.py", "micro_batches"),
    ),
    Mutation(
        "diagnostics: mismatch's share leaves out what it shares with staleness",
        "algorithms/diagnostics.py",
        "(log_mismatch_in_w - log_mismatch_in_w.mean()) * (log_w - log_w.mean())",
        "(log_mismatch_in_w - log_mismatch_in_w.mean()) ** 2",
        ("tests/unit/algorithms/test_diagnostics.py", "split"),
    ),
    Mutation(
        "diagnostics: every rank keeps its own part of the gradient norms",
        "trainer/gradient_norms.py",
        "        dist.all_reduce(totals)\n",
        "",
        ("tests/distributed/test_gradient_norms.py", "parts and ep2 and not cp2 and not vpp2 and not etp2"),
    ),
    Mutation(
        "alarms: staleness is blamed for mismatch",
        "algorithms/alarms.py",
        "main = max(shares,",
        "main = min(shares,",
        ("tests/unit/algorithms/test_alarms.py", "cause"),
    ),
    Mutation(
        "diagnostics: rounding counts as staleness",
        "algorithms/diagnostics.py",
        "noise = min(float((rounding * (staleness != 0.0)).mean()), spread * spread)",
        "noise = 0.0",
        ("tests/unit/algorithms/test_diagnostics.py", "floor"),
    ),
    Mutation(
        "log-probs: logits are rounded to the inputs' type",
        "algorithms/linear_log_probs.py",
        "torch.mm(left.to(out.dtype), right.to(out.dtype), out=out)",
        "out.copy_(left @ right)",
        ("tests/unit/algorithms/test_linear_log_probs.py", "bfloat16"),
    ),
    Mutation(
        "supports: a token gets those of the token before it",
        "algorithms/supports.py",
        "index_T.repeat_interleave(counts_T,",
        "index_T.roll(-1).repeat_interleave(counts_T,",
        (SUPPORTED, "of_the_supports and dtype0"),
    ),
    Mutation(
        "supports: logits outside of them are left as they are",
        "algorithms/supports.py",
        "logits_TW.masked_fill_(self.restricted_T[:, None], OUTSIDE)",
        "logits_TW.masked_fill_(self.restricted_T[:, None], 0.0)",
        (SUPPORTED, "of_the_supports and dtype0"),
    ),
    Mutation(
        "supports: the backward leaves out the tokens that it does not compute, not their supports",
        "algorithms/linear_log_probs.py",
        "None if ctx.supports is None else ctx.supports.of_tokens(rows_R)",
        "ctx.supports and ctx.supports.of_tokens(torch.arange(len(rows_R)))",
        (SUPPORTED, "take_their_supports"),
    ),
    Mutation(
        "supports: every rank takes its rows for the first of the vocabulary",
        "algorithms/linear_log_probs.py",
        "None if supports is None else supports.counted_from(first_row)",
        "supports",
        ("tests/distributed/test_vocabulary_parallel_log_probs.py", "agree and supports"),
    ),
    Mutation(
        "supports: context-parallel ranks take the first tokens' supports",
        "data/micro_batch.py",
        "token_T[kept][predicting_T[kept]]",
        "np.arange(predicting_T[kept].sum())",
        ("tests/unit/data/test_micro_batch.py", "supports_lie"),
    ),
    Mutation(
        "supports: the trainer computes log-probs of the whole vocabulary",
        "trainer/log_probs.py",
        "supports=_supports(micro_batch),",
        "supports=None,",
        ("tests/distributed/test_policy_losses.py", "supports_are and one"),
    ),
    Mutation(
        "masks: mu stays that of the whole vocabulary",
        "rollout/generate_reply.py",
        "log_probs = scored[0::3] if supports is None else",
        "log_probs = scored[0::3] if True else",
        ("tests/unit/rollout/test_sampling_mask.py", "truncated_distribution"),
    ),
    Mutation(
        "masks: ids stay in the engine's order",
        "rollout/sampling_mask.py",
        "keys.sort()",
        "pass",
        ("tests/unit/rollout/test_sampling_mask.py", "truncated_distribution"),
    ),
    Mutation(
        "masks: a continued response has the supports of its beginning",
        "rollout/engine_client.py",
        "TokenSupports.joined([begun.supports, rest.supports])",
        "begun.supports",
        (TRUNCATED, "continued_response"),
    ),
    Mutation(
        "masks: evaluation draws as training does",
        "rollout/evaluate.py",
        "sampling.untruncated()",
        "sampling",
        (TRUNCATED, "evaluation_draws"),
    ),
    Mutation(
        "masks: checkpoints lose the supports of responses in flight",
        "data/completion_arrays.py",
        " | _support_arrays(completions) | ",
        " | ",
        (TRUNCATED, "files_keep"),
    ),
    Mutation(
        "log W: the floor is measured between two equal passes",
        "trainer/rounding.py",
        "output.view(-1)[::EVERY] *= 1 + torch.finfo(dtype).eps",
        "output.view(-1)[::EVERY] *= 1",
        ("tests/distributed/test_log_w_floor.py", "one and bf16"),
    ),
    Mutation(
        "mismatch: a token that is no number is rejected instead of seen",
        "algorithms/corrections.py",
        ".masked_fill(values.isnan(), torch.nan)",
        "",
        ("tests/unit/algorithms/test_corrections.py", "visible"),
    ),
    Mutation(
        "alarms: staleness is blamed for what a correction rejects",
        "algorithms/alarms.py",
        "if dead and corrected > MAIN_CAUSE:",
        "if False:",
        ("tests/unit/algorithms/test_alarms.py", "rejects"),
    ),
    Mutation(
        "adaptive losses: every rank chooses by its own tokens",
        "trainer/mini_batch.py",
        "            dist.all_reduce(values, group=self._groups.dp_cp)\n        return values\n",
        "            pass\n        return values\n",
        ("tests/distributed/test_policy_losses.py", "dp2"),
    ),
    Mutation(
        "adaptive losses: BAPO raises the lower bound first",
        "algorithms/losses/bapo.py",
        "if high < len(highs) - 1:",
        "if low == len(lows) - 1:",
        ("tests/unit/algorithms/test_losses.py", "bapo"),
    ),
    Mutation(
        "adaptive losses: M2PO masks tokens that return to the old policy",
        "algorithms/losses/m2po.py",
        "inputs.log_ratio_T > 0\n",
        "inputs.log_ratio_T != 0\n",
        ("tests/unit/algorithms/test_losses.py", "m2po"),
    ),
    Mutation(
        "adaptive losses: M2PO masks one token too few",
        "algorithms/losses/m2po.py",
        ">= bound",
        "> bound",
        ("tests/unit/algorithms/test_losses.py", "m2po"),
    ),
    Mutation(
        "divergences: DPPO masks tokens that return to the old policy",
        "algorithms/losses/dppo.py",
        "(log_ratio_T < 0) & (",
        "(log_ratio_T != 0) & (",
        ("tests/unit/algorithms/test_losses.py", "dppo"),
    ),
    Mutation(
        "divergences: DPPO's KL is that of pi against mu",
        "algorithms/losses/dppo.py",
        "return log_pi_T - inputs.log_ratio_T, log_pi_T",
        "return log_pi_T, log_pi_T - inputs.log_ratio_T",
        ("tests/unit/algorithms/test_losses.py", "dppo"),
    ),
    Mutation(
        "adaptive losses: the pass they adapt by routes freely",
        "trainer/policy.py",
        "batch = self._run(mini_batch.micro_batches, measure, True, routing)",
        "batch = self._run(mini_batch.micro_batches, measure, True, free_routing)",
        (REPLAY, "adapts_by"),
    ),
    Mutation(
        "advantages: leave-one-out keeps the completion's own reward",
        "algorithms/advantages.py",
        "_normalized(penalised) * (n / max(n - 1, 1))",
        "_normalized(penalised) * 1.0",
        ("tests/unit/algorithms/test_advantages.py", "loops"),
    ),
    Mutation(
        "advantages: pairs of any lengths",
        "algorithms/length_pairs.py",
        " & (gap_p <= length_gap)",
        "",
        ("tests/unit/algorithms/test_advantages.py", "pairs"),
    ),
    Mutation(
        "advantages: the penalty for length does not reach them",
        "driver/training_samples.py",
        "[completion.shaped_reward for completion in group]",
        "[completion.reward for completion in group]",
        ("tests/unit/rollout/test_dynamic_sampling.py", "penalty"),
    ),
    Mutation(
        "recorded rollouts: the engine's log-probs are rounded",
        "data/completion_arrays.py",
        "end_to_end([c.log_probs for c in completions], np.float32)",
        "end_to_end([c.log_probs for c in completions], np.float16)",
        ("tests/unit/data/test_rollout_file.py", "every_bit"),
    ),
    Mutation(
        "partial responses: the routes of a later pass replace those that sampled",
        "rollout/engine_client.py",
        "entered if keeps_routes else None",
        "0 if keeps_routes else None",
        ("tests/unit/rollout/test_continued_routes.py", "new_routes_only"),
    ),
    Mutation(
        "multi-turn: the routes of given tokens are not asked for",
        "rollout/engine_client.py",
        "len(asked.token_ids) - 1 - begun.num_given_at_end",
        "len(asked.token_ids) - 1",
        ("tests/unit/rollout/test_continued_routes.py", "given_tokens"),
    ),
    Mutation(
        "multi-turn: a saved episode's last observation has routes",
        "data/completion_arrays.py",
        "one.num_given_at_end if one is not None else 0 for one in segments",
        "0 for one in segments",
        ("tests/unit/rollout/test_buffer_state.py", "ends_with_an_observation"),
    ),
    Mutation(
        "multi-turn: an observation forges control tokens",
        "data/turns.py",
        "[self._without_control(m, cut) for m in messages]",
        "messages",
        ("tests/unit/data/test_real_templates.py", "forges"),
    ),
    Mutation(
        "multi-turn: the end of an answer is repeated",
        "data/turns.py",
        "token_ids[1:] if is_there else",
        "",
        ("tests/unit/data/test_turns.py", "follows_an_answer"),
    ),
    Mutation(
        "replies: log-probs of other tokens are taken",
        "rollout/generate_reply.py",
        "if scored[1::3] != token_ids:",
        "if len(scored) != 3 * len(token_ids):",
        ("tests/unit/rollout/test_generate_reply.py", "token_by_token"),
    ),
    Mutation(
        "partial responses: what was begun is asked for again, and there twice",
        "rollout/engine_client.py",
        "token_ids=np.concatenate([prompt.token_ids, begun.token_ids]))",
        "token_ids=prompt.token_ids)",
        ("tests/unit/rollout/test_async_collector.py", "suspended"),
    ),
    Mutation(
        "partial responses: all tokens get the version that finished them",
        "rollout/engine_client.py",
        "VersionSpans.joined([begun.policy_versions, rest.policy_versions])",
        "VersionSpans.single(rest.policy_versions.last, len(begun.token_ids) + len(rest.token_ids))",
        ("tests/unit/rollout/test_async_collector.py", "suspended"),
    ),
    Mutation(
        "asynchronous: the bound of a group that goes on forgets its older tokens",
        "rollout/buffer.py",
        "version = min(self.policy_version, oldest_version(begun)) if begun else self.policy_version",
        "version = self.policy_version",
        ("tests/unit/rollout/test_rollout_buffer.py", "keeps_what"),
    ),
    Mutation(
        "recorded rollouts: a batch is trained on twice",
        "rollout/recorded_batches.py",
        "iteration // self._steps_per_rollout",
        "iteration // self._steps_per_rollout // 2",
        ("tests/unit/driver/test_debug_modes.py", "same_samples"),
    ),
    Mutation(
        "replay: recomputation routes freely",
        "trainer/routing_replay.py",
        "self._set_action(chunk, RouterReplayAction.REPLAY_BACKWARD)",
        "self._set_action(chunk, None)",
        (REPLAY, "pass_of_a_step and pp2 and not vpp2 and R3"),
    ),
    Mutation(
        "replay: recomputation takes the latest micro-batch's routes",
        "trainer/routing_replay.py",
        "self._set_action(chunk, RouterReplayAction.REPLAY_BACKWARD)",
        "pass",
        (REPLAY, "pass_of_a_step and pp2 and not vpp2 and R3"),
    ),
    Mutation(
        "replay: every layer gets the first layer's routes",
        "trainer/routing_replay.py",
        "return [routes_R[:, layer] for layer in self.local_layers(chunk)]",
        "return [routes_R[:, 0] for layer in self.local_layers(chunk)]",
        (REPLAY, "sent and one"),
    ),
    Mutation(
        "replay: all tensor-parallel ranks take the first slice",
        "trainer/routing_replay.py",
        "(groups.tp.rank(), groups.tp.size())",
        "(0, groups.tp.size())",
        (REPLAY, "sent and vpp2"),
    ),
    Mutation(
        "replay: routes lie one token late",
        "data/micro_batch.py",
        "routes[start : start + sample.num_tokens - 1] = array",
        "routes[start + 1 : start + sample.num_tokens] = array",
        (REPLAY, "sent and one"),
    ),
    Mutation(
        "shards: all data-parallel ranks receive the first one's samples",
        "cluster/trainer_group.py",
        "Shard.of(samples, outline.cut.of_rank(rank))",
        "Shard.of(samples, outline.cut.of_rank(0))",
        ("tests/unit/cluster/test_trainer_group_batches.py", "gets_its_samples"),
    ),
    Mutation(
        "log-probs: the temperature is ignored",
        "trainer/log_probs.py",
        "micro_batch.temperature_T[predicting],",
        "torch.ones_like(micro_batch.temperature_T[predicting]),",
        (LAYOUTS, "equal_transformers and one"),
    ),
    Mutation(
        "log-probs: the padding of the vocabulary gets probability",
        "trainer/log_probs.py",
        "vocab_size=context.vocab_size,",
        "vocab_size=len(output_layer.weight) * group.size(),",
        (LAYOUTS, "equal_transformers and tp2"),
    ),
    Mutation(
        "budget: c2 falls where E_Q[W] is above it",
        "algorithms/vespo_budget.py",
        "RATE * (expected - budget) / budget",
        "RATE * (budget - expected) / budget",
        (BUDGET, "fixed_point"),
    ),
    Mutation(
        "budget: both signs learn from A > 0",
        "algorithms/vespo_budget.py",
        "chosen = sign_shares[:, i] > 0",
        "chosen = sign_shares[:, 0] > 0",
        (BUDGET, "each_sign"),
    ),
    Mutation(
        "budget: c2 moves where most steps have no estimate",
        "algorithms/vespo_budget.py",
        "np.mean(known) >= MIN_ESTIMATED_SHARE",
        "np.mean(known) > 0.0",
        (BUDGET, "leave_c2_alone"),
    ),
    Mutation(
        "budget: a resumed run starts at the command's c2",
        "trainer/adaptive_kernel.py",
        "within_bounds(c1_positive, c2[0])",
        "kernel.positive[1]",
        (BUDGET_STATE, "resumed_equals"),
    ),
    Mutation(
        "asynchronous: a sample may be one step older than the bound",
        "rollout/buffer.py",
        "- entry[0] <= self._max_staleness",
        "- entry[0] <= self._max_staleness + 1",
        ("tests/unit/rollout/test_rollout_buffer.py", "nothing_is_lost"),
    ),
    Mutation(
        "asynchronous: more in flight than the steps up to the bound can train",
        "rollout/buffer.py",
        "places - self.num_in_flight - self.num_finished",
        "places - self.num_in_flight",
        ("tests/unit/rollout/test_rollout_buffer.py", "room_is"),
    ),
    Mutation(
        "weight sync: one trainer rank sends what all of them hold",
        "weight_sync/plan.py",
        "        source = min(candidates, key=self._sent.__getitem__)\n",
        "        source = candidates[0]\n",
        (PLAN, "replicas_share"),
    ),
    Mutation(
        "weight sync: a group may be larger than an engine rank's buffer",
        "weight_sync/plan.py",
        "        if max(sizes) + size > self._limit:\n",
        "        if sizes[0] + size > self._limit:\n",
        (TRAFFIC, "totals"),
    ),
    Mutation(
        "weight sync: all engines elsewhere are served by the same trainer ranks",
        "weight_sync/teams.py",
        "    number = math.gcd(len(replicas), len(engines))\n",
        "    number = 1\n",
        (TRAFFIC, "test_teams"),
    ),
    Mutation(
        "plan: what an engine rank has on its own GPU is counted as sent",
        "weight_sync/traffic.py",
        "    if source == target:\n",
        "    if False:\n",
        (PLAN_SYNC, "colocated"),
    ),
    Mutation(
        "rewards: a tool's output is the response",
        "data/transcript.py",
        'if turn.writer == "policy"), "")',
        'if turn), "")',
        (SCORING, "what_a_tool_wrote"),
    ),
    Mutation(
        "rewards: the whole conversation is the response",
        "rollout/scoring.py",
        "    return RewardItem(answer_text(turns), ",
        '    return RewardItem("".join(turn.text for turn in turns), ',
        (SCORING, "what_a_tool_wrote"),
    ),
    Mutation(
        "rewards: given tokens count for the penalty of length",
        "rollout/scoring.py",
        "np.array([completion.num_sampled for",
        "np.array([len(completion.token_ids) for",
        (SCORING, "length_penalty"),
    ),
    Mutation(
        "rewards: a failed environment's episode is judged",
        "rollout/scoring.py",
        "if not completion.environment_error]\n",
        "]\n",
        (SCORING, "failed_environment"),
    ),
    Mutation(
        "rewards: a coroutine that blocks is not known to the parent",
        "rewards/coroutines.py",
        "        self._show(index)\n",
        "",
        (ASYNC_REWARDS, "blocks_the_loop"),
    ),
    Mutation(
        "sandbox: a program may make any system call",
        "rewards/jail/zygote.py",
        "    kernel.install_filter(instructions)\n",
        "",
        (ATTACKS, "attack and another and Python"),
    ),
    Mutation(
        "sandbox: a program keeps the zygote's descriptors",
        "rewards/jail/zygote.py",
        '    os.closerange(len(wanted), os.sysconf("SC_OPEN_MAX"))\n',
        "",
        (ATTACKS, "descriptors"),
    ),
    Mutation(
        "sandbox: a program has the run's environment variables",
        "rewards/sandbox.py",
        "            env=_ENVIRONMENT,\n",
        "            env=dict(os.environ) | _ENVIRONMENT,\n",
        (ATTACKS, "environment and secrets"),
    ),
    Mutation(
        "code rewards: a test that catches the program's end passes",
        "rewards/jail/tester.py",
        "            yield passed and not program.is_lost  # a test may have caught the exception\n",
        "            yield passed\n",
        (SANDBOX, "exceptions"),
    ),
    Mutation(
        "code rewards: an empty list is close to every number",
        "rewards/jail/tester.py",
        "    _make_allclose_strict()\n",
        "",
        (SANDBOX, "close_to_no_number"),
    ),
    Mutation(
        "code rewards: a script that printed everything may crash",
        "rewards/code.py",
        "            passed.append(result.exit_status == 0 and same_output(printed, expected))\n",
        "            passed.append(same_output(printed, expected))\n",
        ("tests/unit/rewards/test_code_reward.py", "scripts"),
    ),
    Mutation(
        "code rewards: a data set's pickle may name functions",
        "rewards/code_formats.py",
        '        raise pickle.UnpicklingError(f"the pickle names {module}.{name}")\n',
        "        return super().find_class(module, name)\n",
        ("tests/unit/rewards/test_code_formats.py", "run_nothing"),
    ),
    Mutation(
        "distillation: the student is pushed away from its teacher",
        "algorithms/distillation.py",
        "terms = teacher.astype(np.float64) - behavior.astype(np.float64)",
        "terms = behavior.astype(np.float64) - teacher.astype(np.float64)",
        ("tests/unit/algorithms/test_distillation.py", "likes_better"),
    ),
    Mutation(
        "distillation: rewards count without their coefficient",
        "driver/training_samples.py",
        "weights.reward_coefficient * table",
        "1.0 * table",
        ("tests/unit/driver/test_training_samples.py", "teacher_alone"),
    ),
    Mutation(
        "distillation: given tokens have scores",
        "rollout/teachers.py",
        "return scores if completion.segments is None else scores[completion.segments.mask()[:end]]",
        "return scores",
        (TEACHERS, "given_tokens"),
    ),
    Mutation(
        "distillation: every source has the first teacher",
        "rollout/teachers.py",
        "if pair[0].source in (None, source)]",
        "if True]",
        (TEACHERS, "each_source"),
    ),
    Mutation(
        "distillation: a score that is not finite is taken",
        "rollout/score_reply.py",
        "    if len(bad):\n",
        "    if False:\n",
        (TEACHERS, "not_finite"),
    ),
    Mutation(
        "distillation: a restarted teacher does not serve",
        "cluster/engine_fleet.py",
        "if self._fixed_weights and engine.state is State.READY:",
        "if self._fixed_weights and engine.num_starts == 1 and engine.state is State.READY:",
        ("tests/unit/cluster/test_engine_fleet.py", "fixed_weights"),
    ),
]


def main() -> int:
    wanted = [m for m in MUTATIONS if all(word in m.name for word in sys.argv[1:])]
    survivors = []
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        copy = Path(folder) / "repository"
        shutil.copytree(
            REPOSITORY, copy, ignore=shutil.ignore_patterns(".venv", ".git", "work", "__pycache__")
        )
        for tests in sorted({m.tests for m in wanted}):
            if not passes(copy, *tests):
                print(f"FAILS WITHOUT A MUTATION: {' -k '.join(tests)}")
                return 1
        for mutation in wanted:
            started = time.monotonic()
            survived = tried(copy, mutation)
            survivors += [mutation.name] * survived
            verdict = "SURVIVED" if survived else "found   "
            print(f"{verdict} {time.monotonic() - started:4.0f} s  {mutation.name}", flush=True)
    print(f"{len(wanted) - len(survivors)} of {len(wanted)} mutations make a test fail")
    return int(bool(survivors))


def tried(copy: Path, mutation: Mutation) -> bool:
    """Whether the tests pass on the broken copy, which is whole again afterwards."""
    path = copy / "megatron_vespo" / mutation.file
    whole = path.read_text()
    assert whole.count(mutation.old) == 1, f"{mutation.name}: {mutation.file} has changed"
    path.write_text(whole.replace(mutation.old, mutation.new))
    try:
        return passes(copy, *mutation.tests)
    finally:
        path.write_text(whole)


def passes(copy: Path, file: str, selection: str) -> bool:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", file, "-k", selection]
    environment = os.environ | {
        "PYTHONPATH": str(copy),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        command, cwd=copy, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode in (0, 1), f"pytest ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
