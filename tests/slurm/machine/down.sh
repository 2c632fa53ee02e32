#!/bin/bash
# down.sh DIR [--keep]: ends every process of the cluster, then removes DIR.
DIR=$1
init=$(<"$DIR/run/init.pid")
kill -9 "$init" "$(<"$DIR/run/holder.pid")" 2>/dev/null
for _ in $(seq 100); do kill -0 "$init" 2>/dev/null || break; sleep 0.02; done
rm -f "$DIR/up"
[ "${2:-}" = --keep ] || rm -rf "$DIR"
