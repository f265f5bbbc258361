#!/usr/bin/env bash
# Installs what tests/slurm needs on a Debian or Ubuntu machine: SLURM's programs, none of its services; and shellcheck.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../support/apt_install.sh" \
    "slurmctld slurmd sbatch munged ip nsenter unshare shellcheck" "slurm-wlm munge iproute2 util-linux shellcheck"
