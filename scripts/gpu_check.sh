#!/bin/sh
# Checks and measures neuclip on a GPU, in order of value, and writes results as it goes:
#
#     scripts/gpu_check.sh --minutes 8 --out gpu_check
#
# OUT/results.jsonl has one line a result, OUT/log.txt all output. It needs no network, and neuclip's
# packages (PYTHON names the interpreter that has them). Without a GPU every part runs at toy size.
set -e
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
command -v "$python" > /dev/null || python=python3
export PYTHONPATH="$root/benchmarks:$root/src:$root/tests${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m gpu_check "$@"
