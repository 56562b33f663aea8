"""Which of timm's optimizers work on sharded weights."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vmoe.distributed.mesh import MeshSize, make_meshes
from vmoe.distributed.parallelize import parallelize
from vmoe.training.config import OptimConfig
from vmoe.training.optim import SHARDABLE, create_optimizer
from vmoe.utils.config import ConfigError

from .test_mesh import tiny

CPU = torch.device("cpu")
STEPS = Path(__file__).with_name("optimizer_steps.py")


def test_an_optimizer_of_whole_matrices_is_refused(four_processes):
    model = tiny()
    create_optimizer(model, OptimConfig(name="muon"))  # whole weights
    parallelize(model, make_meshes(MeshSize(1, 2, 2), CPU), CPU)
    with pytest.raises(ConfigError, match=r"optim.name 'muon' does not work on sharded weights.*take one of.*adamw"):
        create_optimizer(model, OptimConfig(name="muon"))
    groups = create_optimizer(model, OptimConfig(name="AdamW")).param_groups
    assert all(len({parameter.device_mesh for parameter in group["params"]}) == 1 for group in groups)


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
def test_the_others_take_the_same_steps(tmp_path):
    subprocess.run([sys.executable, str(STEPS), str(tmp_path), json.dumps(SHARDABLE)], check=True)
    found = json.loads((tmp_path / "differences.json").read_text())
    assert found.keys() == set(SHARDABLE)
    for name, difference in found.items():
        assert difference < 1e-3, name  # rounding; a wrong step differs by its whole length
