import pytest

from vmoe.whole import whole_file


def test_writers_of_one_file_do_not_meet(tmp_path):
    file = tmp_path / "table.json"
    with whole_file(file) as one, whole_file(file) as other:
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
        with whole_file(file) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert file.read_text() == "before"
    assert list(tmp_path.iterdir()) == [file]
