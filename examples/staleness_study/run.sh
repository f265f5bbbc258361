#!/usr/bin/env bash
# The whole study: environment, base model, every run, tables and pictures. It goes on where it was stopped.
#
#     bash examples/staleness_study/run.sh [--workers 2] [--only WORD] [--report-only]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

bash patches/cpu/setup_env.sh
export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore
exec .venv/bin/python examples/staleness_study/study.py "$@"
