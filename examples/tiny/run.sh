#!/usr/bin/env bash
# The tiny example from nothing: environment, base model, training. Everything it makes lies in examples/tiny/work.
#
#     bash examples/tiny/run.sh [flags of megatron-vespo train]
#
# A flag given here wins over the same flag below, e.g. --train-iters 20 or --output-dir /somewhere/else.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
work=examples/tiny/work

SECONDS=0
bash patches/cpu/setup_env.sh
.venv/bin/python examples/tiny/make_base_model.py --output "$work"

# Tensor x pipeline parallel over four processes, experts split between the tensor-parallel ones.
layout=(
    --trainer-ranks 4
    --tensor-model-parallel-size 2
    --pipeline-model-parallel-size 2
    --expert-model-parallel-size 2
    --expert-tensor-parallel-size 1
)
# The paper's N is 8 at full size; lr and batch fit a 0.5 M parameter model.
algorithm=(
    --train-iters 80
    --steps-per-rollout 4
    --rollout-batch-size 32
    --group-size 16
    --lr 5e-5
    --clip-grad 1.0
)
lengths=(
    --max-prompt-tokens 32
    --max-completion-tokens 32
    --max-tokens-per-gpu 4096
)

exec .venv/bin/megatron-vespo train \
    --hf-checkpoint "$work/base" \
    --prompt-data "$work/train.jsonl" \
    --eval-data "$work/heldout.jsonl" \
    --output-dir "$work/run" \
    --save "$work/run/checkpoints" \
    --save-interval 40 \
    --eval-interval 2 \
    --max-logprob-difference 1e-4 \
    --setup-seconds "$SECONDS" \
    "${layout[@]}" "${algorithm[@]}" "${lengths[@]}" "$@"
