import numpy as np
import pytest
import torch

from vmoe.convert import CheckpointError
from vmoe.convert.torch_file import is_torch_file, open_torch


def test_tensors_are_read_as_torch_load_does(tmp_path):
    whole = torch.randn(5, 6)
    state = {"whole": whole, "part": whole[1:3, ::2], "turned": whole.T, "scalar": torch.tensor(3.5)}
    state |= {"half": torch.randn(7).bfloat16(), "count": torch.arange(4), "empty": torch.zeros(0, 3)}
    file = tmp_path / "state.pt"
    torch.save({"model": state, "step": 3}, file)
    assert is_torch_file(file)
    arrays = open_torch(file)
    assert arrays.keys() == state.keys()
    for name, tensor in state.items():
        assert arrays[name].shape == tuple(tensor.shape)
        assert np.array_equal(arrays[name].read(), tensor.float().numpy())
    assert (arrays["half"].dtype, arrays["count"].dtype) == ("bfloat16", "int64")


def test_older_and_changed_files_are_refused(tmp_path):
    file = tmp_path / "state.pt"
    torch.save({"a": torch.zeros(100)}, file, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="older format"):
        open_torch(file)
    torch.save({"a": torch.zeros(100)}, file)
    arrays = open_torch(file)
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="is it complete"):
        arrays["a"].read()
    assert not is_torch_file(tmp_path)
