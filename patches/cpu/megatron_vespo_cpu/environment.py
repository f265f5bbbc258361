"""Environment variables for CPU processes. A value that the user has set is never changed."""

from __future__ import annotations

import importlib.util
import os
import pkgutil
from pathlib import Path

from megatron_vespo.system.process_environment import THREADS, num_threads

# SGLang imports every model it knows at start-up, unless told not to: minutes on a busy machine.
SERVED_MODEL_MODULES = frozenset({"qwen3_moe", "glm4_moe", "qwen3", "llama"})


def disabled_model_modules() -> str:
    """Comma-separated names of the modules of sglang.srt.models that no server here needs; "" without SGLang.

    SGLang skips them when it builds its registry; a served model may still import from one of them.
    """
    spec = importlib.util.find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        return ""
    folder = Path(spec.submodule_search_locations[0]) / "srt" / "models"
    names = {module.name for module in pkgutil.iter_modules([str(folder)]) if not module.ispkg}
    missing = SERVED_MODEL_MODULES - names
    assert not missing, f"{folder} has no {sorted(missing)}: this package is written for sglang 0.5.23"
    return ",".join(sorted(names - SERVED_MODEL_MODULES))


def set_defaults() -> None:
    """Set what is not set yet, in os.environ: this process and all its children see it.

    ValueError for an OMP_NUM_THREADS that is no number of threads.
    """
    defaults = {
        "CUDA_VISIBLE_DEVICES": "",
        "TORCHDYNAMO_DISABLE": "1",  # compiling costs more than tiny models ever gain
        "HF_HUB_OFFLINE": "1",  # models are local folders
        "SGLANG_USE_CPU_ENGINE": "1",
        "SGLANG_DISABLED_MODEL_ARCHS": disabled_model_modules(),
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    os.environ[THREADS] = str(num_threads(os.environ) or 1)  # many processes share few cores
