"""The staleness study: its judgement, its design, its in-process engine and its tables."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, Qwen3MoeForCausalLM

from megatron_vespo.algorithms.losses.inputs import LossInputs
from megatron_vespo.algorithms.losses.table import METHODS
from megatron_vespo.algorithms.vespo import GammaKernel
from megatron_vespo.data.prompts import Columns, load_prompts
from megatron_vespo.data.tokenizer import ChatFormat

sys.path.insert(0, str(Path(__file__).parents[3] / "examples" / "staleness_study"))
import base_model  # noqa: E402
import design  # noqa: E402
import judge  # noqa: E402
import qwen3_moe  # noqa: E402
import real_stack  # noqa: E402
import running_sum  # noqa: E402
import sampler  # noqa: E402
import table  # noqa: E402
import task_files  # noqa: E402
import trial as trials  # noqa: E402


def record(
    accuracy: list[float], entropy: list[float] = (0.1, 0.05), error: str | None = None, **more
) -> dict:
    return {"accuracy": accuracy, "entropy": list(entropy), "error": error, **more}


@pytest.mark.parametrize(
    ("run", "collapsed", "harmed"),
    [
        (record([0.3, 0.5, 0.7, 0.7]), False, False),
        (record([0.3, 0.8, 0.3, 0.45]), True, False),  # 0.375 is below half of 0.8
        (record([0.3, 0.7, 0.3, 0.5]), False, False),
        (record([0.3, 0.3, 0.2, 0.2]), False, True),
        (record([0.9, 0.3, 0.3, 0.3]), True, False),  # the start counts as well
        (record([0.3, 0.7, 0.7], error="non-finite gradient"), True, False),
        (record([0.3, 0.7, 0.7], entropy=[0.3, 1.6]), True, False),
        (record([0.3, 0.7, 0.7], entropy=[0.1, 0.9]), False, False),  # below 1 nat
    ],
)
def test_judgement(run, collapsed, harmed):
    assert (judge.collapsed(run), judge.harmed(run)) == (collapsed, harmed)
    assert judge.works(run, 0.4) == (not collapsed and not harmed)
    assert not judge.works(run, 1.0)


def test_an_accuracy_is_final_over_two_evaluations():
    assert judge.final_accuracy(record([0.1, 0.6, 0.8])) == pytest.approx(0.7)


def finished(trial: trials.Trial) -> dict:
    """A run whose accuracy is best at 2e-4, for every variant alike."""
    final = 0.7 - abs(np.log2(trial.lr / 2e-4)) / 10 + trial.seed / 1e4
    fields = dataclasses.asdict(trial) | {"options": list(trial.options)}
    return {
        "key": trial.key,
        **fields,
        **record([0.3, final, final]),
        "steps": [0, 128, 256],
        "reward": [0.5, 0.68],
    }


def whole_study() -> list[dict]:
    records: list[dict] = []
    while True:
        known = {one["key"] for one in records}
        new = [one for one in dict.fromkeys(design.trials(records)) if one.key not in known]
        if not new:
            return records
        records += map(finished, new)


def test_the_design_begins_with_tuning_and_ends():
    first = design.trials([])
    assert {one.prompts for one in first} == {"tuning"}
    records = whole_study()
    assert len({one["key"] for one in records}) == len(records)
    assert {one["seed"] for one in records if one["prompts"] == "tuning"} == {design.TUNING_SEED}
    assert design.TUNING_SEED not in design.TEST_SEEDS
    print(f"{len(records)} runs")


def test_every_variant_gets_the_same_learning_rates():
    for variant, n in design.cells():
        assert [one.lr for one in design.tuning_trials(variant, n)] == list(design.LEARNING_RATES)


def test_tuning_and_test_prompts_differ():
    tuning, test = (
        {one.text for one in trials.held_out_prompts(trials.Trial("vespo", 1, 1e-4, 0, name))}
        for name in ("tuning", "test")
    )
    assert len(tuning) == len(test) == 256 and not tuning & test


def test_tables_of_a_whole_study():
    text = table.tables({one["key"]: one for one in whole_study()}, {})
    cells = [cell.strip() for line in text.splitlines() if line.startswith("| ") for cell in line.split("|")]
    # seeds 101 to 104: mean 71.025, standard deviation 0.0129, t 3.182 over the root of 4
    assert "71.0 ± 0.0 (2e-4)" in cells
    # no N = 1 run of losses that have the same gradient there
    assert cells.count("-") == 4 + 4 + 4 + 3 * 6 + 4 * 3
    assert "3 of 4: 0.0001, 0.0002, 0.0004" in cells or "4 of 4: 0.0001, 0.0002, 0.0004, 0.0008" in cells


def test_interval():
    runs = [record([0.0, value, value]) for value in (0.5, 0.6, 0.7)]
    assert table.summary(runs) == "60.0 ± 24.8"  # 4.303 * 10 / sqrt(3)
    assert table.summary(runs[:1]) == "50.0"


def test_all_losses_are_one_on_policy():
    """So one of them stands for all at N = 1."""
    mask = torch.tensor([1.0, 1.0, 0.0, 1.0])
    for variant in (*design.VARIANTS, *design.ONE_N_VARIANTS):
        log_probs = torch.tensor([-0.1, -2.0, -1.0, -0.5], requires_grad=True)
        inputs = LossInputs(
            log_probs_T=log_probs,
            log_ratio_T=torch.zeros(4),
            log_w_S=torch.zeros(2),
            advantages_S=torch.tensor([1.5, -0.5]),
            num_tokens_S=torch.tensor([2.0, 1.0]),
            loss_mask_T=mask,
            sequence_ids_T=torch.tensor([0, 0, 1, 1]),
        )
        loss = METHODS[variant.method].bind(GammaKernel())
        term = loss.adapted([inputs], reduce=lambda values: values)(inputs)
        (term.loss_T * mask).sum().backward()
        torch.testing.assert_close(log_probs.grad, torch.tensor([-1.5, -1.5, 0.0, 0.5]), msg=variant.label)


def test_rewards():
    [prompt] = running_sum.prompts(np.full((1, running_sum.LENGTH), 2))
    right = (np.full(running_sum.LENGTH, 2).cumsum() % 10).tolist()
    assert running_sum.reward(prompt, [*right, running_sum.EOS]) == 1.0
    assert running_sum.reward(prompt, right) == 0.0  # no end
    assert running_sum.reward(prompt, [*right[:-1], 3, running_sum.EOS]) == 0.0
    assert running_sum.reward(prompt, [running_sum.EOS]) == 0.0


REAL_TRIAL = trials.Trial("vespo", 16, 2e-4, 101, "test", engine="sglang")


def test_prompts_of_the_real_stack_are_those_of_the_study(tmp_path):
    tokenizer = task_files.tokenizer()
    tokenizer.save_pretrained(tmp_path)
    ours = trials.held_out_prompts(REAL_TRIAL)
    task_files.write_prompts(tmp_path / "prompts.jsonl", ours)
    read = load_prompts(
        tmp_path / "prompts.jsonl",
        ChatFormat(AutoTokenizer.from_pretrained(tmp_path), apply_template=False),
        Columns("question", "answer"),
        max_prompt_tokens=running_sum.LENGTH + 1,
        overlong="error",
        flag="--prompt-data",
    ).prompts
    assert [(one.token_ids.tolist(), one.answer) for one in read] == [
        (one.token_ids.tolist(), one.answer) for one in ours
    ]
    assert len(tokenizer) == running_sum.VOCAB_SIZE and tokenizer.eos_token_id == running_sum.EOS
    # the prompts that a run of the study draws first
    draw = np.random.default_rng([REAL_TRIAL.seed, 1])
    first = running_sum.prompts(running_sum.draw_digits(draw, 64))
    training = real_stack.train_prompts(REAL_TRIAL)
    assert training[:64] == first and len(training) == 1024


def test_the_reward_of_a_text_is_that_of_its_tokens():
    tokenizer = task_files.tokenizer()
    [prompt] = running_sum.prompts(np.full((1, running_sum.LENGTH), 2))
    assert prompt.answer == "8"
    for body in ([2, 8], [8, 2], [8], [], [8, running_sum.EQUALS], *([8, i] for i in range(12, 16))):
        text = tokenizer.batch_decode([[*body, running_sum.EOS]], skip_special_tokens=True)[0]
        expected = running_sum.reward(prompt, [*body, running_sum.EOS])
        assert running_sum.text_reward(text, prompt.answer, {}) == expected, (body, text)


def test_curves_of_the_real_stack():
    def batch(step: int, reward: float, **more) -> dict:
        return {"step": step, "reward/mean": reward, "train/entropy": 0.1, "train/grad_norm": 0.2} | more

    rows = [
        {"step": 0, "eval/accuracy": 0.25},
        batch(16, 0.2),
        batch(32, 0.4, **{"eval/accuracy": 0.5}),
        batch(48, 0.6, **{"eval/accuracy": 0.75}),
        {"step": 48, "check/last_sync_logprob_difference": 1e-6},
    ]
    assert real_stack.curves(rows) == {
        "steps": [0, 32, 48],
        "accuracy": [0.25, 0.5, 0.75],
        "reward": [0.3, 0.6],
        "entropy": [0.1, 0.1],
        "grad_norm": [0.2, 0.2],
    }


def test_table_of_the_real_stack():
    runs = {one["key"]: one for one in whole_study()}
    planned = table.real_stack_trials(runs)
    assert [(one.method, one.seed) for one in planned[:3]] == [("vespo", 101), ("grpo", 101), ("vespo", 102)]
    real = record([0.3, 0.6, 0.7], exported_accuracy=0.664, reward=[0.5, 0.623])
    text = table.tables(runs, {planned[1].key: real})
    assert "| VESPO | 101 | 71.0 | - | 68.0 | - | - |" in text
    assert "| GRPO | 101 | 71.0 | 66.4 | 68.0 | 62.3 | 65.0 |" in text


def test_demonstrations_go_on_from_their_slips():
    digits = running_sum.draw_digits(np.random.default_rng(0), 200)
    shown = running_sum.demonstrations(digits, 0.1, np.random.default_rng(1))
    sums = np.concatenate([np.zeros((200, 1), int), shown[:, :-1]], axis=1)
    slipped = np.diff(sums, axis=1) % 10 != digits
    assert slipped.mean() == pytest.approx(0.1, abs=0.01)
    assert (shown[:, -1] == running_sum.EOS).all()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Random weights, in our form and in transformers'."""
    config = base_model.config()
    stacked = base_model.initial_weights(config, torch.Generator().manual_seed(3))
    folder = tmp_path_factory.mktemp("model")
    config.save_pretrained(folder)
    save_file(qwen3_moe.unstack_experts(stacked), folder / "model.safetensors", {"format": "pt"})
    return config, stacked, Qwen3MoeForCausalLM.from_pretrained(folder)


