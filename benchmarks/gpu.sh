#!/usr/bin/env bash
# Builds, checks and measures fusednorm on a machine with an NVIDIA GPU: benchmarks/gpu.sh FOLDER [STEP…]
#
# It installs into the environment of `python3` (PYTHON names another), without network: pip, pybind11,
# scikit-build-core, cmake, ninja, numpy, ml_dtypes, pytest, CuPy, rich and matplotlib must be there, and nvcc.
#
#     build         pip install, for the GPUs of this machine
#     environment   what is here
#     tests         tests/test_cuda.py and test_cuda_cli.py, the slow ones too: CuPy arrays against float64
#     memcheck      those of test_cuda.py that are not slow, each array in memory of its own; racecheck, initcheck and
#     racecheck     synccheck on CASES, below. They need compute-sanitizer, of the CUDA toolkit or of pip's
#     initcheck     nvidia-cuda-sanitizer-api. After each an error is planted, which must be caught
#     synccheck
#     selftest      fusednorm selftest --device cuda
#     bench         fusednorm bench --device cuda of batch norm: batch.json, batch.md, batch.png
#     family        the same of layer, RMS, instance and group norm, a fourth of the time each
#
# Without STEP all of them. FOLDER gets a log of each and summary.txt. A step that fails does not stop the next; the exit
# code is 1 then. Each has a limit in seconds, which LIMIT_build=600 and the like change. The first seven fit into ten
# minutes, the next two into another ten, and so does the last.
# shellcheck disable=SC2329  # steps are called by their names
set -uo pipefail
exec </dev/null
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

ALL=(build environment tests memcheck racecheck initcheck synccheck selftest bench family)
LIMITS=(180 20 130 100 70 40 40 100 480 580)
# Of small cases some for each way to share the work: one block, clusters of 4 and 8, whole grids; rows and columns, all
# dtypes, masks, ghost batches.
CASES="37x17-axis1 or 3x3x1023-axis1-float32 or 3x5x1025-axis1-float16 or 3x5x1025-axis1-bfloat16 or 1x3x32769 or \
2x1x32769-axis1-float32 or 2x1023x1 or 3x16x17 or 4x49x5-axis-1-float64 or 4x7x9x17-axis-1-float32-mask or \
13x5x7-axis1-float32-ghost or 66x65-axis1-float32-ghost"

