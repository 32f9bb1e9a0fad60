"""Several runs of `fit` in the same processes of gloo: to start these takes longer than a tiny run."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from tests import forks
from tests.test_cli import ENVIRONMENT
from tests.test_resume import ROOT, lines_of, write_config


def fit_each(folder, num_processes, runs, callbacks=()):
    """Each of ``runs`` (name -> how often to save, arguments), one after the other, by processes as torchrun starts them.

    Returns:
        Of each, lines of `LogIds`, as `tests.test_resume.fit` has them. What was printed is in ``FIRST.out`` and ``FIRST.err``
        of each rank, FIRST being the first run's name; exit statuses are asserted to be 0.
    """
    found = run_each(folder, num_processes, runs, callbacks)
    for rank, (_, _, err) in enumerate(found):
        assert statuses(err) == [0] * len(runs), f"rank {rank}: {err}"
    return {name: lines_of(folder, name) for name in runs}


def run_each(folder, num_processes, runs, callbacks=(), timeout=900):
    """As `fit_each`; of each rank the status of the last run, and what was printed. After a run that fails with another status
    than 2, which all processes end with before they are out of step, come no others."""
    commands = []
    for name, (every, arguments) in runs.items():
        config = write_config(folder, name, every, callbacks)
        devices = ["--trainer.devices", num_processes, "--hang_timeout_minutes", 0]
        commands.append(
            ["fit", "--config", config, "--trainer.default_root_dir", folder / f"{name}-run", *devices, *arguments]
        )
    plan = folder / f"{next(iter(runs))}.plan.json"
    plan.write_text(json.dumps([[str(word) for word in command] for command in commands]))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(num_processes):
        torchrun = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": num_processes,
                    "LOCAL_WORLD_SIZE": num_processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                    "TORCHELASTIC_RUN_ID": "test"}  # fmt: skip
        environment = {
            **os.environ, **ENVIRONMENT, **({key: str(value) for key, value in torchrun.items()} if num_processes > 1 else {}),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src"), ENVIRONMENT.get("PYTHONPATH", "")]),
        }  # fmt: skip
        processes.append(forks.Process(
            ["tests.several", plan], env=environment, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        ))  # fmt: skip
    found = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=timeout)
            found.append((process.returncode, out, err))
    finally:
        for process in processes:
            process.kill()
    return found


def statuses(err):
    """Of each run, from what it printed."""
    return [int(line.removeprefix("status ")) for line in err.splitlines() if line.startswith("status ")]


def errors(err):
    """Lines of errors, as users see them."""
    return [line for line in err.splitlines() if line.startswith("error: ")]


if __name__ == "__main__":
    from mmprefix.cli import EXIT_BAD_INPUT, run

    for arguments in json.loads(Path(sys.argv[1]).read_text()):
        status = run(arguments)
        print(f"status {status}", file=sys.stderr)
        if status not in (0, EXIT_BAD_INPUT):
            break
    raise SystemExit(status)
