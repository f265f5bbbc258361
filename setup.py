"""Package metadata of megatron_vespo.

Exact environments: requirements-gpu.txt, and patches/cpu/requirements.txt for machines without a GPU.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
INIT = (ROOT / "megatron_vespo/__init__.py").read_text()
VERSION = re.search(r'^__version__ = "(.+)"$', INIT, re.MULTILINE)[1]
README = ROOT / "README.md"

# Pinned where results or patches depend on the version. torch is not: it comes with the CUDA image, and
# sglang pins it.
INSTALL_REQUIRES = [
    "aiohttp",
    "math-verify==0.9.0",
    "matplotlib",
    "megatron-core==0.19.2",
    "msgspec",
    "numpy",
    "psutil",  # megatron-core needs it to save a checkpoint and does not say so
    "pyarrow",
    "pybase64",
    "ray[default]==2.60.0",
    "requests",
    "rich",
    "safetensors",
    "tensorboard",
    "torch",
    "tqdm",
    "transformers==5.19.0",
    "xxhash",
]

# Their whole environment: requirements-gpu.txt. Transformer Engine is the one for the CUDA of sglang's torch;
# its extension is compiled, see docs/install.md. NVIDIA Apex is not needed: PyPI's `apex` is another project.
GPU_REQUIRES = [
    "nvidia-modelopt==0.47.0",
    "sglang==0.5.23",
    "transformer-engine[core-cu13,pytorch]==2.20.2",
]
# Of --tracker and --prometheus-port; the same as in observability/trackers/packages.py.
TRACKERS = {
    "wandb": ["wandb>=0.21"],
    "mlflow": ["mlflow-skinny>=3.1"],
    "swanlab": ["swanlab>=0.10"],
    "prometheus": ["prometheus_client>=0.20"],
}
DEV_REQUIRES = ["hypothesis", "pyright[nodejs]", "pytest", "pytest-timeout", "pytest-xdist", "ruff"]

setup(
    name="megatron_vespo",
    version=VERSION,
    description="VESPO reinforcement learning of language models on Megatron-Core, SGLang and Ray",
    long_description=README.read_text() if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.12",
    packages=find_packages(include=["megatron_vespo", "megatron_vespo.*"]),
    package_data={"megatron_vespo.commands.view": ["page/*", "page/vendor/*"]},
    install_requires=INSTALL_REQUIRES,
    extras_require={"gpu": GPU_REQUIRES, "dev": DEV_REQUIRES, **TRACKERS},
    entry_points={"console_scripts": ["megatron-vespo = megatron_vespo.commands.main:main"]},
)
