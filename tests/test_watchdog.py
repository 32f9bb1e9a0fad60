"""A process that stands still, or is gone, is named, and the others end."""

import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch.distributed

from mmprefix.data.shards import write_shard
from mmprefix.training.watchdog import Beat, Watchdog, lost_process, silent, slowest, within
from tests.conftest import colour_record
from tests.test_resume import fit


class Stuck(pl.Callback):
    """One rank sleeps, or is stopped as by a debugger, at a step."""

    def __init__(self, rank, step, how):
        self.rank, self.step, self.how = rank, step, how

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if (trainer.global_rank, trainer.global_step) == (self.rank, self.step):
            self.stand_still()

    def stand_still(self):
        if self.how == "sleep":
            time.sleep(600)
        os.kill(os.getpid(), getattr(signal, self.how))


def beat(rank, moves, count=1):
    return Beat(rank, "node", 100 + rank, moves, f"step {moves}", count)


def test_who_is_blamed():
    beats = {0: beat(0, 7), 1: beat(1, 6), 2: beat(2, 7)}
    assert slowest(beats) == [beats[1]]
    assert slowest({0: beat(0, 7), 2: beat(2, 7)}) == [beat(0, 7), beat(2, 7)]
    later = {0: beat(0, 7, 2), 1: beat(1, 6, 2), 2: beat(2, 7, 1)}
    assert silent(beats, later) == [later[2]]
    assert str(beats[1]) == "rank 1 (node, process 101)"


def test_only_what_the_watchdog_found_out_is_told():
    error = RuntimeError("gloo: Connection closed by peer\n [127.0.0.1]")
    assert lost_process(error) is None
    watchdog = Watchdog(1.0)
    watchdog.on_exception(SimpleNamespace(world_size=1), None, error)
    assert lost_process(error) is None, "there is one process only"
    elsewhere = RuntimeError("gloo: Connection closed by peer")
    watchdog.on_exception(SimpleNamespace(world_size=2), None, elsewhere)  # before training, or behind it
    assert lost_process(elsewhere) == "another process has ended; see what it says (gloo: Connection closed by peer)"
    error.add_note("lost process: rank 1 (node, process 101) has not been heard of since step 6")
    assert lost_process(error) == (
        "rank 1 (node, process 101) has not been heard of since step 6 (gloo: Connection closed by peer [127.0.0.1])"
    )


def test_a_run_that_stands_still_ends_with_a_name_and_a_stack(tmp_path):
    write_shard(tmp_path / "a.tar", [colour_record(n) for n in range(6)])
    settings = [
        "--data.batch_size",
        "1",
        "--trainer.devices",
        "2",
        "--trainer.strategy",
        "ddp",
        "--hang_timeout_minutes",
        "0.15",
    ]
    stuck = ("tests.test_watchdog.Stuck", {"rank": 1, "step": 2, "how": "sleep"})
    fit(tmp_path, "asleep", 0, *settings, callbacks=[stuck], status=1)
    text = (tmp_path / "asleep.err").read_text()
    assert "error: no step for 0." in text
    assert "rank 1 (" in text.split("error: no step for")[1].splitlines()[0]
    assert "has not moved on since the end of a batch, at step 2" in text
    assert "in stand_still" in text, "its stack"
    # Stopped altogether: it can say nothing itself.
    stuck = ("tests.test_watchdog.Stuck", {"rank": 1, "step": 2, "how": "SIGSTOP"})
    fit(tmp_path, "stopped", 0, *settings, callbacks=[stuck], status=1)
    text = (tmp_path / "stopped.err").read_text()
    line = next(line for line in text.splitlines() if line.startswith("error: no step for"))
    assert "rank 1 (" in line
    assert "has not been heard of since" in line
    pid, end = line.split("process ")[1].split(")")[0], time.monotonic() + 30
    while is_alive(pid) and time.monotonic() < end:
        time.sleep(0.1)
    assert not is_alive(pid), "nothing is left behind"


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_who_stands_still_has_its_say_before_the_others_end(monkeypatch, capfd):
    """On a busy node its look at the beats comes later, and the first to end takes all with it."""
    store, ends = torch.distributed.HashStore(), []
    # Seconds: who has no core for a moment is not to be taken for gone.
    ranks = [Watchdog(seconds / 60, interval_seconds=0.5) for seconds in (2.0, 5.0)]
    for rank, watchdog in enumerate(ranks):
        watchdog._own, watchdog._store, watchdog._ranks = beat(rank, 3 - rank), store, 2
        watchdog._beat()

        def end(rank=rank, watchdog=watchdog):
            ends.append((rank, capfd.readouterr().err))
            watchdog._ended.set()

        monkeypatch.setattr(watchdog, "_exit", end)
    threads = [threading.Thread(target=watchdog._watch) for watchdog in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    (_, text), (_, rest) = sorted(ends, key=lambda end: -len(end[1]))
    assert ends[0][1] == text, "all was told by the first end"
    assert not rest
    (line,) = [line for line in text.splitlines() if line.startswith("error: no step for")]
    assert "rank 1 (node, process 101) has not moved on since step 2" in line
    assert "error: where rank 1 (node, process 101) is:\n" in text


class CutOff:
    """A store on a host that is gone: torch's time-out does not end there."""

    def get(self, *arguments):
        threading.Event().wait()

    set = get


def cut_off(timeout_minutes):
    watchdog = Watchdog(timeout_minutes, interval_seconds=0.02)
    watchdog.patience, watchdog._store, watchdog._ranks = 0.1, CutOff(), 2
    return watchdog


@pytest.mark.parametrize(
    "message", ["Timed out waiting 30000ms for recv operation to complete", "Application timeout caused pair closure"]
)  # gloo's, which of them depends on what it was doing
def test_a_process_that_is_cut_off_says_so_in_time(message):
    """Found with two hosts and a wire that was cut: it waited on, in the store, for who was gone."""
    watchdog = cut_off(1.0)
    watchdog._thread = threading.Thread(target=str)
    watchdog._thread.start()
    error = RuntimeError(message)
    watchdog.on_exception(None, None, error)
    assert lost_process(error) == f"rank 0, which keeps the job's store, cannot be reached ({error})"
    with pytest.raises(KeyError, match="other"):
        within(1, lambda: {}["other"])
    assert within(1, lambda: 3) == 3


def test_without_its_store_a_run_ends_when_it_stands_still_and_not_before(monkeypatch, capsys):
    watchdog = cut_off(0.01)
    ended = threading.Event()

    def end(status):
        assert status == 1
        ended.set()
        watchdog._ended.set()

    monkeypatch.setattr(os, "_exit", end)
    thread = threading.Thread(target=watchdog._watch)
    thread.start()
    for step in range(20):
        watchdog._move(f"step {step}")
        assert not ended.wait(0.1), "it moves on"
    assert ended.wait(60)
    thread.join(60)
    assert capsys.readouterr().err.startswith(
        "error: no step for 0.0 minutes: rank 0, which keeps the job's store, cannot be reached: no answer within 0.1 s"
    )
