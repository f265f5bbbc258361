"""What a run asks its engines for: routes with --routing-replay R3 only, and what a reply weighs without."""

import base64
import json
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_vespo.driver.services import _server_arguments
from megatron_vespo.driver.trainer_attempt import TrainerAttempt
from megatron_vespo.rollout.collector import Collector
from megatron_vespo.rollout.evaluate import evaluate
from megatron_vespo.rollout.router import LostRequests
from megatron_vespo.types import Completion, SamplingParams
from tests.support.builders import make_prompt
from tests.support.engine_stub import EngineStub
from tests.support.settings import flat_settings

LAYERS, TOPK, VOCABULARY = 48, 8, 151_936  # Qwen3-30B-A3B
PROMPT = make_prompt(3, range(256))
RESPONSE = 3840  # tokens; 4,096 with the prompt
FLAG = "--enable-return-routed-experts"


class Engine(EngineStub):
    """Answers in SGLang's words, with numbers of a large model; keeps how many bytes they were."""

    def __init__(self, num_retractions: int = 0):
        super().__init__()
        self.num_retractions, self.sizes = num_retractions, []

    def reply(self, body: dict) -> dict:
        draw = np.random.default_rng(0)
        length = body["sampling_params"]["max_new_tokens"]
        tokens = draw.integers(100_000, VOCABULARY, length).tolist()
        log_probs = [float(np.float32(-value)) for value in draw.exponential(size=length)]
        meta = {
            "id": "0" * 32,
            "finish_reason": {"type": "length", "length": length},
            "prompt_tokens": len(body["input_ids"]),
            "weight_version": "0",
            "num_retractions": self.num_retractions,
            "input_token_logprobs": [],
            "output_token_logprobs": [[p, t, None] for p, t in zip(log_probs, tokens, strict=True)],
            "completion_tokens": length,
            "cached_tokens": 0,
            "weight_versions": [{"version": "0", "start": 0, "end": length}],
            "e2e_latency": 1.5,
        }
        if body["return_routed_experts"]:
            routes = np.zeros((len(body["input_ids"]) + length - 1, LAYERS, TOPK), np.int32)
            meta["routed_experts"] = base64.b64encode(routes.tobytes()).decode()
        reply = {"output_ids": tokens, "meta_info": meta}
        self.sizes.append(len(json.dumps(reply)))
        return reply


def arguments(replay: str | None) -> SimpleNamespace:
    return flat_settings(
        num_layers=LAYERS, moe_router_topk=TOPK, num_experts=128, routing_replay=replay,
        generate_timeout=60.0, max_request_retries=0, distributed_backend="nccl", bf16=True,
        sglang_flags=("--max-total-tokens", "64"), seed=0, max_staleness=0, on_weight_update="retract",
        colocate=False, engine_start_timeout=60.0, weight_check_timeout=60.0, rollout_temperature=1.0,
        rollout_top_p=1.0, rollout_top_k=-1, rollout_min_p=0.0, max_completion_tokens=RESPONSE,
        rollout_quantization=None,
    )  # fmt: skip


def collector(replay: str | None, engine: EngineStub) -> Collector:
    """As a run makes it."""
    engines = SimpleNamespace(urls=[engine.url], lost=LostRequests(), check=lambda: None)
    trace, task = SimpleNamespace(requests=None), SimpleNamespace(maker=None)
    display = SimpleNamespace(progress=lambda done, total: None)
    services = SimpleNamespace(
        engines=engines, trace=trace, task=task, api_key=None, replies=None, display=display
    )
    made = TrainerAttempt(arguments(replay), services, 0)._collector()
    made.on_wait = None  # the attempt has not started
    return made


def drawn(replay: str | None, engine: EngineStub) -> Completion:
    sampling = SamplingParams(1.0, RESPONSE, (1,))
    return collector(replay, engine).collect([PROMPT], sampling, num_completions=1, seed=0)[0][0]


@pytest.mark.parametrize("replay", [None, "R2"])
def test_without_r3_a_reply_of_4096_tokens_is_at_most_200_kb(replay):
    with Engine() as engine:
        completion = drawn(replay, engine)
    assert len(completion.token_ids) == RESPONSE and completion.routed_experts is None
    print(engine.sizes)
    assert max(engine.sizes) <= 200_000
    assert [body["return_routed_experts"] for body in engine.requests] == [False]
    assert FLAG not in _server_arguments(arguments(replay))


def test_with_r3_training_gets_routes_and_evaluation_does_not():
    with Engine() as engine:
        completion = drawn("R3", engine)
        assert completion.routed_experts.shape == (len(PROMPT.token_ids) + RESPONSE - 1, LAYERS, TOPK)
        sampling = SamplingParams(1.0, RESPONSE, (1,))
        evaluate(collector("R3", engine), [PROMPT], sampling, lambda c: [0.0], 0, 1, None, 1)
    assert [body["return_routed_experts"] for body in engine.requests] == [True, False]
    assert engine.sizes[0] > 8e6 and engine.sizes[1] <= 200_000
    assert FLAG in _server_arguments(arguments("R3"))
