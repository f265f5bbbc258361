"""Mistakes of users, drawn from a seed: a command that is right, and one thing of it that is wrong.

Every case names words of which one has to be in the answer: the flag, the file or the variable.
"""

from __future__ import annotations

import argparse
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.command_files import ANY, JSON, JSON_LINES, empty, surrogate, wrong_field, wrong_stop

TRAIN = (
    "--hf-checkpoint model --prompt-data train.jsonl --eval-data held.jsonl --output-dir out --save ck "
    "--train-iters 8 --lr 1e-4 --steps-per-rollout 4 --rollout-batch-size 8 --group-size 4 "
    "--max-prompt-tokens 64 --max-completion-tokens 32 --max-tokens-per-gpu 512"
)
RECIPE = TRAIN.replace("--save ck", "--save ck --load ck")
RIGHT = {
    "train": f"train {TRAIN}",
    "evaluate": "evaluate --checkpoint model --data held=held.jsonl --output-dir out --max-prompt-tokens 64",
    "prepare-data": "prepare-data gsm8k new.jsonl --source gsm8k.jsonl --exclude held.jsonl",
    "plan": "plan recipe.flags --nodes 1",
    "check layout": "check layout --hf-checkpoint model --candidate tp2 --batch batch.jsonl --output-dir out",
    "convert hf-to-megatron": "convert hf-to-megatron model new --workers 1 --quiet",
    "convert megatron-to-hf": "convert megatron-to-hf megatron new --workers 1 --quiet",
    "convert inspect": "convert inspect megatron",
    "convert verify": "convert verify model megatron --workers 1 --quiet",
    "convert modelopt": "convert modelopt model new --format fp8",
    "simulate": "simulate --gpus 16 --rollout-batches 2 --rollout-batch-size 16 --group-size 2 "
    "--steps-per-rollout 2 --max-staleness 0",
    "doctor": "doctor --json found.json",
    "smoke": "smoke recipe.flags --output-dir out",
    "submit": "submit recipe.flags --nodes 1 --dry-run",
    "args": "args model",
}
# what is read of a command's files, by how it is called; a file's damage is named by the file
TEXTS = ("recipe.flags",)
FILES = {
    "train": ["model/config.json", "model/tokenizer.json", "model/generation_config.json", "train.jsonl",
              "held.jsonl"],
    "evaluate": ["model/tokenizer.json", "model/generation_config.json", "held.jsonl"],
    "prepare-data": ["gsm8k.jsonl", "held.jsonl"],
    "plan": ["recipe.flags", "model/config.json"],
    "check layout": ["model/config.json", "batch.jsonl"],
    "convert hf-to-megatron": ["model/config.json", "model/model.safetensors"],
    "convert megatron-to-hf": ["megatron/release/.metadata", "megatron/release/__0_0.distcp",
                               "megatron/release/hf/config.json",
                               "megatron/latest_checkpointed_iteration.txt"],
    "convert inspect": ["megatron/release/.metadata", "megatron/release/hf/config.json"],
    "convert verify": ["model/config.json", "model/model.safetensors", "megatron/release/.metadata"],
    "smoke": ["recipe.flags"],
    "submit": ["recipe.flags", "model/config.json"],
    "args": ["model/config.json"],
}  # fmt: skip
# flags whose folder or file is written: what stands in the way is said at once
OUTPUTS = {
    "train": ["--output-dir", "--save", "--save-rollouts"],
    "evaluate": ["--output-dir"],
    "check layout": ["--output-dir", "--markdown"],
    "simulate": ["--picture"],
    "doctor": ["--json"],
    "smoke": ["--output-dir"],
}
MEGATRONS = {
    "--lr": float, "--min-lr": float, "--clip-grad": float, "--weight-decay": float, "--adam-beta1": float,
    "--adam-beta2": float, "--adam-eps": float, "--train-iters": int, "--save-interval": int,
    "--tensor-model-parallel-size": int, "--pipeline-model-parallel-size": int, "--lr-warmup-iters": int,
    "--context-parallel-size": int, "--expert-model-parallel-size": int, "--lr-warmup-fraction": float,
    "--seed": int, "--lr-decay-style": str,
}  # fmt: skip
WRONG = {
    int: [
        "abc",
        "",
        "1.5",
        "0x10",
        "nan",
        "inf",
        "1e3",
        "\N{MINUS SIGN}3",
        "1,000",
        "99999999999999999999",
        "-7",
    ],
    float: ["abc", "", "nan", "-inf", "1,5", "0.5.5", "\N{FULLWIDTH DIGIT ONE}x", "-7"],
}
# what is no mistake although it looks like one: the flag, the word, and why
VALID: dict[tuple[str, str], str] = {
    ("--save", "dangling/new"): "what the link names is made",
    ("--seed", "-7"): "simulate and check layout take any seed",
    ("--eval-prompts", "99999999999999999999"): "no more than there are",
    ("--num-prompts", "99999999999999999999"): "no more than there are",
}
CONTRADICTIONS = [
    ("train", "--rollout-batch-size 7", ["--rollout-batch-size"]),
    ("train", "--group-size 1", ["--group-size"]),
    ("train", "--train-iters 7", ["--train-iters"]),
    ("train", "--trainer-ranks 3 --tensor-model-parallel-size 2", ["--tensor-model-parallel-size"]),
    ("train", "--num-layers 5", ["--num-layers"]),
    ("train", "--seq-length 5", ["--seq-length"]),
    ("train", "--routing-replay R2 --ratio-denominator rollout", ["--routing-replay"]),
    ("train", "--clip-range 0.1 0.2", ["--clip-range"]),
    ("train", "--on-alarm checkpoint-and-stop --save", ["--save"]),
    ("train", "--load nowhere", ["--load"]),
    ("train", "--train-from nowhere", ["--train-from"]),
    ("train", "--generate-function nothing", ["generate function"]),
    ("train", "--reward-function no.such:thing", ["reward function"]),
    ("train", "--reward-function held:thing", ["reward function"]),
    ("train", "--reward-function http://", ["reward function"]),
    ("train", "--reward-function environment", ["--reward-function"]),
    ("train", "--prompt-key nothing", ["--prompt-key"]),
    ("train", "--answer-pattern (", ["--answer-pattern"]),
    ("train", "--answer-pattern nothing", ["--answer-pattern"]),
    ("train", "--fp16", ["--fp16"]),
    ("train", "--sglang-port 3", ["--sglang-port"]),
    ("train", "--sglang-tp-size", ["--sglang-tp-size"]),
    ("train", "--sglang-tp-size x", ["--sglang-tp-size"]),
    ("train", "--sglang-tp-size 0", ["--sglang-tp-size"]),
    ("train", "--sglang-mem-fraction-static 7", ["--sglang-mem-fraction-static"]),
    ("train", "--recipe nowhere", ["nowhere"]),
    ("train", "--recipe", ["--recipe"]),
    ("train", "--max-prompt-tokens 5000", ["--max-prompt-tokens"]),
    ("train", "--colocate --rollout-only", ["--colocate", "--rollout-only"]),
    ("train", "--old-policy ewma --ewma-decay 1", ["--ewma-decay"]),
    ("evaluate", "--temperature 0 --num-completions 4", ["--temperature"]),
    ("evaluate", "--api-key-env NOTHING", ["--api-key-env"]),
    ("evaluate", "--data held.jsonl", ["--data"]),
    ("evaluate", "--data held=held.jsonl", ["--data"]),
    ("evaluate", "--engine-url ftp://x", ["--engine-url"]),
    ("evaluate", "--min-engines 3", ["--min-engines"]),
    ("evaluate", "--hf-config nowhere", ["--hf-config", "nowhere"]),
    ("prepare-data", "--max-unusable 7", ["--max-unusable"]),
    ("prepare-data", "--revision abc", ["--revision"]),
    ("prepare-data", "--exclude nowhere.jsonl", ["nowhere.jsonl"]),
    ("prepare-data", "--source nowhere", ["nowhere"]),
    ("plan", "--rollout-only", ["--rollout-only"]),
    ("plan", "--tensor-model-parallel-size 3", ["--tensor-model-parallel-size"]),
    ("plan", "--trainer-ranks 64", ["--rollout-batch-size"]),
    ("check layout", "--candidate tp3", ["tp3"]),
    ("check layout", "--candidate xx2", ["xx2"]),
    ("check layout", "--reference tp0", ["tp0"]),
    ("check layout", "--candidate tp2,tp2", ["tp2,tp2"]),
    ("check layout", "--train-iters 3", ["--train-iters"]),
    ("check layout", "--tensor-model-parallel-size 2", ["--tensor-model-parallel-size"]),
    ("convert hf-to-megatron", "--dtype fp8", ["--dtype"]),
    ("convert hf-to-megatron", "--check-logits 4 --dtype bf16", ["--check-logits"]),
    ("convert verify", "third", ["third"]),
    ("simulate", "--gpus 1", ["--gpus"]),
    ("simulate", "--from-run nowhere", ["nowhere"]),
    ("simulate", "--lengths-from nowhere", ["nowhere"]),
    ("simulate", "--decode-ms 0 0", ["--decode-ms"]),
    ("simulate", "--rollout-batch-size 7", ["--rollout-batch-size"]),
    ("simulate", "--picture x.nothing", ["--picture"]),
    ("simulate", "--max-staleness 1", ["--max-staleness"]),
    ("submit", "--chain 0", ["--chain"]),
    ("submit", "--gpus-per-node -1", ["--gpus-per-node"]),
    ("submit", "--time abc", ["--time"]),
    ("submit", "--sbatch", ["--sbatch"]),
    ("submit", "--partition h100", ["--partition"]),
    ("submit", "--ray-address auto", ["--ray-address"]),
    ("submit", "--load elsewhere", ["--load"]),
    ("submit", "--smoke --chain 3", ["--chain"]),
    ("smoke", "--tensor-model-parallel-size x", ["--tensor-model-parallel-size"]),
    ("smoke", "--timeout 0", ["--timeout"]),
]  # fmt: skip

