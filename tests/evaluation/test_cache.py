import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vmoe.evaluation.cache import read_tensors, write_tensors

KEY = json.dumps({"weights": "abc", "size": 48})


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "cache" / "x.safetensors"
    write_tensors(file, KEY, {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, 2])}, {"left_out": ["x.jpg"]})
    return file


def test_what_was_written_is_read(file):
    tensors, notes = read_tensors(file, KEY)
    assert tensors["a"].equal(torch.arange(6.0).view(2, 3))
    assert tensors["b"].equal(torch.tensor([1, 2]))
    assert notes == {"left_out": ["x.jpg"]}
    assert [path.name for path in file.parent.iterdir()] == [file.name]  # nothing half-written stays behind


def test_the_key_lies_in_the_file_in_clear(file):
    with safe_open(file, "pt") as stream:
        assert json.loads(stream.metadata()["key"]) == {"weights": "abc", "size": 48}


def test_no_file_is_no_warning(tmp_path, caplog):
    assert read_tensors(tmp_path / "none.safetensors", KEY) is None
    assert not caplog.records


def truncate(file):
    file.write_bytes(file.read_bytes()[:-5])


def truncate_header(file):
    file.write_bytes(file.read_bytes()[:20])


def empty(file):
    file.write_bytes(b"")


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def put_another(file):
    save_file({"a": torch.ones(2)}, file)


@pytest.mark.parametrize("harm", [truncate, truncate_header, empty, flip_a_bit, put_another])
def test_a_broken_file_is_not_used(file, harm, caplog):
    harm(file)
    assert read_tensors(file, KEY) is None
    assert str(file) in caplog.text
    assert "made again" in caplog.text


def test_a_file_of_another_key_is_not_used(file, caplog):
    assert read_tensors(file, "another") is None
    assert "another key" in caplog.text


def test_a_file_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    (tmp_path / "taken").write_text("a file where the folder should be")
    write_tensors(tmp_path / "taken" / "x.safetensors", KEY, {"a": torch.ones(1)})
    assert "cannot be written" in caplog.text
