"""Builds SGLang's command line from our flags and the users' `--sglang-*` flags; checks it before a start."""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
import math
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from megatron_vespo.system.paths import expanded, names_a_path
from megatron_vespo.system.plugins import WEIGHT_LOADER

PREFIX = "--sglang-"
# Flags whose value the run depends on or has decided elsewhere. Spellings: all of SGLang's aliases.
OWNED = {
    "--model-path",
    "--model",
    "--host",
    "--port",
    "--nccl-port",
    "--skip-tokenizer-init",
    "--enable-return-routed-experts",
    "--weight-version",
    "--custom-weight-loader",
    "--config",
    "--api-key",  # others could read it on a command line, in logs and in checkpoints
    "--admin-api-key",
}
SUPPORT_CAP_FLAG = "--sampling-mask-max-tokens"
SUPPORT_CAP = 4096  # most tokens that an engine returns as the support of one
MEMORY_SAVER = "--enable-memory-saver"
MEMORY_FRACTION = "--mem-fraction-static"
SIZE_FLAGS = ("--tensor-parallel-size", "--tp-size")  # two names of one flag
EXPERT_FLAGS = ("--expert-parallel-size", "--ep-size", "--ep")
LAYOUT_FLAGS = {
    "--quantization",
    "--pipeline-parallel-size",
    "--pp-size",
    "--moe-dense-tp-size",
    "--moe-data-parallel-size",
    "--moe-dp-size",
    "--enable-dp-attention",
    "--enable-dp-lm-head",
    "--data-parallel-size",
    "--dp-size",
    "--enable-eplb",
    "--ep-num-redundant-experts",
    "--init-expert-location",
    "--moe-runner-backend",
    "--speculative-algorithm",
    "--cpu-offload-gb",
    "--offload-group-size",
    "--model-impl",
    "--json-model-override-args",
}
# with it users choose how CUDA graphs are captured
PREFILL_GRAPHS = "--cuda-graph-backend-prefill"
GRAPH_FLAGS = (PREFILL_GRAPHS, "--cuda-graph-backend-decode", "--cuda-graph-config")
ARITY_NONE, ARITY_OPTIONAL, ARITY_ONE, ARITY_MANY = "none", "optional", "one", "many"


def parse_sglang_flags(argv: list[str]) -> tuple[list[str], list[str]]:
    """Splits `argv` into SGLang's flags, without their prefix, and the rest; both keep their order.

    Example: ["--lr", "1", "--sglang-tp-size=2", "--sglang-disable-radix-cache"]
             -> (["--tp-size", "2", "--disable-radix-cache"], ["--lr", "1"])
    Raises ValueError for a flag that SGLang does not have, that we set ourselves, or whose value is missing;
    and for an invalid fraction of GPU memory.
    """
    flags: list[str] = []
    rest: list[str] = []
    position = 0
    while position < len(argv):
        token = argv[position]
        position += 1
        if not token.startswith(PREFIX):
            rest.append(token)
            continue
        given, equals, value = token.partition("=")
        name = "--" + given.removeprefix(PREFIX)
        arity = _checked_arity(given, name)
        values = [value] if equals else []
        is_path = names_a_path(given)
        while not equals and position < len(argv) and not argv[position].startswith("--"):
            if arity == ARITY_NONE or (arity != ARITY_MANY and values):
                break
            values.append(argv[position])
            position += 1
        if arity == ARITY_NONE and values:
            raise ValueError(f"{given}: SGLang's {name} takes no value, but got {value!r}")
        if arity in (ARITY_ONE, ARITY_MANY) and not values:
            raise ValueError(f"{given}: SGLang's {name} needs a value")
        flags += [name, *(map(expanded, values) if is_path else values)]
    _check_memory_fraction(flags)
    size = flag_value(flags, *SIZE_FLAGS)
    if size is not None and not (size.isdecimal() and int(size)):
        raise ValueError(f"--sglang-tp-size is {size!r}, must be a positive number")
    return flags, rest


