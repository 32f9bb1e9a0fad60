#!/usr/bin/env python3
"""scripts/slurm/train.sbatch under a real SLURM of two nodes, both on this machine.

    python tests/cluster/slurm.py                  5 times: sbatch, SIGUSR1 at a random step, requeue, end; then the rest
    python tests/cluster/slurm.py --signals 1

Needs root and Debian's `slurm-wlm` and `munge`. Everything that is started, the daemons too, lives in a temporary folder and
ends with the script. Prints a row for each scenario; status 1 if one fails, 77 where what it needs is missing.

Must hold: no step is lost or done twice, and final weights are bit-equal to the uninterrupted run's. A rank that is killed ends
the job, which goes on when it is submitted again. A job that its user cancels does not come back.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.cluster.runs import (
    ENVIRONMENT,
    EPOCHS,
    ROOT,
    RigError,
    await_,
    compare,
    digits,
    last_step,
    steps_of,
    versions,
)

TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel")
GPUS = 2
"""Of each node, in name: the script asks for GPUs, which here are empty files."""


def missing() -> str | None:
    """Why this cannot run here."""
    if os.name != "posix" or os.geteuid() != 0:
        return "it needs root"
    absent = [tool for tool in TOOLS if shutil.which(tool) is None]
    return f"{', '.join(absent)} not installed (Debian: slurm-wlm, munge)" if absent else None


def free_ports(number: int) -> list[int]:
    """Ports nobody listens at."""
    sockets = [socket.socket() for _ in range(number)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


class Slurm:
    """Controller and two nodes; commands and jobs of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **ENVIRONMENT,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "MASTER_ADDR": "127.0.0.1",
            "DOCTOR": "0",
        }

    def run(self, *command: str) -> str:
        """What a command printed."""
        done = subprocess.run(
            command, env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=60
        )
        if done.returncode != 0:
            raise RigError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout

    def submit(self, *arguments: str, minutes: int = 30) -> str:
        """Submits the script as a user would, on two nodes with a process each; returns the job's id."""
        output = self.run(
            "sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1",
            "--mem=1000", f"--time={minutes}", str(ROOT / "scripts" / "slurm" / "train.sbatch"), *arguments,
        )  # fmt: skip
        return output.strip()

    def job(self, job: str) -> dict[str, str]:
        """What SLURM knows of a job."""
        return dict(word.split("=", 1) for word in self.run("scontrol", "show", "job", job).split() if "=" in word)

    def log(self, job: str) -> str:
        """What a job printed, in all of its starts."""
        path = self.folder / f"mmprefix-{job}.log"
        return path.read_text() if path.exists() else ""

    def ended(self, job: str) -> str | None:
        """The state of a job that has ended."""
        state = self.job(job)["JobState"]
        return state if state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL") else None

    def end(self, job: str, state: str, seconds: float = 240) -> None:
        """Waits until a job has ended.

        Raises:
            RigError: with the end of its log, if it ended otherwise.
        """
        found = await_(f"job {job}: end", lambda: self.ended(job), seconds, pause=0.5)
        if found != state:
            raise RigError(f"job {job}: expected {state}, got {found}: ...{self.log(job)[-1500:]}")


