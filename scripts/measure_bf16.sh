#!/usr/bin/env bash
# bfloat16 products on a CPU that has them (AMX, or AVX512_BF16 of AMD), in about 40 minutes (estimated): the tests of
# layers that run on these kernels and on those of int8, and float32 layers with torch's flag against nn.LSTM with it and
# against themselves without it.
# usage: scripts/measure_bf16.sh PYTHON FOLDER [THREADS, by default 2]
# The extension must be built; FOLDER gets bf16_products.csv. docs/measuring.md says what to do with it.
set -euo pipefail
python=$(realpath -s "$1")
mkdir -p "$2"
folder=$(realpath "$2")
threads=${3:-2}
cd "$(dirname "$0")/.."
unset ATEN_CPU_CAPABILITY # any value turns AMX off
"$python" - <<'END'
import sys

from fastlstm.backends import native

if native.extension is None:
    sys.exit(native.load_error)
if not native.extension.cpu_machine()["bf16_kernels"]:
    sys.exit(f"this CPU multiplies bfloat16 no faster than float32: kernels of {native.extension.bfloat16_isa()}")
print(f"kernels of {native.extension.bfloat16_isa()}")
END
"$python" -m pytest -n 2 --dist loadfile tests/cpu/test_bf16_{products,variants}.py tests/cpu/test_bfloat16.py \
    tests/ops/test_variants.py tests/frozen/test_{contract,int8,isa}.py
"$python" -m benchmarks --suite bf16_products --threads "$threads" --out "$folder"