# a variable of the environment: those without names are no mistake, and must not be a traceback
_STEP = {"SLURM_STEP_NODELIST": "node[1-2]", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}
ENVIRONMENTS: list[tuple[str, dict[str, str | None], list[str]]] = [
    ("convert inspect", {"RANK": "x", "WORLD_SIZE": "2"}, ["RANK"]),
    ("convert verify", {"RANK": "0", "WORLD_SIZE": ""}, ["WORLD_SIZE"]),
    ("convert hf-to-megatron", {"RANK": "0", "WORLD_SIZE": "0"}, ["WORLD_SIZE"]),
    ("convert inspect", {"RANK": "5", "WORLD_SIZE": "2"}, ["RANK"]),
    ("convert inspect", _STEP | {"SLURM_PROCID": "-1"}, ["SLURM_PROCID"]),
    ("doctor", _STEP | {"SLURM_NTASKS": None}, ["SLURM_NTASKS"]),
    ("doctor", _STEP | {"SLURM_LOCALID": "first"}, ["SLURM_LOCALID"]),
    ("doctor", _STEP | {"SLURM_HET_SIZE": "two"}, ["SLURM_HET_SIZE"]),
    ("submit", {"PATH": "/nowhere"}, []),
    *((command, {"HOME": None}, []) for command in ("train", "evaluate", "plan", "doctor")),
    *((command, {"TMPDIR": "/nowhere"}, []) for command in ("train", "evaluate", "submit", "smoke")),
    *((command, {"LANG": "C", "LC_ALL": "C"}, []) for command in ("train", "simulate", "prepare-data")),
    *((command, {"CUDA_VISIBLE_DEVICES": "none,-1"}, []) for command in ("train", "plan", "check layout")),
    *((command, {"COLUMNS": "wide"}, []) for command in ("simulate", "doctor", "train")),
    *((command, {"RAY_ADDRESS": "nowhere:1"}, []) for command in ("train", "plan", "check layout")),
    *((command, {"HF_HOME": "/dev/null/x"}, []) for command in ("train", "evaluate")),
]
COLD: list[tuple[str, dict[str, str | None], list[str]]] = [
    ("args", {"OMP_NUM_THREADS": "x"}, ["OMP_NUM_THREADS"]),
    ("args", {"OMP_NUM_THREADS": ""}, []),
    ("train", {"OMP_NUM_THREADS": "-1"}, ["OMP_NUM_THREADS"]),
    ("args", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, []),
    ("convert inspect", {"HOME": None, "TMPDIR": "/nowhere", "PATH": None}, []),
]


