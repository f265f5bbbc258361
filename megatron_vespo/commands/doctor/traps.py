"""Checks environment variables that break a run far from where they were set, and access to the model hub."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

import requests

from megatron_vespo.commands.doctor.finding import Finding
from megatron_vespo.rollout.sampled_distribution import wrong_log_probs
from megatron_vespo.system import ray_variables

HUB_TIMEOUT_S = 5.0
OFFLINE_WORDS = {"1", "true", "yes", "on"}
SHOW_ALL_GPUS = "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"


def environment(has_gpu_files: bool) -> Finding:
    interfaces = {name for _, name in socket.if_nameindex()}
    return judge_environment(os.environ, interfaces, has_gpu_files)


def judge_environment(env: Mapping[str, str], interfaces: set[str], has_gpu_files: bool) -> Finding:
    broken, doubtful = [], []  # (problem, fix)
    if has_gpu_files and env.get("CUDA_VISIBLE_DEVICES") == "":
        broken.append(("CUDA_VISIBLE_DEVICES is empty, no GPU is seen", "unset it"))
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        if name in env and not _names_an_interface(env[name], interfaces):
            fix = f"one of {', '.join(sorted(interfaces))}"
            broken.append((f"{name}={env[name]}: there is no such interface", fix))
    if env.get("RAY_AUTH_MODE", "").lower() == "disabled":
        doubtful.append(("RAY_AUTH_MODE=disabled: whoever reaches Ray's ports runs code as you", "unset it"))
    if problem := ray_variables.problem(env):
        doubtful.append(problem)
    if wrong := wrong_log_probs(env):
        broken.append((wrong, "unset it"))
    if env.get(SHOW_ALL_GPUS, "").lower() in ("1", "true"):
        broken.append((f"{SHOW_ALL_GPUS} is set: every trainer rank would use GPU 0", "unset it"))
    if broken or doubtful:
        texts, fixes = zip(*(broken + doubtful), strict=True)
        return Finding("environment", "FAIL" if broken else "warn", "; ".join(texts), "; ".join(fixes))
    return Finding("environment", "ok", "no variable that is known to break runs")


def _names_an_interface(value: str, interfaces: set[str]) -> bool:
    """NCCL takes prefixes of names; "=" marks an exact name, "^" names to exclude."""
    wanted = value.removeprefix("=").split(",")
    return value.startswith("^") or any(have.startswith(want) for want in wanted for have in interfaces)


def hub() -> Finding:
    """Checks the hub, which only models and tokenizers outside local folders need."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name, "").lower() in OFFLINE_WORDS:
            return Finding("hub", "ok", f"off by {name}: models are local folders")
    from huggingface_hub.constants import ENDPOINT

    fix = "use local folders and HF_HUB_OFFLINE=1, or let the node reach it"
    try:
        answer = requests.head(ENDPOINT, timeout=HUB_TIMEOUT_S, allow_redirects=True)
    except requests.RequestException as error:
        return Finding("hub", "warn", f"{ENDPOINT} is out of reach ({type(error).__name__})", fix)
    if answer.status_code >= 500:
        return Finding("hub", "warn", f"{ENDPOINT} answers {answer.status_code}", fix)
    return Finding("hub", "ok", f"{ENDPOINT} answers")
