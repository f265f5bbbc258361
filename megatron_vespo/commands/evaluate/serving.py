"""The engines of an evaluation: it starts them, or uses running ones."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_vespo.arguments.engines import EngineSettings
from megatron_vespo.checkpoints.convert import Options, megatron_to_hf
from megatron_vespo.checkpoints.ranks import Ranks
from megatron_vespo.checkpoints.sources import check_served, is_hf
from megatron_vespo.cluster.placement import has_gpus, stop_ray
from megatron_vespo.cluster.start import start_fleet
from megatron_vespo.commands.evaluate.options import EvaluateOptions
from megatron_vespo.commands.evaluate.settings import api_key, weights_digest
from megatron_vespo.models.hf_config import read_unchecked
from megatron_vespo.rollout.engine_client import RemoteClients
from megatron_vespo.rollout.fp8_engines import DTYPE
from megatron_vespo.rollout.router import LostRequests
from megatron_vespo.rollout.server_arguments import server_arguments
from megatron_vespo.system.plugins import load_runtime_plugins

CONVERTED_NAME = "converted-{}"  # in the output folder, because engines on other nodes must see it
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Serving:
    """What a Collector needs to know about engines. `urls[number]` may change; None: out of service."""

    urls: Sequence[str | None]
    lost: LostRequests
    check: Callable[[], None] | None = None
    on_wait: Callable[[], None] | None = None
    api_key: str | None = None
    remote: RemoteClients | None = None


@contextmanager
def serving(options: EvaluateOptions, log: Callable[[str], None]) -> Iterator[Serving]:
    """Running engines, or engines that are started here and end with the context."""
    if options.engine_url:
        urls = [url.rstrip("/") for url in options.engine_url]
        yield Serving(urls, LostRequests(log), api_key=api_key(options))
        return
    with ExitStack() as stack:
        settings = engine_settings(options, _hf_folder(options, log, stack))
        log("starting Ray ...")
        with warnings.catch_warnings(action="ignore"):  # what is missing here may exist where the engines run
            load_runtime_plugins()
        stack.callback(stop_ray)
        on_gpus = has_gpus(settings.ray_address)
        started = start_fleet(
            settings,
            _server_arguments(settings, options.seed, on_gpus),
            on_gpus=on_gpus,
            log_dir=(options.output_dir / "logs").resolve(),
            log=log,
            stack=stack,
        )
        log(f"starting SGLang: {options.rollout_engines} engines ...")
        engines, sync = started.engines, started.sync
        engines.wait_until_ready()
        sync.sync(0)  # the engines have loaded these weights

        def on_wait() -> None:
            if sync.is_wanted(while_others_serve=True):
                sync.sync(0)

        yield Serving(engines.urls, engines.lost, engines.check, on_wait, started.api_key, started.replies)


def engine_settings(options: EvaluateOptions, hf_folder: Path) -> EngineSettings:
    """Settings of engines that are started here and load `hf_folder`."""
    return EngineSettings.of(
        options, hf_checkpoint=hf_folder, engine_api_key="auto", rollout_quantization=None
    )


def _hf_folder(options: EvaluateOptions, log: Callable[[str], None], stack: ExitStack) -> Path:
    """The checkpoint itself, or its conversion to HF, which is removed when `stack` ends."""
    if is_hf(options.checkpoint):
        check_served(options.checkpoint)
        return options.checkpoint.resolve()
    folder = (options.output_dir / CONVERTED_NAME.format(weights_digest(options.checkpoint))).resolve()
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    if not is_hf(folder):  # a folder left by a killed job is complete
        log(f"converting {options.checkpoint} ...")
        megatron_to_hf(options.checkpoint, folder, Options(quiet=True), Ranks(), options.hf_config)
    return folder


def _server_arguments(settings: EngineSettings, seed: int, on_gpus: bool) -> list[str]:
    return server_arguments(
        settings.sglang_flags,
        device="cuda" if on_gpus else "cpu",
        routes=False,
        dtype=engine_dtype(settings.hf_checkpoint),
        seed=seed,
        longest_step_s=settings.engine_start_timeout,
    )


def engine_dtype(folder: Path) -> str:
    """The stored dtype, without which SGLang would convert float32 to float16; of FP8 layers their own."""
    config = read_unchecked(folder)
    stored = config.get("dtype") or config.get("torch_dtype")
    if "quantization_config" in config and stored == "float32":
        return DTYPE
    return stored if stored in DTYPES else "auto"
