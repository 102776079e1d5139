#!/usr/bin/env bash
# Builds the extension in build/emulate with the AVX-512 kernels on emulated instructions, which it then chooses on any
# x86-64 CPU with AVX2, and runs the tests of bfloat16, masks and int8 on it. Far slower than the instructions: for small
# cases alone. usage: scripts/emulate_avx512.sh PYTHON [more pytest arguments]
set -euo pipefail
python=$(realpath -s "$1")
shift
cd "$(dirname "$0")/.."
tree=build/emulate
mkdir -p "$tree"
cp -r setup.py pyproject.toml README.md LICENSE csrc fastlstm tests benchmarks "$tree"/
rm -f "$tree"/fastlstm/*.so
cd "$tree"

compiler=${CXX:-c++}
host="$PWD/tests/cpu/cpu_host"
emulated="-include $host/emulated_avx512.h -include $host/emulated_tiles.h -Wno-psabi"
cat >c++-emulate <<END
#!/bin/sh
case "\$*" in
*/isa*.cpp*|*/bf16*.cpp*|*/int8*.cpp*) exec $compiler "\$@" -O1 $emulated ;;
*) exec $compiler "\$@" -O0 ;;
esac
END
chmod +x c++-emulate
CXX="$PWD/c++-emulate" FASTLSTM_BUILD=cpu "$python" setup.py -q build_ext --inplace

"$python" -c "import fastlstm; isa = fastlstm._C.bfloat16_isa(); assert isa in ('avx512_bf16', 'amx'), isa"
export OMP_WAIT_POLICY=passive # the workers share the cores
# Without a test that asks the CPU itself for its instructions, and without what runs on other kernels.
"$python" -m pytest -p no:cacheprovider tests/cpu/test_{bf16_products,bf16_variants,bfloat16}.py \
    tests/ops/test_variants.py tests/frozen/test_int8.py \
    -k "not depends_on_the_cpu and not eager and not reference and not triton and not float64" "$@"
