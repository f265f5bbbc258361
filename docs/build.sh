#!/usr/bin/env bash
# Builds the documentation into site/, strictly, and checks its links.
#
#     bash docs/build.sh           # then: python3 -m http.server --directory site
#     bash docs/build.sh --serve   # shows the pages while they are written
#
# The packages go into .venv.docs. Needs Python 3.12. Instant when nothing has changed; may be killed and repeated.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

requirements=docs/requirements.txt
venv=.venv.docs
ready=$venv/.ready # a copy of the requirements that were installed; written last
built=site/.built  # the fingerprint of what the site was made of; written last
export PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1
export NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true # a notice of the theme about another program
unset PYTHONHOME PYTHONPATH

make_venv() {
    if cmp --silent "$requirements" "$ready" && "$venv/bin/python" -I -c 'import mkdocs' 2>/dev/null; then return; fi
    echo "installing $(grep -c == "$requirements") packages for the documentation into $venv"
    rm -rf "$venv"
    "$(bash patches/cpu/find_python.sh)" -m venv "$venv"
    "$venv/bin/python" -m pip install -qq --no-deps -r "$requirements"
    cp "$requirements" "$ready"
}

fingerprint() { # of every file that a page may show
    git ls-files -z --cached --others --exclude-standard -- . ':!tests/golden' |
        { xargs -0 sha256sum 2>/dev/null || true; } | sha256sum # of files that are there
}

make_venv
if [[ ${1:-} == --serve ]]; then exec "$venv/bin/mkdocs" serve; fi
now=$(fingerprint)
if [[ -f $built && $(<"$built") == "$now" ]]; then
    echo "site/ is up to date"
    exit 0
fi
rm -f "$built"
"$venv/bin/mkdocs" --quiet build --strict --clean
"$venv/bin/python" docs/check_site.py site
echo "$now" >"$built"
