"""What an evaluation has done so far, on disk: the same command goes on with it after a kill.

``RUN/unfinished/STAGE-HASH/`` holds a file for each process, to which a line is appended for each window of batches that is
answered: its records, the sums of their losses, and what was said. The hash is that of everything the answers depend on, so
that another checkpoint or other settings have a folder of their own and never read this one. The folder goes when the
evaluation is complete; whoever wants to begin anew deletes it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmprefix.files import replacing
from mmprefix.packing import Reference

FOLDER = "unfinished"
_KEY_FILE = "key.json"


@dataclass(frozen=True)
class Part:
    """A window of batches that is done.

    Attributes:
        records: numbers of all its records, whose pictures could be decoded.
        losses: loss and count, of all and of each set; empty where there are no targets.
        predictions: of its samples, as `runner.Prediction`.
    """

    records: tuple[int, ...]
    losses: tuple[tuple[float, float], ...]
    predictions: tuple[tuple[Reference, str], ...]

    def to_line(self) -> str:
        """One line of JSON, with its end."""
        content = {"records": self.records, "losses": self.losses, "predictions": self.predictions}
        return json.dumps(content, ensure_ascii=False) + "\n"

    @classmethod
    def from_line(cls, line: str) -> Part | None:
        """The inverse; None of a line that was torn."""
        try:
            content = json.loads(line)
            predictions = []
            for fields, said in content["predictions"]:
                reference = Reference._make(fields)
                record, sample = reference.order
                reference = reference._replace(references=tuple(reference.references), order=(record, sample))
                predictions.append((reference, said))
            losses = tuple((loss, count) for loss, count in content["losses"])
            return cls(tuple(content["records"]), losses, tuple(predictions))
        except (ValueError, KeyError, TypeError):
            return None


class Progress:
    """The parts of one evaluation."""

    def __init__(self, run_folder: Path, stage: str, key: Mapping[str, str], rank: int = 0) -> None:
        """Writes nothing.

        Args:
            run_folder: of the run.
            stage: `validate`, `test` or `predict`.
            key: everything that answers and losses depend on, by a name that a user understands.
            rank: of this process.
        """
        self.stage, self.key, self.rank = stage, dict(key), rank
        digest = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()
        self.folder = run_folder / FOLDER / f"{stage}-{digest[:12]}"

    def read(self, num_records: int, at_least: int) -> list[Part]:
        """Parts of all processes that were, whatever their number, no record twice.

        Args:
            num_records: of the split.
            at_least: records that must be left to do: with none, a process would leave the others alone.
        """
        parts: list[Part] = []
        done: set[int] = set()
        for path in sorted(self.folder.glob("process-*.jsonl")):
            # Not `splitlines`, which also ends lines at characters that JSON leaves as they are.
            for line in path.read_bytes().decode("utf-8", "replace").split("\n"):
                part = Part.from_line(line)
                if part is not None and done.isdisjoint(part.records):
                    parts.append(part)
                    done.update(part.records)
        while parts and num_records - len(done) < at_least:
            done.difference_update(parts.pop().records)
        return parts

    def others(self) -> list[str]:
        """A line for each unfinished evaluation of the same stage that can't be used, with what differs."""
        lines = []
        for path in sorted(self.folder.parent.glob(f"{self.stage}-*/{_KEY_FILE}")):
            if path.parent == self.folder:
                continue
            try:
                other = dict(json.loads(path.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError):
                other = {}
            different = [name for name, value in self.key.items() if other.get(name) != value]
            what = ", another ".join(different)
            lines.append(f"{self.stage}: {path.parent} holds an unfinished evaluation with another {what}: not used")
        return lines

    def add(self, part: Part) -> None:
        """Appends a part to this process's file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / _KEY_FILE).exists():
            with replacing(self.folder / _KEY_FILE) as temporary:
                temporary.write_text(json.dumps(self.key, indent=1) + "\n", encoding="utf-8")
        with (self.folder / f"process-{self.rank}.jsonl").open("ab+") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # torn by the kill
                    file.write(b"\n")
            file.write(part.to_line().encode("utf-8"))

    def finish(self) -> None:
        """Removes what was kept. Each process calls it: those of other nodes may have disks of their own."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.folder.parent.is_dir() and not any(self.folder.parent.iterdir()):
            shutil.rmtree(self.folder.parent, ignore_errors=True)


def checkpoint_identity(path: Path) -> str:
    """Name, size and time of a checkpoint's file, or of all files of its folder: another one differs in its time."""
    files: Sequence[Path] = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps([path.name, *states]).encode()).hexdigest()
