"""Random samples for a random model, and the reference that every layout is compared with."""

from __future__ import annotations

import pickle
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron_vespo.types import Segments, TokenSupports, TrainingSample
from tests.support.builders import make_sample
from tests.support.launch import PROGRAMS, TIMEOUT_S, launch

VOCAB_SIZE = 131
NUM_SAMPLES = 48
HOLES_EVERY = 3
# what the engine's log-probs differ by; large enough that some sequences reach the truncation of `decoupled`
ENGINE_NOISE = 0.1


@dataclass(frozen=True)
class Task:
    """A model folder, samples (also as a file), and transformers' log-probs of their sampled tokens."""

    model: Path
    samples_file: Path
    samples: list[TrainingSample]
    log_probs: np.ndarray


def transformers_log_probs(model: Path, samples_file: Path, *flags: str) -> np.ndarray:
    """Of every sampled token, by an interpreter that has not imported Megatron."""
    arguments = ["--model", str(model), "--samples", str(samples_file), *flags]
    program = PROGRAMS / "transformers_log_probs.py"
    with tempfile.TemporaryDirectory() as folder:
        return launch(program, 1, arguments, TIMEOUT_S, Path(folder), preloaded=False)[0]["log_probs"]


def make_task(folder: Path, kind: str = "qwen3 moe") -> Task:
    """Writes a random model and samples of it; `kind`: one of MODELS in the program above."""
    samples = random_samples()
    samples_file = folder / "samples.pkl"
    samples_file.write_bytes(pickle.dumps(samples))
    log_probs = transformers_log_probs(folder / "model", samples_file, "--make-model", kind)
    draw = np.random.default_rng(1)
    for sample, of_sample in zip(samples, split(log_probs, samples), strict=True):
        sample.behavior_log_probs = (of_sample + token_noise(draw, ENGINE_NOISE, sample)).astype(np.float32)
    samples_file.write_bytes(pickle.dumps(samples))
    return Task(folder / "model", samples_file, samples, log_probs)


def random_samples(
    num_samples: int = NUM_SAMPLES, max_prompt: int = 20, max_completion: int = 30
) -> list[TrainingSample]:
    """One of HOLES_EVERY has given tokens, which may also come first and last."""
    draw, draw_holes = np.random.default_rng(0), np.random.default_rng(2)
    samples = []
    for i in range(num_samples):
        prompt = int(draw.integers(1, max_prompt + 1))
        completion = int(draw.integers(1, max_completion + 1))
        samples.append(
            make_sample(
                *np.split(draw.integers(0, VOCAB_SIZE, prompt + completion), [prompt]),
                advantage=float(draw.normal()),
                temperature=(1.0, 0.7)[i % 2],
                group_id=i // 4,
                segments=random_segments(draw_holes, completion) if i % HOLES_EVERY == 0 else None,
            )
        )
    return samples


def random_segments(draw: np.random.Generator, length: int) -> Segments:
    """Runs of tokens of the policy and of others; at least one token is the policy's."""
    cuts = np.flatnonzero(draw.random(length - 1) < 0.25) + 1
    turns = np.diff([0, *cuts, length]).tolist()
    first = int(draw.integers(0, 2)) if len(turns) > 1 else 0
    writers = ("policy", "tool" if draw.random() < 0.5 else "environment")
    return Segments.joined(Segments.single(writers[(first + i) % 2], n) for i, n in enumerate(turns))


def random_supports(samples: list[TrainingSample], vocab_size: int = VOCAB_SIZE) -> list[TrainingSample]:
    """The same samples with the supports of truncated sampling; every third one has none.

    A support has the sampled token alone, a few or many others, or all.
    """
    draw = np.random.default_rng(5)
    restricted = []
    for i, sample in enumerate(samples):
        supports = []
        for token in sample.token_ids[sample.prompt_length :][sample.sampled_mask()]:
            others = draw.choice(vocab_size, draw.choice([0, 4, 40, vocab_size]), replace=False)
            supports.append(np.union1d(others, token).astype(np.int32))
        joined = TokenSupports(np.array([len(ids) for ids in supports], np.int32), np.concatenate(supports))
        restricted.append(replace(sample, supports=None if i % 3 == 2 else joined))
    return restricted


def token_noise(draw: np.random.Generator, deviation: float, sample: TrainingSample) -> np.ndarray:
    """Normal noise of the sampled tokens [N]; given tokens use up draws, too."""
    return draw.normal(0, deviation, sample.completion_length)[sample.sampled_mask()]


def split(values: np.ndarray, samples: list[TrainingSample]) -> list[np.ndarray]:
    """Values per sampled token of all samples, one array per sample."""
    return np.split(values, np.cumsum([sample.num_trained for sample in samples])[:-1])
