"""A real Slurm on the hosts of a lab: munged and slurmd on every host, slurmctld on the first."""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.hosts.lab import Host, HostProcess, Lab, until

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
OWN = "/dev/shm/slurm"  # every host's own: sockets, spool folders, numbers of processes
CONF = """
ClusterName=hosts
SlurmctldHost={first.name}({first.address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={own}/munge.socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SlurmdParameters=config_overrides
StateSaveLocation={own}/state
SlurmdSpoolDir={own}/spool
SlurmctldPidFile={own}/slurmctld.pid
SlurmdPidFile={own}/slurmd.pid
SlurmdTimeout=30
KillWait=10
{family}
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """The first program of Slurm that is not installed here; "" if all are."""
    return next((name for name in DAEMONS if shutil.which(name) is None), "")


@contextmanager
def slurm(lab: Lab, folder: Path) -> Iterator[Path]:
    """A cluster whose nodes are the hosts; the path of its configuration. It ends with the lab."""
    conf, key = folder / "slurm.conf", folder / "munge.key"
    nodes = [f"NodeName={host.name} NodeAddr={host.address} CPUs=8 RealMemory=2000 State=UNKNOWN" for host in lab.hosts]
    family = "CommunicationParameters=EnableIPv6" if ":" in lab.hosts[0].address else ""
    conf.write_text(CONF.format(first=lab.hosts[0], own=OWN, family=family, nodes="\n".join(nodes)))
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    daemons = []
    for host in lab.hosts:
        host.run(["mkdir", "-p", "-m", "755", OWN, f"{OWN}/state", f"{OWN}/spool"], cwd="/")
        daemons.append(_munged(host, key))
    daemons.append(_daemon(lab.hosts[0], conf, "slurmctld", "-D", "-i", "-f", conf))
    for host in lab.hosts:
        daemons.append(_daemon(host, conf, "slurmd", "-D", "-f", conf, "-N", host.name))
    try:
        until(lambda: _idle(lab, conf) == len(lab.hosts), 60, _said(daemons))
        yield conf
    finally:
        for daemon in daemons:
            daemon.kill()


def environment(conf: Path) -> dict[str, str]:
    """For commands of this cluster."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return outside | {"SLURM_CONF": str(conf)}


def _munged(host: Host, key: Path) -> HostProcess:
    own = {"socket": "munge.socket", "pid-file": "munged.pid", "log-file": "munged.log", "seed-file": "munged.seed"}
    files = [f"--{option}={OWN}/{name}" for option, name in own.items()]
    started = host.popen(["munged", "--foreground", f"--key-file={key}", *files], cwd="/")
    time.sleep(0.1)
    return started


def _daemon(host: Host, conf: Path, *command: object) -> HostProcess:
    return host.popen(list(command), env=environment(conf), cwd="/")


def _idle(lab: Lab, conf: Path) -> int:
    states = lab.hosts[0].run(["sinfo", "-h", "-N", "-o", "%T"], env=environment(conf), check=False, cwd="/").stdout
    return states.split().count("idle")


def _said(daemons: list[HostProcess]) -> str:
    return "\n".join(daemon.said[-500:] for daemon in daemons)
