#!/bin/bash
# node.sh DIR start|poweroff|cut|join|exec NODE [COMMAND...]: faults of one node, and commands on it.
set -eu
DIR=$1 op=$2 n=$3; shift 3
HERE=$(cd "$(dirname "$0")" && pwd); . "$DIR/env"; . "$HERE/lib.sh"; export PATH=$PATH:/usr/sbin:/sbin
case $op in
  start)    inside bash "$HERE/ns-node.sh" "$DIR" "$n" ;;
  poweroff) inside kill -9 "$(<"$DIR/run/$n.holder")" ;;                   # its processes die with its namespace
  cut)      inside ip link set "v${n#node}" down ;;                        # its processes live on
  join)     inside ip link set "v${n#node}" up ;;
  exec)     inside nsenter -t "$(<"$DIR/run/$n.init")" -n -u -m -p "$@" ;;
  *) exit 2 ;;
esac
