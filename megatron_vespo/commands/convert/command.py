"""`megatron-vespo convert ...`: converts, compares and inspects checkpoints from the command line."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch

from megatron_vespo.arguments.parser import FlagParser
from megatron_vespo.checkpoints import block_fp8
from megatron_vespo.checkpoints.convert import (
    DEFAULT_SHARD_BYTES,
    Options,
    Result,
    hf_to_hf,
    hf_to_megatron,
    megatron_to_hf,
)
from megatron_vespo.checkpoints.copying import DEFAULT_MEMORY, Budget
from megatron_vespo.checkpoints.ranks import Ranks, joined_ranks
from megatron_vespo.checkpoints.sources import Source, opened
from megatron_vespo.commands.convert.compare import compare, compare_with_manifest, summary
from megatron_vespo.commands.convert.engine_folder import EngineFolder, opened_as_stored
from megatron_vespo.commands.convert.logits_check import check_logits
from megatron_vespo.commands.convert.modelopt_export import FORMATS, Calibration, export_quantised
from megatron_vespo.commands.convert.options import (
    HfToHfOptions,
    HfToMegatronOptions,
    InspectOptions,
    MegatronToHfOptions,
    ModelOptOptions,
    ReadingOptions,
    VerifyOptions,
)
from megatron_vespo.system.paths import user_path

EXIT_DIFFERENT = 1
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_FP8 = "fp8"
_MAX_LINES = 20
_MAX_MESSAGE = 1000  # characters
_DESCRIPTION = """\
Convert checkpoints between HF (safetensors) and Megatron (torch_dist), and prove the result.

