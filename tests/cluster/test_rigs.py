"""The rigs as tests: `pytest tests/cluster -m cluster`, as root."""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.cluster
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("command", [["slurm.py", "--signals", "1"], ["netns.py"]], ids=lambda command: command[0])
def test_rig(command):
    done = subprocess.run([sys.executable, HERE / command[0], *command[1:]], capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip(done.stderr.strip().removeprefix("skipped: "))
    assert done.returncode == 0, done.stdout + done.stderr
