#!/usr/bin/env bash
# Installs what tests/browser needs: Debian's Chromium, Playwright into .venv.browser, and the built documentation.
# Instant when nothing has changed; may be killed and repeated at any moment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

bash tests/support/apt_install.sh chromium chromium
requirements=tests/browser/requirements.txt
folder=.venv.browser
ready=$folder/.ready # a copy of the requirements that were installed; written last
if ! cmp --silent "$requirements" "$ready"; then
    echo "installing $(grep -c == "$requirements") packages for tests/browser into $folder"
    rm -rf "$folder"
    .venv/bin/python -m pip install -qq --no-deps --target "$folder" -r "$requirements"
    cp "$requirements" "$ready"
fi
bash docs/build.sh
