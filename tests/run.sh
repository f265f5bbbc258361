#!/usr/bin/env bash
# Sets up the environment, then checks and tests. `bash tests/run.sh --help` prints the lines below.
#
#     bash tests/run.sh                   checks, then every test that is not slow
#     bash tests/run.sh --fast            checks, then the short unit tests: under two minutes
#     bash tests/run.sh --slow            checks, then every test
#     bash tests/run.sh PATH [ARGUMENTS]  pytest alone, on these paths; arguments go to pytest
#
# Checks are `ruff check`, `ruff format --check` and, beside the tests, pyright.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

lane=full
arguments=()
paths=()
for argument in "$@"; do
    case $argument in
        --help) exec sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' tests/run.sh ;;
        --fast | --slow) lane=${argument#--} ;;
        *) if [[ -e ${argument%%::*} ]]; then paths+=("$argument"); else arguments+=("$argument"); fi ;;
    esac
done

case $lane in
    full) selection=(-m "not slow") ;;
    fast) selection=(-m "not slow and not long") ;;
    slow) selection=() ;;
esac
typed=0
if ((${#paths[@]})); then
    checks=()
else
    checks=("ruff check" "ruff format --check")
    typed=1
    # browser last: Playwright leaves its event loop running, in which asyncio.run is refused
    folders=(distributed te golden gpu cluster integration slurm browser)
    if [[ $lane == fast ]]; then folders=(); fi
    for folder in "${folders[@]}"; do
        if [[ -d tests/$folder ]]; then paths+=("tests/$folder"); fi
    done
fi

stage() { # runs "${@:2}", prints its name $1 and its seconds; fails if it does
    local start=$SECONDS code=0
    "${@:2}" || code=$?
    printf '[%3d s] %s: %s\n' $((SECONDS - start)) "$1" "$( ((code)) && echo "failed" || echo "passed")"
    return "$code"
}

# shellcheck disable=SC2317 # `stage` calls it
run_tests() {
    local code=0
    .venv/bin/python -m pytest -ra --durations=10 "${selection[@]}" "${arguments[@]}" "$@" || code=$?
    # 5: no test was chosen, which is right where arguments such as -k choose tests of another folder
    if ((code == 5 && typed && ${#arguments[@]})); then code=0; fi
    return "$code"
}

bash patches/cpu/setup_env.sh
for folder in tests/te tests/browser tests/slurm; do
    case " ${paths[*]}" in *" $folder"*) bash "$folder/install.sh" ;; esac
done
case " ${paths[*]}" in # the packages of --tracker
    *" tests/integration"* | *" tests/unit/observability"*) bash tests/trackers/install.sh ;;
esac
export OMP_NUM_THREADS=1
export PYRIGHT_PYTHON_IGNORE_WARNINGS=1 # else pyright asks the network for a newer version
for check in "${checks[@]}"; do
    # shellcheck disable=SC2086 # a command and its words
    stage "$check" .venv/bin/python -m $check
done
if ((typed)); then # beside the tests: it needs one core for most of a minute
    types=$(mktemp)
    .venv/bin/python -m pyright >"$types" 2>&1 &
    checker=$!
    trap 'rm -f "$types"; kill "$checker" 2>/dev/null || true' EXIT
fi
code=0
if ((typed)); then # in two processes; the tests of other folders start several themselves
    stage "pytest tests/unit" run_tests --numprocesses 2 --dist loadfile tests/unit || code=$?
fi
if ((${#paths[@]})); then
    stage "pytest" run_tests "${paths[@]}" || code=$?
fi
if ((typed)); then
    stage "pyright" wait "$checker" || code=$?
    checker= # ended: another process may get its number
    cat "$types"
fi
exit "$code"
