"""Forward-mode derivatives and `torch.func` for this package's autograd functions."""

import torch
from torch import Tensor
from torch.autograd import forward_ad


def transforms_active() -> bool:
    """Eager code runs inside a transform of torch.func, such as vmap or jvp."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def on_eager_cpu(device: torch.device) -> bool:
    """Eager code on a CPU, without transforms: Python may read values, and make shapes of them, without waiting."""
    return device.type == "cpu" and not torch.compiler.is_compiling() and not transforms_active()


def is_recomputation() -> bool:
    """Activation checkpointing runs the layer again inside the backward pass: this call is not a new one."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def transformable(function: type) -> type:
    """A decorator of an autograd function whose `tangent` is its jvp, a linear function of tangents (zeros_if_none).

    A subclass has it, which `apply` takes where it is needed: torch.compile refuses functions with a jvp, and what is
    kept for one would take memory in training.
    """

    def setup_context(ctx, inputs: tuple, output: Tensor | tuple) -> None:
        function.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*(each for each in inputs if isinstance(each, Tensor)))

    own = {"generate_vmap_rule": True, "setup_context": staticmethod(setup_context)}
    own["jvp"] = staticmethod(function.tangent)
    function.transformed = type(function)(function.__name__, (function,), own)
    return function


def apply(function: type, *args):
    """The result of a `transformable` function."""
    forward_mode = not torch.compiler.is_compiling() and forward_ad._current_level >= 0
    return (function.transformed if forward_mode or transforms_active() else function).apply(*args)


def zeros_if_none(tangent: Tensor | None, of: Tensor) -> Tensor:
    """The tangent of a tensor, None where it has none."""
    return torch.zeros_like(of) if tangent is None else tangent