CONFIGURATION = """\
ClusterName=rig
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1
KillWait=60
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8 RealMemory=4000 Gres=gpu:{gpus}
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8 RealMemory=4000 Gres=gpu:{gpus}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@contextmanager
def two_nodes(folder: Path) -> Iterator[Slurm]:
    """Starts munge, the controller and the nodes; ends them."""
    for name in ("state", "munge"):
        (folder / name).mkdir()
    (folder / "munge" / "key").write_bytes(os.urandom(1024))
    (folder / "munge" / "key").chmod(0o600)
    (folder / "munge").chmod(0o700)
    for number in range(GPUS):
        (folder / f"gpu{number}").touch()
    (folder / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu File={folder}/gpu[0-{GPUS - 1}]\n")
    content = CONFIGURATION.format(host=socket.gethostname(), ports=free_ports(3), folder=folder, gpus=GPUS)
    (folder / "slurm.conf").write_text(content)
    slurm = Slurm(folder)
    munge = [
        f"--{name}={folder}/munge/{name.split('-')[0]}"
        for name in ("key-file", "socket", "pid-file", "log-file", "seed-file")
    ]
    daemons = [
        ["munged", "--foreground", "--force", *munge],
        ["slurmctld", "-D", "-c"],
        *(["slurmd", "-D", "-N", n] for n in ("n1", "n2")),
    ]
    started = []
    try:
        for command in daemons:
            with (folder / f"{command[0]}{command[-1] if command[0] == 'slurmd' else ''}.out").open("w") as out:
                started.append(subprocess.Popen(command, env=slurm.environment, stdout=out, stderr=out))
            time.sleep(1)
        await_("both nodes idle", lambda: slurm.run("sinfo", "-h", "-o", "%T %D").split() == ["idle", "2"], 60, 0.5)
        yield slurm
    finally:
        for job in slurm.run("squeue", "-h", "-o", "%i").split():
            slurm.run("scancel", "--signal=KILL", "--full", job)
            slurm.run("scancel", job)
        for process in reversed(started):
            process.terminate()
            process.wait(60)


def signalled(slurm: Slurm, name: str, step: int) -> str:
    """SIGUSR1 at a step, requeue, end."""
    job, log = slurm.submit(*digits(slurm.folder, name)), slurm.folder / f"{name}.jsonl"
    await_(f"job {job}: step {step}", lambda: last_step(log) >= step, 240)
    slurm.run("scancel", "--signal=USR1", job)
    start = time.monotonic()
    await_(f"job {job}: saved", lambda: "goes back into the queue" in slurm.log(job), 120)
    seconds = time.monotonic() - start
    stopped = last_step(log)
    await_(f"job {job}: requeued", lambda: slurm.job(job)["JobState"] == "PENDING", 60, 0.2)
    # Else it is held for two minutes; but nodes refuse a job in the second in which they were told to end it.
    time.sleep(5)
    slurm.run("scontrol", "update", f"JobId={job}", "StartTime=now")
    slurm.end(job, "COMPLETED")
    if slurm.job(job)["Restarts"] != "1":
        raise RigError(f"job {job}: expected 1 restart, got {slurm.job(job)['Restarts']}")
    if f"step={stopped:08d}" not in slurm.log(job):
        raise RigError(f"job {job}: expected to resume from step {stopped}, where it stopped")
    result = compare(slurm.folder, name, "whole", exactly_once=True)
    return f"stopped at step {stopped}, {seconds:.1f} s after the signal; {result}"


def killed(slurm: Slurm) -> str:
    """SIGKILL of a rank in the third epoch: the job ends with an error, and goes on when it is submitted again."""
    name = "killed"
    job, log = slurm.submit(*digits(slurm.folder, name)), slurm.folder / f"{name}.jsonl"
    await_(f"job {job}: step 60", lambda: last_step(log) >= 60, 240)
    found = subprocess.run(
        ["pgrep", "-f", f"mmprefix fit.*{slurm.folder / name} "], capture_output=True, text=True, check=True
    )
    # The first of them: its loader processes look like it.
    os.kill(min(int(pid) for pid in found.stdout.split() if rank_of(int(pid), job) == "1"), signal.SIGKILL)
    start = time.monotonic()
    slurm.end(job, "FAILED")
    seconds = time.monotonic() - start
    slurm.end(slurm.submit(*digits(slurm.folder, name)), "COMPLETED")
    return f"ended {seconds:.1f} s after the kill; submitted again: {compare(slurm.folder, name, 'whole', exactly_once=False)}"


def rank_of(pid: int, job: str) -> str | None:
    """The rank that a process is of a job."""
    entries = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    environment = dict(entry.split("=", 1) for entry in entries if "=" in entry)
    return (
        environment.get("SLURM_PROCID")
        if environment.get("SLURM_JOB_ID") == job and "SLURM_STEP_ID" in environment
        else None
    )


def out_of_time(slurm: Slurm) -> str:
    """The script's own `--signal`: three minutes, of which the last two are for saving; the job goes back into the queue."""
    name = "long"
    job = slurm.submit(*digits(slurm.folder, name), "--trainer.max_epochs", "1000", minutes=3)
    await_(f"job {job}: start", lambda: slurm.job(job)["JobState"] == "RUNNING", 60, 0.2)
    start = time.monotonic()
    await_(f"job {job}: saved", lambda: "goes back into the queue" in slurm.log(job), 200, 0.2)
    seconds = time.monotonic() - start
    await_(f"job {job}: requeued", lambda: slurm.job(job)["JobState"] == "PENDING", 60, 0.2)
    slurm.run("scancel", job)
    return f"saved at step {last_step(slurm.folder / f'{name}.jsonl')}, {seconds:.0f} s after the start, and requeued"


def cancelled(slurm: Slurm) -> str:
    """`scancel` by the user: it ends, and does not come back."""
    name = "cancelled"
    job, log = slurm.submit(*digits(slurm.folder, name)), slurm.folder / f"{name}.jsonl"
    await_(f"job {job}: step 5", lambda: last_step(log) >= 5, 240)
    slurm.run("scancel", job)
    slurm.end(job, "CANCELLED")
    await_("both nodes idle", lambda: slurm.run("sinfo", "-h", "-o", "%T %D").split() == ["idle", "2"], 90, 0.5)
    job_now = slurm.job(job)
    if (job_now["JobState"], job_now["Restarts"]) != ("CANCELLED", "0"):
        raise RigError(f"job {job}: expected it to stay cancelled, got {job_now['JobState']}")
    return f"cancelled at step {last_step(log)}, not requeued"


def main() -> int:
    """All scenarios, a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--signals", type=int, default=5, help="how often SIGUSR1, requeue, end")
    parser.add_argument("--only-signals", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="new folder for everything; by default a temporary one")
    options = parser.parse_args()
    reason = missing()
    if reason is not None:
        print(f"skipped: {reason}", file=sys.stderr)
        return 77
    failed = 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started is ended, then, too
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(exist_ok=True)
        with two_nodes(folder) as slurm:
            print(
                f"{versions()}, {slurm.run('sinfo', '--version').strip()}\n\n| scenario | result |\n|---|---|",
                flush=True,
            )
            slurm.end(slurm.submit(*digits(folder, "whole")), "COMPLETED")
            total = len(steps_of(folder / "whole.jsonl")) // 2
            print(f"| uninterrupted | {total} steps in {EPOCHS} epochs |", flush=True)
            # Not so late that the run is over before the signal is there.
            targets = random.Random(options.seed).sample(range(1, total - total // 5), options.signals)
            scenarios = [
                (f"SIGUSR1 at step {n}", lambda n=n, i=i: signalled(slurm, f"signal{i}", n))
                for i, n in enumerate(targets)
            ]
            if not options.only_signals:
                scenarios += [
                    ("SIGKILL of a rank", lambda: killed(slurm)),
                    ("the time is over", lambda: out_of_time(slurm)),
                    ("scancel", lambda: cancelled(slurm)),
                ]
            for name, scenario in scenarios:
                try:
                    print(f"| {name} | {scenario()} |", flush=True)
                except RigError as error:
                    failed += 1
                    print(f"| {name} | FAILED: {' '.join(str(error).split())} |", flush=True)
    print(f"\n{len(scenarios) - failed} of {len(scenarios)} scenarios hold")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
