#!/usr/bin/env bash
# Everything there is to check on a machine with a GPU, in one command:
#   scripts/gpu_check.sh OUT [STAGE ...]
# Stages, all by default: build, small, parity, gradients, execution, graphs, features, adversarial, persistent (the
# suite), steps (the suite without the persistent kernels), first_call, memcheck, racecheck, initcheck, synccheck,
# bfloat16, float16, tf32, float32 (the benchmark suite, a dtype at a time), triton (the same on Triton, T=512),
# latency, launches_A, _B, _D and _S (10,000 random launches of a tier of the persistent kernels),
# persistent_memcheck, _racecheck, _initcheck and _synccheck, and kernels_steps, _A, _B, _D and _S (the benchmark with
# those kernels alone; D and S fall back to another tier if they do not support a layer). Each ends within
# STAGE_SECONDS (580); a benchmark stage that ran out of time goes on when started again with the same OUT. Logs, test
# results and CSVs go to OUT; the exit status is that of the worst stage, and a failed stage does not stop the next
# one. A stage whose tool is missing is skipped, and says so.
# Needs torch with CUDA, nvcc, numpy, setuptools >= 77 and pytest; the last three and rich are installed if pip can.
# PYTHON=python3 names the interpreter; TORCH_CUDA_ARCH_LIST is respected.
set -uo pipefail
if [ $# -lt 1 ]; then
  sed -n '2,13p' "$0" | sed 's/^# \?//' >&2
  exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
shift
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
seconds=${STAGE_SECONDS:-580}
all=(build small parity gradients execution graphs features adversarial persistent steps first_call memcheck racecheck
  initcheck synccheck bfloat16 float16 tf32 float32 triton latency launches_A launches_B launches_D launches_S
  persistent_memcheck persistent_racecheck persistent_initcheck persistent_synccheck kernels_steps kernels_A kernels_B
  kernels_D kernels_S)
stages=("$@")
[ $# -gt 0 ] || stages=("${all[@]}")
skipped=75 # the exit status of a stage that cannot run here

# Reproducible cuBLAS where torch's deterministic mode is on (the tests poison memory through it).
export CUBLAS_WORKSPACE_CONFIG=:4096:8
export PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1

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
  "$python" -m pip list
}

missing() { # prints those of the distributions given, as name or name>=major, that are not there
  "$python" - "$@" <<'PYTHON'
import sys
from importlib.metadata import PackageNotFoundError, version
for wanted in sys.argv[1:]:
    name, _, least = wanted.partition(">=")
    try:
        if not least or int(version(name).split(".")[0]) >= int(least):
            continue
    except PackageNotFoundError:
        pass
    print(wanted)
PYTHON
}

install() {
  local wanted
  mapfile -t wanted < <(missing numpy "setuptools>=77" wheel ninja pytest rich)
  [ "${#wanted[@]}" -gt 0 ] || return 0
  timeout 120 "$python" -m pip install --timeout 5 --retries 0 "${wanted[@]}" ||
    echo "not installed: ${wanted[*]}"
}

build() {
  install
  if ! FASTLSTM_BUILD=cuda timeout "$seconds" "$python" -m pip install --no-build-isolation --no-deps --verbose \
    --editable .; then
    # An old setuptools does not understand pyproject.toml, and some systems let pip install nothing: the extension alone.
    echo "pip could not install; building in place"
    rm -rf "$out/source" && mkdir "$out/source" && cp -r setup.py csrc fastlstm "$out/source" || return
    (cd "$out/source" && FASTLSTM_BUILD=cuda timeout "$seconds" "$python" setup.py build_ext --inplace) || return
    cp "$out"/source/fastlstm/_C*.so fastlstm/ && rm -rf "$out/source" || return
  fi
  "$python" - <<'PYTHON'
from fastlstm.backends import native
print(native.load_error or f"fastlstm._C was built for {', '.join(native.devices)}")
raise SystemExit("cuda" not in native.devices)
PYTHON
}

suite() { # NAME: tests/gpu/test_gpu_NAME.py
  timeout "$seconds" "$python" -m pytest -m gpu "tests/gpu/test_gpu_$1.py" -rs --durations=10 \
    --junitxml="$out/$1.xml"
}
small() { suite small; }
parity() { suite parity; }
gradients() { suite gradients; }
execution() { suite execution; }
graphs() { suite graphs; }
features() { suite features; }
adversarial() { suite adversarial; }
persistent() { suite persistent; }
steps() {
  FASTLSTM_BACKEND=native timeout "$seconds" "$python" -m pytest -m gpu --steps tests/gpu/test_gpu_*.py -rs \
    --deselect tests/gpu/test_gpu_persistent.py --durations=10 --junitxml="$out/steps.xml"
}

# Triton's first training step, compilation included, nothing in its cache.
first_call() {
  local H
  for H in 64 256 512; do
    TRITON_CACHE_DIR=$(mktemp -d) timeout $((seconds / 3)) "$python" - "$H" <<'PYTHON' || return
import sys, time, torch, fastlstm
fastlstm.use_backend("triton")
H = int(sys.argv[1])
lstm = fastlstm.LSTM(H, H, device="cuda", dtype=torch.bfloat16)
x = torch.randn(64, 32, H, device="cuda", dtype=torch.bfloat16, requires_grad=True)
(x @ x.mT).sum().backward()
torch.cuda.synchronize()
start = time.perf_counter()
lstm(x)[0].sum().backward()
torch.cuda.synchronize()
print(f"H={H}: first training step {time.perf_counter() - start:.1f} s")
PYTHON
  done
}

# Each tensor its own allocation, so that a step beyond one is a step beyond its memory.
sanitize() {
  local tool=$1
  shift
  if ! command -v compute-sanitizer >/dev/null; then
    echo "compute-sanitizer is not installed"
    return $skipped
  fi
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 FASTLSTM_BACKEND=native timeout "$seconds" \
    compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all --print-limit 50 \
    "$python" -m pytest -m gpu -x -p no:cacheprovider "$@"
}
memcheck() { sanitize memcheck tests/gpu/test_gpu_small.py; }
racecheck() { sanitize racecheck tests/gpu/test_gpu_small.py; }
initcheck() { sanitize initcheck tests/gpu/test_gpu_small.py; }
synccheck() { sanitize synccheck tests/gpu/test_gpu_small.py; }

measure() { # FOLDER ARGUMENT ...: cases of the suite into OUT/FOLDER/gpu.csv, beside those that are there
  local folder=$1
  shift
  timeout "$seconds" "$python" -m benchmarks --suite gpu --out "$out/$folder" --resume \
    --seconds $((seconds - 60)) "$@"
}
bfloat16() { measure benchmarks --dtype bfloat16; }
float16() { measure benchmarks --dtype float16; }
tf32() { measure benchmarks --dtype tf32; }
float32() { measure benchmarks --dtype float32; }
triton() { measure triton --dtype bfloat16 --filter "T=512 " --impl native triton; }

# What an exchange between blocks costs, for the predicted times (docs/gpu-kernels.md, "Planner").
latency() {
  nvcc -std=c++17 -O3 -arch=native -I csrc benchmarks/cuda/latency.cu -o "$out/latency" || return
  timeout 300 "$out/latency" | tee "$out/latency.csv"
  return "${PIPESTATUS[0]}"
}

launches() { # TIER
  FASTLSTM_FUZZ_COUNT=10000 timeout "$seconds" "$python" -m pytest -m gpu -x tests/gpu/test_gpu_persistent.py \
    -k "random_launches[$1]"
}
launches_A() { launches A; }
launches_B() { launches B; }
launches_D() { launches D; }
launches_S() { launches S; }
persistent_memcheck() { sanitize memcheck tests/gpu/test_gpu_persistent.py -k small; }
persistent_racecheck() { sanitize racecheck tests/gpu/test_gpu_persistent.py -k small; }
persistent_initcheck() { sanitize initcheck tests/gpu/test_gpu_persistent.py -k small; }
persistent_synccheck() { sanitize synccheck tests/gpu/test_gpu_persistent.py -k small; }
# Each kind of kernels by itself, for the planner: what it predicts decides between them.
kernels_steps() { measure kernels_steps --filter "B=64 " --impl native --kernels steps; }
kernels_A() { measure kernels_A --filter "B=64 " --impl native --kernels A; }
kernels_B() { measure kernels_B --filter "B=64 " --impl native --kernels B; }
kernels_D() { measure kernels_D --filter "B=64 " --impl native --kernels D; }
kernels_S() { measure kernels_S --filter "B=64 " --impl native --kernels S; }

for stage in "${stages[@]}"; do
  if [[ " ${all[*]} " != *" $stage "* ]]; then
    echo "unknown stage: $stage; there are ${all[*]}" >&2
    exit 2
  fi
done
environment >"$out/environment.txt" 2>&1
if ! "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
  echo "there is no GPU that this torch can use; see $out/environment.txt" >&2
  exit 2
fi
worst=0
for stage in "${stages[@]}"; do
  echo "== $stage"
  started=$SECONDS
  "$stage" 2>&1 | tee "$out/$stage.log" | tail -n 15
  status=${PIPESTATUS[0]}
  if [ "$status" -eq $skipped ]; then
    echo "== $stage: skipped" | tee -a "$out/summary.txt"
    continue
  fi
  echo "== $stage: exit $status after $((SECONDS - started)) s" | tee -a "$out/summary.txt"
  [ "$status" -le "$worst" ] || worst=$status
done
exit "$worst"
