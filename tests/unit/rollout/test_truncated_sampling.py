"""Truncated sampling on the engines' side: what requests ask for, what is refused, what is kept."""

import asyncio
import importlib.util
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from aiohttp import web

from megatron_vespo.arguments.rollout import RolloutSettings, check_rollout
from megatron_vespo.data.completion_arrays import completion_arrays, completions_of
from megatron_vespo.driver.training_samples import training_sample
from megatron_vespo.rollout.collector import Collector
from megatron_vespo.rollout.engine_client import generate_payload
from megatron_vespo.rollout.evaluate import evaluate
from megatron_vespo.rollout.generate_function import CustomGeneration, GenerateContext, GenerateFunctionError
from megatron_vespo.rollout.sampled_distribution import training_sampling, truncation_remarks
from megatron_vespo.rollout.sampler import RejectedDraws, TooManyRejectedError
from megatron_vespo.rollout.sampling_mask import OVERFLOW
from megatron_vespo.rollout.server_arguments import server_arguments
from megatron_vespo.types import Completion, SamplingParams, Segments, TokenSupports
from tests.support.builders import make_completion, make_prompt
from tests.support.engine_stub import EngineStub, sglang_reply
from tests.support.refusals import check_refusal

PROMPT = make_prompt(3, range(5))
PLAIN = SamplingParams(1.0, 400, (1,))
SAMPLING = training_sampling(replace(PLAIN, top_p=0.9), [])


def flags(*sglang_flags: str, top_p: float = 1.0, top_k: int = -1, min_p: float = 0.0) -> SimpleNamespace:
    return SimpleNamespace(
        rollout_temperature=1.0, max_completion_tokens=9, rollout_top_p=top_p, rollout_top_k=top_k,
        rollout_min_p=min_p, sglang_flags=list(sglang_flags),
    )  # fmt: skip


def test_a_request_asks_for_the_masks_only_if_sampling_is_truncated():
    plain = generate_payload(PROMPT, PLAIN, None, None)
    assert training_sampling(PLAIN, []) is PLAIN and "return_sampling_mask" not in plain
    asked = generate_payload(PROMPT, SAMPLING, None, None)
    assert asked.pop("return_sampling_mask") is True
    assert asked.pop("sampling_params") == plain.pop("sampling_params") | {"top_p": 0.9, "top_k": 2048}
    assert asked == plain
    own = training_sampling(replace(PLAIN, top_k=20, min_p=0.1), [])
    asked = generate_payload(PROMPT, own, None, None)["sampling_params"]
    assert (asked["top_p"], asked["top_k"], asked["min_p"]) == (1.0, 20, 0.1)


def test_a_top_k_that_nobody_has_asked_for_is_said():
    assert truncation_remarks(PLAIN, []) == []
    assert truncation_remarks(training_sampling(replace(PLAIN, top_k=20), []), []) == []
    [line] = truncation_remarks(SAMPLING, [])
    assert line.startswith("every token is drawn from the 2048 likeliest at most: ")
    cap = ["--sampling-mask-max-tokens", "100"]
    smaller = training_sampling(replace(PLAIN, min_p=0.1), cap)
    assert smaller.top_k == 50 and "--sglang-sampling-mask-max-tokens" in truncation_remarks(smaller, cap)[0]


def test_the_engine_gets_the_cap_only_if_sampling_is_truncated():
    options = {"device": "cpu", "routes": False, "dtype": "float32", "seed": 0, "longest_step_s": 1.0}
    assert "--sampling-mask-max-tokens" not in server_arguments([], **options)
    arguments = server_arguments([], **options, supports=True)
    assert arguments[arguments.index("--sampling-mask-max-tokens") + 1] == "4096"
    own = server_arguments(["--sampling-mask-max-tokens", "64"], **options, supports=True)
    assert own.count("--sampling-mask-max-tokens") == 1


