"""Processes that wait for one that will not come: who it is, where it is, and an end.

Each process writes a beat to the job's key-value store every few seconds: how often its training has moved on, and what it
does. Who has not moved for the time-out reads those of all. The process that has moved the least is the one that the others
wait for; it writes the stacks of its threads itself, unless its beats have stopped as well. Then all of them end.
"""

from __future__ import annotations

import faulthandler
import json
import os
import queue
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch.distributed

_LOST = re.compile(
    r"gloo|nccl|connection (?:closed|reset)|pair closure|broken pipe|timed out|socket|TCPStore|DistNetwork",
    re.IGNORECASE,
)
_NOTE = "lost process: "
_TOLD = "mmprefix/told"
_ENDED = "another process has ended; see what it says"
_NO_STORE = "rank 0, which keeps the job's store, cannot be reached"

Result = TypeVar("Result")


@dataclass
class Beat:
    """What a process says of itself.

    Attributes:
        rank: of all processes.
        host: its node.
        pid: on that node.
        moves: how often training has moved on.
        doing: what it does since.
        count: of beats.
    """

    rank: int
    host: str
    pid: int
    moves: int = 0
    doing: str = "starting"
    count: int = 0

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, process {self.pid})"


def slowest(beats: Mapping[int, Beat]) -> list[Beat]:
    """Those who moved on least; all, where all moved alike."""
    least = min(beat.moves for beat in beats.values())
    return [beat for beat in beats.values() if beat.moves == least]


def silent(earlier: Mapping[int, Beat], later: Mapping[int, Beat]) -> list[Beat]:
    """Those who did not write between two looks."""
    return [beat for rank, beat in later.items() if rank in earlier and earlier[rank].count == beat.count]