def _check_memory_fraction(flags: list[str]) -> None:
    given = flag_value(flags, MEMORY_FRACTION)
    if given is None:
        return
    try:
        fits = 0 < float(given) < 1
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"--sglang-mem-fraction-static is {given}, must be between 0 and 1")


def server_arguments(
    sglang_flags: Sequence[str],
    *,
    device: str,
    routes: bool,
    dtype: str,
    seed: int,
    longest_step_s: float,
    weight_version: int = 0,
    prefix_cache: bool = True,
    memory_saver: bool = False,
    supports: bool = False,
    loading: Sequence[str] = (),
) -> list[str]:
    """A rollout engine's flags, without model path, host and ports; `sglang_flags` override our defaults.

    `device` is "cpu" or "cuda"; `dtype` SGLang's name of the weights' type ("float32", "bfloat16").
    `longest_step_s` is how long it may load weights or compile before SGLang's watchdog considers it hung.
    With `routes`, requests may ask for the chosen experts; every step then copies them to the host.
    With `supports`, they may ask which tokens truncated sampling has left.
    `memory_saver` lets it release GPU memory while it runs; it does not exist for CPUs. `loading` are flags
    that say how its weights are loaded.
    """
    owned = ["--skip-tokenizer-init", "--weight-version", str(weight_version)]
    owned += ["--custom-weight-loader", WEIGHT_LOADER, *loading]
    if routes:
        owned.append("--enable-return-routed-experts")
    if not prefix_cache:
        owned.append("--disable-radix-cache")
    if MEMORY_SAVER in sglang_flags:
        memory_saver = True  # the user's flag is the same as ours
    elif memory_saver:
        owned.append(MEMORY_SAVER)
    defaults = {
        "--device": [device],
        "--dtype": [dtype],
        "--random-seed": [str(seed)],
        "--log-level": ["warning"],
        "--watchdog-timeout": [str(math.ceil(longest_step_s))],
        "--dist-timeout": [str(math.ceil(longest_step_s))],
    }
    if supports:
        defaults[SUPPORT_CAP_FLAG] = [str(SUPPORT_CAP)]
    if device == "cpu":
        defaults |= {
            "--attention-backend": ["torch_native"],
            "--max-running-requests": ["256"],
            "--max-total-tokens": ["32768"],  # otherwise the KV cache takes most of the machine's memory
        }
    else:
        # fused, a shared expert is one more routed expert, in the routes of a reply as in the weights
        defaults["--disable-shared-experts-fusion"] = []
    if device == "cpu" or memory_saver:
        defaults["--sleep-on-idle"] = []  # an idle scheduler spins on a core that the trainer needs
    if memory_saver:
        defaults[PREFILL_GRAPHS] = ["disabled"]  # SGLang's default, breakable graphs, cannot release memory
    arguments = [
        part for flag, value in defaults.items() if flag not in sglang_flags for part in (flag, *value)
    ]
    return [*owned, *arguments, *sglang_flags]


def _checked_arity(given: str, name: str) -> str:
    known = known_flags()
    if name in OWNED:
        raise ValueError(f"{given}: megatron_vespo sets SGLang's {name} itself; remove the flag")
    if name not in known:
        nearest = difflib.get_close_matches(name, sorted(known.keys() - OWNED), n=1)
        hint = f"; did you mean {PREFIX}{nearest[0].removeprefix('--')}?" if nearest else ""
        raise ValueError(f"{given}: SGLang {version('sglang')} has no flag {name}{hint}")
    return known[name]


