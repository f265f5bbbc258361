"""Runs all that needs a GPU on a machine with one, and writes a JSON of figures.

    python tests/gpu/run.py [--json FILE] [--pack FOLDER] [--only NAME ...] [--deadline 450]

Needs no more than Python 3.12, torch, Triton and the folder that `pack.py` has filled. Each item runs in a
process of its own with a time limit; none stops the others. `--device cpu` runs in small what can run without
a GPU. Exit code: 0 if something has run and nothing has failed, 1 if something has failed, 3 if nothing ran.
Standard library only.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))

from tests.gpu.items.table import ITEMS, Item  # noqa: E402
from tests.gpu.wheels import unpack  # noqa: E402

DEFAULT_PACK = Path(__file__).with_name("pack")
DEADLINE_S = 450  # of all together: eight minutes less what a fresh machine's disk may add
LEAST_S = 10  # an item is not started with less time left
LOOK_S = 120  # for the first import of torch
SHOWN_LOG = 3000  # characters of a failed item's output
NOTHING_RAN = 3

# what runs in the machine's own interpreter to say what it has
LOOK = """
import json, platform, sys, importlib.metadata as metadata
machine = {"python": platform.python_version(), "system": platform.platform(), "gpus": []}
for name in ("torch", "triton", "megatron-core", "transformers", "numpy", "transformer-engine"):
    try:
        machine[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        machine[name] = None
import torch
machine["cuda"] = torch.version.cuda
if torch.cuda.is_available():
    machine["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        machine["gpus"].append({
            "name": gpu.name, "uuid": str(gpu.uuid), "capability": [gpu.major, gpu.minor],
            "bytes": gpu.total_memory, "multiprocessors": gpu.multi_processor_count,
        })
print(json.dumps(machine))
"""


def look(environment: Mapping[str, str]) -> dict:
    """What this machine has; "problem" where torch does not even start."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", LOOK], env=environment, capture_output=True, text=True, timeout=LOOK_S
        )
    except subprocess.TimeoutExpired:
        return {"gpus": [], "problem": f"torch was not imported in {LOOK_S} s"}
    if done.returncode:
        return {"gpus": [], "problem": (done.stderr.strip().splitlines() or ["no output"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def obstacle(item: Item, device: str, machine: dict, path: Sequence[str]) -> str:
    """Why the item cannot run here; empty if it can."""
    if "problem" in machine:
        return machine["problem"]
    if device == "cpu" and not item.on_cpu:
        return "needs a CUDA device"
    if device == "cuda" and not machine["gpus"]:
        return "no CUDA device"
    missing = [module for module in item.modules if not _found(module, path)]
    if missing:
        return f"{', '.join(missing)} not installed and not in the pack: run pack.py where there is an index"
    if len(item.modules) > 1 and sys.version_info < (3, 12):
        return f"megatron_vespo needs Python 3.12, this is {machine['python']}"
    return ""


def _found(module: str, path: Sequence[str]) -> bool:
    relative = module.replace(".", "/")
    in_pack = any(Path(folder, relative).exists() for folder in path)
    try:
        return in_pack or importlib.util.find_spec(module) is not None
    except ImportError:  # of its parent
        return False


def run_item(item: Item, device: str, folder: Path, environment: Mapping[str, str], limit_s: float) -> dict:
    """Its result; it and all processes that it has started end with it, at `limit_s` at the latest."""
    result, log = folder / "result.json", folder / "log.txt"
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.gpu.run_item", item.name, "--device", device]
    command += ["--folder", str(folder), "--result", str(result)]
    began = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env={**environment, **item.environment},
            stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(limit_s)
            reason = f"its process ended with code {code}"
        except subprocess.TimeoutExpired:
            reason = f"still ran after {limit_s:.0f} s"
        finally:
            _end_session(process)
    told = {"outcome": "failed", "reason": reason, "figures": {}}
    if result.exists():
        told = json.loads(result.read_text())
    if told["outcome"] == "failed":
        told["log"] = log.read_text(errors="replace")[-SHOWN_LOG:]
    return {"name": item.name, **told, "seconds": round(time.monotonic() - began, 1)}


def _end_session(process: subprocess.Popen) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def run_items(
    items: Sequence[Item], device: str, machine: dict, folder: Path, path: Sequence[str], deadline: float
) -> Iterator[dict]:
    """Results, one after another; `path` holds the unpacked wheels, `deadline` is of time.monotonic."""
    environment = child_environment(path)
    for item in items:
        reason = obstacle(item, device, machine, path)
        left = deadline - time.monotonic()
        if not reason and left < LEAST_S:
            reason = "no time left"
        if reason:
            yield {"name": item.name, "outcome": "skipped", "reason": reason, "figures": {}, "seconds": 0.0}
        else:
            yield run_item(item, device, folder, environment, min(item.limit_s, left))


def child_environment(path: Sequence[str]) -> dict[str, str]:
    inherited = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    python_path = os.pathsep.join([*path, str(REPOSITORY), *inherited])
    # the checkout may be read-only, and what Megatron warns of is known
    return {
        **os.environ,
        "PYTHONPATH": python_path,
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONWARNINGS": "ignore",
    }


def exit_code(results: Sequence[dict]) -> int:
    outcomes = {result["outcome"] for result in results}
    return 1 if "failed" in outcomes else 0 if "ok" in outcomes else NOTHING_RAN


def table(result: dict) -> str:
    """One item for people."""
    reason = (result["reason"].strip().splitlines() or [""])[-1]
    lines = [f"{result['outcome']:8}{result['name']:32}{result['seconds']:6.1f} s  {reason}"]
    for name, figure in result["figures"].items():
        shown = f"{figure:.4g}" if isinstance(figure, float) else figure
        lines.append(f"{'':10}{name}: {shown}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Runs all that needs a GPU and writes a JSON of figures.")
    parser.add_argument("--json", type=Path, help="rewritten after each item")
    parser.add_argument("--pack", type=Path, default=DEFAULT_PACK, help="wheels of pack.py; may be missing")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[item.name for item in ITEMS])
    parser.add_argument("--deadline", type=float, default=DEADLINE_S, help="seconds of all items together")
    options = parser.parse_args(argv)
    began = time.monotonic()
    chosen = [item for item in ITEMS if options.only is None or item.name in options.only]
    with tempfile.TemporaryDirectory(prefix="megatron-vespo-gpu-") as scratch:
        wheels, work = Path(scratch, "wheels"), Path(scratch, "work")
        wheels.mkdir()
        work.mkdir()
        unpacked = unpack(options.pack, wheels)
        path = [str(wheels)] if unpacked else []
        machine = look(child_environment(path)) | {"unpacked": unpacked}
        print(json.dumps(machine, indent=1), flush=True)
        results: list[dict] = []
        for result in run_items(chosen, options.device, machine, work, path, began + options.deadline):
            results.append(result)
            print(table(result), flush=True)
            report = {"machine": machine, "device": options.device, "items": results}
            report["seconds"] = round(time.monotonic() - began, 1)
            if options.json is not None:
                options.json.write_text(json.dumps(report, indent=1))
    outcomes = [result["outcome"] for result in results]
    print(", ".join(f"{outcomes.count(kind)} {kind}" for kind in ("ok", "failed", "skipped")),
          f"in {time.monotonic() - began:.0f} s")  # fmt: skip
    return exit_code(results)


if __name__ == "__main__":
    sys.exit(main())
