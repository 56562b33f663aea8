from unittest import mock

import pytest
import torch

from vmoe.evaluation.inference import pick_precision


@pytest.mark.parametrize("features", [{}, {"avx512_bf16": True, "amx_bf16": True}])
def test_automatic_precision_is_the_same_on_every_cpu(features):
    with mock.patch.object(torch.cpu, "get_capabilities", return_value=features):
        assert pick_precision("auto", torch.device("cpu")) == "float32"


@pytest.mark.parametrize(("supported", "precision"), [(True, "bf16"), (False, "float32")])
def test_automatic_precision_asks_the_gpu(supported, precision):
    with mock.patch.object(torch.cuda, "is_bf16_supported", return_value=supported):
        assert pick_precision("auto", torch.device("cuda")) == precision


@pytest.mark.parametrize("name", ["float32", "bf16", "fp16"])
def test_a_chosen_precision_stays(name):
    assert pick_precision(name, torch.device("cpu")) == name