What is written is read back and compared with what was read before it gets its name; a manifest of hashes
lies beside it. Memory is bounded whatever the model's size. Under torchrun or srun, all processes share the
work.
"""


def main(argv: list[str]) -> int:
    """Exit code 0 only if the conversion is verified, or the checkpoints are equal."""
    args = _parser().parse_args(argv)
    try:
        with joined_ranks() as ranks:
            return args.run(args.options.of(args), ranks)
    except OSError as error:  # a full disk, a folder in place of a file
        where = error.filename or getattr(args, "target", args.source)
        raise ValueError(_one_line(f"{where}: {error.strerror}")) from error
    except ValueError as error:
        raise ValueError(_one_line(str(error))) from error


def _one_line(text: str) -> str:
    """`text` on one line, shortened: names in damaged files may be long and have any characters."""
    plain = "".join(c if c.isprintable() else " " for c in text)
    return plain if len(plain) <= _MAX_MESSAGE else plain[:_MAX_MESSAGE] + " ..."


def _parser() -> argparse.ArgumentParser:
    parser = FlagParser(
        prog="megatron-vespo convert",
        description=_DESCRIPTION,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command[T](
        name: str, run: Callable[[T, Ranks], int], options: type[T], help: str
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help, description=help)
        added.set_defaults(run=run, options=options)
        return added

    hf = command(
        "hf-to-megatron", _hf_to_megatron, HfToMegatronOptions, "HF folder SRC to a Megatron checkpoint DST"
    )
    megatron = command(
        "megatron-to-hf", _megatron_to_hf, MegatronToHfOptions, "Megatron checkpoint SRC to an HF folder DST"
    )
    other_hf = command(
        "hf-to-hf", _hf_to_hf, HfToHfOptions, "HF folder SRC to one that SGLang reads: each expert by itself"
    )
    _add_conversion_flags(hf, megatron, other_hf)
    _add_modelopt(commands)
    inspect = command("inspect", _inspect, InspectOptions, "what checkpoint PATH holds")
    inspect.add_argument("source", type=user_path, metavar="PATH")
    inspect.add_argument("--tensors", action="store_true", help="list every tensor")
    verify = command(
        "verify", _verify, VerifyOptions, "compare checkpoints A and B of any formats, or A with its manifest"
    )
    verify.add_argument("source", type=user_path, metavar="A")
    verify.add_argument("other", type=user_path, metavar="B", nargs="?")
    for added in (megatron, inspect, verify):
        added.add_argument("--hf-config", type=user_path, metavar="DIR",
            help="HF folder of a Megatron checkpoint that another program saved")  # fmt: skip
    for added in (hf, megatron, other_hf, verify):
        added.add_argument("--memory-budget", type=float, default=DEFAULT_MEMORY / 2**30, metavar="GiB",
            help="of a process (default: 2)")  # fmt: skip
        added.add_argument("--workers", type=int, metavar="N", help="threads of a process")
        added.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def _add_conversion_flags(
    hf: argparse.ArgumentParser, megatron: argparse.ArgumentParser, other_hf: argparse.ArgumentParser
) -> None:
    for added in (hf, megatron, other_hf):
        added.add_argument("source", type=user_path, metavar="SRC")
        added.add_argument("target", type=user_path, metavar="DST")
        added.add_argument("--force", action="store_true", help="replace a checkpoint that is at DST")
    for added in (hf, megatron):
        added.add_argument("--check-logits", type=int, metavar="N",
            help="run N tokens through the first layers of both sides, in fp32")  # fmt: skip
    other_hf.set_defaults(check_logits=None)
    stored = "of the output (default: as stored)"
    hf.add_argument("--dtype", choices=_DTYPES, help=stored)
    for added in (megatron, other_hf):
        added.add_argument("--dtype", choices=[*_DTYPES, _FP8],
            help=f"{stored}; fp8 is for engines: e4m3 with a scale a 128 x 128 block")  # fmt: skip
        added.add_argument("--max-shard-size", type=float, default=DEFAULT_SHARD_BYTES / 1e9, metavar="GB")


def _add_modelopt(commands) -> None:
    parser = commands.add_parser(
        "modelopt",
        help="HF folder SRC to a folder DST for engines, quantised by NVIDIA ModelOpt",
    )
    parser.set_defaults(run=_modelopt, options=ModelOptOptions)
    parser.add_argument("source", type=user_path, metavar="SRC")
    parser.add_argument("target", type=user_path, metavar="DST")
    parser.add_argument("--force", action="store_true", help="replace a checkpoint that is at DST")
    parser.add_argument("--format", choices=FORMATS, required=True, help="nvfp4 is for Blackwell")
    parser.add_argument(
        "--calibration",
        type=user_path,
        metavar="FILE",
        help="JSONL of prompts, `text` or `question` (default: random tokens, for trying it out)",
    )
    parser.add_argument("--samples", type=_positive, default=512, metavar="N", help="default: 512")
    parser.add_argument(
        "--max-tokens", type=_positive, default=512, metavar="N", help="of a sample (default: 512)"
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return int(text)


def _modelopt(options: ModelOptOptions, ranks: Ranks) -> int:
    calibration = Calibration(options.calibration, options.samples, options.max_tokens)
    for line in export_quantised(
        options.source, options.target, options.format, calibration, options.force, ranks
    ):
        print(line)
    return 0


def _budget(options: ReadingOptions) -> Budget:
    if options.workers is not None and options.workers < 1:
        raise ValueError(f"--workers {options.workers}: at least 1")
    if not 0 < options.memory_budget < 2**20:
        raise ValueError(f"--memory-budget {options.memory_budget}: a number of GiB")
    workers = {} if options.workers is None else {"workers": options.workers}
    return Budget(memory=int(options.memory_budget * 2**30), **workers)


def _conversion(options: HfToMegatronOptions) -> Options:
    check = None
    if options.check_logits is not None:
        if options.check_logits < 1:
            raise ValueError(f"--check-logits {options.check_logits}: at least 1 token")
        if options.dtype is not None:
            raise ValueError("--check-logits compares unrounded weights: leave out --dtype")
        check = partial(check_logits, num_tokens=options.check_logits)
    dtype = block_fp8.DTYPE if options.dtype == _FP8 else _DTYPES.get(options.dtype or "")
    return Options(dtype, _budget(options), options.force, options.quiet, check)


def _hf_to_megatron(options: HfToMegatronOptions, ranks: Ranks) -> int:
    started = time.monotonic()
    result = hf_to_megatron(options.source, options.target, _conversion(options), ranks)
    return _report(options, result, started, ranks)


def _megatron_to_hf(options: MegatronToHfOptions, ranks: Ranks) -> int:
    started, shards = time.monotonic(), _max_shard_bytes(options)
    result = megatron_to_hf(
        options.source, options.target, _conversion(options), ranks, options.hf_config, shards
    )
    return _report(options, result, started, ranks)


def _hf_to_hf(options: HfToHfOptions, ranks: Ranks) -> int:
    started, shards = time.monotonic(), _max_shard_bytes(options)
    return _report(
        options, hf_to_hf(options.source, options.target, _conversion(options), ranks, shards), started, ranks
    )


def _max_shard_bytes(options: HfToHfOptions) -> int:
    if not 0 < options.max_shard_size < 2**20:
        raise ValueError(f"--max-shard-size {options.max_shard_size}: a positive number of GB")
    return int(options.max_shard_size * 1e9)


def _report(options: HfToMegatronOptions, result: Result, started: float, ranks: Ranks) -> int:
    if ranks.rank == 0:
        seconds = time.monotonic() - started
        size = result.num_bytes / 2**30
        print(
            f"{options.target}: {result.num_tensors} tensors, {size:.2f} GiB, read back and proven, "
            f"in {seconds:.1f} s ({size / seconds:.2f} GiB/s)"
        )
        if result.checked:
            print(result.checked)
    return 0


def _inspect(options: InspectOptions, ranks: Ranks) -> int:
    with opened_as_stored(options.source, options.hf_config) as source:
        lines = list(summary(source)) + (_listing(source) if options.tensors else [])
    if ranks.rank == 0:
        print("\n".join(lines))
    return 0


def _listing(source: Source | EngineFolder) -> list[str]:
    return [
        f"{name}  {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        for name, tensor in source.tensors.items()
    ]


def _verify(options: VerifyOptions, ranks: Ranks) -> int:
    if options.other is None:
        with opened_as_stored(options.source, options.hf_config) as stored:
            found = compare_with_manifest(stored, _budget(options), options.quiet, ranks)
    else:
        with opened(options.source, options.hf_config) as a, opened(options.other, options.hf_config) as b:
            found = compare(a, b, _budget(options), options.quiet, ranks)
    if ranks.rank == 0:
        for line in found.differences[:_MAX_LINES]:
            print(line)
        if len(found.differences) > _MAX_LINES:
            print(f"... and {len(found.differences) - _MAX_LINES} more")
        verdict = "DIFFERENT" if found.differences else "same"
        print(f"{verdict}: {found.num_tensors} tensors, {found.num_bytes / 2**30:.2f} GiB compared")
    return EXIT_DIFFERENT if found.differences else 0
