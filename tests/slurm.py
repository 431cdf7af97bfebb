"""A SLURM cluster of this one machine, in a folder of its own, as long as a test needs it."""

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
_SBIN = "/usr/sbin"  # where Debian has the daemons, which a user's PATH may lack

_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld}
SlurmdPort={slurmd}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobRequeue=1
ReturnToService=2
KillWait=30
MinJobAge=86400
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """What a cluster here lacks."""
    missing = [name for name in PROGRAMS if not _find(name)]
    return f"SLURM's {', '.join(missing)} not installed (Debian: slurm-wlm, munge)" if missing else None


def _find(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:{_SBIN}")


def _free_port() -> int:
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return own.getsockname()[1]


@contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Start it, and yield the environment of its commands. Sockets want a short path."""
    for name in ("state", "spool"):
        (folder / name).mkdir()
    folder.chmod(0o755)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    host = socket.gethostname().partition(".")[0]
    (folder / "slurm.conf").write_text(_CONF.format(
        host=host, user=getpass.getuser(), folder=folder, ctld=_free_port(), slurmd=_free_port(), cpus=os.cpu_count(),
    ))  # fmt: skip
    environment = os.environ | {
        "SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:{_SBIN}",
    }  # fmt: skip
    daemons = []

    def start(*command: object) -> None:
        with open(folder / "daemons.log", "a") as log:
            daemons.append(subprocess.Popen(list(map(str, command)), env=environment, stdout=log, stderr=log))

    try:
        start(_find("munged"), "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket",
              f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log",
              f"--seed-file={folder}/munged.seed")  # fmt: skip
        _until(lambda: (folder / "munge.socket").exists(), folder)
        start(_find("slurmctld"), "-D")
        start(_find("slurmd"), "-D", "-N", host)
        _until(lambda: _says(environment, "sinfo", "-h", "-o", "%T") == "idle", folder)
        yield environment
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _says(environment: dict[str, str], *command: str) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True).stdout.strip()


def state(environment: dict[str, str], job: str) -> dict[str, str]:
    """What `scontrol` says of a job."""
    said = _says(environment, "scontrol", "show", "job", "--oneliner", job)
    return dict(part.partition("=")[::2] for part in said.split())


def _until(ready, folder: Path, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not ready():
        logs = "".join(f"\n{log.name}: {log.read_text()[-1500:]}" for log in folder.glob("*.log"))
        assert time.monotonic() < until, f"the cluster is not ready{logs}"
        time.sleep(0.2)
