#!/usr/bin/env bash
# The calculator example from nothing: environment, base model, training. All of it lies in examples/calculator/work.
#
#     bash examples/calculator/run.sh [flags of megatron-vespo train]
#
# A flag given here wins over the same flag below, e.g. --train-iters 20 or --output-dir /somewhere/else.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
work=examples/calculator/work

SECONDS=0
bash patches/cpu/setup_env.sh
# calculator.py has the environment; make_calculator_model.py makes its model with parts of the tiny example
export PYTHONPATH=examples/calculator:examples/tiny${PYTHONPATH:+:$PYTHONPATH}
.venv/bin/python examples/calculator/make_calculator_model.py --output "$work"

# Tensor x pipeline parallel over four processes, experts split between the tensor-parallel ones.
layout=(
    --trainer-ranks 4
    --tensor-model-parallel-size 2
    --pipeline-model-parallel-size 2
    --expert-model-parallel-size 2
    --expert-tensor-parallel-size 1
)
algorithm=(
    --train-iters 80
    --steps-per-rollout 4
    --rollout-batch-size 32
    --group-size 16
    --lr 5e-5
    --clip-grad 1.0
)
# An episode has three turns: two calls and the answer. Its tokens include what the tools say.
episodes=(
    --environment calculator:Calculator
    --max-turns 4
    --reward-function math
    --max-prompt-tokens 64
    --max-completion-tokens 96
    --max-tokens-per-gpu 4096
)

exec .venv/bin/megatron-vespo train \
    --hf-checkpoint "$work/base" \
    --prompt-data "$work/train.jsonl" \
    --eval-data "$work/heldout.jsonl" \
    --output-dir "$work/run" \
    --save "$work/run/checkpoints" \
    --save-interval 40 \
    --eval-interval 3 \
    --max-logprob-difference 1e-4 \
    --setup-seconds "$SECONDS" \
    "${layout[@]}" "${algorithm[@]}" "${episodes[@]}" "$@"