def within(seconds: float, ask: Callable[[], Result]) -> Result:
    """What a question to the store gives.

    The store's own time-out is none where its host is cut off: when it is over, the store tells the server so, and waits for
    the answer to that without end. Who asked is left behind in a thread then.

    Raises:
        TimeoutError: no answer in time.
    """
    answers: queue.SimpleQueue[tuple[Result | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            answers.put((ask(), None))
        except BaseException as error:
            answers.put((None, error))

    threading.Thread(target=run, name="store", daemon=True).start()
    try:
        answer, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if error is not None:
        raise error
    return answer  # type: ignore[return-value]


class Watchdog(pl.Callback):
    """Ends a run of several processes that stands still."""

    def __init__(self, timeout_minutes: float, interval_seconds: float = 1.0) -> None:
        """Settings.

        Args:
            timeout_minutes: how long training may not move on: a step, a batch of validation, a checkpoint.
            interval_seconds: from beat to beat.
        """
        self.timeout = timeout_minutes * 60
        self.interval = min(interval_seconds, self.timeout / 4)
        self.patience = 10.0
        """Seconds for an answer of the store; busy nodes have taken some."""
        self._moved = time.monotonic()
        self._own = Beat(0, os.uname().nodename, os.getpid())
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._store: Any = None
        self._launcher: Any = None
        self._ranks = 1

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts to watch, where there is somebody to wait for."""
        if trainer.world_size == 1 or self._thread is not None:
            return
        self._launcher = trainer.strategy.launcher
        self._own.rank, self._ranks = trainer.global_rank, trainer.world_size
        # A connection of its own: on the job's own one the other thread may be waiting.
        self._store = torch.distributed.distributed_c10d._get_default_store().clone()
        self._store.set_timeout(timedelta(seconds=self.patience / 2))
        self._move("starting")
        self._beat()
        trainer.strategy.barrier("watchdog")  # from here on all have a beat
        self._ended.clear()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def _move(self, doing: str) -> None:
        self._own.doing, self._moved = doing, time.monotonic()
        self._own.moves += 1

    def _beat(self) -> None:
        self._own.count += 1
        content = json.dumps(asdict(self._own))
        within(self.patience, lambda: self._store.set(f"mmprefix/beat/{self._own.rank}", content))

    def _beats(self) -> dict[int, Beat]:
        def read() -> dict[int, Beat]:
            texts = [self._store.get(f"mmprefix/beat/{rank}") for rank in range(self._ranks)]
            return {rank: Beat(**json.loads(text)) for rank, text in enumerate(texts)}

        return within(self.patience, read)

    def _watch(self) -> None:
        while not self._ended.wait(self.interval):
            still = time.monotonic() - self._moved
            try:
                self._beat()
                if still > self.timeout:
                    beats = self._beats()
                    for _ in range(3):  # those who are there go on saying so
                        self._ended.wait(self.interval)
                        self._beat()
                    self._end(still, beats, self._beats())
            except (RuntimeError, OSError) as error:  # torch's own are RuntimeErrors
                # As long as training moves on, it is the store's affair.
                if still > self.timeout and not self._ended.is_set():
                    reason = " ".join(str(error).split())[:150]
                    self._say(f"no step for {still / 60:.1f} minutes: {_NO_STORE}: {reason}")
                    self._exit()

    def _end(self, still: float, before: Mapping[int, Beat], now: Mapping[int, Beat]) -> None:
        gone = silent(before, now)
        blamed = gone or slowest(now)
        if self._own.rank == min(set(now) - {beat.rank for beat in gone}, default=0):
            for beat in blamed[:8]:
                what = "has not been heard of since" if beat in gone else "has not moved on since"
                self._say(f"no step for {still / 60:.1f} minutes: {beat} {what} {beat.doing}")
        if any(beat.rank == self._own.rank for beat in blamed) or self._own.rank == 0:
            self._say(f"where {self._own} is:")
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
        sys.stderr.flush()
        self._wait_for([rank for rank, beat in now.items() if beat not in gone])
        self._exit()

    def _wait_for(self, ranks: Sequence[int]) -> None:
        """Until all have said what they know: who started them may end them with the first."""
        end = time.monotonic() + self.patience
        try:
            within(self.patience, lambda: self._store.set(f"{_TOLD}/{self._own.rank}", ""))
            while not within(self.patience, lambda: self._store.check([f"{_TOLD}/{rank}" for rank in ranks])):
                self._beat()  # whose look comes later must not take this one for gone
                if self._ended.wait(self.interval / 4) or time.monotonic() > end:
                    return
        except (RuntimeError, OSError):
            pass  # the store has ended with rank 0, which waited for this one, too

    def _exit(self) -> None:
        if hasattr(self._launcher, "kill"):  # Lightning's own: one that was stopped would outlast its parent
            self._launcher.kill(signal.SIGKILL)
        os._exit(1)

    def _say(self, text: str) -> None:
        print(f"error: {text}", file=sys.stderr, flush=True)

    def _stop(self) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join(timeout=self.interval)
            self._thread = None

    # What counts as moving on

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """A batch was loaded."""
        self._move(f"the start of the batch after step {trainer.global_step}")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """A batch was learned from."""
        self._move(f"the end of a batch, at step {trainer.global_step}")

    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """A batch was loaded."""
        self._move(f"the start of a validation batch, at step {trainer.global_step}")

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """A batch was scored."""
        self._move(f"the end of a validation batch, at step {trainer.global_step}")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Checkpoints follow."""
        self._move(f"the end of an epoch, at step {trainer.global_step}")

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops to watch."""
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Finds out who is gone, where that is why a process could not go on."""
        watches = self._thread is not None
        if not watches and trainer.world_size == 1:
            return
        if isinstance(exception, RuntimeError) and _LOST.search(str(exception)):
            exception.add_note(_NOTE + (self._missing() if watches else _ENDED))
        if watches:
            self._stop()

    def _missing(self) -> str:
        try:
            before = self._beats()
            time.sleep(2 * self.interval)
            gone = silent(before, self._beats())
        except (RuntimeError, OSError):
            return _NO_STORE
        if not gone:
            return "a process, though all of them are still there; see what they say"
        return ", ".join(f"{beat} has not been heard of since {beat.doing}" for beat in gone[:8])


def lost_process(error: BaseException) -> str | None:
    """Who was gone when a process could not go on, in one line; None where it stopped for another reason."""
    notes = [note for note in getattr(error, "__notes__", []) if note.startswith(_NOTE)]
    if not notes:
        return None
    return f"{notes[0].removeprefix(_NOTE)} ({' '.join(str(error).split())[:200]})"
