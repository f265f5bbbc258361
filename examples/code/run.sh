#!/usr/bin/env bash
# The code example from nothing: environment, base model, training. All of it lies in examples/code/work.
#
#     bash examples/code/run.sh [flags of megatron-vespo train]
#
# A flag given here wins over the same flag below, e.g. --train-iters 20 or --output-dir /somewhere/else.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
work=examples/code/work

SECONDS=0
bash patches/cpu/setup_env.sh
export PYTHONPATH=examples/tiny${PYTHONPATH:+:$PYTHONPATH}
.venv/bin/python examples/code/make_code_model.py --output "$work"

# Tensor x pipeline parallel over four processes, experts split between the tensor-parallel ones.
layout=(
    --trainer-ranks 4
    --tensor-model-parallel-size 2
    --pipeline-model-parallel-size 2
    --expert-model-parallel-size 2
    --expert-tensor-parallel-size 1
)
algorithm=(
    --train-iters 64
    --steps-per-rollout 4
    --rollout-batch-size 32
    --group-size 8
    --lr 2e-4
    --clip-grad 1.0
)
responses=(
    --reward-function code
    --max-prompt-tokens 32
    --max-completion-tokens 48
    --max-tokens-per-gpu 4096
)

exec .venv/bin/megatron-vespo train \
    --hf-checkpoint "$work/base" \
    --prompt-data "$work/train.jsonl" \
    --eval-data "$work/heldout.jsonl" \
    --output-dir "$work/run" \
    --save "$work/run/checkpoints" \
    --save-interval 40 \
    --eval-interval 4 \
    --max-logprob-difference 1e-4 \
    --setup-seconds "$SECONDS" \
    "${layout[@]}" "${algorithm[@]}" "${responses[@]}" "$@"
