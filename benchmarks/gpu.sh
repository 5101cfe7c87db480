#!/usr/bin/env bash
# The GPU tests and, only if every one of them passes, the GPU's benchmarks. From the source tree,
# without an installation; PYTHON names the interpreter, arguments go to benchmarks/gpu.py.
set -euo pipefail
cd "$(dirname "$0")/.."
unset TRITON_INTERPRET
export PYTHONPATH=".:kernels/torch-ext${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3}
report=$(mktemp)
trap 'rm -f "$report"' EXIT

"$python" -m benchmarks.gpu --describe # ends all this where there is no GPU
# Only the files with such tests: others may import what is not installed here.
mapfile -t files < <(grep -l 'mark\.gpu' tests/test_*.py)
"$python" -m pytest -q -m gpu -p no:cacheprovider --durations=10 --junitxml="$report" "${files[@]}"
"$python" -m benchmarks.gpu --tests "$report" "$@"
