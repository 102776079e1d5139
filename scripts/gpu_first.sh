#!/usr/bin/env bash
# The first call: does an error raised in C++ kill the process, and what does an exchange between blocks cost?
#   scripts/gpu_first.sh OUT
# Builds; scripts/gpu_crash_probe.py decides the crash of tests/gpu/test_gpu_adversarial.py;
# exchange_by_data.cu and latency.cu give the exchange's nanoseconds, with flags and with data that are their own flag;
# the adversarial suite, native backend.
source "$(dirname "$0")/gpu_common.sh"
nvidia-smi >"$out/environment.txt" 2>&1
build || finish
stage compile_exchange 60 bash -c "$(declare -f kernels); out='$out'; kernels exchange_by_data.cu exchange_by_data"
stage compile_latency 60 bash -c "$(declare -f kernels); out='$out'; kernels latency.cu latency"
LINES_SHOWN=40 stage crash_probe 150 "$python" scripts/gpu_crash_probe.py
stage exchange 90 bash -c "'$out/exchange_by_data' >'$out/exchange.csv'; status=\$?; tail -n 5 '$out/exchange.csv'; exit \$status"
stage latency 60 bash -c "'$out/latency' >'$out/latency.csv'; status=\$?; tail -n 5 '$out/latency.csv'; exit \$status"
stage adversarial 180 "$python" -m pytest -m gpu tests/gpu/test_gpu_adversarial.py -k native -rs
finish
