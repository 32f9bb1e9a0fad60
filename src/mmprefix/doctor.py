"""`doctor`: are this node, or all nodes of an allocation, fit to train?

Started as a training run would be (alone, by ``srun`` or by ``torchrun``), it prints a line for each thing that it looked
at: ok, warn or FAIL, with the ranks that fail, their hosts, and what to do. Status 1 says that something fails.

Ranks tell each other what they found through a key-value store of the first rank, not through a process group: versions,
disks and devices are compared also where no process group can be made. Every check is a function that measures, on each
rank, and one that judges what all ranks measured; all ranks judge, and the first one prints.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import random
import re
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass
from datetime import timedelta
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

import mmprefix
from mmprefix.arguments import CommandParser
from mmprefix.data.mixture import parse_sets
from mmprefix.data.shard_cache import PIPE
from mmprefix.data.shards import ShardCollection, check_complete, expand_shards
from mmprefix.errors import InputError
from mmprefix.files import replacing
from mmprefix.training.watchdog import within

MIB, GIB = 2**20, 2**30
_RECORDS = 64
"""Records that each rank reads."""
_FILE_BYTES = 8 * MIB
"""What each rank writes into the checkpoint folder."""
_GPU_SIZES, _CPU_SIZES = (MIB, 16 * MIB, 256 * MIB), (MIB, 8 * MIB, 32 * MIB)
"""Bytes that are reduced and gathered."""
_PATIENCE = 10.0
"""Seconds within which a file must show on another node."""
_FREE_DISK = 20 * GIB
_FREE_SHARED_MEMORY = GIB
_OPEN_FILES = 1024
_FREE_DEVICE_SHARE = 0.9

Fact = dict[str, Any]
"""What a rank measured; `error` says what went wrong instead."""


@dataclass(frozen=True)
class Finding:
    """A line of the report."""

    level: Literal["ok", "warn", "FAIL"]
    name: str
    text: str

    def __str__(self) -> str:
        return f"{self.level:<4}  {self.name:<14}  {self.text}"


class LostRanksError(RuntimeError):
    """Ranks did not come, or did not answer; the message names them."""


class FirstRankLostError(LostRanksError):
    """The one that is lost is the one that prints."""


@dataclass(frozen=True)
class Place:
    """Which of the started processes this is, and where the first one listens."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    address: str = ""
    port: int = 0

    @classmethod
    def from_environment(cls) -> Place:
        """From what torchrun or srun set.

        Raises:
            InputError: ranks without an address where they could meet.
        """
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            for name in ("MASTER_ADDR", "MASTER_PORT"):
                if int(os.environ["WORLD_SIZE"]) > 1 and name not in os.environ:
                    raise InputError(f"doctor: expected {name} beside RANK and WORLD_SIZE, it is not set")
            return cls(
                int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_RANK", 0)),
                os.environ.get("MASTER_ADDR", ""), int(os.environ.get("MASTER_PORT", 0)),
            )  # fmt: skip
        # Of a step, that is, of srun: a batch script has SLURM_PROCID and SLURM_NTASKS, too, but is alone.
        if "SLURM_STEP_NUM_TASKS" in os.environ and "SLURM_PROCID" in os.environ:
            from lightning.fabric.plugins.environments import SLURMEnvironment

            slurm = SLURMEnvironment(auto_requeue=False)
            return cls(
                slurm.global_rank(), int(os.environ["SLURM_STEP_NUM_TASKS"]), slurm.local_rank(),
                slurm.main_address, slurm.main_port,
            )  # fmt: skip
        return cls()


