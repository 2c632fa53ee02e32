#!/usr/bin/env bash
# Every GPU test and every table that needs a GPU, with the packages of PYTHON as they are: all.sh PYTHON FOLDER [MINUTES].
# Nothing is installed. What fails is said at the end, and the rest goes on; tables are JSON, what was printed lies beside them.
set -u
python=$1 out=$(mkdir -p "$2" && cd "$2" && pwd) end=$((SECONDS + 60 * ${3:-10})) failed=""
cd "$(dirname "$0")/../.." || exit 1
mkdir -p "$out/packages"
for package in kernels/nlscale_kernels configs:nlscale_configs launch:nlscale_launch; do
    ln -sfn "$PWD/${package%%:*}" "$out/packages/$(basename "${package##*:}")"
done
export PYTHONPATH="$PWD:$out/packages${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1

run() {  # NAME SHARE COMMAND...: at most so many hundredths of the time that is left
    local name=$1 limit=$(((end - SECONDS) * $2 / 100)) began=$SECONDS
    shift 2
    if [ "$limit" -lt 5 ]; then failed="$failed $name(no time left)"; return; fi
    timeout "$limit" "$@" >"$out/$name.log" 2>&1
    local code=$?
    echo "$name: exit $code after $((SECONDS - began)) s"
    [ "$code" = 0 ] || { failed="$failed $name($code)"; tail -n 15 "$out/$name.log"; }
}

run tests 40 "$python" -m pytest -m gpu tests/gpu -q -p no:cacheprovider
run tune 50 "$python" -m nlscale_kernels.tune
cp kernels/nlscale_kernels/tuned/*.json "$out" 2>/dev/null
run kernels 50 "$python" -m nlscale.cli bench kernels --json "$out/kernels.json"
run step 40 "$python" -m nlscale.cli bench step --json "$out/step.json"
run ladder 95 "$python" -m nlscale.cli bench ladder --json "$out/ladder.json"
[ -z "$failed" ] || { echo "failed:$failed"; exit 1; }
