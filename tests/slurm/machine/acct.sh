#!/bin/bash
# Inside the cluster's namespaces, before slurmctld: MariaDB and slurmdbd (ACCT=1). Everything below $DIR/db.
set -eu
. "$1/env"
mariadb-install-db --no-defaults --basedir=/usr --datadir="$DIR/db" --auth-root-authentication-method=normal --user=root \
  --skip-test-db --skip-name-resolve --innodb-log-file-size=8M >"$DIR/log/mariadb-install.log" 2>&1
mariadbd --no-defaults --datadir="$DIR/db" --user=root --basedir=/usr --bind-address=127.0.0.1 --port=3306 \
  --socket="$DIR/run/my" --pid-file="$DIR/run/my.pid" --skip-grant-tables --skip-name-resolve --skip-log-bin \
  --innodb-log-file-size=8M --innodb-buffer-pool-size=64M --innodb-flush-log-at-trx-commit=0 \
  --innodb-lock-wait-timeout=900 >"$DIR/log/mariadb.log" 2>&1 &
for _ in $(seq 300); do (exec 3<>/dev/tcp/127.0.0.1/3306) 2>/dev/null && break; sleep 0.05; done
cat >"$DIR/etc/slurmdbd.conf" <<X
AuthType=auth/munge
AuthInfo=socket=$DIR/munge/s
DbdHost=ctl
DbdAddr=$NET.254
SlurmUser=root
LogFile=$DIR/log/slurmdbd.log
PidFile=$DIR/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=3306
StorageUser=root
StorageLoc=slurm
CommitDelay=1
X
chmod 600 "$DIR/etc/slurmdbd.conf"
slurmdbd -D >"$DIR/log/slurmdbd.out" 2>&1 &
for _ in $(seq 300); do (exec 3<>/dev/tcp/$NET.254/6819) 2>/dev/null && break; sleep 0.05; done
