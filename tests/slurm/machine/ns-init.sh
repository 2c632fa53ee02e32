#!/bin/bash
# Process 1 of the cluster: the login node and the controller. Started by up.sh.
set -eu
. "$1/env"; export PATH=$PATH:/usr/sbin:/sbin
mount --make-rprivate /
mount --bind "$DIR/etc/hosts" /etc/hosts
mount --bind "$DIR/etc/nsswitch.conf" /etc/nsswitch.conf
mkdir -p /etc/slurm; mount --bind "$DIR/etc" /etc/slurm
hostname ctl
ip link set lo up
ip link add br0 type bridge; ip addr add $NET.254/24 dev br0; ip link set br0 up
munged --force --foreground --key-file="$DIR/etc/munge.key" --socket="$DIR/munge/s" --pid-file="$DIR/run/munged.pid" \
  --log-file="$DIR/log/munged.log" --seed-file="$DIR/munge/seed" &
for _ in $(seq 200); do [ -S "$DIR/munge/s" ] && break; sleep 0.02; done
[ -z "$ACCT" ] || { bash "$HERE/acct.sh" "$DIR"; sacctmgr -i add cluster t >"$DIR/log/sacctmgr.out" 2>&1 || true; }
slurmctld -D -i >"$DIR/log/slurmctld.out" 2>&1 & echo $! >"$DIR/run/slurmctld.pid"
for i in $(seq $NODES); do bash "$HERE/ns-node.sh" "$DIR" node$i; done
echo ok >"$DIR/run/ready"
# pid 1: reap whatever is re-parented here; with LIFELINE=fd, end (and so end everything) when its other side is closed
if [ -n "${LIFELINE:-}" ]; then cat <&$LIFELINE >/dev/null; exit; fi
while :; do sleep 86400 & wait; done
