#!/usr/bin/env bash
# Installs packages of Debian or Ubuntu that tests need, and none of their services:
#
#     bash tests/support/apt_install.sh "PROGRAM ..." "PACKAGE ..."
#
# Nothing happens where all programs are on PATH. It ends with 0 whatever happens: tests without their programs are
# skipped, and one line here says why.
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin

read -ra programs <<<"$1"
read -ra packages <<<"$2"
log=$(mktemp)
policy=/usr/sbin/policy-rc.d # Debian's way to say that installed services stay off
made=
trap 'if [[ $made ]]; then rm -f "$policy"; fi; rm -f "$log"' EXIT

missing() {
    local program
    for program in "${programs[@]}"; do
        command -v "$program" >/dev/null || printf '%s ' "$program"
    done
}

give_up() {
    echo "tests that need $(missing)are skipped: $*"
    exit 0
}

apt() { timeout "$1" apt-get -qq -o DPkg::Lock::Timeout=60 "${@:2}" </dev/null >"$log" 2>&1; }

# the first one that apt tells, else its last word
error() { grep -m 1 '^E:' "$log" || tail -n 1 "$log"; }

# --no-upgrade: what is there stays as it is
install() { apt 600 install -y --no-install-recommends --no-upgrade "${packages[@]}"; }

if [[ -z $(missing) ]]; then exit 0; fi
if ! command -v apt-get >/dev/null; then give_up "only apt-get is known here"; fi
if ((EUID != 0)); then give_up "only root installs them (${packages[*]})"; fi
echo "installing ${packages[*]} for $(missing)"
if [[ ! -e $policy ]]; then
    made=1
    printf '#!/bin/sh\nexit 101\n' >"$policy" || give_up "$policy cannot be written"
    chmod +x "$policy"
fi
export DEBIAN_FRONTEND=noninteractive
if ! install; then
    # its lists of packages may be old, or not there; one of its sources may be gone and the others serve
    why=
    apt 120 update || why=$(error)
    install || give_up "apt-get: ${why:-$(error)}"
fi
if [[ $(missing) ]]; then give_up "the packages do not have them"; fi