def host_name() -> str:
    """This machine, as SLURM calls it, or as it calls itself."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


class Ranks:
    """All processes of this start.

    Attributes:
        place: which one this is.
        hosts: of each rank.
        store: where they leave their facts; None for a process that is alone.
    """

    def __init__(self, place: Place, timeout: float) -> None:
        """Waits until all have come.

        Args:
            place: from `Place.from_environment`.
            timeout: seconds to wait for a rank, here and later.

        Raises:
            LostRanksError: naming the ranks that did not come.
        """
        self.place, self.timeout = place, timeout
        self.hosts = [host_name()]
        self.store: Any = None
        if place.world_size > 1:
            self.store = self._connect()
            try:
                self.hosts = self.exchange("hosts", host_name())
            except LostRanksError:
                self.leave()
                raise

    def _connect(self) -> Any:
        place = self.place
        # torchrun may run the store itself.
        of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
        is_server = place.rank == 0 and not of_agent
        try:
            store: Any = dist.TCPStore(  # type: ignore[attr-defined]
                place.address, place.port, place.world_size, is_master=is_server, wait_for_workers=False,
                timeout=timedelta(seconds=self.timeout),
            )  # fmt: skip
        except (RuntimeError, ValueError) as error:
            how = "listen at" if is_server else f"reach rank 0 within {self.timeout:g} s at"
            raise FirstRankLostError(
                f"rank {place.rank} ({host_name()}): cannot {how} {place.address}:{place.port}: {_one_line(error)}; check "
                "MASTER_ADDR and MASTER_PORT, that rank 0 was started, and that no firewall is between them"
            ) from error
        # A restarted group must not read what the one before it left.
        return dist.PrefixStore(  # type: ignore[attr-defined]
            f"doctor/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store
        )

    def exchange(self, name: str, value: Any) -> list[Any]:
        """What each rank gave (JSON), by rank. Nobody goes on before all have given.

        Raises:
            LostRanksError: naming the ranks that did not give theirs in time.
        """
        if self.store is None:
            return [value]
        self.store.set(f"{name}/{self.place.rank}", json.dumps(value))
        if self.place.rank == 0:
            until = time.monotonic() + self.timeout
            keys = [f"{name}/{rank}" for rank in range(self.place.world_size)]
            lost = [rank for rank, key in enumerate(keys) if not self._came(key, until)]
            values = [None if rank in lost else json.loads(self.store.get(key)) for rank, key in enumerate(keys)]
            self.store.set(name, json.dumps({"found": values, "lost": lost}))
        # The first rank decides who is lost; the others give it the time for that.
        elif not self._came(name, time.monotonic() + 2 * self.timeout):
            raise FirstRankLostError(
                f"rank 0 did not answer rank {self.place.rank} ({host_name()}) within {2 * self.timeout:g} s ({name})"
            )
        answer = json.loads(self.store.get(name))
        if answer["lost"]:
            raise LostRanksError(self._describe_lost(name, answer["lost"], answer["found"]))
        found: list[Any] = answer["found"]
        return found

    def under(self, prefix: str) -> Any:
        """The store, for somebody else's keys."""
        return dist.PrefixStore(prefix, self.store)  # type: ignore[attr-defined]

    def _came(self, key: str, until: float) -> bool:
        seconds = max(0.01, until - time.monotonic())
        try:
            within(seconds + self.timeout, lambda: self.store.wait([key], timedelta(seconds=seconds)))
        except (RuntimeError, TimeoutError):  # torch.distributed's own errors of time-outs and of lost connections
            return False
        return True

    def _describe_lost(self, name: str, lost: Sequence[int], found: Sequence[Any]) -> str:
        size = self.place.world_size
        if name != "hosts":
            return (
                f"{len(lost)} of {size} ranks gave no answer within {self.timeout:g} s ({name}): {self.name_of(lost)}; "
                "look for what they printed last"
            )
        text = f"{len(lost)} of {size} ranks did not come within {self.timeout:g} s: {_numbers(lost)}"
        came = {host for host in found if host is not None}
        absent = [node for node in _slurm_nodes() if node not in came]
        if absent:
            text += f"; nobody came from {', '.join(absent)}"
        return (
            f"{text}; came from {', '.join(sorted(came))}; look at what their nodes printed, or raise --timeout_seconds"
        )

    def name_of(self, ranks: Sequence[int]) -> str:
        """Ranks with their hosts: ``rank 3 (node7), rank 5 (node8)``, the hosts of all of them named."""
        hosts: dict[str, list[int]] = {}
        for rank in ranks:
            hosts.setdefault(self.hosts[rank], []).append(rank)
        return ", ".join(f"{_numbers(on_host)} ({host})" for host, on_host in hosts.items())

    @property
    def first_of_hosts(self) -> list[int]:
        """The first rank of each host."""
        return [self.hosts.index(host) for host in dict.fromkeys(self.hosts)]

    def leave(self) -> None:
        """Waits until nobody needs the first rank's store any more."""
        if self.store is None:
            return
        with suppress(RuntimeError, TimeoutError):
            within(5, lambda: self.store.set(f"left/{self.place.rank}", ""))
        if self.place.rank == 0:
            until = time.monotonic() + 5
            for rank in range(self.place.world_size):
                self._came(f"left/{rank}", until)


def _slurm_nodes() -> list[str]:
    nodes = os.environ.get("SLURM_JOB_NODELIST")
    if nodes is None or shutil.which("scontrol") is None:
        return []
    done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, timeout=30)
    return done.stdout.split()


