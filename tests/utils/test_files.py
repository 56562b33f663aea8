import os
from pathlib import Path

import pytest
from safetensors.torch import save_file

from vmoe.utils.files import atomic_file, can_write, local_path


def test_writers_of_one_file_do_not_meet(tmp_path):
    file = tmp_path / "table.json"
    with atomic_file(file) as one, atomic_file(file) as other:
        assert one != other
        assert one.parent == tmp_path
        assert one.suffix == ".json"
        one.write_text("one")
        other.write_text("other")
        assert not file.exists()
    assert file.read_text() == "one"  # it was finished last
    assert list(tmp_path.iterdir()) == [file]


def test_a_failure_leaves_what_was_there(tmp_path):
    file = tmp_path / "table.json"
    file.write_text("before")

    def fail():
        with atomic_file(file) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert file.read_text() == "before"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_permissions_are_those_that_the_user_asks_for(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with atomic_file(tmp_path / "empty.safetensors") as draft:
            save_file({}, draft)  # makes a file that is the user's alone
    finally:
        os.umask(before)
    assert (tmp_path / "empty.safetensors").stat().st_mode & 0o777 == mode


@pytest.mark.parametrize(
    ("checkpoint", "path"),
    [("runs/a", "runs/a"), ("local-dir:runs/a", "runs/a"), ("hf-hub:org/name", "name"), ("hf-hub:name@v1", "name@v1")],
)
def test_results_of_a_checkpoint_belong_beside_it_or_in_the_current_folder(checkpoint, path):
    assert local_path(checkpoint) == Path(path)


def test_what_can_be_written_is_known_without_making_anything(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "nothing").symlink_to(tmp_path / "gone")
    for name, expected in (
        ("file", True),
        ("new/dir/x.csv", True),
        (".", False),
        ("file/x.csv", False),
        ("nothing/x.csv", False),
        (f"{'x' * 300}/x.csv", False),
        (f"{'x' * 300}.csv", False),
        ("a\0b/x.csv", False),
    ):
        assert can_write(tmp_path / name) is expected, name
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "nothing"]