@pytest.mark.parametrize(
    ("args", "flag", "said"),
    [
        (flags(top_p=0.0), "--rollout-top-p is 0", "above 0, at most 1"),
        (flags(top_p=1.5), "--rollout-top-p is 1.5", "above 0, at most 1"),
        (flags(top_p=float("nan")), "--rollout-top-p is nan", "above 0, at most 1"),
        (flags(min_p=1.0), "--rollout-min-p is 1", "below 1"),
        (flags(min_p=-0.1), "--rollout-min-p is -0.1", "below 1"),
        *((flags(top_k=number), f"--rollout-top-k is {number}", "must be -1 (all) or 2 to 2048")
          for number in (-2, 0, 1, 2049)),
        (flags("--sampling-mask-max-tokens", "64", top_k=40), "--rollout-top-k is 40", "2 to 32"),
        (flags("--sampling-mask-max-tokens", "x", top_p=0.9), "--sglang-sampling-mask-max-tokens is 'x'",
         "from 4 on"),
        (flags("--speculative-algorithm", "EAGLE", top_p=0.9), "--sglang-speculative-algorithm EAGLE",
         "leave one of them out"),
        (flags("--sampling-backend", "ascend", top_k=5), "--sglang-sampling-backend ascend",
         "leave one of them out"),
        (flags("--disaggregation-mode", "prefill", min_p=0.1), "--sglang-disaggregation-mode prefill",
         "leave one of them out"),
        (flags("--enable-deterministic-inference", min_p=0.1), "--rollout-min-p 0.1",
         "no min-p with --sglang-enable-deterministic-inference"),
        (flags("--rl-on-policy-target", "fsdp", min_p=0.1), "--rollout-min-p 0.1",
         "no min-p with --sglang-rl-on-policy-target"),
    ],
)  # fmt: skip
def test_what_engines_cannot_do_is_one_line(args, flag, said):
    with pytest.raises(ValueError) as error:
        check_rollout(args)
    check_refusal(str(error.value), flag, said)


@pytest.mark.parametrize(
    "args",
    [
        flags(),
        flags("--speculative-algorithm", "EAGLE", "--enable-deterministic-inference"),
        flags("--enable-deterministic-inference", top_p=0.9, top_k=2),
        flags("--sampling-backend", "pytorch", "--disaggregation-mode", "null", min_p=0.1),
        flags("--sampling-mask-max-tokens", "64", top_k=32),
    ],
)
def test_what_engines_can_do_passes(args):
    check_rollout(args)


def test_settings_say_what_training_samples_and_evaluation_does_not():
    wanted = RolloutSettings.sampling_of(flags(top_p=0.9, top_k=7, min_p=0.1), [4])
    assert (wanted.top_p, wanted.top_k, wanted.min_p, wanted.stop_token_ids) == (0.9, 7, 0.1, (4,))
    assert wanted.truncates and not wanted.untruncated().truncates
    assert training_sampling(wanted, []).untruncated() == RolloutSettings.sampling_of(flags(), [4])


class MaskedEngine(EngineStub):
    """Draws token n at place n of each reply, out of {n, n + 100}. The first replies may be unfinished."""

    def __init__(self, unfinished: int = 0, overflows: int = 0):
        super().__init__()
        self.unfinished, self.overflows = unfinished, overflows

    def reply(self, body: dict) -> dict:
        if self.overflows:
            self.overflows -= 1
            said = f'{{"error":{{"message":"{OVERFLOW}=4096, commonly because of cutoff ties."}}}}'
            raise web.HTTPBadRequest(text=said)
        finish = "abort" if self.unfinished else "stop"
        self.unfinished -= bool(self.unfinished)
        tokens = [2, 3, 4]
        answer = sglang_reply(tokens, finish)
        if body.get("return_sampling_mask"):
            answer["meta_info"] |= {
                "output_token_sampling_mask": [[token + 100, token] for token in tokens],
                "output_token_sampling_logprobs": [-0.25] * 3,
            }
        return answer


def drawn(engine: EngineStub, sampling: SamplingParams = SAMPLING, maker=None, number: int = 1):
    collector = Collector([engine.url], request_timeout_s=30.0, maker=maker)
    return collector.collect([PROMPT], sampling, num_completions=number, seed=1)[0]


def check_pieces(completion: Completion, pieces: int) -> None:
    assert completion.supports.counts.tolist() == [2] * 3 * pieces
    assert completion.supports.token_ids.tolist() == [2, 102, 3, 103, 4, 104] * pieces
    assert completion.log_probs.tolist() == [-0.25] * 3 * pieces


@pytest.mark.parametrize("pieces", [1, 3])
def test_a_continued_response_has_the_supports_of_all_its_pieces(pieces):
    with MaskedEngine(unfinished=pieces - 1) as engine:
        [completion] = drawn(engine)
    check_pieces(completion, pieces)
    assert all(body["return_sampling_mask"] for body in engine.requests)
    sample = training_sample(completion, 0.5, 0, None)
    assert sample.supports is completion.supports and sample.num_trained == len(sample.supports)