def _numbers(ranks: Sequence[int]) -> str:
    """``rank 3``, or ``ranks 0-3, 7``."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
    return f"rank{'' if len(ranks) == 1 else 's'} {text}"


def _one_line(error: BaseException | str, limit: int = 200) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= limit else f"{text[:limit]}..."


def differing(name: str, values: Sequence[str], ranks: Ranks) -> str | None:
    """What to say where ranks have other values than most of them; None where all have the same."""
    counts = Counter(values)
    if len(counts) == 1:
        return None
    ((usual, number),) = counts.most_common(1)
    odd = {value: [r for r, v in enumerate(values) if v == value] for value in counts if value != usual}
    named = ", ".join(f"{value} on {ranks.name_of(which)}" for value, which in odd.items())
    return f"expected one {name} everywhere, got {usual} on {number} of {len(values)} ranks, {named}"


def failures(name: str, facts: Sequence[Fact], ranks: Ranks) -> list[Finding]:
    """A line for each error that ranks came back with."""
    by_text: dict[str, list[int]] = {}
    for rank, fact in enumerate(facts):
        if fact.get("error"):
            by_text.setdefault(fact["error"], []).append(rank)
    return [Finding("FAIL", name, f"{ranks.name_of(which)}: {text}") for text, which in by_text.items()]


# Versions and settings


def measure_versions(settings: Mapping[str, Any] | None) -> Fact:
    """Of what has to be the same everywhere: libraries, driver, this package's files and the settings."""
    found = {"python": platform.python_version()}
    for package in ("torch", "lightning", "transformers", "timm"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "none"
    found["CUDA"] = str(torch.version.cuda or "none")
    found["driver"] = _driver_version() or "none"
    has_nccl = torch.cuda.is_available() and dist.is_nccl_available()
    found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version())) if has_nccl else "none"
    code = hashlib.sha256()
    root = Path(mmprefix.__file__).parent
    for path in sorted(root.rglob("*.py")):
        code.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    found["mmprefix"] = f"{mmprefix.__version__} (files {code.hexdigest()[:8]})"
    if settings is not None:
        content = json.dumps(settings, sort_keys=True, default=str)
        found["config"] = hashlib.sha256(content.encode()).hexdigest()[:8]
    return found


def _driver_version() -> str | None:
    """Of NVIDIA's kernel module, which containers see, too."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", text)
    return found.group(1) if found else "unknown"


def judge_versions(facts: Sequence[Fact], ranks: Ranks) -> list[Finding]:
    """One line where all are equal, else one for each that is not."""
    names = list(dict.fromkeys(name for fact in facts for name in fact))
    wrong = [differing(name, [fact.get(name, "none") for fact in facts], ranks) for name in names]
    found = [
        Finding("FAIL", "versions", f"{text}; start all ranks from one environment, checkout and config")
        for text in wrong
        if text is not None
    ]
    if found:
        return found
    return [Finding("ok", "versions", ", ".join(f"{name} {facts[0][name]}" for name in names))]


# Devices


def measure_devices(ranks: Ranks, accelerator: str) -> Fact:
    """GPUs that this process sees, and the free memory of those that it would use.

    Args:
        ranks: all of them.
        accelerator: the config's; where it asks for GPUs, there must be some.
    """
    if accelerator == "cpu":
        return {"count": 0, "error": None}
    if not torch.cuda.is_available():
        driver, error = _driver_version(), None
        if driver is not None:
            try:
                torch.cuda.init()
                why = "no device is visible to it (CUDA_VISIBLE_DEVICES?)"
            except (RuntimeError, AssertionError) as refused:
                why = _one_line(refused)
            error = f"there is a driver {driver}, but torch (CUDA {torch.version.cuda}) cannot use it: {why}"
        elif accelerator in ("gpu", "cuda"):
            error = f"trainer.accelerator is {accelerator}, but there is no GPU and no driver"
        return {"count": 0, "error": error}
    count, here = torch.cuda.device_count(), ranks.hosts.count(ranks.hosts[ranks.place.rank])
    if ranks.place.local_rank >= count:
        return {"count": count, "error": (
            f"expected a GPU for each of the {here} processes of the host, got {count}: ask for them by node "
            "(--gpus-per-node, not --gpus-per-task: each process must see all of its node)"
        )}  # fmt: skip
    # A context takes half a GiB: only on the device that is this process's own.
    own = range(count) if ranks.place.world_size == 1 else [ranks.place.local_rank]
    pairs = [(i, j) for i in range(count) for j in range(count) if i != j] if ranks.place.local_rank == 0 else []
    return {
        "count": count,
        "names": [torch.cuda.get_device_name(n) for n in own],
        "memory": [torch.cuda.mem_get_info(n) for n in own],  # free, total, in bytes
        "uuids": [str(torch.cuda.get_device_properties(n).uuid) for n in own],
        "no_peer_access": [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)],
    }


def judge_devices(facts: Sequence[Fact], ranks: Ranks) -> list[Finding]:
    """Failures, then what is odd, then one line on what is there."""
    found = failures("devices", facts, ranks)
    without = [rank for rank, fact in enumerate(facts) if not fact["count"]]
    if found:
        return found
    if len(without) == len(facts):
        return [Finding("ok", "devices", "no GPU: training runs on the CPU")]
    if without:
        return [Finding("FAIL", "devices", f"{ranks.name_of(without)}: no GPU, while the others have some")]
    users: dict[tuple[str, str], list[int]] = {}
    for rank, fact in enumerate(facts):
        for uuid in fact["uuids"]:
            users.setdefault((ranks.hosts[rank], uuid), []).append(rank)
    for (host, uuid), which in users.items():
        if len(which) > 1:
            text = f"{_numbers(which)} ({host}) would share the GPU {uuid}; start one process for each GPU"
            found.append(Finding("FAIL", "devices", text))
    kinds = Counter(name for fact in facts for name in fact["names"])
    if len(kinds) > 1:
        usual = kinds.most_common(1)[0][0]
        odd = [rank for rank, fact in enumerate(facts) if any(name != usual for name in fact["names"])]
        others = ", ".join(name for name in kinds if name != usual)
        found.append(
            Finding("warn", "devices", f"{ranks.name_of(odd)}: {others} among {usual}: the slowest sets the pace")
        )
    busy = [
        rank
        for rank, fact in enumerate(facts)
        if any(free < _FREE_DEVICE_SHARE * total for free, total in fact["memory"])
    ]
    if busy:
        least = min(free / GIB for rank in busy for free, _ in facts[rank]["memory"])
        text = f"{ranks.name_of(busy)}: memory of a GPU is in use, {least:.1f} GiB are free; look for others with nvidia-smi"
        found.append(Finding("warn", "devices", text))
    apart = [rank for rank, fact in enumerate(facts) if fact["no_peer_access"]]
    if apart:
        pairs = ", ".join(f"{i}-{j}" for i, j in facts[apart[0]]["no_peer_access"][:4])
        text = f"{ranks.name_of(apart)}: no peer access between GPUs {pairs}: they exchange through the host's memory"
        found.append(Finding("warn", "devices", text))
    if not found:
        per_host = sorted({fact["count"] for fact in facts})
        free = min(free for fact in facts for free, _ in fact["memory"]) / GIB
        text = f"{' or '.join(map(str, per_host))} x {next(iter(kinds))} on each host, {free:.1f} GiB free at least"
        found.append(Finding("ok", "devices", text))
    return found


# Limits of the host


def measure_limits(shared_memory: Path = Path("/dev/shm")) -> Fact:
    """Free shared memory, in bytes (None where the system has no such folder), and the limit of open files."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = shutil.disk_usage(shared_memory).free if shared_memory.is_dir() else None
    return {"shared": free, "files": None if soft == resource.RLIM_INFINITY else soft}


