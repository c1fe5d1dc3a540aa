#!/usr/bin/env bash
# A one-node Slurm below one folder, for tests: munged, slurmctld and slurmd as root, without systemd, cgroups,
# accounting or anything in /etc, /run or /var. Needs: apt-get install --no-install-recommends slurm-wlm munge
#   cluster.sh up FOLDER      then: export SLURM_CONF=FOLDER/slurm.conf
#   cluster.sh down FOLDER    ends exactly what `up` started, by pid file
set -euo pipefail
command=$1; base=$2; cpus=${SLURM_TEST_CPUS:-4}; port=${SLURM_TEST_PORT:-17817}; host=$(hostname -s)
export SLURM_CONF=$base/slurm.conf

if [ "$command" = down ]; then
  jobs=$(timeout 5 squeue -h -o %A 2>/dev/null | sort -u | tr '\n' ' ') || true
  [ -z "${jobs// }" ] || timeout 5 scancel --signal=KILL --full $jobs 2>/dev/null || true
  [ -z "${jobs// }" ] || { timeout 5 scancel $jobs 2>/dev/null || true; sleep 1; }
  for daemon in slurmd slurmctld munged; do
    file=$base/$daemon.pid; [ -s "$file" ] || continue; pid=$(cat "$file")
    [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$daemon" ] || continue
    kill -TERM "$pid"
    for _ in $(seq 100); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
    kill -KILL "$pid" 2>/dev/null || true
  done
  exit 0
fi

mkdir -p "$base"/{log,state,spool}; chmod 755 "$base"; chmod 700 "$base/log"
(umask 077; head -c 1024 /dev/urandom > "$base/munge.key")
cat > "$SLURM_CONF" <<C
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort=$port
SlurmdPort=$((port + 1))
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits before it may start again
AuthInfo=socket=$base/munge.socket,cred_expire=5
StateSaveLocation=$base/state
SlurmdSpoolDir=$base/spool
SlurmctldPidFile=$base/slurmctld.pid
SlurmdPidFile=$base/slurmd.pid
SlurmctldLogFile=$base/log/slurmctld.log
SlurmdLogFile=$base/log/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=512
SchedulerParameters=batch_sched_delay=0,bf_interval=2,sched_interval=2
ReturnToService=2
JobRequeue=1
KillWait=5
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=$host NodeAddr=127.0.0.1 CPUs=$cpus RealMemory=${SLURM_TEST_MEM_MB:-16000} State=UNKNOWN
PartitionName=low  Nodes=$host Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=2 MaxTime=600 State=UP
PartitionName=high Nodes=$host Default=NO PriorityTier=10 PreemptMode=OFF MaxTime=600 State=UP
C
munged --force --key-file="$base/munge.key" --socket="$base/munge.socket" --pid-file="$base/munged.pid" \
       --log-file="$base/log/munged.log" --seed-file="$base/munge.seed" --num-threads=2
slurmctld -f "$SLURM_CONF"
slurmd -f "$SLURM_CONF" -N "$host" 2>/dev/null || slurmd -f "$SLURM_CONF"
for _ in $(seq 200); do
  case $(timeout 5 sinfo -h -N -o %t 2>/dev/null | head -1) in idle*|mix*|alloc*) exit 0;; esac
  sleep 0.1
done
echo "Slurm did not come up:" >&2; tail -5 "$base"/log/*.log >&2; exit 1
