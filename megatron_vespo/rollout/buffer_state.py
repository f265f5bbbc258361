"""Packs the pending groups of a rollout buffer into bytes for a checkpoint.

The bytes are an .npz file of plain arrays, no pickles. For Q pending prompts with N completions or partials:

    serials, prompt_ids, dispatches, sizes int64 [Q]     sizes: of the groups, 0 if nothing was generated
    prompt_tokens_crc uint32 [Q]                         of the prompt's tokens
    owners, places int64 [N]                             which prompt, which completion of its group
    and the completions' arrays of data/completion_arrays.py
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from megatron_vespo.data.completion_arrays import completion_arrays, completions_of
from megatron_vespo.rollout.buffer import PendingGroup
from megatron_vespo.types import Prompt


def pack_pending(all_pending: Sequence[PendingGroup]) -> bytes:
    places = [
        (owner, place, partial)
        for owner, pending in enumerate(all_pending)
        for place, partial in enumerate(pending.partials)
        if partial is not None
    ]
    file = io.BytesIO()
    np.savez(
        file,
        allow_pickle=False,
        serials=np.array([pending.serial for pending in all_pending], np.int64),
        prompt_ids=np.array([pending.prompt.prompt_id for pending in all_pending], np.int64),
        dispatches=np.array([pending.attempts for pending in all_pending], np.int64),
        sizes=np.array([len(pending.partials) for pending in all_pending], np.int64),
        prompt_tokens_crc=np.array([_crc(pending.prompt) for pending in all_pending], np.uint32),
        owners=np.array([owner for owner, _, _ in places], np.int64),
        places=np.array([place for _, place, _ in places], np.int64),
        **completion_arrays([partial for _, _, partial in places]),
    )
    return file.getvalue()


def unpack_pending(packed: bytes, prompts: Mapping[int, Prompt]) -> list[PendingGroup]:
    """`prompts` is by prompt id; ValueError if they are not the prompts that the buffer had."""
    try:
        with np.load(io.BytesIO(packed), allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"the checkpoint's rollout buffer cannot be read: {error}") from error
    owners = []
    for prompt_id, crc in zip(arrays["prompt_ids"].tolist(), arrays["prompt_tokens_crc"], strict=True):
        prompt = prompts.get(prompt_id)
        if prompt is None or _crc(prompt) != crc:
            raise ValueError(
                f"prompt {prompt_id} was in flight when the checkpoint was written and is another one now: "
                "--prompt-data, the tokenizer and the chat template must be the same"
            )
        owners.append(prompt)
    partials: list[list] = [[None] * size for size in arrays["sizes"]]
    completions = completions_of(arrays, [owners[owner] for owner in arrays["owners"]])
    for owner, place, completion in zip(arrays["owners"], arrays["places"], completions, strict=True):
        partials[owner][place] = completion
    return [
        PendingGroup(serial, prompt, attempts, group)
        for serial, prompt, attempts, group in zip(
            arrays["serials"].tolist(), owners, arrays["dispatches"].tolist(), partials, strict=True
        )
    ]


def _crc(prompt: Prompt) -> int:
    return zlib.crc32(prompt.token_ids.astype(np.int64).tobytes())