def test_logits_are_those_of_transformers(model):
    config, stacked, reference = model
    tokens = torch.randint(0, 13, (3, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(
            qwen3_moe.logits(stacked, config, tokens), reference(tokens).logits, rtol=0, atol=2e-5
        )


def test_stacking_is_undone(model):
    config, stacked, _ = model
    again = qwen3_moe.stack_experts(qwen3_moe.unstack_experts(stacked), config)
    assert again.keys() == stacked.keys()
    assert all(torch.equal(again[name], stacked[name]) for name in stacked)


def test_completions_have_the_log_probs_and_routes_of_one_forward_pass(model):
    config, stacked, _ = model
    prompts = running_sum.prompts(running_sum.draw_digits(np.random.default_rng(0), 3))
    for completion in sampler.sample_responses(sampler.Sampler(stacked, config, 7), prompts, seed=1):
        tokens = torch.from_numpy(np.concatenate([completion.prompt.token_ids, completion.token_ids]))[
            None
        ].long()
        routes: list[torch.Tensor] = []
        scores = qwen3_moe.logits(stacked, config, tokens[:, :-1], routes=routes)[0].log_softmax(-1)
        first = len(completion.prompt.token_ids) - 1
        expected = scores[first:].gather(1, tokens[0, first + 1 :, None])[:, 0]
        np.testing.assert_allclose(completion.log_probs, expected.numpy(), atol=2e-5)
        ours = np.sort(completion.routed_experts, axis=-1)
        theirs = np.sort(torch.stack(routes, dim=2)[0].numpy(), axis=-1)
        assert ours.shape == theirs.shape and (ours == theirs).mean() > 0.999
        assert completion.policy_versions.are_all(7)


def test_noisy_engines_differ_from_the_exact_one(model):
    config, stacked, _ = model
    exact = sampler.Sampler(stacked, config)
    name = "model.layers.0.mlp.experts.down"
    rounded = exact.with_fp8_weights().weights[name]
    error = (rounded - stacked[name]).abs().max() / stacked[name].abs().max()
    assert 0 < error < 2**-4  # e4m3 has 3 bits of mantissa
    tokens = torch.arange(10)[None]
    noisy = qwen3_moe.logits(stacked, config, tokens, router_noise=0.3)
    assert (noisy - qwen3_moe.logits(stacked, config, tokens)).abs().max() > 1e-3
