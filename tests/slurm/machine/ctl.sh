#!/bin/bash
# ctl.sh DIR kill|start: slurmctld alone.
set -eu
DIR=$1; HERE=$(cd "$(dirname "$0")" && pwd); . "$DIR/env"; . "$HERE/lib.sh"; export PATH=$PATH:/usr/sbin:/sbin
case $2 in
  kill)  inside kill -9 "$(<"$DIR/run/slurmctld.pid")" ;;
  start) inside setsid bash -c "slurmctld -D >>$DIR/log/slurmctld.out 2>&1 </dev/null & echo \$! >$DIR/run/slurmctld.pid" ;;
  *) exit 2 ;;
esac
