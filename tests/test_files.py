import pytest

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
