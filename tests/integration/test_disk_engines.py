"""Real engines get weights through files: exactly those that they would have loaded, or they are lost."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from megatron_vespo.rollout.sglang_server import SGLangServer
from megatron_vespo.weight_sync.broadcast import Broadcast
from megatron_vespo.weight_sync.disk import Disk
from megatron_vespo.weight_sync.disk_folder import FolderError, run_folder
from megatron_vespo.weight_sync.disk_version import MANIFEST
from megatron_vespo.weight_sync.engine_admin import EnginesLostError
from megatron_vespo.weight_sync.engine_layout import EngineLayout
from megatron_vespo.weight_sync.verify import check_against_checkpoint, check_engines_agree
from megatron_vespo.weight_sync.weight_link import WeightLink, Weights
from tests.support.servers import HOST, make_tiny_model, two_engines
from tests.support.whole_model import exact_source, held_weights, tensors_of

pytestmark = pytest.mark.timeout(300)
TIMEOUT_S = 60.0
BUFFER_BYTES = 300_000


@pytest.fixture(scope="module")
def engines(tiny_model, tmp_path_factory) -> Iterator[tuple[SGLangServer, SGLangServer]]:
    with two_engines(tiny_model, tmp_path_factory.mktemp("disk")) as both:
        yield both


@pytest.fixture(scope="module", autouse=True)
def trainer_of_one_rank(tmp_path_factory) -> Iterator[None]:
    store = f"file://{tmp_path_factory.mktemp('store') / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def policies(tmp_path_factory) -> list[Path]:
    """The first one, one of which a twentieth of the elements is another, and the same again."""
    first = make_tiny_model(tmp_path_factory.mktemp("policy"), seed=1)
    second = tmp_path_factory.mktemp("policies") / "second"
    shutil.copytree(first, second)
    tensors = load_file(first / "model.safetensors")
    draw = torch.Generator().manual_seed(0)
    for tensor in tensors.values():
        tensor[torch.rand(tensor.shape, generator=draw) < 0.05] += 0.01
    save_file(tensors, second / "model.safetensors", metadata={"format": "pt"})
    return [first, second]


class Link:
    """Of a trainer of one rank whose files are in `folder`."""

    def __init__(self, policy: Path, folder: Path, why_export: str | None = None):
        self.files, self._policy = run_folder(folder, folder / "output"), policy
        self.disk = Disk(
            exact_source(policy, HOST, EngineLayout(1), BUFFER_BYTES), self.files, self._export, why_export
        )
        self.link = WeightLink(
            rank=0,
            broadcast=Broadcast(0, 1, True, engine_size=1, host=HOST, backend="gloo"),
            exact=self.disk,
            timeout_s=TIMEOUT_S,
            pause="retract",
        )
        self.number = 0

    def _export(self, target: Path) -> None:
        shutil.copytree(self._policy, target)

    def connect(self, *engines: SGLangServer, fresh: tuple[SGLangServer, ...] = ()) -> None:
        self.number += 1
        self.link.connect([e.url for e in engines], [e.url for e in fresh], self.number)

    def sync(self, policy: Path, version: int, after_stage: Callable[[Path], object] | None = None) -> None:
        """`after_stage` is called with the version's folder before engines read it."""
        self._policy = policy
        stage = type(self.disk).stage

        def staged(held) -> None:
            stage(self.disk, held)
            if after_stage is not None:
                after_stage(self.disk._version)

        self.disk.stage = staged
        self.link.sync(Weights(lambda: [tensors_of(policy)], lambda: held_weights(policy)), version)

    def check(self, policy: Path, version: int) -> None:
        """All engines have what one of them has after it has loaded the policy."""
        sums = check_engines_agree(self.link.admin, version)
        check_against_checkpoint(self.link.admin, sums[0], policy, version, TIMEOUT_S)


def changed_bytes(policies: list[Path]) -> int:
    one, other = (tensors_of(policy) for policy in policies)
    return 4 * sum(int((one[name] != other[name]).sum()) for name in one)