def judge_limits(facts: Sequence[Fact], ranks: Ranks) -> list[Finding]:
    """Two lines: shared memory, open files."""
    found = []
    sizes = [fact["shared"] for fact in facts if fact["shared"] is not None]
    small = [r for r, fact in enumerate(facts) if fact["shared"] is not None and fact["shared"] < _FREE_SHARED_MEMORY]
    if small:
        least = min(facts[rank]["shared"] for rank in small) / GIB
        text = (
            f"{ranks.name_of(small)}: {least:.2f} GiB free in /dev/shm, through which loader processes pass their batches; "
            "containers need --ipc=host or --shm-size"
        )
        found.append(Finding("warn", "shared memory", text))
    else:
        text = f"{min(sizes) / GIB:.1f} GiB free in /dev/shm at least" if sizes else "no /dev/shm on this system"
        found.append(Finding("ok", "shared memory", text))
    limits = [fact["files"] for fact in facts if fact["files"] is not None]
    few = [r for r, fact in enumerate(facts) if fact["files"] is not None and fact["files"] < _OPEN_FILES]
    if few:
        least = min(facts[rank]["files"] for rank in few)
        text = (
            f"{ranks.name_of(few)}: {least} files may be open, expected {_OPEN_FILES} at least; ulimit -n {_OPEN_FILES}"
        )
        found.append(Finding("warn", "open files", text))
    else:
        found.append(Finding("ok", "open files", f"{min(limits) if limits else 'any number'} may be open"))
    return found


# Shards


def patterns_of(options: Namespace, settings: Mapping[str, Any] | None) -> list[tuple[str, str | Sequence[str]]]:
    """Shards to read, each with the option or setting that named them; [] for none, or for a set of the package.

    Raises:
        InputError: a mixture that is none.
    """
    if options.data is not None:
        return [("--data", options.data)]
    if settings is None or settings["data"]["train"] is None:
        return []
    sets = parse_sets(settings["data"]["train"], "data.train", trains=True)
    return [(f"data.train.{one.name}" if one.name else "data.train", one.shards) for one in sets]


def measure_shards(patterns: Sequence[tuple[str, str | Sequence[str]]], rank: int) -> Fact:
    """The first record and random ones, other ones on each rank.

    Returns:
        records, shards: how many there are.
        index: of where everything lies; ranks that see the same files have the same.
        pipes: how many sources are commands, which are not run.
        read, bytes, seconds: records that were read, the size of their images, the time. What was read a moment ago comes
            from memory.
    """
    index, records, shards, pipes, read, size, seconds = hashlib.sha256(), 0, 0, 0, 0, 0, 1e-9
    for where, pattern in patterns:
        paths = expand_shards(pattern, where, pipes=True)
        check_complete(pattern, where)
        usable = [path for path in paths if not path.startswith(PIPE)]
        pipes += len(paths) - len(usable)
        if not usable:
            continue
        collection = ShardCollection(usable, where)
        index.update(collection.fingerprint().encode())
        records += len(collection)
        shards += len(usable)
        wanted = [0, *(random.Random(rank).randrange(len(collection)) for _ in range(_RECORDS - 1))]
        start = time.perf_counter()
        for record in wanted:
            collection.samples(record)
            size += sum(len(collection.image_bytes(record, n)) for n in range(collection.num_images(record)))
        seconds += time.perf_counter() - start
        read += len(wanted)
    return {
        "records": records, "shards": shards, "pipes": pipes, "read": read, "bytes": size, "seconds": seconds,
        "index": index.hexdigest()[:8],
    }  # fmt: skip


