"""`doctor`: alone, with two gloo processes of which one is ill in many ways, and its judgements of GPUs that are not here."""

import io
import json
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import pytest

from mmprefix import doctor
from mmprefix.data.shards import write_shard
from mmprefix.doctor import (
    GIB,
    MIB,
    Finding,
    FirstRankLostError,
    Place,
    Ranks,
    bus_bandwidth,
    doctor_command,
    judge_bandwidth,
    judge_devices,
    judge_limits,
    judge_versions,
)
from mmprefix.errors import InputError
from tests.conftest import colour_record
from tests.test_cli import ENVIRONMENT, config, error_of  # noqa: F401

ROOT = Path(__file__).parents[1]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def settings_of(words):
    """In the place of the command line's reader: the words are the config's own path and its shards."""
    if "missing.yaml" in words:
        raise InputError("--config: expected a file, there is none at missing.yaml")
    return {"data": {"train": words[-1], "dataset": None}, "trainer": {"accelerator": "cpu", "default_root_dir": None}}


class Gone(BaseException):
    """A process that ends."""


def small_files():
    """A disk on which 1 MiB is left; Python ignores the signal of this limit."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, resource.RLIM_INFINITY))


def patched(name, rank):
    """What is wrong with rank 1 in a scenario, and what is different on both."""
    found = [
        mock.patch.object(doctor, "host_name", return_value=f"node{rank}"),
        mock.patch.object(doctor, "_CPU_SIZES", (MIB, 2 * MIB)),
    ]
    if name in ("folders apart", "full disk"):
        found.append(mock.patch.object(doctor, "_PATIENCE", 0.3))
    if rank == 0:
        return found
    if name == "versions":
        found.append(mock.patch("platform.python_version", return_value="2.7.18"))
    if name == "clock":
        found.append(mock.patch.object(doctor, "now", side_effect=lambda: time.time() - 7.5))
    if name == "gone":
        found.append(mock.patch.object(doctor, "measure_limits", mock.Mock(side_effect=Gone)))
    if name == "group":
        broken = mock.Mock(side_effect=RuntimeError("no interface"))
        found.append(mock.patch.object(doctor.dist, "init_process_group", broken))
    if name == "crash":
        found.append(mock.patch.object(doctor, "measure_shards", mock.Mock(side_effect=KeyError("what"))))
    return found


def scenarios(folder, ports):
    """Runs in each of two processes; writes status and output of each scenario."""
    rank, folder = int(os.environ["RANK"]), Path(folder)
    shards, others = str(folder / "shards"), str(folder / ("shards" if rank == 0 else "others"))
    arguments = {
        "well": ["--data", shards, "--out", str(folder / "new" / "run"), "--expect_gbps", "0.0001"],
        "missing shards": ["--data", shards if rank == 0 else str(folder / "nowhere")],
        "other shards": ["--data", others],
        "no folder": ["--out", str(folder / ("run" if rank == 0 else "file/run"))],
        "folders apart": ["--out", str(folder / f"run{rank}")],
        "full disk": ["--out", str(folder / "run")],
        "versions": [],
        "config": ["--config", "missing.yaml" if rank else "x.yaml", "--data.train", shards],
        "other config": ["--config", "x.yaml", "--data.train", others],
        "clock": [],
        "slow": ["--expect_gbps", "1e9"],
        "crash": ["--data", shards],
        "group": ["--timeout_seconds", "4"],
        "gone": ["--timeout_seconds", "2"],
        "absent": ["--timeout_seconds", "2"],
    }
    for (name, words), port in zip(arguments.items(), ports, strict=False):
        os.environ["MASTER_PORT"] = port
        os.environ["WORLD_SIZE"] = "4" if name == "absent" else "2"
        out, err, status = io.StringIO(), io.StringIO(), None
        with ExitStack() as stack:
            for patch in patched(name, rank):
                stack.enter_context(patch)
            stack.enter_context(redirect_stdout(out))
            stack.enter_context(redirect_stderr(err))
            if name == "full disk":
                unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
                small_files()
            # Together: a rank that was alone with the last scenario would be seconds ahead, and pause longer and longer
            # between its tries to reach the first, which waits for two.
            (folder / f"{name}.{rank}.ready").touch()
            for _ in range(6000):
                if (folder / f"{name}.{1 - rank}.ready").exists():
                    break
                time.sleep(0.01)
            start = time.monotonic()
            try:
                status = doctor_command(words, settings_of)
            except Gone:
                status = "gone"
            if name == "full disk":
                resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        result = {"status": status, "out": out.getvalue(), "err": err.getvalue(), "seconds": time.monotonic() - start}
        (folder / f"{name}.{rank}.json").write_text(json.dumps(result))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Of each scenario and rank; a start of two processes costs some 20 s."""
    folder = tmp_path_factory.mktemp("doctor")
    write_shard(folder / "shards" / "a.tar", [colour_record(n) for n in range(5)])
    write_shard(folder / "others" / "a.tar", [colour_record(n) for n in range(6)])
    (folder / "file").write_text("no folder")
    program = "import sys; from tests.test_doctor import scenarios; scenarios(sys.argv[1], sys.argv[2:])"
    ports = [str(free_port()) for _ in range(20)]
    processes = []
    for rank in range(2):
        environment = {
            **ENVIRONMENT, "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "LOCAL_RANK": "0",
            "PYTHONPATH": os.pathsep.join([str(ROOT), ENVIRONMENT.get("PYTHONPATH", "")]),
        }  # fmt: skip
        command = [sys.executable, "-c", program, str(folder), *ports]
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    assert not list((folder / "run").glob(".*")) if (folder / "run").exists() else True, "nothing is left behind"
    assert not (folder / "new").exists(), "nor are folders that were not there"
    return lambda name: [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in range(2)]