usage() {
  echo "usage: $0 FOLDER [STEP…]; steps: ${ALL[*]}" >&2
  exit 2
}
[ $# -ge 1 ] || usage
mkdir -p "$1" || exit 2
folder=$(cd "$1" && pwd)
shift
steps=("$@")
[ $# -ge 1 ] || steps=("${ALL[@]}")
for step in "${steps[@]}"; do
  [[ " ${ALL[*]} " == *" $step "* ]] || usage
done

python=${PYTHON:-python3}
export PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1

build() {
  FUSEDNORM_CUDA=${FUSEDNORM_CUDA:-ON} "$python" -m pip install --no-build-isolation --force-reinstall --no-deps . &&
    "$python" -m fusednorm info
}

environment() {
  nvidia-smi
  nvcc --version
  "$python" --version
  "$python" -m pip list 2>&1 | grep -iE '^(cupy|torch|triton|numpy|ml.dtypes|nvidia-cu|pytest|pybind11|scikit)'
  "$python" -m fusednorm info
}

# Warnings of other libraries fail nothing here.
tests() { "$python" -m pytest -q --slow -W default -p no:cacheprovider tests/test_cuda.py tests/test_cuda_cli.py; }

# pytest with CuPy's memory pool off: within its chunks the sanitizer would see no border between arrays.
without_pool='import sys, cupy, pytest; cupy.cuda.set_allocator(None); sys.exit(pytest.main(sys.argv[1:]))'

# A kernel for each tool to complain about.
planted='
import sys, cupy
cupy.cuda.set_allocator(None)
body = {
    "memcheck": "p[1000] = 1;",
    "racecheck": "__shared__ int s; s = threadIdx.x; p[threadIdx.x] = s;",
    "initcheck": "p[threadIdx.x] = p[threadIdx.x + 64] + 1;",
    "synccheck": "if (threadIdx.x & 1) __syncwarp(1); p[threadIdx.x] = 1;",
}[sys.argv[1]]
a = cupy.empty(128, cupy.int32)
cupy.RawKernel("extern \"C\" __global__ void planted(int* p) { %s }" % body, "planted")((1,), (64,), (a,))
cupy.cuda.Device().synchronize()
'

sanitize() {
  local tool=$1 sanitizer caught=0 status=0
  shift
  sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null || "$python" -c '
import glob, sysconfig
print(*glob.glob(sysconfig.get_path("purelib") + "/nvidia/*/bin/compute-sanitizer")[:1])')
  if [ -z "$sanitizer" ]; then
    echo "no compute-sanitizer was found: it is in the CUDA toolkit, and in pip's nvidia-cuda-sanitizer-api"
    return 77
  fi
  echo "$sanitizer"
  "$sanitizer" --tool "$tool" --error-exitcode 99 "$python" -c "$without_pool" \
    -q -W default -p no:cacheprovider tests/test_cuda.py "$@" || status=$?
  echo "the planted error:"
  "$sanitizer" --tool "$tool" --error-exitcode 99 "$python" -c "$planted" "$tool" || caught=$?
  if [ "$caught" != 99 ]; then
    echo "the planted error went unnoticed (exit code $caught), so the silence before it means nothing"
    return 1
  fi
  return "$status"
}
memcheck() { sanitize memcheck -m 'not slow'; }
racecheck() { sanitize racecheck -k "$CASES"; }
initcheck() { sanitize initcheck -k "$CASES"; }
synccheck() { sanitize synccheck -k "$CASES"; }

selftest() { "$python" -m fusednorm selftest --device cuda; }

# The norms, with equal shares of the time; each ends by itself, with what it has, before its share does.
measure() {
  local norm status=0
  for norm; do
    "$python" -m fusednorm bench --device cuda --norm "$norm" --seconds $((limit * 3 / 4 / $#)) \
      --json "$folder/$norm.json" --plot "$folder/$norm.png" --markdown >"$folder/$norm.md" || status=$?
    tail -n 5 "$folder/$norm.md"
  done
  return "$status"
}
bench() { measure batch; }
family() { measure layer rms instance group; }

# `timeout` runs programs, not functions: for each step this script runs itself.
if [ -n "${GPU_SH_STEP:-}" ]; then
  limit=$GPU_SH_LIMIT
  "$GPU_SH_STEP"
  exit
fi

failed=0
for i in "${!ALL[@]}"; do
  step=${ALL[i]} limit=LIMIT_${ALL[i]} start=$SECONDS status=0 word=passed
  [[ " ${steps[*]} " == *" $step "* ]] || continue
  limit=${!limit:-${LIMITS[i]}}
  log=$folder/$step.log
  GPU_SH_STEP=$step GPU_SH_LIMIT=$limit timeout --kill-after=10 "$limit" bash benchmarks/gpu.sh "$folder" >"$log" 2>&1 ||
    status=$?
  case $status in
    0) ;;
    77) word="skipped: $(tail -n 1 "$log")" ;;
    124 | 137) word="FAILED: stopped after $limit s" failed=1 ;;
    *) word="FAILED ($status)" failed=1 ;;
  esac
  printf '\n=== %s, the end of %s\n' "$step" "$log"
  tail -n 12 "$log"
  printf '%-12s %5d s  %s\n' "$step" $((SECONDS - start)) "$word" | tee -a "$folder/summary.txt"
done
printf '\n'
cat "$folder/summary.txt"
exit "$failed"
