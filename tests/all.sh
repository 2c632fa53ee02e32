#!/usr/bin/env bash
# Every test, on as few as two cores: all.sh PYTHON.
#
# Ranks wait for each other at every collective. Beside other work they take many times as long, and alone they leave most of a
# core idle. So tests of several ranks, and then those of a queue, have the machine to themselves, but for what works beside
# them at idle priority, which takes what they leave: the tests that are mostly of one process, a file a core.
set -u
cd "$(dirname "$0")/.." || exit 1
several=(tests/{data,optim,parallel,runtime,train} tests/test_{failure_modes,cli}.py)
idle=(nice -n 19)
if chrt --idle 0 true 2>/dev/null; then idle=(chrt --idle 0); fi
log=$(mktemp)
"${idle[@]}" "$1" -m pytest "${several[@]/#/--ignore=}" --ignore=tests/slurm -n logical --maxprocesses 8 --dist loadfile \
    --timeout 900 --durations=15 >"$log" 2>&1 &
beside=$!
trap 'kill "$beside" 2>/dev/null; rm -f "$log"' EXIT
trap 'exit 130' INT TERM
failed=0
"$1" -m pytest "${several[@]}" --durations=15 || failed=1
"$1" -m pytest tests/slurm --durations=5 || failed=1
wait "$beside" || failed=1
cat "$log"
exit "$failed"
