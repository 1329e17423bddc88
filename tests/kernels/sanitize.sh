#!/bin/sh
# Builds the CPU kernels with AddressSanitizer and UndefinedBehaviorSanitizer and runs their tests with them.
# Usage, from anywhere: sh tests/kernels/sanitize.sh [pytest arguments]. PYTHON names the interpreter (default: python3).
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
python=$(command -v "${PYTHON:-python3}")
case $python in /*) ;; *) python=$PWD/$python ;; esac
build=$root/build/sanitize

cmake -S "$root" -B "$build" -DANYFP4_SANITIZE=ON -DPython_EXECUTABLE="$python" >/dev/null
cmake --build "$build" --parallel 2
overlay=$build/overlay
rm -rf "$overlay" && mkdir -p "$overlay"
cp -R "$root/anyfp4" "$root/tests" "$root/pyproject.toml" "$overlay"
rm -f "$overlay"/anyfp4/kernels/cpu/_native.*.so
cp "$build"/_native.*.so "$overlay/anyfp4/kernels/cpu/"

compiler=$(sed -n 's/^CMAKE_CXX_COMPILER:[A-Z]*=//p' "$build/CMakeCache.txt")
cd "$overlay"
# A report goes straight to stderr, which pytest must not hold back (--capture=sys).
# Python and torch are not instrumented: the runtime comes first, their own leaks are not looked for
LD_PRELOAD="$("$compiler" -print-file-name=libasan.so) $("$compiler" -print-file-name=libubsan.so)" \
ASAN_OPTIONS=detect_leaks=0:verify_asan_link_order=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
PYTHONPATH="$overlay" "$python" -m pytest -q --capture=sys -p no:cacheprovider tests/kernels tests/backends/test_cpu.py "$@"
