"""Weights through files, for engines that only HTTP and a file system reach.

Every trainer rank writes one file of what has changed since the sync before, while engines generate. Then
engines read their parts of all files. Where the plan does not hold, whole HF checkpoints take this way.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path

from torch import Tensor

from megatron_vespo.weight_sync.agreement import from_rank_0, gathered, together
from megatron_vespo.weight_sync.disk_folder import FLAG, FolderError, claim, folder_errors, sees
from megatron_vespo.weight_sync.disk_version import Manifest, answers, write_manifest
from megatron_vespo.weight_sync.disk_writer import DiskWriter, Written
from megatron_vespo.weight_sync.engine_admin import EngineAdmin, EnginesLostError
from megatron_vespo.weight_sync.engine_calls import post_messages
from megatron_vespo.weight_sync.exact import ExactSource
from megatron_vespo.weight_sync.messages import DiskHello, DiskLoad, DiskPlan
from megatron_vespo.weight_sync.plan import Plan
from megatron_vespo.weight_sync.trainer_layout import TrainerShard

# of the trainer with answers that another host has written: file systems may show them later
PATIENCE_S = 5.0


class Disk:
    """One trainer rank's part. Rank 0 speaks to the engines. Every method is a collective, see WeightLink."""

    def __init__(
        self,
        source: ExactSource,
        run_folder: Path,
        export: Callable[[Path], None],
        why_export: str | None = None,
    ):
        """`run_folder` is as `disk_folder` names it. `export` writes an HF checkpoint, a collective;
        `why_export` is the reason if no plan can hold.
        """
        self._source, self._run_folder, self._export = source, run_folder, export
        self._leads = source.shard.rank == 0
        self._never_planned = why_export
        self.why_export = why_export
        self.written_bytes = 0  # of the last sync, by all ranks
        self.changed_elements = 0  # the same; with an export 0
        self._token: str | None = None
        self._admin: EngineAdmin | None = None
        self._writer: DiskWriter | None = None
        self._connection: Path | None = None
        self._sync = 0
        self._load: DiskLoad | None = None

    @property
    def way(self) -> str:
        """How weights go to the engines, for people."""
        if self.why_export is not None:
            return f"weights go to the engines as whole checkpoints in {self._run_folder}: {self.why_export}"
        return f"weights go to the engines as changes in files in {self._run_folder}"

    @property
    def in_session(self) -> bool:
        """Engines read a checkpoint only outside of a weight update."""
        return self.why_export is None

    def connect(self, admin: EngineAdmin, number: int) -> None:
        """Find out whether all engines see the folder, and tell them of the plan.

        FolderError if no engine sees it, or not all trainer ranks do.
        """
        self._admin, self._sync, self.why_export = admin, 0, self._never_planned
        self._connection = self._run_folder / f"connection-{number}"
        if self._token is None:
            self._token = from_rank_0(together(self._leads, claim, self._run_folder))
            together(True, self._check_seen)
        together(self._leads, self._make, self._connection)
        together(self._leads, self._say_hello)
        if self.why_export is None:
            plan = self._plan(gathered(self._source.shard))
            if isinstance(plan, Plan):
                source = self._source
                self._writer = DiskWriter(plan, source.shard.rank, source.dtype, source.device)
                self.why_export = from_rank_0(together(self._leads, self._tell, plan))
            else:
                self.why_export = plan

    def stage(self, held: Mapping[str, Tensor]) -> None:
        """Write a version. `held` are this rank's parameters by their first HF tensor."""
        self._sync += 1
        if self.why_export is not None:
            with folder_errors(self._run_folder):
                self._export(self._version)
            self.written_bytes = from_rank_0(together(self._leads, self._size))
            return
        together(self._leads, self._make, self._version)
        written: list[Written] = gathered(together(True, self._write, held))
        self.written_bytes = sum(of_rank.size for of_rank in written)
        self.changed_elements = sum(of_rank.changed for of_rank in written)
        self._load = together(self._leads, self._finish, written)

    def send(self, held: Mapping[str, Tensor], policy_version: int) -> None:
        """Have the engines read what `stage` has written; afterwards it is deleted."""
        together(self._leads, self._send, policy_version)

    def close(self) -> None:
        """Delete what engines have not read."""
        if self._leads and self._connection is not None:
            shutil.rmtree(self._connection, ignore_errors=True)
        self._writer = self._connection = self._admin = None

    def _check_seen(self) -> None:
        assert self._token is not None
        if not sees(self._run_folder, self._token):
            raise FolderError(
                f"{FLAG} {self._run_folder.parent}: trainer rank {self._source.shard.rank} on "
                f"{self._source.host} sees another folder of this name than rank 0: all ranks and engines "
                "need one file system"
            )

    def _make(self, folder: Path) -> None:
        with folder_errors(self._run_folder):
            folder.mkdir()

    def _say_hello(self) -> None:
        folder, token = self._folder, self._token
        assert token is not None
        calls = post_messages(
            self._engines, self._size_of_engine,
            lambda slot: DiskHello(str(self._run_folder), token, str(folder), slot), None,
        )  # fmt: skip
        self._engines.wait(calls)
        blind = self._silent(answers(folder, self._slots, PATIENCE_S))
        if not blind:
            return
        text = f"does not see {FLAG} {self._run_folder.parent} of the trainer, or cannot write there"
        if len(blind) == len(self._engines.urls):
            raise FolderError(f"engine {blind[0]} {text}: it needs the same file system")
        raise EnginesLostError({url: f"engine {url} {text}" for url in blind})

    def _plan(self, shards: Sequence[TrainerShard]) -> Plan | str:
        """Or the reason why there is none."""
        try:
            return self._source.plan(shards)
        except ValueError as error:
            return str(error)

    def _tell(self, plan: Plan) -> str | None:
        """Tell all engines of the plan; why it does not hold for one of them."""
        source, folder = self._source, self._folder
        messages = [
            disk_plan(plan, rank, str(source.dtype).removeprefix("torch."), folder)
            for rank in range(source.layout.tp)
        ]
        size = len(messages)
        calls = post_messages(self._engines, size, lambda slot: messages[slot % size], None)
        if failed := self._failed(calls, folder):
            return "; ".join(failed.values())
        return None

    def _write(self, held: Mapping[str, Tensor]) -> Written:
        assert self._writer is not None
        with folder_errors(self._run_folder):
            return self._writer.write(self._version, held)

    def _finish(self, written: Sequence[Written]) -> DiskLoad:
        """Write the manifest; the message that makes engines read the version."""
        manifest = Manifest(
            sync=self._sync,
            base=self._sync - 1 if self._sync > 1 else None,
            files={rank: of_rank.size for rank, of_rank in enumerate(written) if of_rank.size},
            parts=[part for of_rank in written for part in of_rank.parts],
        )
        with folder_errors(self._run_folder):
            return DiskLoad(str(self._version), write_manifest(self._version, manifest))

    def _send(self, policy_version: int) -> None:
        if self.why_export is None:
            load = self._load
            assert load is not None, "stage comes first"
            calls = post_messages(self._engines, self._size_of_engine, lambda slot: load, policy_version)
            failed = self._failed(calls, self._version)
        else:
            payload = {
                "model_path": str(self._version),
                "load_format": "auto",
                "flush_cache": self._engines.pause != "in_place",
                "weight_version": str(policy_version),
            }
            calls = self._engines.post("/update_weights_from_disk", payload)
            errors = [future.exception() for future in calls]
            pairs = zip(self._engines.urls, errors, strict=True)
            failed = {url: str(error) for url, error in pairs if error is not None}
        if failed:  # their weights are mixed
            raise EnginesLostError(failed)
        shutil.rmtree(self._version, ignore_errors=True)

    def _failed(self, calls: list[Future], folder: Path) -> dict[str, str]:
        """What engines have answered in `folder`, by url: those that failed, or said nothing."""
        self._engines.wait(calls)
        found = answers(folder, self._slots, PATIENCE_S)
        failed = {
            url: f"engine {url} has not answered in {folder}; see its log" for url in self._silent(found)
        }
        for slot, error in found.items():
            if error is not None:
                url = self._url(slot)
                failed[url] = f"engine {url}: {error}"
        return failed

    def _silent(self, found: Mapping[int, str | None]) -> list[str]:
        """Engines of which not all ranks have answered."""
        return list(dict.fromkeys(self._url(slot) for slot in self._slots if slot not in found))

    def _size(self) -> int:
        """Of a checkpoint, in bytes."""
        return sum(file.stat().st_size for file in self._version.iterdir())

    def _url(self, slot: int) -> str:
        return self._engines.urls[slot // self._size_of_engine]

    @property
    def _slots(self) -> range:
        return range(self._size_of_engine * len(self._engines.urls))

    @property
    def _size_of_engine(self) -> int:
        return self._source.layout.tp

    @property
    def _folder(self) -> Path:
        assert self._connection is not None, "connect comes first"
        return self._connection

    @property
    def _version(self) -> Path:
        return self._folder / f"sync-{self._sync}"

    @property
    def _engines(self) -> EngineAdmin:
        assert self._admin is not None, "connect comes first"
        return self._admin


def disk_plan(plan: Plan, engine_rank: int, dtype: str, folder: Path) -> DiskPlan:
    """What one engine rank has to know."""
    shard = plan.of_rank(engine_rank)
    return DiskPlan(
        folder=str(folder),
        engine_rank=engine_rank,
        dtype=dtype,
        matrices=shard.matrices,
        pieces=[
            [
                piece.source, piece.group, shard.numbers[piece.parameter], piece.to_row, piece.to_col,
                piece.rows, piece.cols,
            ]
            for piece in shard.pieces
        ],
        padding=shard.padding,
    )  # fmt: skip
