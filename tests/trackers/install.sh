#!/usr/bin/env bash
# Installs the packages of --tracker into .venv.trackers, for tests with the real ones.
# Instant when nothing has changed; may be killed and repeated at any moment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

requirements=tests/trackers/requirements.txt
folder=.venv.trackers
ready=$folder/.ready # a copy of the requirements that were installed; written last
if ! cmp --silent "$requirements" "$ready"; then
    echo "installing $(grep -c == "$requirements") packages for tests of trackers into $folder"
    rm -rf "$folder"
    .venv/bin/python -m pip install -qq --no-deps --target "$folder" -r "$requirements"
    cp "$requirements" "$ready"
fi
