#!/usr/bin/env bash
# No false alarms: the suite and random configurations under each instruction set that this CPU has. No blindness: the
# planted faults under each. About an hour on two idle cores with AVX-512.
# FUZZ_SEEDS and FUZZ_SEEDS_OTHER bound the fuzz; SUITE=0 leaves the suite out.
#   scripts/check_tolerance.sh [PYTHON]
set -uo pipefail
python=$(realpath -s "${1:-$(dirname "$0")/../.venv/bin/python}")
cd "$(dirname "$0")/.."
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT

run() {  # name, then environment and command
  local name=$1 log
  shift
  log=$(mktemp -p "$logs")
  if env "$@" >"$log" 2>&1; then
    echo "ok      $name: $(grep -E 'passed|configurations ran' "$log" | tr '\n' ' ')"
  else
    echo "FAILED  $name"
    tail -40 "$log"
    touch "$logs/failed"
  fi
}

suite=("$python" -m pytest -n 2 --dist loadfile)
case $("$python" -c 'import torch; print(torch.backends.cpu.get_cpu_capability())') in
  AVX512*) levels="avx512 avx2 default" ;;
  AVX2) levels="avx2 default" ;;
  *) levels=default ;;
esac
best=${levels%% *}
for isa in $levels; do
  export ATEN_CPU_CAPABILITY=$isa
  run "planted faults, $isa" "$python" -m pytest tests/tools/test_planted_faults.py tests/tools/test_accuracy.py
  [ "${SUITE:-1}" = 1 ] && run "suite, $isa" "${suite[@]}"
  seeds=${FUZZ_SEEDS_OTHER:-3}
  [ "$isa" = "$best" ] && seeds=${FUZZ_SEEDS:-10}
  for ((k = 1; k <= seeds; k++)); do # two at a time
    run "fuzz, $isa, seed ${k}000000" FASTLSTM_FUZZ_COUNT=1000 FASTLSTM_FUZZ_SEED=${k}000000 "$python" -m pytest -m fuzz -s &
    ((k % 2)) || wait
  done
  wait
done
unset ATEN_CPU_CAPABILITY
[ "${SUITE:-1}" = 1 ] && run "suite, MKL with AVX2" MKL_ENABLE_INSTRUCTIONS=AVX2 "${suite[@]}"
[ ! -e "$logs/failed" ]
