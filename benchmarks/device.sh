#!/bin/sh
# Checks and times this checkout on a CUDA machine: no installation, no network, about five minutes.
# Needs python3 with torch, transformers, accelerate, peft and pytest. Writes
# benchmarks/results/device-<gpu>.json, and a copy to $OUT where that is set.
cd "$(dirname "$0")/.." || exit 1
exec "${PYTHON:-python3}" benchmarks/device.py --device cuda "$@"
