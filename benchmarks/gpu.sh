#!/usr/bin/env bash
# One GPU measured within twelve minutes: training, guided sampling, XLA's flags, PyTorch beside it where it is installed.
#
#   benchmarks/gpu.sh                      # leaves runs/gpu/gpu.json, written anew after every part
#   OUT=runs/gpu benchmarks/gpu.sh --minutes 6 --parts device train:cifar10
#   benchmarks/gpu.sh --smoke              # next to no computation, on any machine: does it run through?
#
# Needs jax with CUDA, flax, optax and jaxtyping. PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ -z "${PYTHON:-}" ]]; then
  PYTHON=python3
  if [[ -x .venv/bin/python ]]; then PYTHON=.venv/bin/python; fi
fi
exec "$PYTHON" -m benchmarks.gpu --out "${OUT:-runs/gpu}" "$@"