def failing(result):
    return [line for line in result["out"].splitlines() if line.startswith("FAIL")]


def test_two_healthy_ranks(results):
    first, second = results("well")
    assert (first["status"], second["status"]) == (0, 0), first["out"]
    assert second["out"] == second["err"] == "", "the first rank speaks for all"
    lines = first["out"].splitlines()
    assert [line[:20].split()[0] for line in lines[:-1]] == ["ok"] * len(lines[:-1])
    names = [line[6:20].strip() for line in lines[:-1]]
    assert names == ["versions", "devices", "shared memory", "open files", "shards", "checkpoints", "process group",
                     "clock", "all-reduce", "all-gather"]  # fmt: skip
    assert "1 shard, 5 records; " in first["out"]
    assert lines[-1] == "2 processes on 2 hosts (node0, node1): 10 ok, 0 warn, 0 FAIL"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("missing shards", "shards          rank 1 (node1): --data: expected shards at"),
        ("other shards", "shards          expected one set of shards everywhere, got 5 records (index"),
        ("no folder", "checkpoints     rank 1 (node1): "),
        ("folders apart", "checkpoints     rank 1 (node1): "),
        ("full disk", "checkpoints     rank 0 (node0), rank 1 (node1): [Errno 27] File too large; /"),
        ("versions", "versions        expected one python everywhere, got "),
        ("config", "config          rank 1 (node1): --config: expected a file, there is none at missing.yaml"),
        ("other config", "versions        expected one config everywhere, got "),
        ("clock", "clock           rank 1 (node1): -7."),
        ("slow", "all-reduce      bus bandwidth in Gbit/s: "),
        ("crash", "shards          rank 1 (node1): KeyError: 'what'"),
        ("group", "process group   rank 1 (node1): RuntimeError: no interface; set GLOO_SOCKET_IFNAME"),
        ("gone", "ranks           1 of 2 ranks gave no answer within 2 s (limits): rank 1 (node1); look"),
        ("absent", "ranks           2 of 4 ranks did not come within 2 s: ranks 2-3; came from node0, node1;"),
    ],
)
def test_an_ill_rank_is_named(results, name, expected):
    first, second = results(name)
    assert first["status"] == 1
    assert second["status"] == ("gone" if name == "gone" else 1), "on every rank"
    assert any(line.startswith(f"FAIL  {expected}") for line in failing(first)), first["out"]
    assert second["err"] == "", "told once"
    if name in ("gone", "absent", "group"):
        assert first["seconds"] < 12
    assert "node1" in "".join(failing(first)) or name in ("slow", "full disk")


def test_what_else_ill_ranks_show(results):
    (slow, _), (apart, _), (versions, _) = results("slow"), results("folders apart"), results("versions")
    assert len(failing(slow)) == 2
    (links,) = [line for line in slow["out"].splitlines() if line.startswith("warn  links")]
    assert "node0 to node1" in links
    assert "node1 to node0" in links
    assert len(failing(apart)) == 2, "each misses the other's file"
    assert "does not show the file that rank 0 (node0) wrote" in apart["out"]
    assert failing(versions)[0].endswith(
        "2.7.18 on rank 1 (node1); start all ranks from one environment, checkout and config"
    )
    assert "ok    clock" in versions["out"], "the other checks go on"


