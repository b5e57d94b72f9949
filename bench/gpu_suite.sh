#!/usr/bin/env bash
# Everything that wants a GPU, in one go: tests with the Triton kernels on the device, kernels built ahead of time,
# compute-sanitizer, benchmarks, memory of training steps, tuned configurations of the kernels. On a machine without a
# GPU it runs, too: the reference, and a few kernels in the interpreter.
#
#   bench/gpu_suite.sh [--quick] [FOLDER]
#
# Results go to FOLDER, by default bench/results/<gpu, or cpu>-<commit>:
#
#   summary.txt   what ran, exit codes, seconds       log.txt       all that the steps print
#   build.json    registers, spills, load widths      bench.json    pytest-benchmark
#   bench.md/png  table and plot of it                memory*.json  a training step of networks and twins
#   compress-step.json/md  a training step of networks with compressed maps
#   <gpu>-triton-<version>.json   tuned configurations; what runs here does not use them
#
# A step that fails or runs out of time does not stop those after it; the exit status is 1 then. The whole ends within
# 9 minutes, with --quick within 2. Works from a bare checkout: needs torch, triton, pytest and pytest-benchmark.
#
#   PYTHON         the interpreter (python3)
#   BENCH_COMMIT   what to call the commit where there is no git
#   and the variables of bench/conftest.py
set -uo pipefail

quick=0
out=
for argument in "$@"; do
  case $argument in
    --quick) quick=1 ;;
    -h | --help)
      sed -n '2,/^set /s/^# \{0,1\}//p' "$0"
      exit 0
      ;;
    -*)
      echo "gpu_suite.sh: no option $argument; see --help" >&2
      exit 2
      ;;
    *) out=$argument ;;
  esac
done

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
case $python in
  /*) ;;
  */*) python=$PWD/$python ;; # relative to where the script was called