@dataclass
class Case:
    """`prepare` changes a copy of the files; one of `names` has to be in the answer."""

    command: str
    argv: list[str]
    what: str
    names: list[str]
    prepare: Callable[[Path], None] = lambda folder: None
    env: dict[str, str | None] = field(default_factory=dict)  # None: unset
    warm: bool = True  # whether a process that has imported everything can answer
    valid: str = ""  # why it is no mistake


def flags_of(command: str) -> dict[str, tuple[object, object]]:
    """Flag -> type, nargs of the command's own flags; for a command that takes train's, those too."""
    from megatron_vespo.arguments.training_flags import add_vespo_arguments
    from megatron_vespo.commands.check_layout import command as layout_check
    from megatron_vespo.commands.evaluate import flags as evaluate_flags
    from megatron_vespo.commands.plan import command as plan_cli
    from megatron_vespo.commands.prepare_data import command as prepare_cli
    from megatron_vespo.commands.simulate import command as simulate_cli
    from megatron_vespo.commands.submit import command as submit_cli

    train = add_vespo_arguments(argparse.ArgumentParser(add_help=False))
    parsers = {
        "train": [train], "evaluate": [evaluate_flags.make_parser()], "prepare-data": [prepare_cli._parser()],
        "plan": [plan_cli._parser(), train], "check layout": [layout_check._parser()],
        "simulate": [simulate_cli._parser()], "submit": [submit_cli._parser(), train],
    }  # fmt: skip
    if command.startswith("convert"):
        from megatron_vespo.commands.convert import command as convert_cli

        (sub,) = (a for a in convert_cli._parser()._actions if isinstance(a, argparse._SubParsersAction))
        parsers[command] = [sub.choices[command.split()[1]]]
    own = {
        action.option_strings[0]: (action.type if not action.choices else "choice", action.nargs)
        for parser in parsers.get(command, ())
        for action in parser._actions
        if action.option_strings and action.dest != "help"
    }
    more = {"doctor": {"--shared-dir": (Path, None)}, "smoke": {"--timeout": (float, None)}}
    megatrons = {flag: (kind, None) for flag, kind in MEGATRONS.items()}
    return own | more.get(command, {}) | (megatrons if command in ("train", "plan", "submit") else {})