def test_alone(config, capfd, tmp_path):  # noqa: F811
    words = ["doctor", "--config", str(config), "--trainer.default_root_dir", str(tmp_path / "run")]
    with mock.patch.object(doctor.dist, "init_process_group", side_effect=AssertionError("alone")):
        from mmprefix.cli import run

        assert run(words) == 0
        out = capfd.readouterr().out
        assert "\nok    shards          2 shards, 24 records; " in out
        assert out.splitlines()[-1].startswith("1 process on ")
        assert not (tmp_path / "run").exists()
        assert run([*words, "--out", str(config / "below a file")]) == 1
    out = capfd.readouterr().out
    assert f"\nFAIL  checkpoints     rank 0 ({doctor.host_name()}): [Errno 20] Not a directory" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--data.batch_size", "3"], "doctor: expected --config with settings of fit, got --data.batch_size alone"),
        (["--timeout_seconds", "0"], "--timeout_seconds: expected more than 0, got 0.0"),
        (["--expect_gbps", "nan"], "--expect_gbps: expected more than 0, got nan"),
    ],
)
def test_bad_options(capfd, words, message):
    status, line = error_of(capfd, "doctor", *words)
    assert status == 2
    assert message in line


def test_pipes_are_not_run(tmp_path, capsys):
    marker = tmp_path / "was run"
    write_shard(tmp_path / "a.tar", [colour_record(0)])
    assert doctor_command(["--data", f"{{pipe:touch '{marker}',{tmp_path}/a.tar}}"], settings_of) == 0
    out = capsys.readouterr().out
    assert "warn  shards          1 commands (pipe:) are not run here" in out
    assert "ok    shards          1 shard, 1 records" in out
    assert not marker.exists()


def test_where_a_process_is(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert Place.from_environment() == Place()
    slurm = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4", "SLURM_LOCALID": "1",
             "SLURM_JOB_ID": "123456", "SLURM_JOB_NAME": "train", "SLURM_NODELIST": "node[3-4]"}  # fmt: skip
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    assert Place.from_environment() == Place(), "a batch script is alone"
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    assert Place.from_environment() == Place(5, 8, 1, "node3", 15000 + 3456)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.delenv("MASTER_ADDR")
    with pytest.raises(InputError, match="doctor: expected MASTER_ADDR beside RANK and WORLD_SIZE, it is not set"):
        Place.from_environment()
    monkeypatch.setenv("MASTER_ADDR", "here")
    monkeypatch.setenv("MASTER_PORT", "5")
    assert Place.from_environment() == Place(2, 3, 0, "here", 5), "torchrun inside a job"


def test_a_first_rank_that_is_not_there():
    with pytest.raises(FirstRankLostError, match=r"rank 1 \(.*\): cannot reach rank 0 within 1 s at 127.0.0.1:"):
        Ranks(Place(1, 2, 0, "127.0.0.1", free_port()), timeout=1)


class CutOff:
    """A store on a host that is gone: torch's time-out does not end there."""

    def set(self, key, value):
        pass

    def wait(self, keys, timeout):
        threading.Event().wait()

    get = wait


def test_a_first_rank_that_is_cut_off():
    ranks = ranks_on("a", "b")
    ranks.place, ranks.store, ranks.timeout = Place(1, 2), CutOff(), 0.1
    with pytest.raises(FirstRankLostError, match=r"rank 0 did not answer rank 1 \(.*\) within 0.2 s \(versions\)"):
        ranks.exchange("versions", {})


def ranks_on(*hosts):
    ranks = Ranks(Place(), 1)
    ranks.hosts, ranks.place = list(hosts), Place(0, len(hosts))
    return ranks


