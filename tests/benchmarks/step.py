"""One rank's optimizer step against plain transformers on the same tokens.

    python tests/benchmarks/step.py [--model tiny|100m] [--varied] [--sequences N ...] [--profile SIDE]

Both sides start from the same random Qwen3-MoE in float32 and take optimizer steps of the VESPO loss by Adam,
on the same samples, in one process and in turn, with one thread of a CPU. The numbers are medians of
processor seconds, which other work on the machine changes less than the clock. transformers runs with each of
its ways to compute experts, so that the fastest can be compared with. Sequences have one length, and
transformers pads nothing; `--varied` draws lengths from 2 to twice the mean. Several `--sequences` give a
growth curve.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
REPOSITORY = Path(__file__).parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "patches/cpu")]

import numpy as np  # noqa: E402

PHASES = ("old", "forward_backward", "optimizer_step")
EXPERTS = ("eager", "grouped_mm")  # batched_mm copies the weights of each token's experts: 15 times slower


@dataclass(frozen=True)
class Size:
    """A Qwen3-MoE and what one optimizer step trains on: sequences of one length, so that none is padded."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    topk: int
    expert_width: int
    vocab: int
    num_sequences: int
    prompt: int
    completion: int
    pack_tokens: int


SIZES = {
    "tiny": Size(4, 64, 4, 2, 32, 8, 2, 64, 37, 128, 11, 14, 4096),
    "100m": Size(8, 512, 8, 4, 64, 16, 4, 384, 16384, 16, 64, 192, 2048),
}


def make_model(folder: Path, size: Size) -> int:
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=size.hidden * 2,
        moe_intermediate_size=size.expert_width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_dim,
        num_experts=size.experts,
        num_experts_per_tok=size.topk,
        norm_topk_prob=True,
        mlp_only_layers=[],
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    model = Qwen3MoeForCausalLM(config).float()
    model.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def make_samples(size: Size, varied: bool):
    from tests.support.builders import make_sample

    draw = np.random.default_rng(1)
    samples = []
    for i in range(size.num_sequences):
        completion = int(draw.integers(2, 2 * size.completion - 1)) if varied else size.completion
        tokens = draw.integers(0, size.vocab, size.prompt + completion)
        samples.append(
            make_sample(
                *np.split(tokens, [size.prompt]),
                behavior_log_probs=np.full(completion, -np.log(size.vocab), np.float32),
                advantage=float(draw.normal(0.5)),
                group_id=i // 4,
            )
        )
    return samples


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Ours:
    """This package's policy on one rank."""

    def __init__(self, folder: Path, size: Size, samples):
        import torch

        from megatron_vespo.algorithms.losses.settings import LossSettings
        from megatron_vespo.arguments.parse import parse_args
        from megatron_vespo.trainer.initialize import initialize
        from megatron_vespo.trainer.policy import MegatronPolicy

        longest = max(s.completion_length for s in samples)
        args = parse_args(
            [
                "--hf-checkpoint", str(folder), "--prompt-data", "unused", "--output-dir", "unused",
                "--train-iters", "1000", "--lr", "1e-5", "--clip-grad", "1.0", "--steps-per-rollout", "1",
                "--rollout-batch-size", str(len(samples) // 4), "--group-size", "4",
                "--max-prompt-tokens", str(size.prompt), "--max-completion-tokens", str(longest),
                "--max-tokens-per-gpu", str(size.pack_tokens),
            ]
        )  # fmt: skip
        if not torch.distributed.is_initialized():
            args = initialize(args, 0, 0, "127.0.0.1", free_port())
        self.policy, self.samples = MegatronPolicy(args, LossSettings.of(args)), samples
        self.mini_batch = self.policy.pack(samples)
        self.old()

    def old(self):
        self.policy.compute_old_log_probs(self.mini_batch)

    def forward_backward(self):
        self.outputs = self.policy.forward_backward(self.mini_batch)

    def optimizer_step(self):
        return self.policy.optimizer_step(self.mini_batch, self.outputs)

    def step(self):
        return self.policy.train_step(self.mini_batch)


class Theirs:
    """A loop as in the documents of transformers: padded batches, all logits, fused AdamW."""

    def __init__(self, folder: Path, size: Size, samples, experts: str):
        import torch
        from transformers import Qwen3MoeForCausalLM

        self.torch = torch
        self.model = Qwen3MoeForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa", experts_implementation=experts
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, betas=(0.9, 0.95), fused=True)
        per_batch = size.pack_tokens // max(s.num_tokens for s in samples)
        self.batches = [self._batch(samples[i : i + per_batch]) for i in range(0, len(samples), per_batch)]
        self.num_tokens = sum(s.completion_length for s in samples)
        self.old()

    def _batch(self, samples):
        torch = self.torch
        longest = max(s.num_tokens for s in samples)
        tokens = torch.zeros(len(samples), longest, dtype=torch.long)
        mask = torch.zeros(len(samples), longest)
        attention = torch.zeros(len(samples), longest, dtype=torch.long)
        for row, s in enumerate(samples):
            tokens[row, : s.num_tokens] = torch.from_numpy(s.token_ids.astype(np.int64))
            mask[row, s.prompt_length : s.num_tokens] = 1
            attention[row, : s.num_tokens] = 1
        advantages = torch.tensor([s.advantage for s in samples])
        if attention.all():
            attention = None
        return {"tokens": tokens, "mask": mask[:, 1:], "attention": attention, "advantages": advantages}

    def log_probs(self, batch):
        out = self.model(
            input_ids=batch["tokens"], attention_mask=batch["attention"], use_cache=False
        ).logits[:, :-1]
        return out.log_softmax(-1).gather(2, batch["tokens"][:, 1:, None])[..., 0]

    def old(self):
        with self.torch.no_grad():
            for batch in self.batches:
                batch["old"] = self.log_probs(batch)

    def forward_backward(self):
        torch = self.torch
        self.optimizer.zero_grad()
        for batch in self.batches:
            log_probs, mask, advantages = self.log_probs(batch), batch["mask"], batch["advantages"]
            with torch.no_grad():
                log_w = ((log_probs - batch["old"]) * mask).sum(-1)
                positive = advantages >= 0
                c1, c2 = torch.where(positive, 2.0, 3.0), torch.where(positive, 3.0, 2.0)
                phi = (c1 * log_w + c2 * (1 - log_w.exp())).exp()
            loss = (-(phi * advantages)[:, None] * log_probs * mask).sum() / self.num_tokens
            loss.backward()

    def optimizer_step(self):
        self.torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def step(self):
        self.forward_backward()
        self.optimizer_step()


