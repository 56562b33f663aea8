"""What a training step does beside the model: norms and parameter groups over several meshes."""

import pytest
import torch
from torch import nn

from vmoe.distributed.mesh import MeshSize, make_meshes
from vmoe.distributed.parallelize import clip_grad_norm, parallelize, split_groups

from .test_mesh import tiny


@pytest.mark.parametrize("max_norm", [0.5, float("inf")])
def test_plain_parameters_are_clipped_as_by_torch(max_norm):
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(2))]
    for parameter in parameters[:2]:  # the third has no gradient
        parameter.grad = torch.randn_like(parameter)
    expected = [parameter.grad.clone() for parameter in parameters[:2]]
    norm = torch.cat([grad.flatten() for grad in expected]).norm()
    torch.testing.assert_close(clip_grad_norm(parameters, max_norm), norm)
    for parameter, grad in zip(parameters, expected):
        torch.testing.assert_close(parameter.grad, grad * min(1, max_norm / norm))


def test_a_group_of_the_optimizer_holds_one_kind_of_sharding(four_processes):
    model = tiny()
    parallelize(model, make_meshes(MeshSize(1, 2, 2), torch.device("cpu")), torch.device("cpu"))
    named = dict(model.named_parameters())
    decayed = [p for p in named.values() if p.ndim > 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "lr": 0.5}, {"params": [named["head.bias"]], "lr": 0.1}])
    split_groups(optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5, 0.1]
    for group in optimizer.param_groups:
        assert len({parameter.device_mesh for parameter in group["params"]}) == 1
    kept = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(kept) == len(decayed) + 1
    assert {id(parameter) for parameter in kept} == {id(p) for p in [*decayed, named["head.bias"]]}


def test_optimizers_of_one_process_stay_as_they_are():
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.ones(2))], "lr": 0.5}], lr=0.1)
    before = [dict(group) for group in optimizer.param_groups]
    split_groups(optimizer)
    assert [{**group, "params": None} for group in optimizer.param_groups] == [{**g, "params": None} for g in before]
    assert pytest.approx(0.5) == optimizer.param_groups[0]["lr"]
