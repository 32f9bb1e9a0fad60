"""Forked processes behave as those that `subprocess` starts."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests import forks

PROGRAM = """
import atexit, os, sys, time
how, *words = sys.argv[1:]
atexit.register(lambda: print("left", file=sys.stderr))
print(how, words, os.getcwd(), os.environ.get("WORD"), __name__)
if how == "text":
    sys.exit("a text")
if how == "wait":
    sys.stdout.flush()
    time.sleep(60)
if how == "raise":
    raise ValueError("by itself")
sys.exit(int(how))
"""


@pytest.fixture
def environment(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    return {**os.environ, "PYTHONPATH": str(tmp_path), "WORD": "of its own"}


@pytest.mark.parametrize("how", ["0", "3", "text", "raise"])
def test_a_forked_process_ends_as_one_that_was_started(how, environment, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    settings = {"env": environment, "cwd": tmp_path / "elsewhere", "text": True, "timeout": 60}
    expected = subprocess.run([sys.executable, "-m", "program", how, "a b"], capture_output=True, **settings)
    found = forks.run(["program", how, "a b"], **settings)
    assert found.returncode == expected.returncode
    assert found.stdout == expected.stdout
    assert found.stderr.splitlines()[-2:] == expected.stderr.splitlines()[-2:]
    assert found.stderr.splitlines()[-1] == "left"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signals_reach_it(number, environment, tmp_path):
    codes = []
    for start, command in ((subprocess.Popen, [sys.executable, "-m"]), (forks.Process, [])):
        process = start([*command, "program", "wait"], env=environment, cwd=tmp_path, stdout=subprocess.PIPE,
                        stderr=subprocess.PIPE, text=True, start_new_session=True)  # fmt: skip
        assert process.stdout.readline().startswith("wait")
        assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.1)
        os.killpg(process.pid, number)
        assert process.communicate(timeout=60)[0] == ""
        codes.append(process.returncode)
    assert codes == [-number, -number]


def test_a_run_that_takes_too_long_is_killed(environment, tmp_path):
    start = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        forks.run(["program", "wait"], env=environment, cwd=tmp_path, timeout=1)
    assert time.monotonic() - start < 30


def test_output_goes_where_it_is_sent(environment, tmp_path, capfd):
    both = forks.Process(["program", "0"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    out, err = both.communicate(60)
    assert (out.splitlines()[-1], err) == ("left", None)
    assert forks.Process(["program", "0"], env=environment, stderr=subprocess.DEVNULL).wait(60) == 0
    out, err = capfd.readouterr()
    assert out.startswith("0 [] ")
    assert not err


def test_what_python_draws_when_it_starts_differs_by_turns(environment, tmp_path):
    """Of hashes, two in a row; of generators, all."""
    (tmp_path / "drawn.py").write_text(
        "import random, numpy\nprint(hash('a text'), random.random(), numpy.random.rand())"
    )
    drawn = []
    for _ in range(4):
        drawn.append(forks.run(["drawn"], env=environment, text=True, timeout=60).stdout.split())
    hashes, *generators = zip(*drawn, strict=True)
    assert hashes[0] != hashes[1] != hashes[2] != hashes[3]
    assert all(len(set(values)) == 4 for values in generators)


def test_a_starter_ends_its_children_and_is_replaced(environment, tmp_path):
    processes = [
        forks.Process(["program", "wait"], env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    for process in processes:
        assert process.stdout.readline().startswith("wait")
    starters = list(forks._starters.values())
    for starter in starters:
        starter._socket.shutdown(socket.SHUT_RDWR)  # as at the end of the tests' process
        starter._process.wait(60)
    for process in processes:
        assert process.stdout.read() == "", "it has ended, and nobody holds its output open"
        process.stdout.close()
    assert forks.run(["program", "0"], env=environment, timeout=60).returncode == 0
    assert forks.run(["program", "0"], env=environment, timeout=60).returncode == 0
    assert not set(starters) & set(forks._starters.values())


def test_a_child_that_ends_while_nobody_listens_harms_no_other(environment, tmp_path):
    """Its end and that of its connection come at once."""
    for process in (forks.Process(["program", "wait"], env=environment, stdout=subprocess.PIPE) for _ in range(2)):
        assert process.stdout.readline().startswith(b"wait")
        for each in forks._starters.values():
            os.kill(each._process.pid, signal.SIGSTOP)
        os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.2)
        process._ended.close()
        for each in forks._starters.values():
            os.kill(each._process.pid, signal.SIGCONT)
        process.stdout.close()
    assert [forks.run(["program", "0"], env=environment, timeout=60).returncode for _ in range(2)] == [0, 0]
    assert all(starter.is_alive() for starter in forks._starters.values())


RANKS = """
import json, os, subprocess, sys
from lightning.pytorch.strategies.launchers import subprocess_script
rank = os.environ.get("LOCAL_RANK", "0")
line = rank, os.getppid() == int(os.environ.get("FIRST", "0")), os.environ["WORD"], os.getcwd(), sys.argv[1:]
os.write(1, (" ".join(map(str, line)) + "\\n").encode())  # at once: lines of three processes
if "alone" in sys.argv:
    print(subprocess_script.subprocess is subprocess)
elif rank == "0":
    ranks = [
        subprocess_script.subprocess.Popen([], env={**os.environ, "LOCAL_RANK": str(n), "FIRST": str(os.getpid())}, cwd=None)
        for n in (1, 2)
    ]
    ranks[1].send_signal(9)
    while any(each.poll() is None for each in ranks):
        pass
    print([each.returncode for each in ranks])
if rank == "2":
    sys.stdin.close()
    import time
    time.sleep(60)
sys.exit(int(rank) + 3)
"""


def test_ranks_are_forked_with_their_own_environment(environment, tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    words = ["ranks", "--trainer.devices", "3"]
    found = forks.run(words, env=environment, cwd=tmp_path, text=True, timeout=60)
    lines = found.stdout.splitlines()
    assert found.returncode == 3, found.stderr
    rest = f"of its own {tmp_path} ['--trainer.devices', '3']"
    assert lines[0] == f"0 False {rest}"
    assert f"1 True {rest}" in lines
    assert "[4, -9]" in lines
    assert set(lines) - {lines[0], f"1 True {rest}", "[4, -9]"} <= {f"2 True {rest}"}, "killed before or after it spoke"
    assert not found.stderr


def test_ranks_that_nobody_wants_end(environment, tmp_path):
    """And hold no output open."""
    (tmp_path / "ranks.py").write_text(RANKS)
    found = forks.run(
        ["ranks", "--trainer.devices", "2", "alone"], env=environment, cwd=tmp_path, text=True, timeout=60
    )
    assert found.stdout.splitlines()[1:] == ["False"]
    started_otherwise = {**environment, "RANK": "0"}
    words = ["ranks", "--trainer.devices", "2", "alone"]
    found = forks.run(words, env=started_otherwise, cwd=tmp_path, text=True, timeout=60)
    assert found.stdout.splitlines()[1:] == ["True"], "none is forked"
