"""Rate and peak memory of the conversions against a plain copy and against megatron-bridge.

    python tests/benchmarks/conversion.py [--layers 2] [--rounds 3] [--folder DIR] [--bridge-python PYTHON]

An HF folder with the shapes of Qwen3-30B-A3B, bf16, cut to a few layers, with random weights. Everything is a
process of its own. Seconds are those of the work without imports, as each process measures them:

    copy     every file by shutil.copyfile, then fsync
    ours     `megatron-vespo convert`: convert, fsync, read back and prove
    bridge   import: load_hf_weights and dist_checkpointing.save; export: dist_checkpointing.load and
             save_hf_weights, which leaves the files in the system's cache. Making the model is not counted.

Variants take turns, and ratios are those of one round, because other work on the machine slows all of them;
processor seconds say more there, and nothing of the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from process_memory import Run, run

REPOSITORY = Path(__file__).parents[2]
BRIDGE = REPOSITORY / "tests" / "integration" / "programs" / "megatron_bridge.py"
TIMEOUT_S = 900
GIB = 2**30
RATE_TO_COPY, RATE_TO_BRIDGE, MEMORY_TO_BRIDGE = 0.5, 2.0, 0.5  # the aims
CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "dtype": "bfloat16",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
BUDGETS = (2, 1)  # GiB
COPY = """
import os, shutil, sys, time
from pathlib import Path
started, processor = time.monotonic(), sum(os.times()[:4])
source, target = map(Path, sys.argv[1:])
target.mkdir()
for path in sorted(source.iterdir()):
    shutil.copyfile(path, target / path.name)
    with open(target / path.name, "rb") as file:
        os.fsync(file.fileno())
