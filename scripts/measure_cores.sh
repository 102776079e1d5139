#!/usr/bin/env bash
# A machine with more than two cores, in about ten minutes: an old revision against the working tree at 1, 2, 4, 8, ...
# threads (suites cpu and scaling), and the thread partitions that the plan chooses against the fastest.
# usage: scripts/measure_cores.sh PYTHON REV FOLDER [SECONDS per number of threads, by default 80]
# The working tree must be built; FOLDER gets ab_<threads>.csv and calibrate_<threads>.csv. docs/measuring.md explains
# both.
set -euo pipefail
python=$(realpath -s "$1")
revision=$2
mkdir -p "$3"
folder=$(realpath "$3")
seconds=${4:-80}
cd "$(dirname "$0")/.."
cores=$(nproc)
threads=1
while ((threads <= cores)); do
    "$python" -m benchmarks ab "$revision" --suite cpu scaling --threads "$threads" --budget 0.5 --launches 2 \
        --seconds "$seconds" --output "$folder/ab_$threads.csv"
    if ((threads > 1)); then
        "$python" -m benchmarks calibrate --threads "$threads" --seconds $((seconds / 4)) \
            --output "$folder/calibrate_$threads.csv"
    fi
    threads=$((threads * 2))
done
