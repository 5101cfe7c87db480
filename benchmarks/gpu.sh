#!/usr/bin/env bash
# Runs the GPU tests and the GPU benchmarks in seven minutes, from the source tree and without an
# installation. PYTHON names the interpreter, and all arguments go to benchmarks/gpu.py.
set -euo pipefail
cd "$(dirname "$0")/.."
unset TRITON_INTERPRET
export PYTHONPATH=".:kernels/torch-ext${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m benchmarks.gpu "$@"