def gpus(number, **kwargs):
    return {
        "count": 2, "names": ["H100"], "memory": [(79 * GIB, 80 * GIB)], "uuids": [f"GPU-{number}"],
        "no_peer_access": [], **kwargs,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ([gpus(n) for n in range(4)], ["ok: 2 x H100 on each host, 79.0 GiB free at least"]),
        ([gpus(0), gpus(0), gpus(0), gpus(1)], ["FAIL: ranks 0-1 (a) would share the GPU GPU-0; start one process for each GPU"]),
        ([gpus(0), gpus(1), gpus(2), {"count": 0}], ["FAIL: rank 3 (b): no GPU, while the others have some"]),
        ([gpus(0), {"count": 1, "error": "one too few"}, gpus(2), gpus(3)], ["FAIL: rank 1 (a): one too few"]),
        ([gpus(0), gpus(1), gpus(2), gpus(3, names=["A100"])], ["warn: rank 3 (b): A100 among H100: the slowest sets the pace"]),
        ([gpus(0), gpus(1), gpus(2, memory=[(60 * GIB, 80 * GIB)]), gpus(3)],
         ["warn: rank 2 (b): memory of a GPU is in use, 60.0 GiB are free; look for others with nvidia-smi"]),
        ([gpus(0, no_peer_access=[[0, 1], [1, 0]]), gpus(1), gpus(2), gpus(3)],
         ["warn: rank 0 (a): no peer access between GPUs 0-1, 1-0: they exchange through the host's memory"]),
        ([{"count": 0}] * 4, ["ok: no GPU: training runs on the CPU"]),
    ],
)  # fmt: skip
def test_judgement_of_gpus(facts, expected):
    found = judge_devices(facts, ranks_on("a", "a", "b", "b"))
    assert [f"{one.level}: {one.text}" for one in found] == expected


def test_too_few_visible_gpus(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    ranks = ranks_on("a", "a")
    ranks.place = Place(1, 2, local_rank=1)
    fact = doctor.measure_devices(ranks, "auto")
    assert "expected a GPU for each of the 2 processes of the host, got 1" in fact["error"]


def test_a_gpu_that_torch_cannot_use(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(doctor, "_driver_version", lambda: "535.1")
    assert "there is a driver 535.1, but torch" in doctor.measure_devices(ranks_on("a"), "auto")["error"]
    monkeypatch.setattr(doctor, "_driver_version", lambda: None)
    assert "no GPU and no driver" in doctor.measure_devices(ranks_on("a"), "gpu")["error"]
    assert doctor.measure_devices(ranks_on("a"), "auto")["error"] is None


def test_judgement_of_limits_and_versions():
    ranks = ranks_on("a", "b", "c")
    well = {"shared": 2 * GIB, "files": None}
    assert [one.level for one in judge_limits([well] * 3, ranks)] == ["ok", "ok"]
    found = judge_limits([well, {"shared": 64 * MIB, "files": 256}, well], ranks)
    assert [one.level for one in found] == ["warn", "warn"]
    assert found[0].text.startswith("rank 1 (b): 0.06 GiB free in /dev/shm")
    assert found[1].text.startswith("rank 1 (b): 256 files may be open, expected 1024")
    assert [one.level for one in judge_limits([{"shared": None, "files": 4096}] * 3, ranks)] == ["ok", "ok"]
    assert judge_versions([{"torch": "2"}] * 3, ranks) == [Finding("ok", "versions", "torch 2")]
    (found,) = judge_versions([{"torch": "2"}, {"torch": "2"}, {"torch": "3"}], ranks)
    assert found.text.startswith("expected one torch everywhere, got 2 on 2 of 3 ranks, 3 on rank 2 (c);")


def test_bus_bandwidth_is_that_of_a_ring():
    """Ring all-reduce of n ranks: n - 1 steps of reduce-scatter and n - 1 of all-gather, each of size / n bytes."""
    for n in (2, 3, 8):
        size, per_step = 960.0, 960.0 / n
        assert bus_bandwidth(size, 2.0, n, "all-reduce") == pytest.approx(2 * (n - 1) * per_step / 2.0)
        assert bus_bandwidth(size, 2.0, n, "all-gather") == pytest.approx((n - 1) * per_step / 2.0)
    facts = [{"seconds": [1.0, 0.1]}, {"seconds": [1.0, 0.2]}]  # the slowest rank counts: 32 MiB in 0.2 s
    found = judge_bandwidth("all-reduce", [MIB, 32 * MIB], facts, 1.0)
    assert (found.level, found.text) == ("ok", "bus bandwidth in Gbit/s: 0.00839 at 1 MiB, 1.34 at 32 MiB")
    assert judge_bandwidth("all-reduce", [MIB, 32 * MIB], facts, 1.5).level == "FAIL"