def timed(action: Callable[[], object]) -> float:
    started = time.process_time()
    action()
    return time.process_time() - started


def compare(sides: dict[str, Ours | Theirs], rounds: int) -> None:
    """One line per side: medians of the phases' milliseconds, and the step's ratio to it."""
    seconds: dict[tuple[str, str], list[float]] = {(side, phase): [] for side in sides for phase in PHASES}
    for _ in range(rounds + 1):
        for name, side in sides.items():
            for phase in PHASES:
                seconds[name, phase].append(timed(getattr(side, phase)))
    median = {key: statistics.median(values[1:]) * 1e3 for key, values in seconds.items()}
    step = {side: median[side, "forward_backward"] + median[side, "optimizer_step"] for side in sides}
    for side in sides:
        phases = "  ".join(f"{phase} {median[side, phase]:7.1f}" for phase in PHASES)
        print(
            f"{side:24} {phases}  step {step[side]:7.1f} ms, ours x{step['ours'] / step[side]:.2f}",
            flush=True,
        )


def profile(side: Ours | Theirs) -> None:
    import torch

    for _ in range(3):
        side.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as p:
        for _ in range(5):
            side.step()
    print(p.key_averages().table(sort_by="self_cpu_time_total", row_limit=40, max_name_column_width=60))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", choices=SIZES, default="tiny")
    parser.add_argument("--sequences", type=int, nargs="+")
    parser.add_argument("--varied", action="store_true")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--profile", choices=["ours", *(f"transformers {way}" for way in EXPERTS)])
    options = parser.parse_args()
    from megatron_vespo_cpu import activate

    activate()
    import torch

    torch.set_num_threads(1)
    size = SIZES[options.model]
    for number in options.sequences or [size.num_sequences]:
        size = replace(size, num_sequences=number)
        samples = make_samples(size, options.varied)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "model"
            parameters = make_model(folder, size)
            sides: dict[str, Ours | Theirs] = {"ours": Ours(folder, size, samples)}
            sides |= {f"transformers {way}": Theirs(folder, size, samples, way) for way in EXPERTS}
        tokens = sum(sample.num_tokens for sample in samples)
        print(f"{parameters / 1e6:.1f} M parameters, {number} sequences, {tokens} tokens")
        if options.profile:
            profile(sides[options.profile])
        else:
            compare(sides, options.rounds)


if __name__ == "__main__":
    main()
