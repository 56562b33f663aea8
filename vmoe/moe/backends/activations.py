"""The activations that operations of several steps know by name."""

from torch import nn

# By name: this package does not know timm, whose models bring activations of their own.
_NAMES = {
    "torch.nn.modules.activation.SiLU": "silu",
    "torch.nn.modules.activation.ReLU": "relu",
    "torch.nn.modules.linear.Identity": "none",
    "timm.layers.activations.GELU": "gelu",
    "timm.layers.activations.GELUTanh": "gelu_tanh",
}


def activation_name(act: nn.Module) -> str | None:
    """ "gelu", "gelu_tanh", "silu", "relu" or "none"; None: not one of these."""
    if type(act) is nn.GELU:
        return "gelu" if act.approximate == "none" else "gelu_tanh"
    return _NAMES.get(f"{type(act).__module__}.{type(act).__qualname__}")
