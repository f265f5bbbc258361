"""What the server of `launch` imports once for all ranks."""

import contextlib
import importlib
import warnings

MODULES = (
    "pytest",  # every child imports the parent's main module
    "numpy",
    "megatron_vespo.trainer.policy",
    "megatron_vespo.trainer.export",
    "megatron_vespo.trainer.initialize",
    "megatron_vespo.arguments.parse",
    "megatron.training.arguments",
    "megatron.training.checkpointing",
    "megatron.training.initialize",
)

warnings.simplefilter("ignore")
for module in MODULES:
    # a rank that needs a broken module fails by itself, into its log
    with contextlib.suppress(Exception):
        importlib.import_module(module)
