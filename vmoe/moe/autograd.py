"""How code runs: eagerly, inside transforms of `torch.func`, in forward mode, or again for activation checkpointing."""

import torch
from torch import Tensor
from torch.autograd import forward_ad


def transforms_active() -> bool:
    """Eager code runs inside a transform of torch.func, such as vmap or jvp."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def needs_operators() -> bool:
    """Only PyTorch's own operators will do, which know vmap and forward-mode derivatives."""
    return transforms_active() or (not torch.compiler.is_compiling() and forward_ad._current_level >= 0)


def on_eager_cpu(device: torch.device) -> bool:
    """Eager code on a CPU, without transforms: Python may read values, and make shapes of them, without waiting."""
    return device.type == "cpu" and not torch.compiler.is_compiling() and not needs_operators()


def is_recomputation() -> bool:
    """Activation checkpointing runs the layer again inside the backward pass: this call is not a new one."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def apply(function: type, *args) -> Tensor:
    """The result of an autograd function whose `forward` is made of PyTorch's own operators: of these, if need be."""
    return (function.forward if needs_operators() else function.apply)(*args)
