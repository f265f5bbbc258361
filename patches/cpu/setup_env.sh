#!/usr/bin/env bash
# Makes or updates .venv in the repository's root: everything megatron_vespo needs on a CPU machine.
#
#     bash patches/cpu/setup_env.sh
#
# Instant when nothing has changed. May be killed and repeated at any moment, and run twice at once.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$root"
venv=$root/.venv
python=$venv/bin/python
ready=$venv/.ready           # holds the fingerprint of what was installed; written last
incomplete=$venv/.incomplete # exists while packages are being installed
requirements=patches/cpu/requirements.txt
lock_wait_seconds=1800

unset PYTHONHOME PYTHONPATH
export PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1
SECONDS=0

say() { printf '[%3d s] %s\n' "$SECONDS" "$*"; }

fingerprint() { # of all that decides what .venv holds; paths count too, a virtual environment cannot be moved
    {
        echo "$venv" "$(readlink -f "$python")"
        cat "$requirements" patches/apply.py patches/*/*.diff patches/cpu/*.sh patches/cpu/pyproject.toml \
            setup.py pyproject.toml megatron_vespo/__init__.py "$venv/pyvenv.cfg"
    } | sha256sum
}

runs() { [[ -x $python ]] && "$python" -I -c 'import sys, pip; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; }

is_ready() {
    [[ -f $ready && ! -e $incomplete && $(<"$ready") == "$(fingerprint 2>/dev/null)" ]] &&
        "$python" -I -S patches/apply.py check --python "$python" >/dev/null
}

finish() {
    say "environment ready in $SECONDS s"
    exit 0
}

take_lock() { # on this very file, so that nothing is left behind; released when the last child has ended
    command -v flock >/dev/null || return 0
    exec 9<"patches/cpu/setup_env.sh"
    flock --nonblock 9 && return
    say "waiting for another run of patches/cpu/setup_env.sh in $root"
    flock --wait "$lock_wait_seconds" 9 && return
    echo "another run of patches/cpu/setup_env.sh in $root has not ended in $lock_wait_seconds s" >&2
    exit 1
}

make_venv() {
    if [[ ! -e $incomplete ]] && runs; then return; fi
    local base
    base=$(bash patches/cpu/find_python.sh)
    say "making .venv with $base"
    rm -rf "$venv.old"
    if [[ -e $venv ]]; then mv "$venv" "$venv.old"; fi # deleting in place could be killed with the marker gone
    mkdir "$venv"
    touch "$incomplete"
    "$base" -m venv "$venv"
    rm -rf "$venv.old"
}

configure_uv() { # uv does not read pip's settings
    local index
    index=${PIP_INDEX_URL:-$("$python" -m pip config get global.index-url 2>/dev/null || true)}
    if [[ -n $index ]]; then export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-$index}; fi
    if [[ -n ${PIP_CERT:-} ]]; then export SSL_CERT_FILE=${SSL_CERT_FILE:-$PIP_CERT}; fi
}

install() {
    if ((use_uv)); then
        # compiled now: a machine that forbids writing bytecode would compile SGLang anew in every process, 20 s each
        env -u PYTHONDONTWRITEBYTECODE "$python" -m uv pip install --quiet --compile-bytecode \
            --python "$python" --no-deps "$@" && return
        say "uv failed; trying pip"
        use_uv=0
    fi
    "$python" -m pip install --quiet --no-deps "$@"
}

if is_ready; then finish; fi
take_lock
if is_ready; then finish; fi

make_venv
touch "$incomplete"
rm -f "$ready"
uv=$(grep '^uv==' "$requirements")
use_uv=1
say "installing $uv"
if "$python" -m pip install --quiet "$uv"; then
    configure_uv
else
    say "$uv cannot be installed; using pip, which takes minutes"
    use_uv=0
fi
say "installing $(grep -c == "$requirements") packages"
install -r "$requirements"
say "installing megatron_vespo and its CPU runtime"
install --no-build-isolation -e . -e ./patches/cpu
say "patching"
"$python" patches/apply.py apply --python "$python"
rm "$incomplete"
fingerprint >"$ready.new"
mv "$ready.new" "$ready"
finish