def judge_shards(facts: Sequence[Fact], ranks: Ranks) -> list[Finding]:
    """Failures, or one line with the rates."""
    found = failures("shards", facts, ranks)
    if found:
        return found
    text = differing("set of shards", [f"{fact['records']} records (index {fact['index']})" for fact in facts], ranks)
    if text is not None:
        return [Finding("FAIL", "shards", f"{text}; give all nodes the same files")]
    first = facts[0]
    if first["pipes"]:
        text = f"{first['pipes']} commands (pipe:) are not run here: fit copies their output to data.shard_cache"
        found.append(Finding("warn", "shards", text))
    if first["records"]:
        seconds = [fact["seconds"] for fact in facts]
        slowest = seconds.index(max(seconds))
        read, size = facts[slowest]["read"], facts[slowest]["bytes"] / MIB
        number = first["shards"]
        text = f"{number} shard{'' if number == 1 else 's'}, {first['records']} records; {read / max(seconds):.0f} records/s"
        text += f" ({size / max(seconds):.0f} MiB/s of images)"
        if len(facts) > 1:
            text += f" on the slowest, {ranks.name_of([slowest])}; {read / min(seconds):.0f} on the fastest"
        found.append(Finding("ok", "shards", text))
    return found


# The folder of checkpoints


def missing_folders(folder: Path) -> list[Path]:
    """``folder`` and those above it that are not there yet, the innermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def write_file(folder: Path, name: str) -> Fact:
    """Writes, syncs and renames a file as a checkpoint is; says how fast, and what is free, in bytes."""
    start = time.perf_counter()
    try:
        with replacing(folder / name) as temporary, open(temporary, "wb") as file:
            file.write(content_of(name) * (_FILE_BYTES // len(content_of(name))))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:  # the folder is said in any case, and a rank's own file would keep equal lines apart
        raise OSError(error.errno, error.strerror) from error
    return {"seconds": time.perf_counter() - start, "free": shutil.disk_usage(folder).free}


def content_of(name: str) -> bytes:
    """A block of the file of that name, no other's."""
    return hashlib.sha256(name.encode()).digest() * 128


