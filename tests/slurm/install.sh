#!/usr/bin/env bash
# Puts a SLURM for tests/slurm on a Debian or Ubuntu machine where there is none. Only its programs: no service runs.
# Does nothing, and says so, where this is not root or has no apt; the tests are skipped then.
set -euo pipefail

programs=(slurmctld slurmd sbatch munged ip nsenter unshare)
missing=()
for program in "${programs[@]}"; do
    if ! PATH=$PATH:/usr/sbin:/sbin command -v "$program" >/dev/null; then missing+=("$program"); fi
done
if ((${#missing[@]} == 0)); then exit 0; fi
if ((EUID != 0)) || ! command -v apt-get >/dev/null; then
    echo "tests/slurm will be skipped: ${missing[*]} missing, and only root with apt installs them"
    exit 0
fi
echo "installing ${missing[*]}"
policy=/usr/sbin/policy-rc.d # Debian's way to say that installed services stay off
made=
if [[ ! -e $policy ]]; then
    made=1
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
fi
trap 'if [[ $made ]]; then rm -f "$policy"; fi' EXIT
export DEBIAN_FRONTEND=noninteractive
install() { timeout 300 apt-get install -qq -y --no-install-recommends slurm-wlm munge iproute2 util-linux >/dev/null; }
install || { timeout 120 apt-get update -qq && install; } || echo "tests/slurm will be skipped: apt has no SLURM"