def test_given_tokens_have_no_support():
    async def two_turns(draw, prompt, sampling, seed, context):
        first = await draw(prompt, sampling, seed)
        return await draw(prompt, sampling, seed, begun=first.with_given([7, 8], "tool"))

    with MaskedEngine() as engine:
        [completion] = drawn(engine, maker=CustomGeneration(two_turns, GenerateContext(None, None, False)))
    assert completion.segments == Segments(("policy", "tool", "policy"), (3, 2, 3))
    check_pieces(completion, 2)


def test_a_generate_function_must_keep_the_supports():
    async def loses_them(draw, prompt, sampling, seed):
        return replace(await draw(prompt, sampling, seed), supports=None)

    with (
        MaskedEngine() as engine,
        pytest.raises(GenerateFunctionError, match="3 sampled tokens and 0 supports$"),
    ):
        drawn(engine, maker=CustomGeneration(loses_them, GenerateContext(None, None, False)))


def test_evaluation_draws_from_the_whole_vocabulary():
    with MaskedEngine() as engine:
        collector = Collector([engine.url], request_timeout_s=30.0)
        evaluate(collector, [PROMPT], SAMPLING, lambda completions: [0.0], 0, 1, 0.6, 1.0)
        drawn(engine)
    assert "return_sampling_mask" not in engine.requests[0] and engine.requests[1]["return_sampling_mask"]
    asked = engine.requests[0]["sampling_params"]
    assert (asked["top_p"], asked["top_k"], asked["min_p"]) == (1.0, -1, 0.0)


def test_a_support_that_is_too_large_costs_one_draw():
    with MaskedEngine(overflows=1) as engine:
        [completion] = drawn(engine)
    assert len(completion.rejections) == 1 and OVERFLOW in completion.rejections[0]
    check_pieces(completion, 1)


def test_the_installed_sglang_says_so():
    package = importlib.util.find_spec("sglang")
    assert package is not None and package.submodule_search_locations
    folder = Path(package.submodule_search_locations[0]) / "srt/managers/scheduler_components"
    assert OVERFLOW in (folder / "batch_result_processor.py").read_text()


def test_supports_that_are_often_too_large_end_the_run():
    line = r"^2 of 4 completions had a support larger than --sglang-sampling-mask-max-tokens, more than 3%; "
    with MaskedEngine(overflows=2) as engine, pytest.raises(TooManyRejectedError, match=line):
        drawn(engine, number=4)


def test_a_beginning_of_another_kind_of_sampling_is_drawn_anew():
    """A run may be resumed with --rollout-top-p, or without it."""

    async def continued(begun: Completion, sampling: SamplingParams) -> Completion:
        with MaskedEngine() as engine:
            async with Collector([engine.url], request_timeout_s=30.0).connect() as sampler:
                return await sampler.draw(PROMPT, sampling, 1, 0, 1, RejectedDraws(1), [begun])

    plain = make_completion(PROMPT, 2, finish_reason="abort")
    masked = replace(plain, supports=TokenSupports(np.ones(2, np.int32), plain.token_ids))
    for begun, sampling, length in (
        (plain, PLAIN, 5), (plain, SAMPLING, 3), (masked, PLAIN, 3), (masked, SAMPLING, 5),
        (replace(plain, temperature=0.7), PLAIN, 3), (replace(masked, temperature=0.7), SAMPLING, 3),
    ):  # fmt: skip
        completion = asyncio.run(continued(begun, sampling))
        assert len(completion.token_ids) == length, (sampling, length)
        assert (completion.supports is not None) == sampling.with_supports
        assert completion.temperature == sampling.temperature


def test_files_keep_supports_bit_by_bit_and_old_files_have_none():
    masked = make_completion(PROMPT, 3)
    masked.supports = TokenSupports(np.array([2, 1, 3], np.int32), np.array([4, 9, 7, 0, 2, 5], np.int32))
    given = replace(masked, segments=None).with_given(np.array([7, 8], np.int32), "tool")
    completions = [make_completion(PROMPT, 2), masked, make_completion(PROMPT, 1), given]
    arrays = completion_arrays(completions)
    back = completions_of(arrays, [PROMPT] * 4)
    for before, after in zip(completions, back, strict=True):
        assert (before.supports is None) == (after.supports is None)
        for name in ("counts", "token_ids") if before.supports else ():
            found = getattr(after.supports, name)
            assert found.dtype == np.int32 and found.tolist() == getattr(before.supports, name).tolist()
    without = completion_arrays(completions[:1])
    assert not [name for name in without if "support" in name]
    assert completions_of(without, [PROMPT])[0].supports is None
