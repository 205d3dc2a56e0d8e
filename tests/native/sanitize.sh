#!/usr/bin/env bash
# Builds csrc/cpu with the address and undefined-behaviour sanitizers and runs the native tests on it, and hostile inputs;
# fails on any report.
#     [EBFT_FUZZ_CASES=5000] bash tests/native/sanitize.sh [PYTHON]
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${1:-python3}
cache=$(mktemp -d)
trap 'rm -rf "$cache"' EXIT
flags="-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
# The compiler is not what is tested: on the sanitizers' allocator it takes ten times as long, and all memory.
cat > "$cache/c++" <<COMPILER
#!/usr/bin/env bash
unset LD_PRELOAD
exec g++ "\$@" $flags
COMPILER
chmod +x "$cache/c++"
# Python itself is not instrumented: the runtimes come first, leaks of the interpreter are not ours, and torch's own
# allocations at exit are left alone.
preload="$(g++ -print-file-name=libasan.so):$(g++ -print-file-name=libubsan.so):$(g++ -print-file-name=libstdc++.so)"
export CXX="$cache/c++" EBFT_CACHE="$cache/build" PYTHONPATH="$PWD"
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
LD_PRELOAD="$preload" "$python" -c 'from ebft_kernels._extension import native_reason; assert native_reason() is None, native_reason()'
for path in best avx2 plain; do
  echo "sanitized: the $path path"
  LD_PRELOAD="$preload" EBFT_CPU=$path "$python" -m pytest -q -s -p no:cacheprovider tests/native/test_native.py \
    -k "not process and not compiler and not turned_off and not lesser_cpus and not at_install"
done
echo "sanitized: hostile inputs on each path"
LD_PRELOAD="$preload" EBFT_FUZZ_CASES=${EBFT_FUZZ_CASES:-5000} "$python" -m pytest -q -p no:cacheprovider \
  tests/native/test_hostile.py -k "not ends_the_process and not forgets"
echo "no report from the sanitizers"
