#!/usr/bin/env bash
# The second call: are the persistent kernels right?
#   scripts/gpu_correctness.sh OUT
# Their suite, with graphs and a green context; parity with cuDNN in four processes; memcheck; 300 random launches of a
# tier; racecheck. The limits of the stages add up to less than a call. initcheck is left out: it reports torch's own
# reads; the single-block variant, too, whose CTAs exchange nothing.
source "$(dirname "$0")/gpu_common.sh"
build || finish
small() { PYTORCH_NO_CUDA_MEMORY_CACHING=1 FASTLSTM_BACKEND=native compute-sanitizer --tool "$1" --error-exitcode 9 \
  --target-processes all --print-limit 50 "$python" -m pytest -m gpu -x -p no:cacheprovider \
  tests/gpu/test_gpu_persistent.py -k small; }
export -f small
export python
stage persistent 120 "$python" -m pytest -m gpu tests/gpu/test_gpu_persistent.py -rs -k "not random_launches"
stage graphs 50 "$python" -m pytest -m gpu tests/gpu/test_gpu_graphs.py -rs
if "$python" -c "import xdist" 2>/dev/null; then
  stage parity 100 "$python" -m pytest -m gpu tests/gpu/test_gpu_parity.py -n 4 --dist worksteal -rs
else
  stage parity 100 "$python" -m pytest -m gpu tests/gpu/test_gpu_parity.py -rs
fi
stage memcheck 100 bash -c "small memcheck"
for tier in A B D; do
  FASTLSTM_FUZZ_COUNT=300 stage "launches_$tier" 45 "$python" -m pytest -m gpu -x tests/gpu/test_gpu_persistent.py \
    -k "random_launches[$tier]"
done
stage racecheck 70 bash -c "small racecheck"
finish
