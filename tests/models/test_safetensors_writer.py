"""Safetensors files that are written tensor by tensor."""

import pytest
import torch
from safetensors.torch import load_file

from vmoe.models.safetensors_writer import DTYPE_NAMES, write_one_by_one
from vmoe.models.serialization import StoredTensors


def test_every_type_of_number_and_shape_is_read_by_safetensors(tmp_path):
    wanted = {}
    for dtype in DTYPE_NAMES:
        for shape in ((), (0, 3), (3,), (2, 5)):
            wanted[f"{dtype} {shape}"] = torch.randint(0, 2, shape).to(dtype)
    file = tmp_path / "all.safetensors"
    shapes = {name: tensor.shape for name, tensor in wanted.items()}
    dtypes = {name: tensor.dtype for name, tensor in wanted.items()}
    write_one_by_one(file, shapes, dtypes, {"format": "pt"}, wanted.__getitem__)
    for found in (load_file(file), {name: StoredTensors(file).read(name) for name in wanted}):
        assert found.keys() == wanted.keys()
        assert all(found[n].dtype == t.dtype and torch.equal(found[n], t) for n, t in wanted.items())


def test_an_error_leaves_the_file_as_it_was(tmp_path):
    file = tmp_path / "new" / "w.safetensors"

    def write(value: float, fail: bool) -> None:
        def read(name: str) -> torch.Tensor:
            if fail and name == "y":
                raise RuntimeError("half way")
            return torch.full((3,), value)

        write_one_by_one(file, dict.fromkeys("xy", (3,)), dict.fromkeys("xy", torch.float32), {"format": "pt"}, read)

    with pytest.raises(RuntimeError, match="half way"):
        write(1.0, fail=True)
    assert list(file.parent.iterdir()) == []
    write(2.0, fail=False)
    with pytest.raises(RuntimeError, match="half way"):
        write(3.0, fail=True)
    assert load_file(file)["x"].tolist() == [2.0] * 3
    assert [each.name for each in file.parent.iterdir()] == ["w.safetensors"]
