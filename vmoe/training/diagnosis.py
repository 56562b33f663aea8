"""Finds the first value that is not finite in a training step."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._pytree import tree_leaves

from vmoe.distributed.process_group import gather_lists


class NonFiniteError(ArithmeticError):
    """The loss or the gradient of a step is not finite; the step did not change the weights."""

    shared = True  # see vmoe.distributed.process_group.SharedError


def find_non_finite(model: nn.Module, compute_loss: Callable[[], Tensor], batch: dict[str, Tensor]) -> str | None:
    """Names the first thing that is not finite in a repeated step, as "the output of the layer blocks.1.mlp.router".

    None if this process finds nothing. All processes call it together: what one finds ends the search for all.
    `compute_loss` repeats the forward pass of `batch` with the same random numbers; gradients are overwritten.
    """
    weights = [*model.named_parameters(), *model.named_buffers()]
    found = [f"the weights {name}" for name, tensor in weights if not _is_finite(tensor)]
    found += [f"the input ({name})" for name, value in batch.items() if not all(map(_is_finite, tree_leaves(value)))]
    if gather_lists(found):
        return found[0] if found else None

    # An identity computes nothing, so it is not the first.
    names = {module: name or "model" for name, module in model.named_modules() if not isinstance(module, nn.Identity)}

    def observe(module: nn.Module, _inputs: Any, output: Any) -> None:
        if module in names and not found and not all(map(_is_finite, tree_leaves(output))):
            found.append(f"the output of the layer {names[module]} ({type(module).__name__})")

    # A module's hook runs after those of its parts, so the first to report is the innermost.
    handle = register_module_forward_hook(observe)
    try:
        loss = compute_loss()
    finally:
        handle.remove()
    if not found and not _is_finite(loss):
        found.append("the loss itself (all layers' outputs are finite)")
    if gather_lists(found):
        return found[0] if found else None
    model.zero_grad()
    loss.backward()
    # The gradient flows from the end of the model to its start.
    for name, parameter in reversed(list(model.named_parameters())):
        if parameter.grad is not None and not _is_finite(parameter.grad):
            return f"the gradient of {name} (all layers' outputs are finite)"
    return None


def _is_finite(tensor: Any) -> bool:
    if not isinstance(tensor, Tensor):
        return True
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):  # this process's part
        tensor = tensor.to_local()
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