def read_file(folder: Path, name: str, owner: str, patience: float) -> Fact:
    """Compares another rank's file.

    Args:
        folder: of checkpoints.
        name: of the file.
        owner: who wrote it, for messages.
        patience: seconds within which it must appear: network folders are told of files late.
    """
    until = time.monotonic() + patience
    while not (folder / name).exists():
        if time.monotonic() > until:
            return {"error": (
                f"{folder} does not show the file that {owner} wrote; put it on a file system that all nodes share"
            )}  # fmt: skip
        time.sleep(0.1)
    content = (folder / name).read_bytes()
    if content != content_of(name) * (_FILE_BYTES // len(content_of(name))):
        return {"error": f"{folder}: the file that {owner} wrote reads otherwise than it was written"}
    return {}


def check_folder(folder: Path, ranks: Ranks) -> list[Finding]:
    """Each rank writes a file, reads that of the next one, and deletes its own."""
    # Others may be looking at the same folder.
    (mark, *_) = ranks.exchange("folder mark", f"{os.getpid()}-{random.SystemRandom().randrange(16**8):08x}")
    made = missing_folders(folder) if ranks.place.rank == 0 else []
    ranks.exchange("folder begin", None)
    own = folder / f".doctor-{mark}-{ranks.place.rank}"
    try:
        found = _write_and_read(folder, mark, ranks)
    finally:
        if own.exists():
            own.unlink()
    ranks.exchange("folder end", None)
    for path in made:
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    return found


def _write_and_read(folder: Path, mark: str, ranks: Ranks) -> list[Finding]:
    rank, size = ranks.place.rank, ranks.place.world_size
    facts = ranks.exchange("folder write", _attempt(lambda: write_file(folder, f".doctor-{mark}-{rank}")))
    found = failures("checkpoints", facts, ranks)
    if found:
        return [Finding(f.level, f.name, f"{f.text}; {folder} is of --out or trainer.default_root_dir") for f in found]
    if size > 1:
        of = (rank + 1) % size
        read = _attempt(lambda: read_file(folder, f".doctor-{mark}-{of}", ranks.name_of([of]), _PATIENCE))
        found = failures("checkpoints", ranks.exchange("folder read", read), ranks)
        if found:
            return found
    free = min(fact["free"] for fact in facts)
    rate = min(_FILE_BYTES / MIB / fact["seconds"] for fact in facts)
    text = f"{folder}: written, synced, renamed, read; {rate:.0f} MiB/s on the slowest rank, {free / GIB:.0f} GiB free"
    if free < _FREE_DISK:
        return [Finding("warn", "checkpoints", f"{text}: expected {_FREE_DISK / GIB:.0f} at least")]
    return [Finding("ok", "checkpoints", text)]


def _attempt(measure: Callable[[], Fact]) -> Fact:
    """What was measured, or why it could not be: the other ranks wait for an answer, whatever happens here."""
    try:
        return measure()
    except Exception as error:
        message = _one_line(error)
        known = isinstance(error, InputError | OSError)
        return {"error": message if known else f"{type(error).__name__}: {message}"}


# The process group


def check_group(ranks: Ranks, on_gpu: bool) -> list[Finding]:
    """Connects all ranks, as training does."""
    place = ranks.place
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    # Else a time-out aborts the process before it can say anything.
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")

    def connect() -> Fact:
        if on_gpu:
            torch.cuda.set_device(place.local_rank)
        dist.init_process_group(
            backend, store=ranks.under("group"), rank=place.rank, world_size=place.world_size,
            timeout=timedelta(seconds=ranks.timeout / 2),  # before the others give this rank up
        )  # fmt: skip
        total = torch.ones(1, device=_device(place, on_gpu))
        dist.all_reduce(total)  # connections are made now
        if int(total) != place.world_size:
            return {"error": f"ones of {place.world_size} ranks add up to {int(total)}"}
        return {}

    start = time.perf_counter()
    found = failures("process group", ranks.exchange("group", _attempt(connect)), ranks)
    hint = (
        "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface between the nodes (`ip addr`), open all ports among "
        "them; NCCL_DEBUG=INFO says more"
    )
    if found:
        return [Finding(f.level, f.name, f"{f.text}; {hint}") for f in found]
    hosts = len(set(ranks.hosts))
    text = f"{backend}, {place.world_size} ranks on {hosts} host{'s' * (hosts > 1)} within {time.perf_counter() - start:.1f} s"
    return [Finding("ok", "process group", text)]


def _device(place: Place, on_gpu: bool) -> torch.device:
    return torch.device("cuda", place.local_rank) if on_gpu else torch.device("cpu")


def now() -> float:
    """This machine's clock, in seconds."""
    return time.time()


def check_clocks(ranks: Ranks, limit: float) -> list[Finding]:
    """Each rank's clock against the first one's, from the fastest of several round trips (Cristian's algorithm)."""

    def measure() -> Fact:
        stamp = torch.zeros(1, dtype=torch.float64)
        offsets = []
        for rank in range(1, ranks.place.world_size):
            trips = []
            for _ in range(5):
                if ranks.place.rank == 0:
                    sent = now()
                    dist.send(stamp, rank)
                    dist.recv(stamp, rank)
                    received = now()
                    trips.append((received - sent, float(stamp) - (sent + received) / 2))
                elif ranks.place.rank == rank:
                    dist.recv(stamp, 0)
                    stamp.fill_(now())
                    dist.send(stamp, 0)
            offsets += [min(trips)] if trips else []
        return {"offsets": offsets}

    facts = ranks.exchange("clock", _attempt(measure))
    found = failures("clock", facts, ranks)
    return found or judge_clocks([(0.0, 0.0), *map(tuple, facts[0]["offsets"])], ranks, limit)


def judge_clocks(trips: Sequence[tuple[float, float]], ranks: Ranks, limit: float) -> list[Finding]:
    """One line, or one for each host that is off.

    Args:
        trips: of each rank, round trip and offset in seconds.
        ranks: all of them.
        limit: the largest offset allowed, in seconds.
    """
    found = []
    for host in dict.fromkeys(ranks.hosts):
        of_host = [rank for rank, name in enumerate(ranks.hosts) if name == host]
        worst = max((trips[rank][1] for rank in of_host), key=abs)
        if abs(worst) > limit:
            text = f"{ranks.name_of(of_host)}: {worst:+.3f} s against rank 0, at most {limit:g} expected; is NTP running there?"
            found.append(Finding("FAIL", "clock", text))
    if not found:
        worst, trip = max(abs(offset) for _, offset in trips), max(trip for trip, _ in trips)
        found.append(Finding("ok", "clock", f"within {worst * 1e3:.2f} ms of rank 0, round trip {trip * 1e3:.2f} ms"))
    return found


# Bandwidth


def bus_bandwidth(size: int, seconds: float, world_size: int, collective: str) -> float:
    """Bytes a second that each link carried, to be compared with what the link can do.

    A ring sends 2 (n - 1) / n of the bytes for an all-reduce, and (n - 1) / n of the gathered bytes for an all-gather.
    Source: NVIDIA nccl-tests, doc/PERFORMANCE.md, "Bus bandwidth".

    Args:
        size: bytes of the reduced tensor, or of the gathered one.
        seconds: that it took.
        world_size: ranks.
        collective: ``all-reduce`` or ``all-gather``.
    """
    share = (world_size - 1) / world_size * (2 if collective == "all-reduce" else 1)
    return size / seconds * share


def _median_seconds(run: Callable[[], None], device: torch.device, repeats: int = 5, warm_up: int = 2) -> float:
    seconds = []
    for _ in range(warm_up + repeats):
        dist.barrier()
        _finish(device)
        start = time.perf_counter()
        run()
        _finish(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[warm_up:])


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check_bandwidth(ranks: Ranks, on_gpu: bool, expected: float | None) -> list[Finding]:
    """All-reduce and all-gather of several sizes; where one is too slow, the links between hosts, one by one.

    Args:
        ranks: all of them.
        on_gpu: whether GPUs exchange.
        expected: Gbit/s of bus bandwidth that the largest size must reach; None only reports.
    """
    size, device = ranks.place.world_size, _device(ranks.place, on_gpu)
    sizes = _GPU_SIZES if on_gpu else _CPU_SIZES
    found = []
    for collective in ("all-reduce", "all-gather"):

        def measure(collective: str = collective) -> Fact:
            seconds = []
            for wanted in sizes:
                share = torch.ones(wanted // 4 // size, device=device)
                whole = torch.ones(share.numel() * size, device=device)
                seconds.append(_median_seconds(lambda: _run(collective, whole, share), device))  # noqa: B023
            return {"seconds": seconds}

        facts = ranks.exchange(collective, _attempt(measure))
        found += failures(collective, facts, ranks) or [judge_bandwidth(collective, sizes, facts, expected)]
    if any(one.level == "FAIL" for one in found) and expected is not None and len(ranks.first_of_hosts) > 1:
        found += _check_links(ranks, device, sizes[-1])
    return found


_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""Its name since torch 2.14, which warns of the old one."""


def _run(collective: str, whole: Tensor, share: Tensor) -> None:
    if collective == "all-reduce":
        dist.all_reduce(whole)
    else:
        _all_gather(whole, share)


def judge_bandwidth(
    collective: str, sizes: Sequence[int], facts: Sequence[Fact], expected: float | None
) -> Finding:  # fmt: skip
    """One line, of the slowest rank's medians."""
    rates = [
        bus_bandwidth(size, max(fact["seconds"][n] for fact in facts), len(facts), collective) * 8 / 1e9
        for n, size in enumerate(sizes)
    ]
    text = ", ".join(f"{rate:.3g} at {size // MIB} MiB" for rate, size in zip(rates, sizes, strict=True))
    if expected is not None and rates[-1] < expected:
        return Finding("FAIL", collective, f"bus bandwidth in Gbit/s: {text}; expected {expected:g} (--expect_gbps)")
    return Finding("ok", collective, f"bus bandwidth in Gbit/s: {text}")


def _check_links(ranks: Ranks, device: torch.device, size: int) -> list[Finding]:
    """From each host to the next one, one after the other, while the others are silent."""
    firsts = ranks.first_of_hosts
    links = list(zip(firsts, [*firsts[1:], firsts[0]], strict=True))

    def measure() -> Fact:
        data, answer = torch.ones(size // 4, device=device), torch.ones(1, device=device)
        seconds: dict[str, float] = {}
        for number, (source, target) in enumerate(links):
            times = []
            for _ in range(3):
                start = time.perf_counter()
                if ranks.place.rank == source:
                    dist.send(data, target)
                    dist.recv(answer, target)
                elif ranks.place.rank == target:
                    dist.recv(data, source)
                    dist.send(answer, source)
                _finish(device)
                times.append(time.perf_counter() - start)
            if ranks.place.rank == source:
                seconds[str(number)] = statistics.median(times)
            dist.barrier()
        return {"seconds": seconds}

    facts = ranks.exchange("links", _attempt(measure))
    found = failures("links", facts, ranks)
    if found:
        return found
    taken = [(facts[source]["seconds"][str(number)], source, target) for number, (source, target) in enumerate(links)]
    slowest = [
        f"{ranks.hosts[source]} to {ranks.hosts[target]} {size * 8 / 1e9 / seconds:.3g}"
        for seconds, source, target in sorted(taken, reverse=True)[:4]
    ]
    return [
        Finding("warn", "links", f"between hosts, one at a time, the slowest first, in Gbit/s: {', '.join(slowest)}")
    ]


# The command


def parse(arguments: list[str]) -> tuple[Namespace, list[str]]:
    """The command's own options, and the others, which are those of ``fit``."""
    parser = CommandParser(
        "doctor",
        "Checks this node, or, started by srun or torchrun as training is, all nodes of the allocation.",
        "With --config, every setting of `fit` can follow (--data.train 'mine/train-*.tar').",
    )
    parser.add_argument("--config", action="append", help="config of `fit`: its shards, run folder and accelerator")
    parser.add_argument("--data", help="shards to read (path, glob or folder); by default the config's data.train")
    parser.add_argument("--out", type=Path, help="folder to write into; by default the config's run folder")
    parser.add_argument(
        "--expect_gbps", type=float, help="Gbit/s of bus bandwidth that all-reduce and all-gather must reach"
    )
    parser.add_argument("--max_skew_seconds", type=float, default=1.0, help="between a rank's clock and rank 0's")
    parser.add_argument("--timeout_seconds", type=float, default=120.0, help="how long to wait for a rank")
    options, others = parser.parse_with_settings(arguments)
    for name in ("expect_gbps", "max_skew_seconds", "timeout_seconds"):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            raise InputError(f"--{name}: expected more than 0, got {value}")
    if others and not options.config:
        raise InputError(f"doctor: expected --config with settings of fit, got {others[0]} alone")
    return options, others


def doctor_command(arguments: list[str], read_settings: Callable[[list[str]], Mapping[str, Any]]) -> int:
    """Prints the lines and returns the status: 0, or 1 where something fails.

    Args:
        arguments: of the command line.
        read_settings: reads what ``fit`` would run with (`data`, `trainer`) from ``--config`` and the settings behind it,
            without building anything.

    Raises:
        InputError: options that are none, or, in a process that is alone, a config that is none.
    """
    options, others = parse(arguments)
    place = Place.from_environment()
    try:
        ranks = Ranks(place, options.timeout_seconds)
    except LostRanksError as error:
        _tell(error, place)
        return 1
    examination = _Examination(options, ranks)
    try:
        examination.run(others, read_settings)
    except LostRanksError as error:
        _tell(error, place)
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        ranks.leave()
    return examination.end()


def _tell(error: LostRanksError, place: Place) -> None:
    """The first rank speaks for all whom it has heard from; who has not heard from it speaks for itself."""
    if place.rank == 0 or isinstance(error, FirstRankLostError):
        print(Finding("FAIL", "ranks", str(error)), file=sys.stdout if place.rank == 0 else sys.stderr, flush=True)


class _Examination:
    """All checks, one after the other, and the lines so far."""

    def __init__(self, options: Namespace, ranks: Ranks) -> None:
        self.options, self.ranks = options, ranks
        self.found: list[Finding] = []

    def report(self, found: list[Finding]) -> None:
        self.found += found
        if found and self.ranks.place.rank == 0:
            print(*found, sep="\n", flush=True)

    def end(self) -> int:
        """The last line, and the status."""
        count = Counter(one.level for one in self.found)
        hosts, size = sorted(set(self.ranks.hosts)), self.ranks.place.world_size
        where = f"{hosts[0]}" if len(hosts) == 1 else f"{len(hosts)} hosts ({', '.join(hosts)})"
        if self.ranks.place.rank == 0:
            print(
                f"{size} process{'es' * (size > 1)} on {where}: {count['ok']} ok, {count['warn']} warn, {count['FAIL']} FAIL"
            )
        return 1 if count["FAIL"] else 0

    def run(self, others: list[str], read_settings: Callable[[list[str]], Mapping[str, Any]]) -> None:
        """Raises LostRanksError where a rank is gone; what was found before is reported."""
        ranks, options = self.ranks, self.options
        settings: Mapping[str, Any] | None = None
        if options.config:
            words = [*(word for path in options.config for word in ("--config", path)), *others]
            if ranks.place.world_size == 1:
                settings = read_settings(words)
            else:
                fact: Fact = {}
                settings, fact = _read_settings(words, read_settings)
                found = failures("config", ranks.exchange("config", fact), ranks)
                self.report(found)
                if found:
                    return
        self.report(judge_versions(ranks.exchange("versions", measure_versions(settings)), ranks))
        accelerator = str(settings["trainer"]["accelerator"]) if settings is not None else "auto"
        devices = ranks.exchange("devices", _attempt(lambda: {"count": 0, **measure_devices(ranks, accelerator)}))
        self.report(judge_devices([{"count": 0, **fact} for fact in devices], ranks))
        self.report(judge_limits(ranks.exchange("limits", measure_limits()), ranks))
        self._check_shards(settings)
        self._check_folder(settings)
        if ranks.place.world_size > 1:
            on_gpu = all(fact.get("count") and not fact.get("error") for fact in devices)
            group = check_group(ranks, on_gpu)
            self.report(group)
            if any(one.level == "FAIL" for one in group):
                return
            self.report(check_clocks(ranks, options.max_skew_seconds))
            self.report(check_bandwidth(ranks, on_gpu, options.expect_gbps))

    def _check_shards(self, settings: Mapping[str, Any] | None) -> None:
        patterns = patterns_of(self.options, settings)
        if patterns:
            fact = _attempt(lambda: measure_shards(patterns, self.ranks.place.rank))
            self.report(judge_shards(self.ranks.exchange("shards", fact), self.ranks))
        elif settings is not None and settings["data"]["dataset"] is not None:
            self.report([Finding("ok", "shards", f"data.dataset {settings['data']['dataset']} writes its own")])

    def _check_folder(self, settings: Mapping[str, Any] | None) -> None:
        folder = self.options.out
        if folder is None and settings is not None:
            folder = Path(settings["trainer"]["default_root_dir"] or "runs/latest")
        if folder is not None:
            self.report(check_folder(folder.absolute(), self.ranks))


def _read_settings(
    words: list[str], read_settings: Callable[[list[str]], Mapping[str, Any]]
) -> tuple[Mapping[str, Any] | None, Fact]:  # fmt: skip
    """Settings, or why there are none: on one node the file may be missing."""
    printed = StringIO()
    try:
        with redirect_stderr(printed):
            return read_settings(words), {}
    except SystemExit:  # the parser prints its error and exits
        return None, {"error": _one_line(printed.getvalue().strip().removeprefix("error: "))}
    except (InputError, OSError, UnicodeDecodeError) as error:
        return None, {"error": _one_line(error)}