def test_engines_have_what_they_would_have_loaded(engines, policies, tmp_path):
    first, second = engines
    link = Link(policies[0], tmp_path)
    link.connect(first, fresh=(first,))
    link.sync(policies[0], 1)
    assert link.link.why_broadcast is None and link.disk.why_export is None
    assert link.disk.written_bytes == sum(4 * tensor.numel() for tensor in tensors_of(policies[0]).values())
    link.check(policies[0], 1)
    link.sync(policies[1], 2)
    link.check(policies[1], 2)
    changed = changed_bytes(policies)
    assert changed < link.disk.written_bytes < 1.35 * changed  # a byte for each of its four, and heads
    link.sync(policies[1], 3)  # nothing has changed
    assert link.disk.written_bytes == 0
    link.connect(first, second, fresh=(second,))  # one that comes late
    link.sync(policies[1], 4)
    link.check(policies[1], 4)
    assert sorted(path.name for path in link.files.rglob("*")) == ["connection-2", "owner.json"]
    link.link.close()


def damaged(folder: Path) -> None:
    file = folder / "rank-0.weights"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damaged, "DamagedError: .*/sync-2/rank-0.weights is damaged"),
        (lambda folder: os.truncate(folder / "rank-0.weights", 100), "has 100 bytes, written were"),
        (lambda folder: (folder / MANIFEST).unlink(), "manifest.json cannot be read: No such file"),
    ],
    ids=["damaged", "cut", "missing"],
)
def test_a_damaged_file_makes_the_engine_lost_and_is_named(engines, policies, tmp_path, damage, said):
    first, _ = engines
    link = Link(policies[0], tmp_path)
    link.connect(first)
    link.sync(policies[0], 1)
    with pytest.raises(EnginesLostError, match=f"engine {first.url}: .*{said}") as error:
        link.sync(policies[1], 2, damage)
    assert list(error.value.lost) == [first.url]
    assert "\n" not in str(error.value)
    link.connect(first)  # it has answered: a repeated sync brings everything
    link.sync(policies[1], 2)
    link.check(policies[1], 2)
    link.link.close()


def test_an_engine_that_is_killed_in_the_middle(engines, policies, tmp_path):
    first, second = engines
    link = Link(policies[0], tmp_path)
    link.connect(first, second)
    link.sync(policies[0], 1)
    with pytest.raises(EnginesLostError) as error:
        link.sync(policies[1], 2, lambda folder: os.killpg(second.pid, signal.SIGKILL))
    assert list(error.value.lost) == [second.url]
    link.connect(first)
    link.sync(policies[1], 2)
    link.check(policies[1], 2)
    second.stop(timeout_s=0)
    second.start()
    link.connect(first, second, fresh=(second,))
    link.sync(policies[0], 3)
    link.check(policies[0], 3)
    link.link.close()


def test_where_no_plan_holds_engines_load_checkpoints(engines, policies, tmp_path):
    first, _ = engines
    link = Link(policies[0], tmp_path, why_export="experts are elsewhere")
    link.connect(first, fresh=(first,))
    assert link.link.way.startswith("weights go to the engines as whole checkpoints in ")
    assert link.link.way.endswith(": experts are elsewhere")
    for version, policy in enumerate((policies[1], policies[0])):
        link.sync(policy, version)
        link.check(policy, version)
        assert link.disk.written_bytes > sum(4 * tensor.numel() for tensor in tensors_of(policy).values())
    with pytest.raises(EnginesLostError, match=f"engine {first.url}: .*"):
        link.sync(policies[1], 3, lambda folder: (folder / "model.safetensors").unlink())
    link.link.close()


def test_an_engine_that_sees_another_folder_is_named(engines, policies, tmp_path, monkeypatch):
    first, _ = engines
    monkeypatch.chdir(tmp_path)
    link = Link(policies[0], Path("/proc/self/cwd/files"))  # the engine has another current folder
    with pytest.raises(FolderError) as error:
        link.connect(first)
    assert str(error.value) == (
        f"engine {first.url} does not see --weight-sync-folder /proc/self/cwd/files of the trainer, or "
        "cannot write there: it needs the same file system"
    )
    link.link.close()
