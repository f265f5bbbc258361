"""Names the trackers that need a package of their own, and the pip requirement of each."""

from __future__ import annotations

import importlib.util

# Tracker -> (module, requirement); each is an extra of setup.py.
PACKAGES = {
    "wandb": ("wandb", "wandb>=0.21"),
    "mlflow": ("mlflow", "mlflow-skinny>=3.1"),
    "swanlab": ("swanlab", "swanlab>=0.10"),
}
PROMETHEUS = ("prometheus_client", "prometheus_client>=0.20")
NAMES = (*PACKAGES, "tensorboard", "none")


def check_installed(flag: str, module: str, requirement: str) -> None:
    """ValueError with the pip command if the package is not there. It is not imported."""
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"{flag}: the Python package {module} is not installed: pip install '{requirement}'")