esac
case $out in
  '' | /*) ;;
  *) out=$PWD/$out ;;
esac
cd "$root" || exit 1
export PYTHONPATH=$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export SPECTRITON_TUNING=0 # what is measured must not depend on what was tuned here earlier
unset TRITON_INTERPRET # the build compiles; tests set it where there is no GPU

BENCH_COMMIT=${BENCH_COMMIT:-$(git describe --always --dirty --abbrev=9 --exclude='*' 2>/dev/null || echo unknown)}
export BENCH_COMMIT
gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")') || {
  echo "gpu_suite.sh: $python cannot import torch; set PYTHON" >&2
  exit 2
}
if [ -z "$out" ]; then
  name=$(printf %s "${gpu:-cpu}" | tr -cs 'A-Za-z0-9.\n' - | tr '[:upper:]' '[:lower:]')
  out=$root/bench/results/$name-${BENCH_COMMIT%-dirty}
fi
mkdir -p "$out" || exit 1
summary=$out/summary.txt
log=$out/log.txt
: >"$log"

if [ "$quick" = 1 ]; then
  export BENCH_QUICK=1
  total=112
else
  total=525
fi
begin=$SECONDS
failures=0

left() { # seconds until the end, at least 5
  local seconds=$((total - SECONDS + begin))
  echo $((seconds > 5 ? seconds : 5))
}

note() { # name, exit code or word, seconds, remark
  printf '%-12s %-8s %5s s  %s\n' "$@" | tee -a "$summary"
}

step() { # name, limit in seconds, command: run it, and take down how it ended
  local name=$1 limit=$2 start=$SECONDS code remark=
  shift 2
  if ((limit > $(left))); then limit=$(left); fi
  # An interrupt first: pytest still writes what it has.
  timeout --foreground --signal=INT --kill-after=10 "$limit" "$@" >"$out/step.log" 2>&1
  code=$?
  if [ $code = 124 ] || [ $code = 137 ]; then remark="out of time ($limit s) "; fi
  if [ $code != 0 ]; then failures=$((failures + 1)); fi
  remark+=$(grep -aE '^=* ?([0-9]+ [a-z]+,? )+in [0-9.]+s' "$out/step.log" | tail -n 1 | tr -d '=')
  note "$name" $code $((SECONDS - start)) "$remark"
  {
    printf '\n==== %s: %s\n' "$name" "$*"
    cat "$out/step.log"
  } >>"$log"
  rm -f "$out/step.log"
}

{
  echo "$(date -u +%Y-%m-%dT%H:%MZ)  ${gpu:-cpu}  commit $BENCH_COMMIT$([ "$quick" = 1 ] && echo '  (quick)')"
  "$python" -c 'import json; from spectriton.environment import collect; print(json.dumps(collect()))'
  echo
} >"$summary" 2>&1
cat "$summary"

# The cache of pytest and its long list of skips are not wanted here.
pytest=("$python" -m pytest -q --no-header -p no:cacheprovider -o addopts=)

# The build needs no GPU and one core: it goes on beside the tests.
build=("$python" -m spectriton_kernels.build --json)
if [ -n "$gpu" ]; then
  capability=$("$python" -c 'import torch; print("sm_%d%d" % torch.cuda.get_device_capability())')
else
  capability=sm_90
fi
case $capability in sm_80 | sm_90 | sm_100) ;; *) capability=sm_90 ;; esac
if [ "$quick" = 1 ]; then build+=(--core --target "$capability"); fi
build_start=$SECONDS
timeout --foreground --kill-after=10 $((quick ? 60 : 280)) "${build[@]}" \
  >"$out/build.json" 2>"$out/build.err" &
build_pid=$!
trap 'kill "$build_pid" 2>/dev/null' EXIT
trap 'exit 130' INT TERM

if [ -n "$gpu" ]; then
  # Compiling kernels is what takes the time: several processes where pytest-xdist is there.
  workers=()
  if "$python" -c 'import xdist' 2>/dev/null; then workers=(-n 6); fi
  tests=(tests)
  # Without the packages that applications need most of their tests skip, and the others want no GPU.
  if ! "$python" -c 'import matplotlib, rich, sklearn, typer' 2>/dev/null; then
    for file in tests/apps/test_*.py; do
      if [ "$file" != tests/apps/test_tuner.py ]; then tests+=(--ignore="$file"); fi
    done
  fi
  if [ "$quick" = 1 ]; then tests=(tests/kernels/test_{,un}pack.py tests/ops/test_spec_block.py tests/nn/test_run_ahead.py); fi
  SPECTRITON_BACKEND=triton step tests $((quick ? 40 : 210)) "${pytest[@]}" "${workers[@]}" -m "not slow" --maxfail=30 "${tests[@]}"
  if sanitizer=$(command -v compute-sanitizer); then
    # Every allocation by itself, so that an access beyond one is seen.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 step sanitizer $((quick ? 20 : 60)) \
      "$sanitizer" --tool memcheck --error-exitcode 9 --launch-timeout 0 \
      "${pytest[@]}" tests/kernels/test_pack.py tests/kernels/test_unpack.py \
      -k "test_dtypes or test_round_trip or test_overflow or test_unpack_planes_gives_real_maps"
  else
    note sanitizer skipped 0 "compute-sanitizer is not installed"
  fi
else
  # One thread: where cores are shared, threads that wait for one another take most of the time.
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} BENCH_THREADS=${BENCH_THREADS:-1}
  tests=(tests/ops tests/test_packed.py)
  kernel_tests=(tests/kernels)
  if [ "$quick" = 1 ]; then
    tests=(tests/test_packed.py)
    kernel_tests+=(-k "test_pack_rows or test_unpack_rows")
  fi
  SPECTRITON_BACKEND=reference step tests $((quick ? 25 : 150)) "${pytest[@]}" "${tests[@]}"
  TRITON_INTERPRET=1 step kernel-tests $((quick ? 25 : 90)) "${pytest[@]}" "${kernel_tests[@]}"
  note sanitizer skipped 0 "no GPU"
fi

wait "$build_pid"
code=$?
trap - EXIT
if [ $code != 0 ]; then failures=$((failures + 1)); fi
note build $code $((SECONDS - build_start)) "$(grep -c '"example"' "$out/build.json") builds (beside the tests)"
{
  printf '\n==== build: %s\n' "${build[*]}"
  cat "$out/build.err"
} >>"$log"
rm -f "$out/build.err"

if [ -n "$gpu" ] && [ "$quick" = 0 ]; then
  step tune 60 "$python" -m bench.tune --seconds 35 "$out" # by itself, with more seconds, it finds more
else
  note tune skipped 0 "no GPU, or quick"
fi

# The LeNet table first: it is short. Benchmarks stop by themselves in time for the report.
step memory $((quick ? 20 : 40)) "$python" -m bench.step_memory --json "$out/memory.json"
if [ -n "$gpu" ] && [ "$quick" = 0 ]; then
  step memory-vgg16 60 "$python" -m bench.step_memory --model vgg16_bn --image-size 224 --channels 3 --classes 1000 \
    --batch 64 --json "$out/memory-vgg16.json"
  step memory-densenet 40 "$python" -m bench.step_memory --model densenet --image-size 32 --json "$out/memory-densenet.json"
fi
# Begins nothing new after so many seconds, and writes what there is; by itself, with more, it finds the largest batches.
steps=("$python" -m bench.compress_step --seconds $((quick ? 8 : 55)) --json "$out/compress-step.json")
if [ "$quick" = 1 ]; then steps+=(--models vgg16_bn); fi
step compress-step $((quick ? 25 : 80)) "${steps[@]}"
room=$(($(left) - (quick ? 15 : 40)))
if ((room < 10)); then room=10; fi
export BENCH_SECONDS=${BENCH_SECONDS:-$room}
step bench $((room + (quick ? 8 : 25))) "${pytest[@]}" bench --benchmark-only \
  --benchmark-json="$out/bench.json" --benchmark-columns=median,iqr,rounds --benchmark-sort=name
if [ -s "$out/bench.json" ]; then
  step report 20 "$python" -m bench.report "$out/bench.json"
else
  note report skipped 0 "no results"
fi

echo | tee -a "$summary"
echo "$failures of the steps failed, $((SECONDS - begin)) s in all" | tee -a "$summary"
echo "$out"
exit $((failures > 0))
