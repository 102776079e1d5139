# Sourced by gpu_first.sh, gpu_correctness.sh and gpu_numbers.sh, which are one call each on a machine with a GPU:
#   scripts/gpu_NAME.sh OUT
# CALL_SECONDS (590) bounds a call; what is not begun in time is named as left. OUT keeps the built extension, so the
# first call of a machine builds and the next ones do not; logs and CSVs lie in OUT and, together, in OUT/logs.tar.gz.
# TORCH_CUDA_ARCH_LIST (9.0a) and MAX_JOBS (16) bound the build. Nothing here has run on a GPU yet.
set -uo pipefail
if [ $# -ne 1 ]; then
  echo "usage: $0 OUT" >&2
  exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
deadline=$((SECONDS + ${CALL_SECONDS:-590}))
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0a} MAX_JOBS=${MAX_JOBS:-16} PYTHONUNBUFFERED=1
worst=0

# stage NAME SECONDS COMMAND...: its output to OUT/NAME.log, the last lines shown; at most SECONDS, or what is left.
stage() {
  local name=$1 limit=$2 left=$((deadline - SECONDS)) started=$SECONDS status
  shift 2
  if [ $left -lt 15 ]; then
    echo "== $name: left, for want of time" | tee -a "$out/summary.txt"
    return 1
  fi
  [ "$limit" -le "$left" ] || limit=$left
  echo "== $name"
  timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1
  status=$?
  tail -n "${LINES_SHOWN:-12}" "$out/$name.log"
  echo "== $name: exit $status after $((SECONDS - started)) s" | tee -a "$out/summary.txt"
  [ $status -le "$worst" ] || worst=$status
  return $status
}

# The extension for CUDA: the one of an earlier call, or a new one.
build() {
  if compgen -G "$out/_C*.so" >/dev/null; then
    cp "$out"/_C*.so fastlstm/
    "$python" -c 'from fastlstm.backends import native; raise SystemExit("cuda" not in native.devices)' && return 0
  fi
  STAGE_SECONDS=$((deadline - SECONDS)) stage build 580 scripts/gpu_check.sh "$out" build || return
  cp fastlstm/_C*.so "$out/" 2>/dev/null || true
}

kernels() { # SOURCE PROGRAM: one of benchmarks/cuda
  nvcc -std=c++17 -O3 -gencode="arch=compute_${TORCH_CUDA_ARCH_LIST/./},code=sm_${TORCH_CUDA_ARCH_LIST/./}" -I csrc \
    "benchmarks/cuda/$1" -o "$out/$2"
}

finish() {
  (cd "$out" && tar czf logs.tar.gz --exclude='*.so' --exclude=logs.tar.gz ./*.log ./*.txt ./*.csv ./*/*.csv 2>/dev/null)
  cat "$out/summary.txt"
  exit "$worst"
}