@functools.cache
def known_flags() -> dict[str, str]:
    """Every flag of the installed SGLang with its arity, read from its source in 0.07 s.

    SGLang's own parser says the same, but importing it takes 20 s, 0.9 GB and a machine that can load its
    kernels. tests/integration/test_sglang_flags.py compares the two.
    """
    spec = importlib.util.find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"{PREFIX}* flags need the sglang package, which is not installed")
    srt = Path(spec.submodule_search_locations[0]) / "srt"
    flags: dict[str, str] = {}
    for path in sorted((srt / "arg_groups" / "fields").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                flags.update(_field_flags(node.target.id, node.annotation))
    for node in ast.walk(ast.parse((srt / "server_args.py").read_text())):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "add_argument"
        ):
            action = ast.unparse(_keyword(node, "action") or ast.Constant(None))
            takes_none = "StoreTrue" in action or "store_true" in action
            names = [str(arg.value) for arg in node.args if isinstance(arg, ast.Constant)]
            flags |= dict.fromkeys(names, ARITY_NONE if takes_none else ARITY_ONE)
    assert "--attention-backend" in flags and "--tp-size" in flags, (
        f"SGLang's flags are not under {srt} any more"
    )
    return flags


def _field_flags(field: str, annotation: ast.expr) -> dict[str, str]:
    """Flags of one `name: A[type, help or Arg(...)]` declaration."""
    if not (isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "A"):
        return {}
    assert isinstance(annotation.slice, ast.Tuple)
    kind = ast.unparse(annotation.slice.elts[0])
    calls = [meta for meta in annotation.slice.elts[1:] if isinstance(meta, ast.Call)]
    options = {keyword.arg: keyword.value for call in calls for keyword in call.keywords}
    if "no_cli" in options:
        return {}
    name = ast.literal_eval(options["cli_name"]) if "cli_name" in options else "--" + field.replace("_", "-")
    names = [name, *(ast.literal_eval(options["aliases"]) if "aliases" in options else [])]
    action = ast.unparse(options["action"]) if "action" in options else ""
    if action.endswith("BooleanOptionalAction"):
        return {
            spelling: ARITY_NONE for name in names for spelling in (name, "--no-" + name.removeprefix("--"))
        }
    is_list = kind.lower().startswith(("list[", "optional[list[")) and "type_parser" not in options
    if "nargs" in options and ast.literal_eval(options["nargs"]) == "?":
        return dict.fromkeys(names, ARITY_OPTIONAL)
    if is_list or action or "nargs" in options:
        return dict.fromkeys(names, ARITY_MANY)
    return dict.fromkeys(names, ARITY_NONE if kind in ("bool", "Optional[bool]") else ARITY_ONE)


def _keyword(call: ast.Call, name: str) -> ast.expr | None:
    return next((keyword.value for keyword in call.keywords if keyword.arg == name), None)


def flag_value(sglang_flags: Sequence[str], *names: str) -> str | None:
    """The value of the last of these flags, which are spellings of one; None if absent."""
    found = None
    for name, value in zip(sglang_flags, sglang_flags[1:], strict=False):
        if name in names:
            found = value
    return found


def engine_size(sglang_flags: Sequence[str]) -> int:
    """Ranks of one engine that take part in a weight sync: its tensor-parallel size."""
    return int(flag_value(sglang_flags, *SIZE_FLAGS) or 1)


def expert_parallel_size(sglang_flags: Sequence[str]) -> int:
    return int(flag_value(sglang_flags, *EXPERT_FLAGS) or 1)


def other_layout(sglang_flags: Sequence[str], quantization: str | None) -> str | None:
    """Why the engines' layout of weights is not known: a flag that changes it; None without."""
    if quantization is not None:
        return f"--rollout-quantization {quantization} quantises whole tensors"
    flag = next((flag for flag in sglang_flags if flag in LAYOUT_FLAGS), None)
    return flag and f"{PREFIX}{flag.removeprefix('--')} changes how SGLang stores weights"


def has_pausable_graphs(arguments: Sequence[str]) -> bool:
    """Whether SGLang can release the memory of all CUDA graphs of a colocated engine."""
    return not any("breakable" in (flag_value(arguments, flag) or "") for flag in GRAPH_FLAGS)


def has_symmetric_memory(arguments: Sequence[str]) -> bool:
    """Whether SGLang turns NCCL's cuMem on, whatever the environment says."""
    return "--enable-symm-mem" in arguments