def cases(seed: int, number: int) -> Iterator[Case]:
    """The first `number` cases of a seed; case i is the same whatever `number` is."""
    flags = {command: flags_of(command) for command in RIGHT}
    commands = [*RIGHT, "train", "train", "evaluate"]  # most is read and asked for there
    for index in range(number):
        draw = random.Random(f"{seed}/{index}")
        command = draw.choice(commands)
        kinds = [kind for kind in KINDS if kind is not _damaged or command in FILES]
        case = None
        while case is None:
            case = draw.choice(kinds)(draw, command, flags[command])
        yield case


def _right(command: str) -> list[str]:
    return RIGHT[command].split()


def _wrong_value(draw: random.Random, command: str, flags: dict) -> Case | None:
    numbers = [flag for flag, (kind, _) in flags.items() if kind in (int, float, "choice")]
    if not numbers:
        return None
    flag = draw.choice(numbers)
    kind, nargs = flags[flag]
    word = draw.choice(WRONG.get(kind, ["nonsense", ""]))
    words = [word] * (nargs if isinstance(nargs, int) else 1)
    joined = [f"{flag}={word}"] if len(words) == 1 and word.startswith("-") else [flag, *words]
    why = VALID.get((flag, word), "")
    return Case(command, [*_right(command), *joined], f"{flag} {word!r}", [flag], valid=why)


def _misspelt(draw: random.Random, command: str, flags: dict) -> Case | None:
    if not flags:
        return None
    flag = draw.choice(list(flags))
    at = draw.randrange(3, len(flag))
    wrong = draw.choice((flag[:at] + flag[at + 1 :], flag[:at] + "z" + flag[at:], flag.replace("-", "_")))
    if wrong in flags or wrong == flag:
        return None
    return Case(command, [*_right(command), wrong, "1"], f"misspelt {flag}", [wrong])


def _without_value(draw: random.Random, command: str, flags: dict) -> Case | None:
    takes = [flag for flag, (_, nargs) in flags.items() if nargs != 0]
    if not takes:
        return None
    flag = draw.choice(takes)
    return Case(command, [*_right(command), flag], f"{flag} without a value", [flag])


