"""Files of a weight sync: damage is found and named, and a version is applied to its base alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from megatron_vespo.models.family import FAMILIES
from megatron_vespo.weight_sync.disk import disk_plan
from megatron_vespo.weight_sync.disk_receiver import DiskConnection, DiskReceiver
from megatron_vespo.weight_sync.disk_version import MANIFEST, DamagedError, Manifest, answers, write_manifest
from megatron_vespo.weight_sync.disk_writer import DiskWriter
from megatron_vespo.weight_sync.engine_layout import EngineLayout
from megatron_vespo.weight_sync.messages import DiskHello, DiskLoad
from megatron_vespo.weight_sync.plan import make_plan
from tests.support.sync_layouts import changed_weights, engine_weights, held_by, model_shape, trainer

CPU = torch.device("cpu")
FAMILY, SHAPE = FAMILIES["Qwen3MoeForCausalLM"], model_shape()
[SHARD] = trainer(SHAPE)
PLAN = make_plan(FAMILY, SHAPE, [SHARD], EngineLayout(1), 4, 5000)
STEPS = [0.0, 0.05, 0.4]


class Model(nn.Module):
    """SGLang's names and shapes, with random weights."""

    def __init__(self):
        super().__init__()
        self.tensors = {
            name: nn.Parameter(torch.rand(tensor.shape), False) for name, tensor in expected(0).items()
        }

    def named_parameters(self, *_, **__):
        return iter(self.tensors.items())

    def wrong(self, step: int) -> list[str]:
        """Parameters that are not those of this step."""
        return [name for name, tensor in expected(step).items() if not tensor.equal(self.tensors[name].data)]


def expected(step: int) -> dict[str, torch.Tensor]:
    return engine_weights(changed_weights(FAMILY, SHAPE, STEPS[: step + 1]), SHAPE, 0, 1, 1)


class Sync:
    """A trainer of one rank and an engine of one rank, without HTTP."""

    def __init__(self, folder: Path):
        self.folder, self.model = folder, Model()
        self.writer = DiskWriter(PLAN, 0, torch.float32, CPU)
        self.receiver = DiskReceiver(disk_plan(PLAN, 0, "float32", folder), CPU)

    def write(self, step: int) -> DiskLoad:
        folder = self.folder / f"sync-{step}"
        folder.mkdir()
        held = held_by(SHARD.part, FAMILY, SHAPE, changed_weights(FAMILY, SHAPE, STEPS[: step + 1]))
        written = self.writer.write(folder, held)
        manifest = Manifest(
            step, step - 1 if step else None, {0: written.size} if written.size else {}, written.parts
        )
        return DiskLoad(str(folder), write_manifest(folder, manifest))

    def load(self, message: DiskLoad) -> None:
        self.receiver.load(self.model, message)


@pytest.fixture
def sync(tmp_path) -> Sync:
    return Sync(tmp_path)


def test_the_engine_follows_the_trainer(sync):
    for step in range(len(STEPS)):
        assert sync.model.wrong(step)
        sync.load(sync.write(step))
        assert sync.model.wrong(step) == []


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("rank-0.weights", lambda file: flip(file, 77), "is damaged: another checksum of the .* bytes at 0"),
        ("rank-0.weights", cut, "has .* bytes, written were"),
        ("rank-0.weights", Path.unlink, "cannot be read: No such file"),
        (MANIFEST, lambda file: flip(file, 40), "is damaged: another checksum than the trainer has told"),
        (MANIFEST, cut, "is damaged"),
        (MANIFEST, Path.unlink, "cannot be read: No such file"),
    ],
)  # fmt: skip
def test_damage_is_found_and_named(sync, step, name, damage: Callable[[Path], object], said):
    messages = [sync.write(0)]
    if step:
        sync.load(messages[0])
        messages.append(sync.write(1))
    file = Path(messages[-1].folder) / name
    damage(file)
    with pytest.raises(DamagedError, match=f"{file} {said}"):
        sync.load(messages[-1])
    if step:  # nobody can go on with a part of a version
        with pytest.raises(ValueError, match="has what changed since sync 1, here is (0|None)"):
            sync.load(sync.write(2))


def test_changes_since_another_version_are_refused(sync):
    sync.load(sync.write(0))
    sync.write(1)
    with pytest.raises(ValueError, match="sync-2 has what changed since sync 1, here is 0"):
        sync.load(sync.write(2))


def test_an_engine_rank_answers_in_the_folder(sync, tmp_path):
    (tmp_path / "owner.json").write_text('{"host": "", "pid": 1, "started": 1, "token": "right"}')
    for token in ("wrong", "right"):
        hello = DiskHello(str(tmp_path), token, str(tmp_path), slot=3)
        connection = DiskConnection(hello, CPU)
        assert answers(tmp_path, [3], 0) == ({3: None} if token == "right" else {})
    connection.take(disk_plan(PLAN, 0, "float32", tmp_path), sync.model)
    message = sync.write(0)
    Path(message.folder, "rank-0.weights").unlink()
    connection.take(message, sync.model)
    assert answers(tmp_path, [3], 0) == {3: None}
    said = answers(Path(message.folder), [3], 0)[3]
    assert said is not None and said.startswith(f"DamagedError: {message.folder}/rank-0.weights cannot be")
    del sync.model.tensors["model.norm.weight"]
    connection.take(disk_plan(PLAN, 0, "float32", tmp_path), sync.model)
    assert answers(tmp_path, [3], 0) == {3: "ValueError: parameter model.norm.weight is in the plan only"}
