#!/usr/bin/env python3
"""Two hosts on one machine: network namespaces with host names of their own, a rank in each, and a wire that can be cut.

    python tests/cluster/netns.py                  cut in the middle of training; scripts/torchrun.sh over both hosts
    python tests/cluster/netns.py --timeout_minutes 1

Needs root and `ip` (Debian: iproute2). Prints a row for each scenario; status 1 if one fails, 77 where what it needs is
missing.

Must hold: with the wire cut, both ranks end by themselves within the time-out, with an error that says what was waited
for; started again when the wire is whole, they end with the weights of the uninterrupted run, bit-equal. Under torchrun, a
rank that is killed makes all ranks start again, by themselves, to the same end; SIGTERM to one host's script saves, stops
all ranks, and leaves exit status 75 on that host.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.cluster.runs import ENVIRONMENT, ROOT, RigError, await_, compare, digits, finish, last_step, versions


def missing() -> str | None:
    """Why this cannot run here."""
    if os.name != "posix" or os.geteuid() != 0:
        return "it needs root"
    absent = [tool for tool in ("ip", "unshare", "nsenter") if shutil.which(tool) is None]
    if absent:
        return f"{', '.join(absent)} not installed (Debian: iproute2, util-linux)"
    probe = subprocess.run(["ip", "netns", "add", "mmprefix-probe"], capture_output=True, text=True)
    if probe.returncode != 0:
        return f"no network namespaces here: {probe.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", "mmprefix-probe"], check=True)
    return None


class Hosts:
    """Two hosts and the wire between them."""

    def __init__(self, number: int) -> None:
        self.names = [f"mmp{number}a", f"mmp{number}b"]
        self.addresses = [f"10.{number // 250 % 250 + 1}.{number % 250 + 1}.{n}" for n in (1, 2)]

    def build(self) -> None:
        """Makes them."""
        for name in self.names:
            ip("netns", "add", name)
        ip(
            "link",
            "add",
            "wire",
            "netns",
            self.names[0],
            "type",
            "veth",
            "peer",
            "name",
            "wire",
            "netns",
            self.names[1],
        )
        for name, address in zip(self.names, self.addresses, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "wire")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "wire", "up")

    def remove(self) -> None:
        """Takes them away; the wire goes with them."""
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)

    def cut(self) -> None:
        """The second host loses its wire: packets vanish, no connection is told."""
        ip("-n", self.names[1], "link", "set", "wire", "down")

    def mend(self) -> None:
        """The wire is whole again."""
        ip("-n", self.names[1], "link", "set", "wire", "up")

    def start(self, host: int, command: Sequence[str], out: Path, **environment: str) -> subprocess.Popen[str]:
        """A command on a host, in a group of processes of its own; what it prints goes to a file."""
        inside = ["ip", "netns", "exec", self.names[host], "unshare", "--uts", "sh", "-c",
                  f'hostname {self.names[host]}; exec "$@"', "sh", *command]  # fmt: skip
        settings = {
            **ENVIRONMENT,
            "GLOO_SOCKET_IFNAME": "wire",
            "MASTER_ADDR": self.addresses[0],
            "MASTER_PORT": "29511",
        }
        with out.open("a") as file:
            return subprocess.Popen(
                inside, env={**settings, **environment}, stdout=file, stderr=file, text=True, start_new_session=True
            )


def ip(*arguments: str) -> None:
    """Raises RigError where `ip` fails."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise RigError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """They go when the block ends, and with them what still runs there."""
    hosts = Hosts(os.getpid())
    try:
        hosts.build()
        yield hosts
    finally:
        for name in hosts.names:
            found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout
            for pid in found.split():
                os.kill(int(pid), signal.SIGKILL)
        hosts.remove()


def start_ranks(hosts: Hosts, folder: Path, name: str, minutes: float) -> list[subprocess.Popen[str]]:
    """A rank on each host, as a scheduler would start them."""
    fit = [sys.executable, "-m", "mmprefix", "fit", *digits(folder, name), "--trainer.num_nodes", "2", "--trainer.devices", "1",
           "--trainer.strategy.timeout_minutes", str(minutes), "--ckpt_path", "last"]  # fmt: skip
    return [
        hosts.start(n, fit, folder / f"{name}.{n}.out", NODE_RANK=str(n), LOCAL_RANK="0", WORLD_SIZE="2")
        for n in range(2)
    ]


def end_well(processes: Sequence[subprocess.Popen[str]], folder: Path, name: str) -> None:
    """Raises RigError where one does not end with status 0."""
    for number, process in enumerate(processes):
        status = finish(process, f"{name} on host {number}", 300)
        if status != 0:
            raise RigError(f"{name} on host {number}: status {status}: ...{tail(folder, name, number)}")


def tail(folder: Path, name: str, number: int) -> str:
    """The last lines that a host printed."""
    return " / ".join((folder / f"{name}.{number}.out").read_text().splitlines()[-8:])[-1500:]


def cut_off(hosts: Hosts, folder: Path, minutes: float) -> str:
    """Cut in the third epoch, mended, started again."""
    name = "cut"
    processes = start_ranks(hosts, folder, name, minutes)
    await_("step 60", lambda: last_step(folder / f"{name}.jsonl") >= 60, 240)
    hosts.cut()
    start, seconds = time.monotonic(), []
    try:
        for number, process in enumerate(processes):
            status = finish(process, f"host {number} without a wire", max(start + minutes * 60 - time.monotonic(), 0))
            seconds.append(time.monotonic() - start)
            if status in (0, 75):
                raise RigError(f"host {number} without a wire: expected an error, got status {status}")
    finally:
        hosts.mend()
    lines = [error_line(folder / f"{name}.{number}.out") for number in range(2)]
    end_well(start_ranks(hosts, folder, name, minutes), folder, name)
    result = compare(folder, name, "whole", exactly_once=False)
    said = "; ".join(f"host {number}: `{line}`" for number, line in enumerate(lines))
    return f"ended {max(seconds):.0f} s after the cut (time-out {minutes * 60:.0f} s), {said}; started again: {result}"


def error_line(out: Path) -> str:
    """The line in which a rank says what was wrong.

    Raises:
        RigError: there is none.
    """
    lines = [line for line in out.read_text().splitlines() if re.match(r"error: .*rank", line)]
    if not lines:
        raise RigError(f"{out.name}: expected a line `error: ... rank ...`, got ...{out.read_text()[-1500:]}")
    return lines[-1].replace("|", "/")


def start_torchrun(hosts: Hosts, folder: Path, name: str) -> list[subprocess.Popen[str]]:
    """scripts/torchrun.sh on each host."""
    return [
        hosts.start(
            n, [str(ROOT / "scripts" / "torchrun.sh"), *digits(folder, name)], folder / f"{name}.{n}.out", NNODES="2",
            NODE_RANK=str(n), HEAD=f"{hosts.addresses[0]}:29400", LOCAL_ADDR=hosts.addresses[n], PROCESSES="1",
        )
        for n in range(2)
    ]  # fmt: skip


def rank_on(hosts: Hosts, host: int) -> int:
    """Process id of the rank on a host."""
    found = subprocess.run(
        ["ip", "netns", "pids", hosts.names[host]], capture_output=True, text=True, check=True
    ).stdout
    for pid in sorted(map(int, found.split())):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if words[1:4] == [b"-m", b"mmprefix", b"fit"]:  # its loader processes have later ids
            return pid
    raise RigError(f"no rank on {hosts.names[host]}")


def restarted(hosts: Hosts, folder: Path) -> str:
    """A rank on the second host is killed in the third epoch; torchrun starts all of them again."""
    name = "restarted"
    processes = start_torchrun(hosts, folder, name)
    await_("step 60", lambda: last_step(folder / f"{name}.jsonl") >= 60, 240)
    os.kill(rank_on(hosts, 1), signal.SIGKILL)
    end_well(processes, folder, name)
    return compare(folder, name, "whole", exactly_once=False)


def preempted(hosts: Hosts, folder: Path) -> str:
    """SIGTERM to the script on the second host; both scripts are then started again."""
    name = "preempted"
    processes = start_torchrun(hosts, folder, name)
    await_("step 40", lambda: last_step(folder / f"{name}.jsonl") >= 40, 240)
    start = time.monotonic()
    processes[1].send_signal(signal.SIGTERM)
    status = finish(processes[1], "the script on host 1", 120)
    seconds = time.monotonic() - start
    if status != 75:
        raise RigError(f"the script on host 1: expected status 75, got {status}: ...{tail(folder, name, 1)}")
    # The first host waits for the second, which comes back.
    again = hosts.start(
        1, [str(ROOT / "scripts" / "torchrun.sh"), *digits(folder, name)], folder / f"{name}.1.out", NNODES="2", NODE_RANK="1",
        HEAD=f"{hosts.addresses[0]}:29400", LOCAL_ADDR=hosts.addresses[1], PROCESSES="1",
    )  # fmt: skip
    end_well([processes[0], again], folder, name)
    return f"status 75 after {seconds:.1f} s; come back: {compare(folder, name, 'whole', exactly_once=True)}"


def main() -> int:
    """All scenarios, a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--timeout_minutes", type=float, default=1.0, help="of the strategy, in the run that is cut off"
    )
    parser.add_argument("--only", help="a part of a scenario's name")
    parser.add_argument("--keep", type=Path, help="new folder for everything; by default a temporary one")
    options = parser.parse_args()
    reason = missing()
    if reason is not None:
        print(f"skipped: {reason}", file=sys.stderr)
        return 77
    failed = 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was made is taken away, then, too
    print(f"{versions()}\n\n| scenario | result |\n|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as temporary, two_hosts() as hosts:
        folder = options.keep or Path(temporary)
        folder.mkdir(exist_ok=True)
        end_well(start_ranks(hosts, folder, "whole", options.timeout_minutes), folder, "whole")
        print(f"| uninterrupted | {last_step(folder / 'whole.jsonl')} steps |", flush=True)
        scenarios = [
            ("cut off, mended, started again", lambda: cut_off(hosts, folder, options.timeout_minutes)),
            ("torchrun.sh, SIGKILL of a rank", lambda: restarted(hosts, folder)),
            ("torchrun.sh, SIGTERM on one host", lambda: preempted(hosts, folder)),
        ]
        scenarios = [one for one in scenarios if (options.only or "") in one[0]]
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
