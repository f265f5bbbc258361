"""Exact syncs between trainer ranks and processes that do with the loader what an SGLang engine does.

The first ranks of the job are the trainer's; each other one is an engine, and forks an engine's other ranks.
A case says which memory everybody can open.
"""

from __future__ import annotations

import base64
import json
import os
import pickle
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from common import hand_back

from megatron_vespo.models.family import FAMILIES
from megatron_vespo.system.http import post_json
from megatron_vespo.weight_sync import engine_loader
from megatron_vespo.weight_sync.engine_admin import EngineAdmin
from megatron_vespo.weight_sync.engine_layout import EngineLayout
from megatron_vespo.weight_sync.exact import Exact, ExactSource
from megatron_vespo.weight_sync.exact_sender import ExactSender
from megatron_vespo.weight_sync.places import Place
from megatron_vespo.weight_sync.trainer_layout import TrainerShard
from tests.support.sync_layouts import engine_weights, held_by, model_shape, trainer, weights

HOST = "127.0.0.1"
TIMEOUT_S = 30.0


@dataclass
class Case:
    family: str
    trainer: dict[str, int]
    engine: tuple[int, int]  # tp, ep
    trainer_places: list[tuple[str, str]]  # host and memory, by rank
    engine_places: list[list[tuple[str, str]]]  # by engine and rank
    buffer_bytes: int
    staging: bool = False
    num_syncs: int = 2

    @property
    def shape(self):
        experts = 4 if "num_experts" in FAMILIES[self.family].sizes else 0
        return model_shape(4, False, experts)


class Model(torch.nn.Module):
    """SGLang's names and shapes, with random weights."""

    def __init__(self, parameters: dict[str, torch.Tensor]):
        super().__init__()
        self._named = {n: torch.nn.Parameter(torch.rand(t.shape), False) for n, t in parameters.items()}

    def named_parameters(self, *_, **__):
        return iter(self._named.items())

    def parameters(self, recurse: bool = True):
        return iter(self._named.values())


def make_model(case: Case, rank: int) -> Model:
    hf = weights(FAMILIES[case.family], case.shape)
    return Model({n: t.float() for n, t in engine_weights(hf, case.shape, rank, *case.engine).items()})


def engine_rank(case: Case, engine: int, rank: int, orders, folder: Path) -> None:
    """One process of an engine: takes messages until there is none, then writes its weights."""
    place = Place(*case.engine_places[engine][rank])
    engine_loader.place_of = lambda device: place
    model = make_model(case, rank)
    while (message := orders.recv()) is not None:
        [named] = pickle.loads(message)
        engine_loader.load(model, [named])
        orders.send("done")
    np.savez(folder / f"engine-{engine}-{rank}.npz", **{n: p.numpy() for n, p in model.named_parameters()})
    orders.send("done")


def serve(case: Case, engine: int, folder: Path) -> None:
    forked = get_context("fork")  # a fresh process would import torch again
    pipes = []
    for rank in range(case.engine[0]):
        ours, theirs = forked.Pipe()
        forked.Process(target=engine_rank, args=(case, engine, rank, theirs, folder), daemon=True).start()
        pipes.append(ours)
    running = True

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            nonlocal running
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/update_weights_from_tensor":
                for pipe, text in zip(pipes, body["serialized_named_tensors"], strict=True):
                    pipe.send(base64.b64decode(text))
            else:
                for pipe in pipes:
                    pipe.send(None)
                running = False
            for pipe in pipes:
                pipe.recv()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_) -> None:
            pass

    server = HTTPServer((HOST, 0), Handler)
    (folder / f"port-{engine}.part").write_text(str(server.server_port))
    (folder / f"port-{engine}.part").rename(folder / f"port-{engine}")
    while running:
        server.handle_request()


def train(case: Case, rank: int, num_ranks: int, folder: Path) -> dict:
    store = f"tcp://{HOST}:{os.environ['MASTER_PORT']}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=num_ranks,
                            timeout=timedelta(seconds=TIMEOUT_S))  # fmt: skip
    family, shape = FAMILIES[case.family], case.shape
    shard = trainer(shape, **case.trainer)[rank]
    hf = {name: tensor.float() for name, tensor in weights(family, shape).items()}
    exact = Exact(ExactSource(
        family, shape, TrainerShard(rank, Place(*case.trainer_places[rank]), shard.part),
        EngineLayout(*case.engine), torch.float32, torch.device("cpu"), case.buffer_bytes, HOST, case.staging,
    ))  # fmt: skip
    packed = []
    original = ExactSender.pack
    ExactSender.pack = lambda self, *arguments: packed.append(original(self, *arguments))
    urls = []
    for engine in range(len(case.engine_places)):
        while not (folder / f"port-{engine}").exists():
            time.sleep(0.02)
        urls.append(f"http://{HOST}:{(folder / f'port-{engine}').read_text()}")
    admin = EngineAdmin(urls, TIMEOUT_S)
    for number in range(case.num_syncs):
        exact.connect(admin, number + 1)
        for version in range(2):
            scale = 1.0 + version + 2 * number
            held = {n: t * scale for n, t in held_by(shard.part, family, shape, hf).items()}
            exact.stage(held)
            exact.send(held, version + 1)
        exact.close()
    dist.barrier()
    if rank == 0:
        for url in urls:
            post_json(url, "/end", {}, TIMEOUT_S)
    return {"packed": sum(packed) // (2 * case.num_syncs)}


def main() -> None:
    folder = Path(sys.argv[1])
    case: Case = Case(**json.loads(sys.argv[2]))
    rank, num_ranks = int(os.environ["RANK"]), len(case.trainer_places)
    if rank >= num_ranks:
        serve(case, rank - num_ranks, folder)
        hand_back(packed=0)
    else:
        hand_back(**train(case, rank, num_ranks, folder))


if __name__ == "__main__":
    main()
