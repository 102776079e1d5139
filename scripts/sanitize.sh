#!/usr/bin/env bash
# Builds the extension with AddressSanitizer and UndefinedBehaviorSanitizer in build/sanitize and runs the tests of the
# CPU kernels on it. usage: scripts/sanitize.sh PYTHON [more pytest arguments]
set -euo pipefail
python=$(realpath -s "$1")
shift
cd "$(dirname "$0")/.."
tree=build/sanitize
mkdir -p "$tree"
cp -r setup.py pyproject.toml README.md LICENSE csrc fastlstm tests benchmarks "$tree"/
rm -f "$tree"/fastlstm/*.so
cd "$tree"

# vptr needs run-time type information of torch's classes that it does not export. null and alignment double the time
# that torch's headers take to compile: AddressSanitizer finds what is read through null, and
# tests/cpu/test_partitions.py checks the kernels for both.
flags="-fsanitize=address,undefined -fno-sanitize=vptr,null,alignment -fno-sanitize-recover=undefined"
flags+=" -fno-omit-frame-pointer"

# The compiler, with -Og for the kernels that run here and -O0 for everything else: -O3 on top of the checks compiles for
# minutes. Kernels of other instruction sets do not run, so they are compiled without the checks. The name has the
# instruction set, so that ninja compiles again when it changes.
compiler=${CXX:-c++}
isa=$("$python" -c "import torch; print(torch.backends.cpu.get_cpu_capability())")
case $isa in
AVX512) idle='*/isa_baseline.cpp*|*/isa_avx2.cpp*|*/int8_avx2.cpp*|*/int8_avx_vnni.cpp*' ;;
AVX2) idle='*/isa_baseline.cpp*|*/isa_avx512*.cpp*|*/bf16_*.cpp*|*/int8_avx512.cpp*|*/int8_amx.cpp*' ;;
*) idle='*/isa_avx*.cpp*|*/bf16_*.cpp*|*/int8_a*.cpp*' ;;
esac
cat >"c++-$isa" <<END
#!/bin/sh
case "\$*" in
$idle) exec $compiler "\$@" -O0 -fno-sanitize=all ;;
*/isa_*.cpp*|*/bf16_*.cpp*|*/int8*.cpp*) exec $compiler "\$@" -Og ;;
*) exec $compiler "\$@" -O0 ;;
esac
END
chmod +x "c++-$isa"
CXX="$PWD/c++-$isa" CFLAGS="$flags" CXXFLAGS="$flags" LDFLAGS="-fsanitize=address,undefined" FASTLSTM_BUILD=cpu \
    "$python" setup.py -q build_ext --inplace

export LD_PRELOAD="$($compiler -print-file-name=libasan.so) $($compiler -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0 # Python and torch keep what they allocate
export UBSAN_OPTIONS=print_stacktrace=1
export OMP_WAIT_POLICY=passive # the workers share the cores, so a thread that spins delays the others
export FASTLSTM_COARSE_BOUNDS=1 # accesses are judged here; make test judges the rounding
# Without what is about rounding or large sizes alone; other threads are under ThreadSanitizer
# (tests/cpu/test_partitions.py).
selection="not eager and not triton and not reference and not opcheck and not three_to_eight and not 2048"
selection+=" and not rounded_once and not beyond and not large_case and not fewer_threads"
selection+=" and not T140 and not T160 and not 10_000 and not instruction_set"
selection+=" and not gradcheck and not of_gradients and not random_configurations"
selection+=" and not test_recompute and not test_each_gradient_alone and not test_output_changed"
selection+=" and not drift and not detected and not are_found and not exact_factors and not flags_that_decide"
selection+=" and not follow_the_flag and not may_change_before"
# A report goes to the file descriptor, hence --capture=sys, and ends its process: the first one ends the run.
"$python" -m pytest -p no:cacheprovider --capture=sys --max-worker-restart=0 \
    tests/ops/test_{ops,parity,ragged,variants}.py \
    tests/cpu/test_{activations,bf16_products,bfloat16,blocks,chunks,norm,threads}.py \
    tests/module/test_cell.py tests/frozen/test_{int8,errors}.py \
    -k "$selection" "$@" 2>stderr.txt && exit
# What was found and where, without the interpreter's own frames; last, where a log that is cut keeps it.
grep -E -m 2 -A 30 "runtime error:|ERROR: AddressSanitizer" stderr.txt || cat stderr.txt
exit 1
