#!/usr/bin/env bash
# Puts what tests/te/requirements.txt lists into .venv.te, a folder that only the processes of tests/te import from.
# Instant when nothing has changed; may be killed and repeated at any moment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

requirements=tests/te/requirements.txt
folder=.venv.te
ready=$folder/.ready # a copy of the requirements that were installed; written last

if cmp --silent "$requirements" "$ready"; then exit 0; fi
echo "installing $(grep -c == "$requirements") packages for tests/te into $folder"
index=${PIP_INDEX_URL:-$(.venv/bin/python -m pip config get global.index-url 2>/dev/null || true)}
if [[ $index ]]; then export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-$index}; fi # uv does not read pip's settings
if [[ ${PIP_CERT:-} ]]; then export SSL_CERT_FILE=${SSL_CERT_FILE:-$PIP_CERT}; fi
rm -rf "$folder"
# --target, not an environment of its own: torch and Megatron stay those of .venv
.venv/bin/python -m uv pip install --quiet --python .venv/bin/python --no-deps --target "$folder" -r "$requirements"
cp "$requirements" "$ready"
