#!/usr/bin/env bash
# Builds the wheel, installs it into a fresh environment, and runs it with no repository beside it.
# The environment sees the packages of the given Python's, but not the neuclip that is installed
# there: `scripts/check_wheel.sh .venv/bin/python`.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "$1")
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
unset PYTHONPATH

"$python" -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$out" .
"$python" -m venv --without-pip "$out/venv"
site=$("$out/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$python" -m pip install --quiet --disable-pip-version-check --no-deps --no-compile \
    --target "$site" "$out"/*.whl
# A path alone, not a .pth file: the .pth files there, such as an editable neuclip's, stay unread.
"$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$site/shared.pth"

mkdir "$out/empty"
cd "$out/empty"
run="$out/venv/bin/python -P -m neuclip"
from=$("$out/venv/bin/python" -P -c 'import neuclip; print(neuclip.__file__)')
[ "$from" = "$site/neuclip/__init__.py" ] || { echo "neuclip came from $from"; exit 1; }
$run --version
$run methods >methods.txt
OMP_NUM_THREADS=1 $run demo --smoke --out smoke >demo.txt 2>&1 || { cat demo.txt; exit 1; }
ls smoke/runs/*/report.html
echo "the wheel works: $(basename "$out"/*.whl)"
