import errno
import os
import threading

import pytest

from mmprefix.arguments import keep_inputs
from mmprefix.errors import InputError
from mmprefix.files import replacing, set_aside


def test_file_is_complete_or_untouched(tmp_path):
    path = tmp_path / "sub" / "a.txt"
    with replacing(path) as temporary:
        temporary.write_text("one")
        assert not path.exists()
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("half of tw")
        raise KeyboardInterrupt
    assert path.read_text() == "one"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_folder_is_replaced_as_a_whole(tmp_path):
    folder = tmp_path / "model"
    for names in (("a", "b"), ("c",)):
        with replacing(folder) as temporary:
            temporary.mkdir()
            for name in names:
                (temporary / name).write_text(name)
    assert [p.name for p in folder.iterdir()] == ["c"]
    with pytest.raises(OSError, match="full"), replacing(folder) as temporary:
        temporary.mkdir()
        (temporary / "d").write_text("d")
        raise OSError("full")
    assert [p.name for p in folder.iterdir()] == ["c"]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_names_the_file(tmp_path):
    with pytest.raises(OSError, match=r"No space.*a\.txt"), replacing(tmp_path / "a.txt"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_does_not_take_a_folders_place(tmp_path):
    folder = tmp_path / "report.html"
    folder.mkdir()
    (folder / "mine").write_text("kept")
    with pytest.raises(IsADirectoryError, match="expected a file or nothing, found a folder"), replacing(folder) as new:
        new.write_text("page")
    assert (folder / "mine").read_text() == "kept"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_set_aside_takes_the_next_free_number(tmp_path):
    folder = tmp_path / "run"
    assert set_aside(folder) is None
    folder.mkdir()
    assert set_aside(folder) is None, "an empty folder is nothing to keep"
    for number in (1, 2):
        folder.mkdir(exist_ok=True)
        (folder / "x").write_text(str(number))
        assert set_aside(folder) == tmp_path / f"run.{number}"
    assert (tmp_path / "run.1" / "x").read_text() == "1"


def test_behind_a_link_its_target_is_replaced_and_a_pipe_is_written_to(tmp_path):
    target, link, pipe = tmp_path / "target", tmp_path / "link", tmp_path / "pipe"
    target.write_text("old")
    link.symlink_to(target)
    with replacing(link) as temporary:
        temporary.write_text("new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    os.mkfifo(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    with replacing(pipe) as there:
        there.write_text("through it")
    reader.join(timeout=30)
    assert read == ["through it"]
    assert pipe.is_fifo()


def test_what_is_read_is_not_written(tmp_path):
    read, link = tmp_path / "read.json", tmp_path / "link.json"
    read.touch()
    link.symlink_to(read)
    keep_inputs("--json", tmp_path / "new.json", [read, None, tmp_path / "none"])
    for out in (read, link, tmp_path / "." / "read.json"):
        with pytest.raises(InputError, match="^--json: expected another file than what is read, got .*json$"):
            keep_inputs("--json", out, [None, read])
