"""Linear layers and norms with parameters for each expert, applied to rows sorted by expert.

Shapes, by suffix: E experts, R rows sorted by expert, F width of a norm, I and O a linear layer's widths.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vmoe.moe.grouped_mm import expert_of_rows, grouped_linear


def local_experts(parameter: Tensor | None) -> Tensor | None:
    """The rows of a stacked parameter that belong to this process: all of them, unless it is a DTensor.

    Rows of all P processes pass through an expert, so its gradient is the sum of theirs; divided by P it is their mean,
    as with all other parameters.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    return _ScaleGradient.apply(parameter.to_local(), 1 / parameter.device_mesh.size())


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, scale: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, ctx.scale = inputs

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad * ctx.scale, None


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type of matrix multiplications with `x`: its own, or autocast's (the meta device knows no autocast)."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else x.dtype


class GroupedLinear(nn.Module):
    """E linear layers, each applied to its own run of rows: `weight` (E, O, I), `bias` (E, O) or None."""

    def __init__(
        self, num_experts: int, in_features: int, out_features: int, bias: bool = True, device=None, dtype=None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_experts, out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform weights (each expert's own fans, as in the reference), almost-zero biases."""
        for weight_OI in self.weight:
            nn.init.xavier_uniform_(weight_OI)
        if self.bias is not None:
            nn.init.normal_(self.bias, std=1e-6)

    def forward(self, x_RI: Tensor, count_E: Tensor) -> Tensor:
        """(R, I) rows sorted by expert, (E,) rows of each -> (R, O); rows beyond the counts are unused."""
        dtype = compute_dtype(x_RI)
        bias_EO = None if self.bias is None else local_experts(self.bias).to(dtype)
        return grouped_linear(x_RI.to(dtype), local_experts(self.weight).to(dtype), bias_EO, count_E)


class GroupedLayerNorm(nn.Module):
    """A layer norm whose weight and bias, (E, F), are each expert's own; else as `like`, an `nn.LayerNorm`."""

    def __init__(self, num_experts: int, like: nn.Module, device=None, dtype=None) -> None:
        super().__init__()
        if not isinstance(like, nn.LayerNorm) or like.weight is None:
            raise TypeError(f"a norm inside the experts must be an nn.LayerNorm with weights, got {like}")
        self.eps = like.eps
        shape = (num_experts, *like.normalized_shape)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias = None if like.bias is None else nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Ones and zeros, as `nn.LayerNorm`."""
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x_RF: Tensor, count_E: Tensor) -> Tensor:
        """Rows sorted by expert -> the same shape."""
        weight_EF, bias_EF = local_experts(self.weight), local_experts(self.bias)
        y_RF = F.layer_norm(x_RF, x_RF.shape[-1:], eps=self.eps)
        expert_R = expert_of_rows(count_E.cumsum(0), x_RF.shape[0]).clamp(max=weight_EF.shape[0] - 1)
        y_RF = y_RF * weight_EF[expert_R]
        return (y_RF if bias_EF is None else y_RF + bias_EF[expert_R]).to(x_RF.dtype)
