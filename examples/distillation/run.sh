#!/usr/bin/env bash
# A teacher that RL has made of the tiny example's model, and students with a worse start: by RL alone, from the teacher alone,
# and from both; then a table and a picture. All of it lies in examples/distillation/work.
#
#     bash examples/distillation/run.sh [flags of megatron-vespo train, for all runs]
#
# A run whose summary is there is not repeated: what was stopped goes on with the next one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
work=examples/distillation/work
base=examples/tiny/work

bash patches/cpu/setup_env.sh
.venv/bin/python examples/tiny/make_base_model.py --output "$base"
PYTHONPATH=examples/tiny .venv/bin/python examples/distillation/make_student.py --output "$work/start"

train() {
    local output=$work/$1
    if [[ -e $output/summary.json ]]; then return; fi
    .venv/bin/megatron-vespo train \
        --output-dir "$output" \
        --prompt-data "$base/train.jsonl" \
        --eval-data "$base/heldout.jsonl" \
        --steps-per-rollout 2 \
        --lr 5e-5 --clip-grad 1.0 --eval-prompts 256 \
        --max-prompt-tokens 32 --max-completion-tokens 32 --max-tokens-per-gpu 4096 \
        "${@:2}"
}

train teacher --hf-checkpoint "$base/base" --rollout-batch-size 8 --group-size 8 --train-iters 80 --eval-interval 1000 "$@"
student=(--hf-checkpoint "$work/start/base" --rollout-batch-size 4 --group-size 4 --train-iters 128 --eval-interval 4 --no-hf-export)
teacher=(--teacher-checkpoint "$work/teacher/hf")
for seed in 1 2; do
    train "distillation-$seed" "${student[@]}" --seed "$seed" "${teacher[@]}" --reward-coefficient 0 "$@"
    train "rl-$seed" "${student[@]}" --seed "$seed" "$@"
    train "mixture-$seed" "${student[@]}" --seed "$seed" "${teacher[@]}" "$@"
done
.venv/bin/python examples/distillation/compare.py "$work"
