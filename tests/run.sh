#!/usr/bin/env bash
# Sets up the environment and runs the tests: bash tests/run.sh [--slow] [arguments for pytest]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

selection=(-m "not slow")
arguments=()
paths=()
for argument in "$@"; do
    if [[ $argument == --slow ]]; then
        selection=()
    elif [[ -e ${argument%%::*} ]]; then
        paths+=("$argument")
    else
        arguments+=("$argument")
    fi
done
if ((${#paths[@]} == 0)); then
    for folder in tests/{unit,distributed,te,golden,gpu,cluster,integration,slurm}; do
        if [[ -d $folder ]]; then paths+=("$folder"); fi
    done
fi

bash patches/cpu/setup_env.sh
for folder in tests/te tests/slurm; do
    case " ${paths[*]}" in *" $folder"*) bash "$folder/install.sh" ;; esac
done
export OMP_NUM_THREADS=1
exec .venv/bin/python -m pytest -ra --durations=10 "${selection[@]}" "${arguments[@]}" "${paths[@]}"
