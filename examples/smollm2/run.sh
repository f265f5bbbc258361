#!/usr/bin/env bash
# The smollm2 example from nothing: environment, model, data, warm-up, training. All of it lies in examples/smollm2/work.
#
#     PROBLEMS=mawpssingleop.jsonl bash examples/smollm2/run.sh [flags of megatron-vespo train]
#
# README.md says where that file is; default: examples/smollm2/work/mawpssingleop.jsonl.
# A flag given here wins over the same flag below, e.g. --train-iters 20 or --output-dir /somewhere/else.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
work=examples/smollm2/work
problems=${PROBLEMS:-$work/mawpssingleop.jsonl}

SECONDS=0
bash patches/cpu/setup_env.sh
# word_problems.py has the reward
export PYTHONPATH=examples/smollm2${PYTHONPATH:+:$PYTHONPATH}
# trainer and engine take turns: each may use both cores, and threads that wait sleep
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} OMP_WAIT_POLICY=passive
.venv/bin/python examples/smollm2/word_problems.py --source "$problems" --output "$work"
.venv/bin/python examples/smollm2/prepare.py --output "$work/smollm2"
.venv/bin/python examples/smollm2/warm_up.py --model "$work/smollm2" --data "$work/train.jsonl" --output "$work/base"

algorithm=(
    --policy-loss vespo
    --ratio-denominator rollout
    --train-iters 32
    --seed 1
    --steps-per-rollout 4
    --rollout-batch-size 32
    --group-size 4
    --lr 5e-5
    --clip-grad 1.0
)
responses=(
    --reward-function word_problems:reward
    --max-prompt-tokens 96
    --max-completion-tokens 16
    --max-tokens-per-gpu 2048
)

exec .venv/bin/megatron-vespo train \
    --hf-checkpoint "$work/base" \
    --prompt-data "$work/train.jsonl" \
    --eval-data "$work/heldout.jsonl" \
    --output-dir "$work/run" \
    --save "$work/run/checkpoints" \
    --save-interval 1000 \
    --eval-interval 4 \
    --eval-temperature 0 \
    --max-logprob-difference 1e-4 \
    --setup-seconds "$SECONDS" \
    "${algorithm[@]}" "${responses[@]}" "$@"
