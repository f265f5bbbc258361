"""The settings that an evaluation's numbers depend on: a resumed job must have the same."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from megatron_vespo.checkpoints.megatron_checkpoint import checkpoint_folder
from megatron_vespo.checkpoints.names import HF_FOLDER
from megatron_vespo.checkpoints.prompt_record import digest
from megatron_vespo.checkpoints.sources import is_hf, is_megatron
from megatron_vespo.commands.evaluate.options import EvaluateOptions
from megatron_vespo.commands.evaluate.result_file import made_with
from megatron_vespo.system.http import EngineRequestError, get_json
from megatron_vespo.types import Prompt

TOKENS = "prompts as tokens (tokenizer and chat template)"
DATE = "date of its start"  # in the settings: a chat template may write it into prompts
MODEL_INFO_TIMEOUT_S = 30.0
_SAMPLED_BYTES = 2**20  # hashed at each end of a weight file: every optimizer step changes all tensors
_WEIGHT_FILES = (".safetensors", ".distcp", ".metadata", "config.json")
# keys are the words that messages use
_FLAGS = {
    "--num-completions": "num_completions",
    "--temperature": "temperature",
    "--top-p": "top_p",
    "--top-k": "top_k",
    "--max-completion-tokens": "max_completion_tokens",
    "--max-prompt-tokens": "max_prompt_tokens",
    "--seed": "seed",
    "--num-prompts": "num_prompts",
    "--prompt-key": "prompt_key",
    "--answer-key": "answer_key",
    "--answer-pattern": "answer_pattern",
    "a chat template": "apply_chat_template",
    "--chat-template-arguments": "chat_template_arguments",
    "--environment": "environment",
    "--max-turns": "max_turns",
    "--max-turn-tokens": "max_turn_tokens",
    "--generate-function": "generate_function",
    "--reward-function": "reward_function",
    "--turn-rewards": "turn_rewards",
    "--reward-timeout": "reward_timeout",
    "--save-responses": "save_responses",
    "SGLang's flags": "sglang_flags",
}
_CODE_FLAGS = {
    "--code-reward": "code_reward",
    "--code-timeout": "code_timeout",
    "--code-test-timeout": "code_test_timeout",
    "--code-memory-mb": "code_memory_mb",
}


def start_date(results: Path) -> datetime:
    """When the evaluation with finished prompts in `results` started; now, if there is none."""
    date = made_with(results).get(DATE)
    return datetime.fromisoformat(date) if date else datetime.now().replace(microsecond=0)


def evaluation_settings(
    options: EvaluateOptions, stops: Sequence[int], sets: Mapping[str, Sequence[Prompt]], date: datetime
) -> dict[str, Any]:
    """The settings as JSON values, without the number and place of the engines, which do not matter.

    The token ids of `sets` stand for tokenizer and chat template.
    """
    flags = _FLAGS | (_CODE_FLAGS if options.reward_function == "code" else {})
    settings: dict[str, Any] = {name: getattr(options, attribute) for name, attribute in flags.items()}
    settings["end tokens"] = list(stops)
    settings["prompt sets"] = {name: f"{path.name} {_digest(path)}" for name, path in options.data.items()}
    settings[DATE] = date.isoformat()
    settings[TOKENS] = {name: digest(prompts) for name, prompts in sets.items()}
    urls = options.engine_url
    settings["weights"] = (
        _live_weights(urls, api_key(options)) if urls else weights_digest(options.checkpoint)
    )
    return settings


def comparable(settings: Mapping[str, Any], results: Path) -> dict[str, Any]:
    """`settings` without those that an older version did not write to `results`, if they change nothing."""
    before = made_with(results)
    added = [DATE, TOKENS]
    for name in ("--chat-template-arguments", "--environment", "--generate-function"):
        added += [] if settings[name] else [name]
    if not settings["--environment"]:
        added += ["--max-turns", "--max-turn-tokens", "--turn-rewards"]
    return {
        name: value for name, value in settings.items() if not before or name in before or name not in added
    }


def tokenizer_folder(options: EvaluateOptions) -> Path:
    """The HF folder of a checkpoint of either format."""
    if is_hf(options.checkpoint) or options.engine_url:
        return options.checkpoint
    if not is_megatron(options.checkpoint):
        raise ValueError(
            f"--checkpoint {options.checkpoint}: neither an HF folder with safetensors nor a Megatron "
            "checkpoint"
        )
    folder = options.hf_config or checkpoint_folder(options.checkpoint) / HF_FOLDER
    if not folder.is_dir():
        raise ValueError(
            f"--checkpoint {options.checkpoint} holds no HF config: --hf-config DIR names its model's HF "
            "folder"
        )
    return folder


def weights_digest(checkpoint: Path) -> str:
    """Distinguishes folders of weights by the names, sizes and ends of their files."""
    folder = checkpoint
    if is_megatron(checkpoint) and not is_hf(checkpoint):
        folder = checkpoint_folder(checkpoint)
    total = hashlib.blake2b(digest_size=8)
    files = sorted(path for path in folder.iterdir() if path.name.endswith(_WEIGHT_FILES) and path.is_file())
    for path in files:
        size = path.stat().st_size
        total.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            total.update(file.read(_SAMPLED_BYTES))
            file.seek(max(0, size - _SAMPLED_BYTES))
            total.update(file.read(_SAMPLED_BYTES))
    return total.hexdigest()


def api_key(options: EvaluateOptions) -> str | None:
    return os.environ[options.api_key_env] if options.api_key_env else None


def _live_weights(urls: Sequence[str], key: str | None) -> str:
    """The model that the engines report; ValueError if their replies are unusable."""
    seen = set()
    for url in urls:
        try:
            info = get_json(url.rstrip("/"), "/model_info", MODEL_INFO_TIMEOUT_S, key)
        except EngineRequestError as error:
            raise ValueError(f"--engine-url {url}: {error}") from error
        version = str(info.get("weight_version"))
        if not version.isdecimal():
            raise ValueError(
                f"--engine-url {url}: its weight version is {version!r}, no number: "
                "start it with --weight-version 0"
            )
        seen.add(f"{info.get('model_path')}")
    if len(seen) > 1:
        raise ValueError(f"--engine-url: the engines serve different models, {', '.join(sorted(seen))}")
    return f"of {seen.pop()}, served by others"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:16]
