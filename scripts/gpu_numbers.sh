#!/usr/bin/env bash
# The third call: how fast?
#   scripts/gpu_numbers.sh OUT
# The kernels without torch, whole and with a stage left out (steps.csv); nn.LSTM and fastlstm, eager and in CUDA graphs,
# with and without the persistent kernels, at the suite gpu_points; lengths and resets; data flags against flags; ncu.
source "$(dirname "$0")/gpu_common.sh"
build || finish
# 25 s with nvcc 13.0 for sm_90a on one core (2026-11-30); the limits of all stages add up to less than a call.
stage compile_steps 75 bash -c "$(declare -f kernels); out='$out'; kernels steps.cu steps"
stage steps 60 bash -c "'$out/steps' >'$out/steps.csv'; status=\$?; tail -n 8 '$out/steps.csv'; exit \$status"
stage ragged 30 "$python" - <<'PYTHON'
import statistics, torch, fastlstm
from benchmarks.measure import Measurement, Plan, alternate, cuda_timer
print("H,B,T,what,forward us a step,median of the rounds")
for H, B in ((128, 16), (512, 64), (1024, 64)):
    T = 512
    lstm = fastlstm.LSTM(H, H, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(T, B, H, device="cuda", dtype=torch.bfloat16)
    masks = {
        "dense": {},
        "resets": {"reset_mask": torch.rand(T, B, device="cuda") < 0.02},
        "lengths": {"lengths": torch.randint(T // 2, T + 1, (B,), device="cuda")},
    }
    with torch.no_grad(), fastlstm.use_backend("native"):
        measurements = {name: Measurement.of(lambda mask=mask: lstm(x, **mask)) for name, mask in masks.items()}
        alternate(measurements, cuda_timer, Plan(budget=1.0, min_rounds=7))
    for name, measurement in measurements.items():
        print(f"{H},{B},{T},{name},{statistics.median(measurement.samples) * 1e6 / T:.3f}")
PYTHON
stage data_flags 40 "$python" - <<'PYTHON'
import statistics, torch, fastlstm
from benchmarks.measure import Measurement, Plan, alternate, cuda_timer
from fastlstm.backends import native
print("H,B,T,tier,us per step of forward,us per step of training,kernels")
def of_tier(tier, call):
    def run():
        native.set_persistent(True, tier=tier)
        call()
    return Measurement.of(run)
for H, B in ((512, 16), (512, 64), (768, 16), (1024, 16), (1024, 32)):
    T = 512
    lstm = fastlstm.LSTM(H, H, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(T, B, H, device="cuda", dtype=torch.bfloat16)
    def forward():
        with torch.no_grad():
            lstm(x)
    def training():
        lstm(x)[0].sum().backward()
    times = {}
    with fastlstm.use_backend("native"):
        for call in (forward, training):
            times[call] = {tier: of_tier(tier, call) for tier in "BD"}
            alternate(times[call], cuda_timer, Plan(budget=1.0, min_rounds=7))
        for tier in "BD":
            us = [statistics.median(times[call][tier].samples) * 1e6 / T for call in (forward, training)]
            native.set_persistent(True, tier=tier)
            print(f"{H},{B},{T},{tier},{us[0]:.3f},{us[1]:.3f},{fastlstm.explain(lstm, x).kernels!r}")
PYTHON
LINES_SHOWN=40 stage points 300 "$python" -m benchmarks --suite gpu_points --out "$out" --resume --seconds 280 \
  --impl fastlstm fastlstm_graph steps steps_graph
if command -v ncu >/dev/null; then
  for H in 512 1024; do
    stage "ncu_$H" 40 ncu --clock-control none --set full --kernel-name regex:persistent --launch-count 2 \
      "$python" -c "
import torch, fastlstm
lstm = fastlstm.LSTM($H, $H, device='cuda', dtype=torch.bfloat16)
lstm(torch.randn(256, 64, $H, device='cuda', dtype=torch.bfloat16))[0].sum().backward()
torch.cuda.synchronize()"
  done
fi
finish
