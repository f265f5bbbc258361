"""A stub engine whose replies have routes that say which token they belong to."""

from __future__ import annotations

import base64
import threading

import numpy as np

from megatron_vespo.rollout.generate_reply import RouteShape
from tests.support.engine_stub import EngineStub, sglang_reply

ROUTES = RouteShape(num_layers=48, topk=8)
LIMIT_S = 60.0


class Engine(EngineStub):
    """Answers with `length` tokens; the routes of token number t are those of expert t % 128 and the next."""

    def __init__(self, length: int = 400):
        super().__init__()
        self.length, self.waits, self.refuses, self.unfinished = length, threading.Event(), False, 0
        self.waits.set()

    def reply(self, body: dict) -> dict:
        assert self.waits.wait(LIMIT_S)
        if self.refuses:
            return {"meta_info": {}}
        length = min(self.length, body["sampling_params"]["max_new_tokens"])
        begins = self.unfinished > 0
        self.unfinished -= begins
        answer = sglang_reply(list(range(1, length + 1)), "abort" if begins else "stop")
        if body["return_routed_experts"]:
            end, start = len(body["input_ids"]) + length - 1, body.get("routed_experts_start_len", 0)
            answer["meta_info"]["routed_experts"] = base64.b64encode(routes(start, end).tobytes()).decode()
        return answer


def routes(start: int, end: int) -> np.ndarray:
    tokens = np.arange(start, end)[:, None, None] + np.arange(ROUTES.topk)
    return np.broadcast_to(tokens % 128, (end - start, *ROUTES)).astype(np.int32)
