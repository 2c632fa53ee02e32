#!/usr/bin/env bash
# Every GPU test and every table that needs a GPU, with the packages of PYTHON as they are: all.sh PYTHON FOLDER [MINUTES].
# Nothing is installed. What fails is said at the end, and the rest goes on; tables are JSON, what was printed lies beside them.
set -u
python=$1 out=$(mkdir -p "$2" && cd "$2" && pwd) end=$((SECONDS + 60 * ${3:-10})) failed="" started=""
cd "$(dirname "$0")/../.." || exit 1
mkdir -p "$out/packages"
for package in kernels/nlscale_kernels configs:nlscale_configs launch:nlscale_launch; do
    ln -sfn "$PWD/${package%%:*}" "$out/packages/$(basename "${package##*:}")"
done
export PYTHONPATH="$PWD:$out/packages${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1

start() {  # NAME SHARE COMMAND...: in the background, for at most so many hundredths of the time that is left
    local name=$1 limit=$(((end - SECONDS) * $2 / 100))
    shift 2
    # Interrupted, a test says what has failed so far; what a shell puts into the background would not hear that signal.
    env --default-signal=INT timeout -s INT -k 15 "$limit" "$@" >"$out/$name.log" 2>&1 &
    started="$started $name:$!"
}

finish() {  # waits for all that was started
    local each name code
    for each in $started; do
        name=${each%:*}
        wait "${each##*:}"
        code=$?
        echo "$name: exit $code, at $SECONDS s"
        [ "$code" = 0 ] || { failed="$failed $name($code)"; tail -n 25 "$out/$name.log"; }
    done
    started=""
}

run() {  # NAME SHARE COMMAND...: alone, unless the time is up
    if [ "$((end - SECONDS))" -lt 10 ]; then failed="$failed $1(no time left)"; return; fi
    start "$@"
    finish
}

for file in tests/gpu/test_*.py; do  # all at once: their time goes into compiling kernels
    start "$(basename "$file" .py)" 40 "$python" -m pytest -m gpu "$file" -q --tb=short -p no:cacheprovider
done
finish
run tune 50 "$python" -m nlscale_kernels.tune
cp kernels/nlscale_kernels/tuned/*.json "$out" 2>/dev/null
run kernels 50 "$python" -m nlscale.cli bench kernels --json "$out/kernels.json"
run step 40 "$python" -m nlscale.cli bench step --json "$out/step.json"
run ladder 95 "$python" -m nlscale.cli bench ladder --json "$out/ladder.json"
[ -z "$failed" ] || { echo "failed:$failed"; exit 1; }
