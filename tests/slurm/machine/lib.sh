# Shared by node.sh and ctl.sh.
inside() { nsenter -t "$(<"$DIR/run/init.pid")" --net --uts --mount --pid "$@"; }
