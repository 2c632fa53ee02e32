#!/bin/bash
# up.sh DIR: a real Slurm cluster on this machine. Every node has its own network, host name, mounts and processes
# (namespaces) on a bridge that no route leads to or from; the rest of the file system is what the nodes share.
# Knobs by environment: NODES CPUS GPUS MEM (of a node), SLURMDTIMEOUT CREDEXP KILLWAIT (seconds), ACCT=1 (slurmdbd),
# LIFELINE (a file descriptor: the cluster ends when its other side closes).
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
DIR=${1:?usage: up.sh DIR}
NODES=${NODES:-4} CPUS=${CPUS:-16} GPUS=${GPUS:-8} MEM=${MEM:-64000}
SLURMDTIMEOUT=${SLURMDTIMEOUT:-5} CREDEXP=${CREDEXP:-5} KILLWAIT=${KILLWAIT:-3}
NET=10.231.0
export PATH=$PATH:/usr/sbin:/sbin

[ ! -e "$DIR/up" ] || { echo "$DIR is already up" >&2; exit 1; }
[ ${#DIR} -le 40 ] || { echo "DIR is too long for slurmstepd's unix sockets" >&2; exit 1; }
mkdir -p "$DIR"/{etc,munge,state,spool,log,run,bin,gpu,local}
chmod 755 "$DIR" "$DIR/munge"
(umask 077; head -c 128 /dev/urandom >"$DIR/etc/munge.key")

# ---- files
nodes="" hosts="127.0.0.1 localhost"$'\n'"$NET.254 ctl"$'\n'
hw="CPUs=$CPUS Boards=1 SocketsPerBoard=1 CoresPerSocket=$CPUS ThreadsPerCore=1 RealMemory=$MEM"
[ "$GPUS" -eq 0 ] || hw+=" Gres=gpu:$GPUS"
for i in $(seq "$NODES"); do
  nodes+="NodeName=node$i NodeAddr=$NET.$i Port=6818 $hw"$'\n'
  hosts+="$NET.$i node$i"$'\n'"::ffff:$NET.$i node$i"$'\n'          # torch looks mapped addresses up, too
done
conf=$(<"$HERE/slurm.conf.in")
for v in DIR CREDEXP SLURMDTIMEOUT KILLWAIT; do conf=${conf//@$v@/${!v}}; done
conf=${conf//@NODES@/$nodes}
acct="accounting_storage/slurmdbd"$'\n'"AccountingStorageHost=$NET.254"$'\n'"AccountingStoragePass=$DIR/munge/s"
[ -z "${ACCT:-}" ] || conf=${conf/accounting_storage\/none/$acct}
printf '%s\n' "$conf" >"$DIR/etc/slurm.conf"
: >"$DIR/etc/gres.conf"
if [ "$GPUS" -gt 0 ]; then   # one existing character device a GPU, all different; nobody opens them
  for g in $(seq 0 $((GPUS-1))); do mknod "$DIR/gpu/nv$g" c 1 3; done
  echo "Name=gpu File=$DIR/gpu/nv[0-$((GPUS-1))]" >"$DIR/etc/gres.conf"
fi
printf '%s' "$hosts" >"$DIR/etc/hosts"
sed 's/^hosts:.*/hosts: files/' /etc/nsswitch.conf >"$DIR/etc/nsswitch.conf"   # the nodes ask no name server
printf '%s\n' "NODES=$NODES NET=$NET DIR=$DIR HERE=$HERE ACCT=${ACCT:-}" >"$DIR/env"

# ---- one init process owns everything: killing it ends every process and namespace of the cluster
trap '[ $? = 0 ] || bash "$HERE/down.sh" "$DIR" --keep' EXIT
setsid unshare --net --uts --mount --pid --ipc --fork --kill-child --mount-proc \
  bash "$HERE/ns-init.sh" "$DIR" >"$DIR/log/init.log" 2>&1 </dev/null &
echo $! >"$DIR/run/holder.pid"
holder=$(<"$DIR/run/holder.pid")
until pgrep -P "$holder" >"$DIR/run/init.pid"; do kill -0 "$holder"; sleep 0.01; done
for _ in $(seq 1500); do
  [ ! -s "$DIR/run/ready" ] || break
  kill -0 "$holder" || break
  sleep 0.02
done
[ -s "$DIR/run/ready" ] || { cat "$DIR/log/init.log" >&2; exit 1; }

# ---- what a person types on the login node: put DIR/bin in front of PATH
init=$(<"$DIR/run/init.pid")
for c in sbatch srun squeue scancel scontrol sinfo sacct sacctmgr; do
  cat >"$DIR/bin/$c" <<X
#!/bin/sh
[ -e /etc/slurm/slurm.conf ] && exec /usr/bin/$c "\$@"     # on a node: sbatch hands this PATH to its job
export SLURM_CONF=$DIR/etc/slurm.conf
exec nsenter -t $init --net --uts --wd="\$PWD" /usr/bin/$c "\$@"
X
done
chmod +x "$DIR"/bin/*
touch "$DIR/up"

# ---- wait until all nodes are idle
while [ $SECONDS -lt 60 ]; do
  ! grep -qs fatal "$DIR/log/slurmctld.out" || break
  [ "$("$DIR/bin/sinfo" -h -p main -t idle -o %D 2>/dev/null)" != "$NODES" ] || exit 0
  sleep 0.1
done
"$DIR/bin/sinfo" -N -l >&2 || true; tail -5 "$DIR"/log/*.log >&2
echo "the cluster did not come up" >&2; exit 1
