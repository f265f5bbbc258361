"""The floor of log W in bf16: what rounding alone puts into it once the weights have moved.

A random mixture of experts, responses sampled from it, one optimizer step by Adam at lr 1e-6. The truth is
fp32 on the same bf16 weights, before and after the step; what the bf16 passes measure beyond it is the floor.
Beside it stands what a run measures itself: two passes over the same weights (`MegatronPolicy.log_w_floor`),
and the same samples in other packs.
"""

from __future__ import annotations

import argparse
import os
import pickle
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

REPOSITORY = Path(__file__).parents[2]
PROGRAMS = REPOSITORY / "tests/distributed/programs"
TIMEOUT_S = 900
NUM_SAMPLES, PROMPT = 8, 8
LENGTHS = (400, 1000)
LOGIT_SD = 4.5
SIZES = {
    "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "moe_intermediate_size": 192,
    "num_experts": 16, "num_experts_per_tok": 8, "norm_topk_prob": True, "initializer_range": 0.05,
    "max_position_embeddings": 2048, "tie_word_embeddings": False,
}  # fmt: skip
FLAGS = (
    f"--max-prompt-tokens {PROMPT} --max-completion-tokens {LENGTHS[-1]} --max-tokens-per-gpu 4096 --lr 1e-6 "
    f"--log-prob-chunk-size 512 --steps-per-rollout 1 --rollout-batch-size {NUM_SAMPLES // 2} --group-size 2"
).split()


@torch.no_grad()
def make_model(folder: Path) -> torch.nn.Module:
    """Random, in bf16's numbers; logits of a realistic size."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **SIZES))
    torch.nn.init.normal_(model.lm_head.weight, std=LOGIT_SD * SIZES["hidden_size"] ** -0.5)
    model.bfloat16().save_pretrained(folder)
    return model.float().eval()


@torch.no_grad()
def sample(model: torch.nn.Module) -> np.ndarray:
    """[NUM_SAMPLES / 2, PROMPT + longest] tokens drawn from the model, after a random prompt."""
    tokens = torch.randint(SIZES["vocab_size"], (NUM_SAMPLES // 2, PROMPT))
    drawn, cache = [tokens], None
    for _ in range(LENGTHS[-1]):
        output = model(drawn[-1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        drawn.append(output.logits[:, -1].softmax(-1).multinomial(1))
    return torch.cat(drawn, 1).numpy()


def write_samples(tokens: np.ndarray, file: Path) -> None:
    """Each response whole, and its beginning."""
    from tests.support.builders import make_sample

    draw = np.random.default_rng(0)
    samples = [
        make_sample(
            row[:PROMPT],
            row[PROMPT : PROMPT + length],
            advantage=float(draw.choice([-1.0, 1.0])),
            group_id=i,
        )
        for i, row in enumerate(tokens)
        for length in LENGTHS
    ]
    file.write_bytes(pickle.dumps(samples))


def on_a_rank() -> None:
    """Log-probs under the policy; with --after then one optimizer step, and the policy exported there."""
    from common import hand_back, start_policy

    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--on-a-rank", action="store_true")
    parser.add_argument("--after", type=Path)
    parser.add_argument("--bf16-logits", action="store_true")
    options, sys.argv[1:] = parser.parse_known_args()
    if options.bf16_logits:
        from megatron_vespo.algorithms import linear_log_probs

        linear_log_probs._product = lambda left, right, out: out.copy_(left @ right)
    policy, samples = start_policy()
    results = {"before": np.concatenate(policy.log_probs(samples))}
    if options.after:
        from megatron_vespo.trainer.export import export_hf

        results["floor"] = policy.log_w_floor(samples)
        thirds = [policy.log_probs(samples[start::3]) for start in range(3)]
        results["packed_otherwise"] = np.concatenate([thirds[i % 3][i // 3] for i in range(len(samples))])
        mini_batch = policy.pack(samples)
        policy.compute_old_log_probs(mini_batch)
        results["log_w"] = policy.train_step(mini_batch).log_w
        results["after"] = np.concatenate(policy.log_probs(samples))
        export_hf(policy, options.after, bucket_bytes=2**26)
    hand_back(**results)


def launch(folder: Path, model: Path, flags: list[str]) -> dict[str, np.ndarray]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    result = folder / "result.npz"
    environment = {
        "RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": str(port), "RESULT_FILE": str(result),
        "PYTHONPATH": f"{os.environ.get('PYTHONPATH', REPOSITORY)}:{REPOSITORY}:{PROGRAMS}",
    }  # fmt: skip
    command = [sys.executable, __file__, "--on-a-rank", "--samples", str(folder / "samples.pkl")]
    command += ["--hf-checkpoint", str(model), *FLAGS, *flags]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    if done.returncode:
        sys.exit(done.stdout[-2000:] + done.stderr[-4000:])
    return dict(np.load(result))


def log_w(difference: np.ndarray) -> np.ndarray:
    """Sums over each response, [response, length]."""
    ends = np.cumsum(np.tile(LENGTHS, NUM_SAMPLES // 2))
    return np.array([part.sum(dtype=np.float64) for part in np.split(difference, ends[:-1])]).reshape(-1, 2)


def rms(values: np.ndarray) -> np.ndarray:
    return np.sqrt(np.mean(np.square(values, dtype=np.float64), axis=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--folder", type=Path, help="keep model and samples there, or find them there")
    parser.add_argument("--flags", default="", help="more flags of training, e.g. '--routing-replay R2'")
    parser.add_argument("--bf16-logits", action="store_true", help="round logits to bf16, for comparison")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp())
    model = folder / "model"
    if not (folder / "samples.pkl").exists():
        folder.mkdir(exist_ok=True, parents=True)
        write_samples(sample(make_model(model)), folder / "samples.pkl")
    after = Path(tempfile.mkdtemp(dir=folder)) / "after"
    flags = ["--bf16", "--after", str(after), *["--bf16-logits"] * options.bf16_logits]
    bf16 = launch(folder, model, [*flags, *options.flags.split()])
    truth = {name: launch(folder, path, [])["before"] for name, path in (("before", model), ("after", after))}

    moved = truth["after"] - truth["before"].astype(np.float64)
    measured = bf16["after"] - bf16["before"].astype(np.float64)
    rows = {
        "true after a step": moved,
        "measured": measured,
        "measured minus true": measured - moved,
        "same weights, other packs": bf16["packed_otherwise"] - bf16["before"].astype(np.float64),
    }
    zero = (bf16["log_w"].reshape(-1, 2) == 0).mean(0)
    for length, share in zip(LENGTHS, zero, strict=True):
        print(f"T = {length}: log W == 0 before the first update in {share:.0%} of the responses")
    print(f"{'':28} {'per token':>9}" + "".join(f" {f'T = {length}':>9}" for length in LENGTHS))
    for name, difference in rows.items():
        print(f"{name:28} {rms(difference):9.5f}" + "".join(f" {v:9.4f}" for v in rms(log_w(difference))))
    own = bf16["floor"].reshape(-1, 2)
    sigma = np.sqrt(np.square(own, dtype=np.float64).sum() / (sum(LENGTHS) * len(own)))
    print(f"{'ratio/floor':28} {sigma:9.5f}" + "".join(f" {v:9.4f}" for v in rms(own)))


if __name__ == "__main__":
    if "--on-a-rank" in sys.argv:
        on_a_rank()
    else:
        main()
