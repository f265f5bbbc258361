#!/usr/bin/env bash
# Synchronous against asynchronous training at equal samples, three seeds each; then a table and a picture.
#
#     bash examples/asynchronous/run.sh [flags of megatron-vespo train, for all runs]
#
# A run whose summary is there is not repeated: what was stopped goes on with the next one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
work=examples/asynchronous/work
base=examples/tiny/work

bash patches/cpu/setup_env.sh
.venv/bin/python examples/tiny/make_base_model.py --output "$base"
export PYTHONPATH=examples/asynchronous${PYTHONPATH:+:$PYTHONPATH}

for seed in 1 2 3; do
    for mode in synchronous asynchronous; do
        output=$work/$mode-$seed
        if [[ -e $output/summary.json ]]; then continue; fi
        flags=()
        if [[ $mode == asynchronous ]]; then flags=(--max-staleness 8); fi
        .venv/bin/megatron-vespo train \
            --hf-checkpoint "$base/base" \
            --prompt-data "$base/train.jsonl" \
            --eval-data "$base/heldout.jsonl" \
            --output-dir "$output" \
            --seed "$seed" \
            --generate-function long_tail:generate \
            --train-iters 80 --steps-per-rollout 2 --rollout-batch-size 8 --group-size 8 \
            --lr 5e-5 --clip-grad 1.0 \
            --max-prompt-tokens 32 --max-completion-tokens 32 --max-tokens-per-gpu 4096 \
            --eval-interval 1000 --no-hf-export \
            "${flags[@]}" "$@"
    done
done
.venv/bin/python examples/asynchronous/compare.py "$work"