print(f"took {time.monotonic() - started:.2f} s, {sum(os.times()[:4]) - processor:.2f} s of processors")
"""
CONVERT = """
import os, sys, time
from megatron_vespo.commands import main as cli
from megatron_vespo.commands.convert import command as convert_cli
started, processor = time.monotonic(), sum(os.times()[:4])
code = cli.run(sys.argv[1:])
print(f"took {time.monotonic() - started:.2f} s, {sum(os.times()[:4]) - processor:.2f} s of processors")
sys.exit(code)
"""
_TOOK = re.compile(r"^took ([0-9.]+) s, ([0-9.]+) s of processors$", re.MULTILINE)


def make_checkpoint(folder: Path, layers: int, shard_bytes: int) -> None:
    """Random bits for values, in files of about that size; nothing but one tensor is ever in memory."""
    import numpy as np
    import torch

    from megatron_vespo.checkpoints.hf_shards import write_index
    from megatron_vespo.checkpoints.hf_writer import ShardFile, plan_shards
    from megatron_vespo.checkpoints.safetensors_file import TensorInfo
    from megatron_vespo.checkpoints.spans import Span
    from megatron_vespo.models.family import family_of, shape_of

    folder.mkdir()
    config = CONFIG | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    shapes = family_of(config).hf_tensors(shape_of(config))
    infos = {name: TensorInfo(torch.bfloat16, shape) for name, shape in shapes.items()}
    shards = plan_shards(infos, shard_bytes)
    random = np.random.Generator(np.random.SFC64(0))
    for file_name, tensors in shards.items():
        with ShardFile(folder / file_name, tensors) as file:
            for name, info in tensors.items():
                bits = np.frombuffer(bytearray(random.bytes(info.nbytes)), np.uint16)
                bits &= 0x80FF  # sign, mantissa and the lowest bit of the exponent
                bits |= 0x3C00  # the rest of it: values around 2**-7
                values = torch.from_numpy(bits).view(torch.bfloat16).view(info.shape)
                file.write(Span(name, 0, info.rows), values)
    weight_map = {name: file_name for file_name, tensors in shards.items() for name in tensors}
    write_index(folder, weight_map, sum(info.nbytes for info in infos.values()))


class Bench:
    """One folder of checkpoints and the processes that work on it."""

    def __init__(self, folder: Path, bridge_python: Path | None):
        self.folder, self._bridge_python = folder, bridge_python
        self.hf, self.megatron = folder / "hf", folder / "megatron"
        self._environment = os.environ | {
            "PYTHONPATH": f"{REPOSITORY}:{BRIDGE.parent}",
            "OMP_NUM_THREADS": "1",
            "RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29517",
        }

    def one_round(self) -> dict[str, Run]:
        out, results = self.folder / "out", {}

        def measure(name: str, *command: str | Path, source: Path, keep_as: Path | None = None) -> None:
            shutil.rmtree(out, ignore_errors=True)
            # The source is in the cache then, and memory for what will be written has just been freed: on a
            # virtual machine, memory that was free for long costs several times what the work does.
            shutil.copytree(source, out)
            shutil.rmtree(out)
            os.sync()
            words = [str(word) for word in command]
            results[name] = run(words, self._environment, TIMEOUT_S, self.folder / "log.txt")
            if keep_as is not None:
                shutil.rmtree(keep_as, ignore_errors=True)
                out.rename(keep_as)

        def convert(direction: str, source: Path, budget: int, keep_as: Path | None = None) -> None:
            flags = ["--quiet", "--memory-budget", str(budget)]
            command = [sys.executable, "-c", CONVERT, "convert", direction, source, out, *flags]
            measure(f"{direction}, {budget} GiB", *command, source=source, keep_as=keep_as)

        measure("copy", sys.executable, "-c", COPY, self.hf, out, source=self.hf)
        for budget in BUDGETS:
            convert("hf-to-megatron", self.hf, budget, self.megatron)
            convert("megatron-to-hf", self.megatron, budget)
        if self._bridge_python is not None:
            program = [self._bridge_python, BRIDGE]
            measure("bridge import", *program, "import", self.hf, out, source=self.hf)
            weights = self.megatron / "release"
            measure("bridge export", *program, "export", self.hf, weights, out, source=weights)
        shutil.rmtree(out, ignore_errors=True)
        return results


def seconds(result: Run) -> float:
    return float(_TOOK.search(result.output)[1])


def processor_seconds(result: Run) -> float:
    """Of all threads, and of processes that it started."""
    return float(_TOOK.search(result.output)[2])


def report(rounds: list[dict[str, Run]], num_bytes: int) -> None:
    def median(name: str, of: Callable[[Run], float], reference: str) -> float:
        """How many times the reference's, in the same round."""
        return statistics.median(of(a_round[reference]) / of(a_round[name]) for a_round in rounds)

    def peak(name: str, kind: str = "peak") -> float:
        return max(getattr(a_round[name], kind) for a_round in rounds) / GIB

    print(f"\n{'':24} {'MB/s, by round':>20} {'to copy':>8} {'CPU s/GB':>9} {'peak GiB':>9} {'anonymous':>9}")
    for name in rounds[0]:
        rates = " ".join(f"{num_bytes / seconds(a_round[name]) / 1e6:.0f}" for a_round in rounds)
        processor = min(processor_seconds(a_round[name]) for a_round in rounds) / num_bytes * 1e9
        print(
            f"{name:24} {rates:>20} {median(name, seconds, 'copy'):8.2f} {processor:9.2f} {peak(name):9.2f} "
            f"{peak(name, 'peak_anonymous'):9.2f}"
        )
    print()
    for direction, work in (("hf-to-megatron", "import"), ("megatron-to-hf", "export")):
        for budget in BUDGETS:
            name, other = f"{direction}, {budget} GiB", f"bridge {work}"
            verdict(f"{name}: peak {peak(name):.2f} GiB", peak(name) <= budget, f"at most {budget}")
            value = median(name, seconds, "copy")
            verdict(f"{name}: rate x{value:.2f} of the copy", value >= RATE_TO_COPY, f"x{RATE_TO_COPY}")
            if other not in rounds[0]:
                continue
            value, processor = (median(name, of, other) for of in (seconds, processor_seconds))
            text = f"{name}: rate x{value:.2f} of {other}, per processor second x{processor:.2f}"
            verdict(text, value >= RATE_TO_BRIDGE, f"x{RATE_TO_BRIDGE}")
            value, anonymous = (peak(name, kind) / peak(other, kind) for kind in ("peak", "peak_anonymous"))
            text = f"{name}: peak x{value:.2f} of {other}, anonymous x{anonymous:.2f}"
            verdict(text, value <= MEMORY_TO_BRIDGE, f"x{MEMORY_TO_BRIDGE}")


def verdict(text: str, reached: bool, aim: str) -> None:
    print(f"{'reached' if reached else 'MISSED ':8} {text} (aim: {aim})")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--shard-size", type=float, default=1.5, metavar="GB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work; three times the checkpoint's size")
    parser.add_argument("--bridge-python", type=Path, help="interpreter with megatron-bridge")
    parser.add_argument("--make", type=Path, help="only make the checkpoint, here")
    options = parser.parse_args()
    if options.make:
        make_checkpoint(options.make, options.layers, int(options.shard_size * 1e9))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        bench = Bench(Path(folder), options.bridge_python)
        command = [sys.executable, __file__, *sys.argv[1:], "--make", str(bench.hf)]
        run(command, os.environ | {"PYTHONPATH": str(REPOSITORY)}, TIMEOUT_S, Path(folder) / "log.txt")
        num_bytes = sum(path.stat().st_size for path in bench.hf.iterdir())
        print(
            f"{num_bytes / 1e9:.2f} GB in {options.layers} layers, the source in the cache before every run"
        )
        rounds = []
        for number in range(options.rounds):
            rounds.append(bench.one_round())
            times = ", ".join(f"{name} {seconds(result):.1f} s" for name, result in rounds[-1].items())
            print(f"round {number + 1}: {times}", flush=True)
        report(rounds, num_bytes)


if __name__ == "__main__":
    main()
