"""Where trainer ranks and engines will run: on which node and GPU, as the run itself will place them."""

from __future__ import annotations

from collections import defaultdict

from megatron_vespo.arguments.train_settings import TrainSettings
from megatron_vespo.cluster.assignments import Assignment, Bundle, assigned
from megatron_vespo.cluster.blocks import Run, neighbours, packed, requested
from megatron_vespo.weight_sync.places import Place


def planned_places(
    settings: TrainSettings, engine_size: int, nodes: int, gpus_per_node: int
) -> tuple[list[Place], list[list[Place]]]:
    """Of every trainer rank, and of every engine's ranks. ValueError if the cluster is too small.

    Teachers take part in no weight sync; they are placed, but not returned.
    """
    run = Run(
        ranks=settings.trainer.trainer_ranks,
        groups=neighbours(settings.trainer),
        engines=settings.engines.rollout_engines,
        engine_size=engine_size,
        on_gpus=True,
        colocate=settings.sync.colocate,
        teachers=settings.distillation.num_engines,
        teacher_size=settings.distillation.engine_size(engine_size),
    )
    there = [{"GPU": gpus_per_node, "CPU": run.ranks + run.engines + run.teachers}] * nodes
    request = requested(run, there)
    numbers = packed(request.bundles, there)
    assert numbers is not None
    located = _located(numbers, [int(bundle["GPU"]) for bundle in request.bundles])
    trainer, engines, _ = assigned(
        request.blocks, request.sharing, located, engine_size, run.colocate, run.teachers
    )
    return (
        [place for rank in trainer for place in _places(rank, located)],
        [_places(engine, located) for engine in engines],
    )


def _located(numbers: list[int], sizes: list[int]) -> list[Bundle]:
    """Bundles take the GPUs of their node one after another."""
    taken: dict[int, int] = defaultdict(int)
    found = []
    for node, size in zip(numbers, sizes, strict=True):
        first = taken[node]
        taken[node] += size
        found.append(Bundle(f"node {node}", tuple(str(gpu) for gpu in range(first, first + size))))
    return found


def _places(assignment: Assignment, located: list[Bundle]) -> list[Place]:
    assert assignment.devices is not None
    node = located[assignment.bundle].node
    return [Place(node, f"{node} GPU {gpu}") for gpu in assignment.devices.split(",")]
