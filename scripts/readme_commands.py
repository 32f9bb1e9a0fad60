#!/usr/bin/env python3
"""Prints the n-th command block of the README (0: install and fit, 1: install and test).

CI runs what this prints, so that the README and CI cannot drift apart.
"""

import re
import sys
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"


def commands(text: str) -> list[str]:
    """Contents of the README's ```sh blocks, in order."""
    return [block.strip() for block in re.findall(r"^```sh\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)]


if __name__ == "__main__":
    blocks = commands(README.read_text())
    number = int(sys.argv[1]) if len(sys.argv) == 2 else -1
    if not 0 <= number < len(blocks):
        sys.exit(f"usage: readme_commands.py N, with N from 0 to {len(blocks) - 1}")
    print(blocks[number])
