"""Linear layers by oneDNN, which PyTorch's own calls use on CPUs in half precision only and never with GELU inside.

PyTorch computes float32 products by MKL; on an AMD processor oneDNN took 10 to 27% less for the products that experts
need, and its GELU, where the hidden layer is not kept, 4 to 11% of the product (`python -m benchmarks.choices`).
"""

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

# {activation that oneDNN knows: how it approximates GELU}
GELU = {"gelu": "none", "gelu_tanh": "tanh"}


def is_observed() -> bool:
    """Somebody wants to see PyTorch's own operations.

    Compilers, tracers, torch.func, forward differentiation, FLOP counters and other dispatch modes do.
    """
    return (
        torch.compiler.is_compiling()  # first: what follows can not be compiled
        or torch.jit.is_tracing()
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def in_onednn(dtype: torch.dtype) -> bool:
    """oneDNN computes products of this type on this processor, and nobody wants to see PyTorch's own product."""
    if is_observed() or not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return dtype == torch.float32


def are_plain(*tensors: Tensor) -> bool:
    """Tensors on a CPU, neither empty nor of a class of their own."""
    return all(type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu" and t.numel() for t in tensors)


def linear(x_RI: Tensor, w_OI: Tensor, b_O: Tensor | None = None, activation_name: str | None = None) -> Tensor:
    """x Wᵀ + b, then GELU if it is named. Without a gradient.

    Args:
        x_RI: of a type that is `in_onednn`, as the others.
        w_OI: may be a transposed view.
        b_O: or None. oneDNN takes no strides here, so one with strides is copied.
        activation_name: one of `GELU`, or None.
    """
    then, kind = ("none", "") if activation_name is None else ("gelu", GELU[activation_name])
    b_O = None if b_O is None else b_O.contiguous()
    return torch.ops.mkldnn._linear_pointwise(x_RI, w_OI, b_O, then, [], kind)
