"""What a rollout batch costs the driver and the trainer ranks: from the engine's replies to the ranks' packs.

    python tests/benchmarks/data_plane.py [--responses 2048 4096 8192 16384] [--routes 0 2x4] [--ranks 4]

Everything is a process of its own, and only processor seconds are compared, as others may use the machine:

    engine   a stub: real HTTP, SGLang's words, ready-made replies of random lengths. Not counted
    replies  the ReplyCollector beside the engine, which parses what it says. Its seconds are not the driver's
    driver   Collector -> training_samples -> TrainerGroup.prepare; peak of its memory from start to end
    ranks    data-parallel, in Ray: receive their mini-batches and pack them with the trainer's Packer;
             there is no model

Lengths of responses are log-normal, from 64 to 16,384 tokens, with a mean of 4,096; prompts have 256 tokens.
`--routes LxK` asks for routes of L layers and K experts per token. A real model has more of both; bytes of
routes are in proportion.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from process_memory import run

REPOSITORY = Path(__file__).parents[2]
MEAN_TOKENS, PROMPT_TOKENS, GROUP_SIZE, MINI_BATCHES = 4096, 256, 8, 4
SHORTEST, LONGEST, SIGMA = 64, 16384, 1.0
VOCABULARY, NUM_EXPERTS = 151_936, 64
DIFFERENT_REPLIES = 64
MAX_TOKENS = 20_480  # of a pack
DRIVER_SECONDS, DRIVER_GB, AIM_AT = 30.0, 2.0, 16_384  # the aims, without routes
TIMEOUT_S = 1500


def lengths() -> np.ndarray:
    """Return DIFFERENT_REPLIES response lengths with a mean of MEAN_TOKENS."""
    drawn = np.random.default_rng(0).lognormal(0.0, SIGMA, DIFFERENT_REPLIES)
    scale = float(MEAN_TOKENS)
    for _ in range(50):  # clipping moves the mean
        clipped = np.clip(drawn * scale, SHORTEST, LONGEST)
        scale *= MEAN_TOKENS / clipped.mean()
    return clipped.round().astype(int)


def reply(length: int, routes: tuple[int, int] | None) -> bytes:
    draw = np.random.default_rng(length)
    tokens = draw.integers(0, VOCABULARY, length).tolist()
    log_probs = [float(np.float32(-value)) for value in draw.exponential(size=length)]
    meta = {
        "id": "0" * 32,
        "finish_reason": {"type": "length", "length": length},
        "prompt_tokens": PROMPT_TOKENS,
        "weight_version": "0",
        "num_retractions": 0,
        "input_token_logprobs": [],
        "output_token_logprobs": [[p, t, None] for p, t in zip(log_probs, tokens, strict=True)],
        "completion_tokens": length,
        "cached_tokens": 0,
        "weight_versions": [{"version": "0", "start": 0, "end": length}],
        "e2e_latency": 1.5,
    }
    if routes is not None:
        layers, topk = routes
        scores = draw.random((PROMPT_TOKENS + length - 1, layers, NUM_EXPERTS))
        chosen = scores.argpartition(topk, -1)[..., :topk].astype(np.int32)
        meta["routed_experts"] = base64.b64encode(chosen.tobytes()).decode()
    return json.dumps({"output_ids": tokens, "meta_info": meta}).encode()


def serve(routes: tuple[int, int] | None) -> None:
    """The engine: prints its port."""
    from aiohttp import web

    bodies = cycle([reply(int(length), routes) for length in lengths()])

    async def answer(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(body=next(bodies), content_type="application/json")

    async def until_killed() -> None:
        application = web.Application(client_max_size=2**26)
        application.router.add_post("/generate", answer)
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        print(runner.addresses[0][1], flush=True)
        await asyncio.Event().wait()

    asyncio.run(until_killed())


class Rank:
    """A data-parallel rank without a model."""

    def __init__(self, rank: int, size: int, port: int, routes: tuple[int, int] | None):
        import torch
        import torch.distributed as dist

        from megatron_vespo.trainer.mini_batch import Packer

        torch.set_num_threads(1)
        dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
        alone = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
        groups = SimpleNamespace(dp=dist.group.WORLD, cp=alone, tp=alone, pp=alone)
        self._packer = Packer(packer_arguments(routes), groups)
        self._prepared, self._bytes = [], 0
        self._before, self._started = memory("VmRSS"), time.process_time()

    def traced(self, method: str, *arguments) -> tuple:
        return getattr(self, method)(*arguments), [], []

    def place(self) -> tuple:
        return self._packer.rule, self._packer.rank

    def take(self, index: int, outline, shard) -> None:
        self._bytes += shard.nbytes
        self._prepared.append(self._packer.build(outline, shard.samples()))

    def prepare(self, canaries: list) -> None:
        """There are no log-probs to compute."""

    def measured(self) -> dict[str, float]:
        packs = sum(pack.nbytes for batch in self._prepared for pack in batch.micro_batches)
        return {
            "seconds": time.process_time() - self._started,
            "received": self._bytes,
            "peak": memory("VmHWM") - self._before,
            "packs": packs,
        }


def packer_arguments(routes: tuple[int, int] | None) -> SimpleNamespace:
    layers, topk = routes or (4, 8)
    return SimpleNamespace(
        num_layers=layers, hidden_size=2048, num_attention_heads=32, num_query_groups=4, kv_channels=128,
        moe_shared_expert_intermediate_size=None,
        moe_ffn_hidden_size=768, moe_router_topk=topk, num_experts=NUM_EXPERTS, vocab_size=VOCABULARY,
        padded_vocab_size=VOCABULARY, virtual_pipeline_model_parallel_size=None, sequence_parallel=False,
        max_tokens_per_gpu=MAX_TOKENS, context_parallel_size=1, moe_token_dispatcher_type="alltoall",
        routing_replay="R3" if routes else None,
    )  # fmt: skip


def memory(field: str) -> int:
    """Bytes in /proc/self/status."""
    text = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith(field)) * 1024


def drive(url: str, responses: int, ranks: int, routes: tuple[int, int] | None, folder: Path) -> None:
    """The driver: prints what it and the ranks have used, as JSON."""
    import ray

    from megatron_vespo.cluster.assignments import Assignment
    from megatron_vespo.cluster.placement import start_ray
    from megatron_vespo.cluster.reply_collectors import ReplyCollectors
    from megatron_vespo.cluster.trainer_group import TrainerGroup
    from megatron_vespo.driver.training_samples import training_samples
    from megatron_vespo.rollout.collector import Collector
    from megatron_vespo.rollout.generate_reply import RouteShape
    from megatron_vespo.system.ports import find_free_port
    from megatron_vespo.types import Prompt, SamplingParams, token_array
    from tests.support.settings import flat_settings

    start_ray(None, ranks, ())
    port = find_free_port("127.0.0.1")
    actor = ray.remote(Rank).options(num_cpus=0)
    workers = [actor.remote(rank, ranks, port, routes) for rank in range(ranks)]
    trainer = TrainerGroup(
        flat_settings(train_timeout=float(TIMEOUT_S)), SimpleNamespace(trainer=[]), Path(), lambda: None
    )
    trainer._workers = workers
    trainer.learn_places(TIMEOUT_S)
    draw = np.random.default_rng(0)
    prompts = [
        Prompt(number, token_array(draw.integers(0, VOCABULARY, PROMPT_TOKENS)), "", "")
        for number in range(responses // GROUP_SIZE)
    ]
    shape = RouteShape(*routes) if routes else None
    here = SimpleNamespace(engines=[Assignment(0)], options=lambda assignment: {"num_cpus": 0})
    replies = ReplyCollectors(here, folder, None)
    collector = Collector(
        [url], routes=shape, request_timeout_s=float(TIMEOUT_S), check=lambda: None, remote=replies
    )
    before, seconds = memory("VmRSS"), [time.process_time()]
    sampling = SamplingParams(1.0, LONGEST, ())
    groups = collector.collect(prompts, sampling, num_completions=GROUP_SIZE, seed=0)
    seconds.append(time.process_time())
    for group in groups:
        for completion in group:
            completion.reward = float(draw.integers(0, 2))
    samples = training_samples(groups, "group-mean", "R3" if routes else None)
    del groups, group, completion
    seconds.append(time.process_time())
    size = len(samples) // MINI_BATCHES
    trainer.prepare([samples[i : i + size] for i in range(0, len(samples), size)])
    seconds.append(time.process_time())
    tokens = sum(sample.completion_length for sample in samples)
    found = {
        "seconds": dict(zip(("collect", "samples", "hand out"), np.diff(seconds).tolist(), strict=True)),
        "started": before,
        "tokens": tokens,
        "ranks": ray.get([worker.measured.remote() for worker in workers]),
    }
    print(json.dumps(found))
    ray.shutdown()


def measured(responses: int, ranks: int, routes: str, folder: Path) -> dict:
    """Run engine and driver; what the driver prints and the peaks of its memory in bytes."""
    paths = f"{REPOSITORY}:{REPOSITORY / 'patches' / 'cpu'}"
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--routes", routes, "--ranks", str(ranks)]
    with subprocess.Popen(
        [*command, "--serve"], stdout=subprocess.PIPE, text=True, env=environment
    ) as engine:
        try:
            assert engine.stdout is not None
            url = f"http://127.0.0.1:{int(engine.stdout.readline())}"
            driver = [*command, "--responses", str(responses), "--drive", url, "--folder", str(folder)]
            done = run(driver, environment, TIMEOUT_S, folder / "driver.log")
        finally:
            engine.kill()
    found = json.loads(done.output.strip().splitlines()[-1])
    return found | {"peak": done.peak, "anonymous": done.peak_anonymous, "wall": done.seconds}


def route_shape(text: str) -> tuple[int, int] | None:
    if text == "0":
        return None
    layers, topk = map(int, text.split("x"))
    return layers, topk


def report(responses: int, routes: str, found: dict) -> list[str]:
    ranks, seconds = found["ranks"], found["seconds"]
    return [
        f"{responses:,}",
        routes,
        f"{found['tokens'] / 1e6:.1f}",
        *(f"{seconds[name]:.2f}" for name in ("collect", "samples", "hand out")),
        f"{sum(seconds.values()):.2f}",
        f"{1e3 * sum(seconds.values()) / responses:.2f}",
        f"{found['started'] / 1e9:.2f}",
        f"{found['peak'] / 1e9:.2f}",
        f"{max(rank['seconds'] for rank in ranks):.2f}",
        f"{max(rank['received'] for rank in ranks) / 1e6:.0f}",
        f"{max(rank['packs'] for rank in ranks) / 1e6:.0f}",
        f"{max(rank['peak'] for rank in ranks) / 1e6:.0f}",
    ]


COLUMNS = (
    "responses", "routes", "M tokens", "collect s", "samples s", "hand out s", "driver s", "ms per response",
    "driver GB before", "peak GB", "rank s", "rank receives MB", "rank packs MB", "rank grows MB",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--responses", type=int, nargs="+", default=[2048, 4096, 8192, 16384])
    parser.add_argument("--routes", nargs="+", default=["0", "2x4"], metavar="LxK", help="0: none")
    parser.add_argument("--ranks", type=int, default=4, help="data-parallel")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--drive", metavar="URL", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(route_shape(options.routes[0]))
        return
    if options.drive:
        routes, folder = route_shape(options.routes[0]), options.folder
        drive(options.drive, options.responses[0], options.ranks, routes, folder)
        return
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    missed = []
    with tempfile.TemporaryDirectory() as folder:
        for routes in options.routes:
            for responses in options.responses:
                found = measured(responses, options.ranks, routes, Path(folder))
                print(f"| {' | '.join(report(responses, routes, found))} |", flush=True)
                seconds, peak = sum(found["seconds"].values()), found["peak"] / 1e9
                if responses == AIM_AT and routes == "0" and (seconds > DRIVER_SECONDS or peak > DRIVER_GB):
                    missed.append(f"{responses:,} responses: {seconds:.0f} s and {peak:.1f} GB")
    aim = f"{AIM_AT:,} responses without routes, driver at most {DRIVER_SECONDS:g} s and {DRIVER_GB:g} GB"
    print(f"{aim}: {'missed, ' + '; '.join(missed) if missed else 'met, if measured above'}")


if __name__ == "__main__":
    main()
