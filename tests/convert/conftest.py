import pytest
import torch

from vmoe.convert import reference_config, to_reference
from vmoe.models.factory import create_model

TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}


@pytest.fixture
def tiny():
    """A small V-MoE with the reference's config and arrays of it."""
    torch.manual_seed(0)
    routing = {
        "moe_layers": (0,),
        "num_experts": 3,
        "group_size": 5,
        "eval_capacity_factor": 0.6,
        "capacity_multiple_of": 1,
    }
    model = create_model("vmoe_tiny_patch8_48", **TINY, **routing).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, reference_config(model), to_reference(model)