def _stray(draw: random.Random, command: str, flags: dict) -> Case | None:
    word = draw.choice(("stray", "strange \N{SNOWMAN}", "-z"))
    return Case(command, [*_right(command), "--", word], f"a stray {word!r}", [word, "--"])


def _contradiction(draw: random.Random, command: str, flags: dict) -> Case | None:
    own = [entry for entry in CONTRADICTIONS if entry[0] == command]
    if not own:
        return None
    _, words, names = draw.choice(own)
    return Case(command, [*_right(command), *words.split()], words, names)


def _missing(draw: random.Random, command: str, flags: dict) -> Case | None:
    """A file or folder of the command's is not there, or is of the other kind."""
    there = [word for word in _right(command) if word in ("model", "train.jsonl", "held.jsonl", "megatron",
             "gsm8k.jsonl", "recipe.flags", "batch.jsonl")]  # fmt: skip
    if command == "evaluate":
        there.append("held.jsonl")
    if not there:
        return None
    name = draw.choice(there)

    def prepare(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        if how == "is a file":
            path.write_text("x")
        elif how == "is an empty folder":
            path.mkdir()
        elif how == "is a dangling link":
            path.symlink_to("nothing")
        elif how == "is a link to itself":
            path.symlink_to(name)

    how = draw.choice(("is missing", "is an empty folder", "is a dangling link", "is a link to itself")
                      + (("is a file",) if "." not in name else ()))  # fmt: skip
    return Case(command, _right(command), f"{name} {how}", [name], prepare)


def _in_the_way(draw: random.Random, command: str, flags: dict) -> Case | None:
    if command not in OUTPUTS:
        return None
    flag = draw.choice(OUTPUTS[command])
    place = draw.choice(("train.jsonl/deeper", "/proc/vespo/new", "dangling/new", "/dev/null/new", "x" * 300))
    argv = [*_right(command), flag, place]
    return Case(
        command,
        argv,
        f"{flag} {place[:20]}",
        [flag, "xxx: File name too long"],
        lambda folder: (folder / "dangling").symlink_to("nothing"),
        valid=VALID.get((flag, place), ""),
    )


def _environment(draw: random.Random, command: str, flags: dict) -> Case | None:
    own = [entry for entry in ENVIRONMENTS if entry[0] == command]
    return _in_environment(*draw.choice(own)) if own else None


def _in_environment(command: str, env: dict[str, str | None], names: list[str], warm: bool = True) -> Case:
    what = " ".join(f"{name}={value}" for name, value in env.items())
    return Case(
        command, _right(command), what, names, env=env, warm=warm, valid="" if names else "it may be so"
    )


def cold_cases() -> list[Case]:
    """Of variables that count when a process starts, or imports Megatron."""
    return [_in_environment(*entry, warm=False) for entry in COLD]


def _damaged(draw: random.Random, command: str, flags: dict) -> Case | None:
    name = draw.choice(FILES[command])
    ways = [*ANY]
    if name.endswith((".json", ".jsonl")):
        ways += JSON
    if name.endswith(".jsonl"):
        ways += JSON_LINES
    if name.endswith("/config.json"):
        ways += [wrong_field] * 6
    if name.endswith("generation_config.json"):
        ways += [wrong_stop] * 4
    damage = draw.choice(ways)
    if damage is empty and name.endswith(("recipe.flags", "batch.jsonl")) and command == "smoke":
        return None
    what, data = damage(draw, name)
    # questions of --exclude are compared with others, nothing else
    why = "compared only" if (command, name, damage) == ("prepare-data", "held.jsonl", surrogate) else ""

    def prepare(folder: Path) -> None:
        path = folder / name
        before = path.read_bytes()
        path.unlink()
        if callable(data):
            path.write_bytes(data(before))
        elif data is None:
            path.mkdir()
        else:
            path.write_bytes(data)

    parent = Path(name).parts[0]
    return Case(command, _right(command), f"{name} {what}", [Path(name).name, parent], prepare, valid=why)


KINDS = [_wrong_value, _wrong_value, _wrong_value, _misspelt, _without_value, _stray, _contradiction,
         _contradiction, _missing, _in_the_way, _environment, _damaged, _damaged, _damaged]  # fmt: skip
