#!/usr/bin/env bash
# Prints the path of a Python 3.12 that runs and can make virtual environments; exits 1 if there is none.
# A name on PATH proves nothing (pyenv's shims exist for versions that are not active): every candidate is run.
set -euo pipefail
shopt -s nullglob

tried=()

try() { # prints the interpreter behind $1, never a virtual environment's, and ends the search if it will do
    local found
    if found=$("$1" -I -c '
import ensurepip, sys, venv
assert sys.version_info[:2] == (3, 12)
print(getattr(sys, "_base_executable", None) or sys.executable)' </dev/null 2>/dev/null); then
        echo "$found"
        exit 0
    fi
    tried+=("$1")
}

for name in python3.12 python3 python; do
    while read -r candidate; do try "$candidate"; done < <(type -aP "$name")
done

pyenv_root=${PYENV_ROOT:-${HOME:-}/.pyenv}
for candidate in "$pyenv_root"/versions/3.12*/bin/python; do try "$candidate"; done

if command -v uv >/dev/null; then
    candidate=$(uv python find --system 3.12 2>/dev/null) && try "$candidate"
fi

conda=${CONDA_EXE:-$(command -v conda || true)}
conda_roots=("${HOME:-}"/{miniconda3,miniforge3,anaconda3})
if [[ -n $conda ]]; then conda_roots=("$(dirname "$(dirname "$conda")")" "${conda_roots[@]}"); fi
for conda_root in "${conda_roots[@]}"; do
    for candidate in "$conda_root"/bin/python "$conda_root"/envs/*/bin/python; do try "$candidate"; done
done

{
    echo "No Python 3.12 with venv and ensurepip was found."
    echo "Looked for: python3.12, python3 and python on PATH; pyenv's versions in $pyenv_root/versions/3.12*;"
    echo "            uv python find 3.12; conda environments in ${conda_roots[*]}."
    if ((${#tried[@]})); then echo "Not usable: ${tried[*]}"; fi
    echo "Any of these provides one: pyenv install 3.12 | uv python install 3.12 | conda create -n py312 python=3.12"
} >&2
exit 1
