#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: builds with CUDA, tests the GPU kernels, measures them. 8 minutes at most, no network.
# Not yet run on a GPU. Needs nvcc, and python with torch (CUDA), triton, numpy, safetensors, tqdm, setuptools, pybind11,
# ninja, pytest, pytest-benchmark, hypothesis. Writes benchmarks/results/<device>.jsonl. Goes on after a failed stage, so
# that one run tells everything; exits with 1 if any failed.
# CWFAST_BENCH_SIZE=normal measures less; CWFAST_BENCH_DEVICE=cpu shows that the script works: tiny, nothing is built.
set -uo pipefail
cd "$(dirname "$0")/.."
export CWFAST_BENCH_DEVICE="${CWFAST_BENCH_DEVICE:-cuda}"
size=$([ "$CWFAST_BENCH_DEVICE" = cpu ] && echo tiny || echo "${CWFAST_BENCH_SIZE:-full}")
end=$((SECONDS + 480))
summary=()
failed=0

# stage NAME SECONDS COMMAND...: within the stage's seconds and what is left of the eight minutes
stage() {
  local name=$1 limit=$2 left=$((end - SECONDS)) begin=$SECONDS status
  shift 2
  printf '\n== %s\n' "$name"
  if [ "$left" -lt 5 ]; then
    summary+=("NOT RUN  $name: the eight minutes are over")
    failed=1
    return
  fi
  timeout --kill-after=5 "$((limit < left ? limit : left))" "$@"
  status=$?
  case $status in
    0) summary+=("ok       $name ($((SECONDS - begin)) s)") ;;
    124 | 137) summary+=("TIME OUT $name ($((SECONDS - begin)) s)"); failed=1 ;;
    *) summary+=("FAILED   $name (status $status, $((SECONDS - begin)) s)"); failed=1 ;;
  esac
}

if [ "$CWFAST_BENCH_DEVICE" = cpu ]; then
  name=dry-run
else
  name=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1 | tr ' /' '--' | tr '[:upper:]' '[:lower:]')
  name=${name:-unknown-gpu}
fi
results=${CWFAST_BENCH_RESULTS:-$PWD/benchmarks/results}
out=$results/$name.jsonl
mkdir -p "$results"
rm -f "$out"

[ "$CWFAST_BENCH_DEVICE" = cpu ] || stage "build" 150 env CWFAST_CUDA=1 python -m pip install -q --no-build-isolation --no-deps --no-index .
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -r tests pyproject.toml "$work" && root=$PWD
cd "$work" || exit 1 # the checkout's cwfast/ must not hide the installed one
stage "environment" 30 python -P -m cwfast.cli env
stage "device" 30 python -P -c "from cwfast.benchmarks import _harness; d = _harness.device(); print(d)
import cwfast; b = cwfast.backends(); print(b)
assert d.type == 'cpu' or (b['cuda'].available and b['triton'].available), 'a GPU kernel is missing'"
pytest=(python -P -m pytest -q -p no:cacheprovider --benchmark-disable --override-ini=addopts=
  --override-ini=filterwarnings=default)
stage "tests on the device" 150 "${pytest[@]}" --import-mode=importlib tests/test_gpu.py
bench=$(python -P -c 'import cwfast.benchmarks as b; print(b.__path__[0])')/bench_device.py
for test in test_saliency_linear test_token_statistics test_embedding test_select test_rewind test_saliency_stack; do # what fails takes no other along
  stage "$test" 120 env CWFAST_BENCH_SIZE="$size" CWFAST_BENCH_OUT="$out" "${pytest[@]}" "$bench::$test"
done
cd "$root" || exit 1

printf '\n== summary (%s, %s s)\n' "$name" "$SECONDS"
printf '%s\n' "${summary[@]}"
[ -s "$out" ] && echo "results: $out ($(wc -l <"$out") cases)" || { echo "no results"; failed=1; }
exit $failed
