#!/usr/bin/env bash
# Everything there is to check on a machine with a GPU, in one command:
#   scripts/gpu_check.sh OUT [STAGE ...]
# Stages, all by default: build, tests, memcheck, racecheck, initcheck, synccheck, benchmarks; and for the persistent
# kernels, which are off otherwise (docs/gpu-notes.md), latency, persistent_small, persistent_tests, persistent_launches,
# persistent_memcheck, persistent_racecheck, persistent_initcheck, persistent_synccheck, persistent_benchmarks. Logs, test
# results and CSVs go to OUT; the exit status is that of the worst stage, and a failed stage does not stop the next one.
# PYTHON=python3 names the interpreter with the CUDA build of torch; TORCH_CUDA_ARCH_LIST is respected.
set -uo pipefail
if [ $# -lt 1 ]; then
  sed -n '2,8p' "$0" | sed 's/^# //' >&2
  exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
shift
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
stages=("$@")
all=(build tests memcheck racecheck initcheck synccheck latency persistent_small persistent_tests persistent_launches
  persistent_memcheck persistent_racecheck persistent_initcheck persistent_synccheck benchmarks persistent_benchmarks)
[ $# -gt 0 ] || stages=("${all[@]}")

# Reproducible cuBLAS where torch's deterministic mode is on (the tests poison memory through it).
export CUBLAS_WORKSPACE_CONFIG=:4096:8

environment() {
  nvidia-smi
  nvcc --version
  git describe --always --dirty
  "$python" - <<'PYTHON'
import platform
import torch
print("python", platform.python_version(), "torch", torch.__version__, "CUDA", torch.version.cuda)
print("cuDNN", torch.backends.cudnn.version())
for index in range(torch.cuda.device_count()):
    print(index, torch.cuda.get_device_properties(index))
PYTHON
}

build() {
  FASTLSTM_BUILD=cuda "$python" -m pip install --no-build-isolation --no-deps --verbose --editable . || return
  "$python" -c "from fastlstm.backends import native; print(native.load_error or native.extension.devices())"
}

tests() {
  "$python" -m pytest -m gpu tests/test_gpu_*.py -rs --durations=20 --junitxml="$out/tests.xml"
}

# Each tensor its own allocation, so that a step beyond one is a step beyond its memory.
sanitize() {
  local tool=$1
  shift
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 FASTLSTM_BACKEND=native \
    compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all --print-limit 50 \
    "$python" -m pytest -m gpu -x "$@"
}
memcheck() { sanitize memcheck tests/test_gpu_small.py; }
racecheck() { sanitize racecheck tests/test_gpu_small.py; }
initcheck() { sanitize initcheck tests/test_gpu_small.py; }
synccheck() { sanitize synccheck tests/test_gpu_small.py; }

benchmarks() {
  "$python" -m benchmarks --suite gpu --out "$out/benchmarks"
}

# What an exchange between blocks costs, for the prediction in docs/gpu-notes.md.
latency() {
  nvcc -std=c++17 -O3 -arch=native -I csrc benchmarks/cuda/latency.cu -o "$out/latency" || return
  timeout 300 "$out/latency" | tee "$out/latency.csv"
  return "${PIPESTATUS[0]}"
}

# The persistent kernels never wait for ever; should they yet, the time limits end them.
persistent_small() { timeout 600 "$python" -m pytest -m gpu -x tests/test_gpu_persistent.py -k small; }
persistent_tests() {
  FASTLSTM_BACKEND=native timeout 3600 "$python" -m pytest -m gpu --persistent tests/test_gpu_*.py -rs \
    --durations=20 --junitxml="$out/persistent_tests.xml"
}
persistent_launches() {
  FASTLSTM_FUZZ_COUNT=10000 timeout 3600 "$python" -m pytest -m gpu -x tests/test_gpu_persistent.py -k launches
}
persistent_memcheck() { sanitize memcheck tests/test_gpu_persistent.py -k small; }
persistent_racecheck() { sanitize racecheck tests/test_gpu_persistent.py -k small; }
persistent_initcheck() { sanitize initcheck tests/test_gpu_persistent.py -k small; }
persistent_synccheck() { sanitize synccheck tests/test_gpu_persistent.py -k small; }
persistent_benchmarks() {
  timeout 7200 "$python" -m benchmarks --suite gpu --persistent --out "$out/persistent_benchmarks"
}

environment >"$out/environment.txt" 2>&1
if ! "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
  echo "there is no GPU that this torch can use; see $out/environment.txt" >&2
  exit 2
fi
worst=0
for stage in "${stages[@]}"; do
  if [[ " ${all[*]} " != *" $stage "* ]]; then
    echo "unknown stage: $stage" >&2
    exit 2
  fi
  echo "== $stage"
  started=$SECONDS
  "$stage" 2>&1 | tee "$out/$stage.log" | tail -n 15
  status=${PIPESTATUS[0]}
  echo "== $stage: exit $status after $((SECONDS - started)) s" | tee -a "$out/summary.txt"
  [ "$status" -le "$worst" ] || worst=$status
done
exit "$worst"
