#!/usr/bin/env bash
# The GPU tests and the GPU's benchmarks, in seven minutes. It runs from the source tree, without an
# installation; PYTHON names the interpreter, and all arguments go to benchmarks/gpu.py.
set -euo pipefail
cd "$(dirname "$0")/.."
unset TRITON_INTERPRET
export PYTHONPATH=".:kernels/torch-ext${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m benchmarks.gpu "$@"
