#!/usr/bin/env bash
# No false alarms: the suite and random configurations under each instruction set. No blindness: the planted faults.
# About an hour and a half on two cores. FUZZ_SEEDS and FUZZ_SEEDS_OTHER bound the fuzz; SUITE=0 leaves the suite out.
#   scripts/check_tolerance.sh [PYTHON]
set -uo pipefail
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python}
failed=0

run() {  # name, then environment and command
  local name=$1 log
  shift
  log=$(mktemp)
  if env "$@" >"$log" 2>&1; then
    echo "ok      $name: $(grep -E 'passed|configurations ran' "$log" | tr '\n' ' ')"
  else
    echo "FAILED  $name"
    tail -40 "$log"
    failed=1
  fi
  rm -f "$log"
}

run "planted faults" "$python" -m pytest tests/test_planted_faults.py tests/test_accuracy.py
for isa in avx512 avx2 default; do
  [ "${SUITE:-1}" = 1 ] && run "suite, $isa" ATEN_CPU_CAPABILITY=$isa "$python" -m pytest -n 2 --dist loadfile
  seeds=${FUZZ_SEEDS_OTHER:-3}
  [ $isa = avx512 ] && seeds=${FUZZ_SEEDS:-10}
  for ((k = 1; k <= seeds; k++)); do
    run "fuzz, $isa, seed ${k}000000" ATEN_CPU_CAPABILITY=$isa FASTLSTM_FUZZ_COUNT=1000 FASTLSTM_FUZZ_SEED=${k}000000 \
      "$python" -m pytest -m fuzz -s
  done
done
[ "${SUITE:-1}" = 1 ] && run "suite, MKL with AVX2" MKL_ENABLE_INSTRUCTIONS=AVX2 "$python" -m pytest -n 2 --dist loadfile
exit $failed
