"""Which CUDA graph backends SGLang chooses on CUDA, and whether it can give back the memory of their graphs.

Standard input is a JSON list of servers, each {"arguments": [...], "variables": {...}}. For each is printed
{phase: [class, whether the memory saver is on]}, null for a phase without graphs, or the exception.
All is SGLang's own code, as in a scheduler. Two answers are those of a machine with a GPU: the default
prefill backend, and torch_memory_saver, of which SGLang only asks here whether it is there.
"""

from __future__ import annotations

import json
import os
import sys
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

saver = ModuleType("torch_memory_saver")
saver.torch_memory_saver = SimpleNamespace(enabled=True)
sys.modules["torch_memory_saver"] = saver

import torch  # noqa: E402
from sglang.srt import runtime_context  # noqa: E402
from sglang.srt.model_executor import cuda_graph_config  # noqa: E402
from sglang.srt.model_executor.runner_backend import utils  # noqa: E402
from sglang.srt.server_args import prepare_server_args  # noqa: E402

cuda_graph_config.default_prefill_backend = lambda: cuda_graph_config.Backend.BREAKABLE


def backends(arguments: list[str]) -> dict[str, list | None]:
    server_args = prepare_server_args(arguments)
    server_args.resolve_once()
    runtime_context.publish(server_args, role="scheduler")
    chosen = server_args.resolved_dict()["cuda_graph_config"]
    runner = SimpleNamespace(model_runner=SimpleNamespace(device="cuda"), device_module=torch.cuda)
    found: dict[str, list | None] = {}
    for phase, resolve in (
        ("decode", utils.resolve_decode_backend), ("prefill", utils.resolve_prefill_backend),
    ):  # fmt: skip
        if chosen[phase]["backend"] == cuda_graph_config.Backend.DISABLED:
            found[phase] = None  # model_runner_components/cuda_graph_setup.py makes no runner
            continue
        with runtime_context.get_parallel().override(tp_group=None):
            backend = resolve(runner)
        found[phase] = [type(backend).__name__, backend._memory_saver_adapter.enabled]
    return found


def main() -> None:
    answers = []
    for server in json.load(sys.stdin):
        with patch.dict(os.environ, server["variables"]):
            try:
                answers.append(backends(server["arguments"]))
            except NotImplementedError as error:
                answers.append(str(error))
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
