import json

import pytest
import torch
from timm.optim import create_optimizer_v2, kron, list_optimizers
from torch import nn

from vmoe.models.manifest import MANIFEST, describe_files, write_manifest
from vmoe.training.checkpoint import Checkpointer, CheckpointError, load_checkpoint
from vmoe.training.config import OptimConfig
from vmoe.training.optim import create_optimizer
from vmoe.training.optimizer_state import export_state

# Left out: what needs packages that only run on GPUs, and second derivatives, which the loop does not make.
NAMES = [name for name in list_optimizers() if not name.startswith(("bnb", "fused", "adahessian"))]


class Small(nn.Module):
    vmoe_spec = {"name": "small", "kwargs": {}}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 3)
        self.experts = nn.Parameter(torch.randn(2, 3, 4))
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        return (self.scale * torch.einsum("bd,edf->bef", self.first(x), self.experts)).tanh().square().mean()


def step(model, optimizer, number):
    torch.manual_seed(number)
    model(torch.randn(5, 4)).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.fixture
def make(monkeypatch):
    from vmoe.training import checkpoint

    monkeypatch.setattr(checkpoint, "file_metadata", lambda *_: {})
    monkeypatch.setattr(kron, "has_dynamo", False)  # nothing is compiled, which takes long

    def make(name):
        torch.manual_seed(0)
        model = Small()
        return model, create_optimizer(model, OptimConfig(name=name, lr=1e-2, weight_decay=0.1))

    return make


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*NAMES, "lookahead_adamw", "lookahead_sgd"])
def test_every_optimizer_goes_on_as_if_it_had_not_stopped(tmp_path, make, name):
    model, optimizer = make(name)
    for number in range(4):
        step(model, optimizer, number)
    folder = Checkpointer(tmp_path, 1).save(4, model, None, optimizer, {}, {})
    json.loads((folder / "trainer.json").read_text())
    again, new = make(name)
    load_checkpoint(folder, again, None, new)
    before, after = (each.state_dict() for each in (optimizer, new))
    assert repr(before) == repr(after)
    for number in range(4, 8):
        step(model, optimizer, number)
        step(again, new, number)
    for ours, theirs in zip(model.parameters(), again.parameters()):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state["experts"].update(other={"tensor": ""}), "its tensor 'other/experts' is not stored"),
        (lambda state: state.pop("experts"), r"its tensor 'exp_avg/experts' \(one of 3\) belongs to no state"),
        (lambda state: state["scale"].pop("step"), r"its tensor 'step/scale' \(one of 1\) belongs to no state"),
    ],
)
def test_state_that_was_changed_together_with_the_manifest_is_refused(tmp_path, make, change, message):
    model, optimizer = make("adamw")
    step(model, optimizer, 0)
    folder = Checkpointer(tmp_path, 1).save(1, model, None, optimizer, {}, {})
    content = json.loads((folder / "trainer.json").read_text())
    change(content["optimizer"]["state"])
    (folder / "trainer.json").write_text(json.dumps(content))
    write_manifest(folder, {}, describe_files(folder, [f.name for f in folder.iterdir() if f.name != MANIFEST]))
    again, new = make("adamw")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder, again, None, new)


def test_state_that_no_file_can_hold_is_named():
    model = Small()
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.1)
    optimizer.state[model.scale]["function"] = print
    with pytest.raises(ValueError, match="optimizer's function of scale is a builtin_function_or_method"):
        export_state(optimizer, model)
