"""The scripts that start training on clusters, run with stand-ins for SLURM and for the ranks: what they start, and how they end."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from mmprefix.cli import run

ROOT = Path(__file__).parents[1]
SBATCH, TORCHRUN, JOBSET = (
    ROOT / "scripts" / name for name in ("slurm/train.sbatch", "torchrun.sh", "k8s/jobset.yaml")
)
CONFIGS = ["--config", str(ROOT / "configs" / "digits.yaml"), "--config", str(ROOT / "configs" / "fsdp.yaml")]


def stand_in(folder, name, program):
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{program}\n")
    path.chmod(0o755)
    return path


def assert_settings_exist(arguments, capfd):
    """`fit` would take them."""
    capfd.readouterr()
    try:
        status = run(["fit", *arguments, "--print_config"])
    except SystemExit as exit_:
        status = exit_.code
    out, err = capfd.readouterr()
    assert not status, err
    return yaml.safe_load(out)


@pytest.mark.parametrize("script", [SBATCH, TORCHRUN], ids=lambda path: path.name)
def test_scripts_parse(script):
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", script], check=True)


def sbatch_options():
    """sbatch reads its lines up to the first command, and no further."""
    found = []
    for line in SBATCH.read_text().splitlines():
        if line.startswith("#SBATCH"):
            found.append(line.removeprefix("#SBATCH").strip())
        elif line and not line.startswith("#"):
            return found
    raise AssertionError("no command")


def test_sbatch_asks_for_what_it_relies_on():
    assert {"--signal=USR1@120", "--requeue", "--open-mode=append"} <= set(sbatch_options())
    assert SBATCH.read_text().count("\n#SBATCH") == len(sbatch_options()), "none where sbatch does not look"
    assert not any("gpus-per-task" in option for option in sbatch_options()), "each process must see all of its node"


def submit(tmp_path, status, restarts=None, doctor=0, **settings):
    """Runs the batch script; `srun` and `scontrol` write down how they were called. Returns status and calls."""
    log = tmp_path / "calls"
    log.unlink(missing_ok=True)
    stand_in(tmp_path, "srun", f'echo "srun $MASTER_ADDR $MASTER_PORT $SRUN_CPUS_PER_TASK $*" >>{log}\n'
             f'[[ "$*" == *" doctor "* ]] && exit {doctor}\nexit {status}')  # fmt: skip
    stand_in(tmp_path, "scontrol", f'echo "scontrol $*" >>{log}\necho node7\necho node8')
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "1234567", "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "8", "SLURM_CPUS_PER_TASK": "12", **settings,
    }  # fmt: skip
    if restarts is not None:
        environment["SLURM_RESTART_COUNT"] = str(restarts)
    done = subprocess.run(["bash", SBATCH, *CONFIGS], env=environment, capture_output=True, text=True)
    return done.returncode, log.read_text().splitlines()


def test_batch_script_starts_doctor_and_fit(tmp_path, capfd):
    status, (hosts, doctor, fit) = submit(tmp_path, 0)
    assert status == 0
    assert hosts == "scontrol show hostnames node[7-8]"
    assert doctor == f"srun node7 19567 12 python -m mmprefix doctor {' '.join(CONFIGS)}"
    before, after = fit.split(" python -m mmprefix fit ")
    assert before == "srun node7 19567 12 --kill-on-bad-exit=0 --wait=600"
    settings = assert_settings_exist(after.split(), capfd)
    assert (settings["trainer"]["num_nodes"], settings["trainer"]["devices"]) in ((2, 8), (2, "8"))
    assert settings["ckpt_path"] == "last"


def test_batch_script_ends_by_exit_status(tmp_path):
    requeue = "scontrol requeue 1234567"
    for ended, again in ((0, False), (1, False), (2, False), (75, True), (138, True), (137, False)):
        status, calls = submit(tmp_path, ended, DOCTOR="0")
        assert status == ended
        assert (calls[-1] == requeue) is again
        assert sum("doctor" in call for call in calls) == 0
    status, calls = submit(tmp_path, 75, restarts=3, MASTER_ADDR="10.0.0.1", MASTER_PORT="5")
    assert [call.split(" -m mmprefix ")[0].split(" --")[0] for call in calls] == ["srun 10.0.0.1 5 12", requeue], (
        "no doctor again"
    )
    status, calls = submit(tmp_path, 0, doctor=1)
    assert status == 1
    assert not any(" fit " in call for call in calls), "nothing is trained on nodes that fail"


RANK = """\
if [ "$2" = torch.distributed.run ]; then exec {python} "$@"; fi
echo "$LOCAL_RANK $TORCHELASTIC_RESTART_COUNT $WORLD_SIZE $TORCHELASTIC_USE_AGENT_STORE $*" >>{folder}/calls
{program}"""


def torchrun(tmp_path, program, processes=2, **settings):
    """Starts the script with a program in the place of each rank."""
    python = stand_in(tmp_path, "python", RANK.format(python=sys.executable, folder=tmp_path, program=program))
    (tmp_path / "calls").unlink(missing_ok=True)
    environment = {**os.environ, "PYTHON": str(python), "PROCESSES": str(processes), "OMP_NUM_THREADS": "1", **settings}
    return subprocess.Popen(["bash", TORCHRUN, *CONFIGS], env=environment, stderr=subprocess.PIPE, text=True)


def calls(tmp_path):
    path = tmp_path / "calls"
    return sorted(path.read_text().splitlines()) if path.exists() else []


def test_torchrun_passes_settings_of_fit(tmp_path, capfd):
    process = torchrun(tmp_path, "exit 0")
    assert process.wait(120) == 0, process.stderr.read()
    first, second = calls(tmp_path)
    assert first.split(" -m mmprefix ")[0] == "0 0 2 False", "the ranks' own store"
    assert second.startswith("1 0 2 ")
    settings = assert_settings_exist(first.split(" fit ")[1].split(), capfd)
    assert (settings["trainer"]["num_nodes"], int(settings["trainer"]["devices"])) == (1, 2)
    process = torchrun(tmp_path, "exit 1", COMMAND="doctor")
    assert process.wait(120) == 1
    assert calls(tmp_path)[0].endswith(f"-m mmprefix doctor {' '.join(CONFIGS)}")
    assert len(calls(tmp_path)) == 2, "once"


@pytest.mark.parametrize(
    ("program", "status", "starts"),
    [
        # Dies, is started again, ends.
        ('[ "$TORCHELASTIC_RESTART_COUNT$LOCAL_RANK" = 01 ] && kill -9 $$; [ "$TORCHELASTIC_RESTART_COUNT" = 0 ] && sleep 60; exit 0', 0, 2),
        # Saved: started again.
        ('[ "$TORCHELASTIC_RESTART_COUNT" = 0 ] && exit 75; exit 0', 0, 2),
        ("exit 75", 75, 2),
        # Bad input: not again.
        ("exit 2", 2, 1),
        ('[ "$LOCAL_RANK" = 0 ] && exit 2; sleep 60', 2, 1),
        ("exit 1", 1, 2),
        ("kill -9 $$", 1, 2),
    ],
)  # fmt: skip
def test_torchrun_ends_by_exit_status(tmp_path, program, status, starts):
    process = torchrun(tmp_path, program, MAX_RESTARTS="1")
    assert process.wait(120) == status, process.stderr.read()
    assert len([call for call in calls(tmp_path) if call.startswith("0 ")]) == starts


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], ids=lambda number: number.name)
def test_signals_to_the_script_reach_the_ranks(tmp_path, number):
    name, code = number.name.removeprefix("SIG"), 130 if number == signal.SIGINT else 75
    process = torchrun(
        tmp_path, f"trap 'sleep 1; exit {code}' {name}; while true; do sleep 0.1; done", MAX_RESTARTS="3"
    )
    end = time.monotonic() + 60
    while len(calls(tmp_path)) < 2:
        assert time.monotonic() < end
        time.sleep(0.1)
    time.sleep(0.5)
    process.send_signal(number)
    assert process.wait(60) == code, process.stderr.read()
    assert len(calls(tmp_path)) == 2, "who was told to stop is not started again"


def test_jobset_is_of_one_piece(capfd):
    jobset = yaml.safe_load(JOBSET.read_text())
    name, (group,) = jobset["metadata"]["name"], jobset["spec"]["replicatedJobs"]
    job = group["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert environment["HEAD"] == f"{name}-{group['name']}-0-0.{name}:29400", "the first pod's name"
    assert job["completions"] == job["parallelism"] == int(environment["NNODES"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(environment["PROCESSES"])
    assert (job["backoffLimit"], pod["restartPolicy"], environment["MAX_RESTARTS"]) == (0, "Never", "0")
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule == {
        "action": "FailJob",
        "onExitCodes": {"containerName": container["name"], "operator": "In", "values": [2]},
    }
    assert jobset["spec"]["failurePolicy"]["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    script = TORCHRUN.read_text()
    assert all(re.search(rf"^{variable}=\$", script, re.MULTILINE) for variable in environment), "the script knows them"
    # What the image has.
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert "WORKDIR /opt/mmprefix" in dockerfile
    assert container["command"] == ["/opt/mmprefix/scripts/torchrun.sh"]
    assert "COPY scripts/torchrun.sh scripts/torchrun.sh" in dockerfile
    assert "COPY configs configs" in dockerfile
    places = {"/work/mine.yaml": "configs/digits.yaml", "/opt/mmprefix/": ""}
    arguments = container["args"]
    for place, here in places.items():
        arguments = [argument.replace(place, f"{ROOT}/{here}") for argument in arguments]
    assert "class_path: mmprefix.training.fsdp" in yaml.safe_dump(assert_settings_exist(arguments, capfd))
