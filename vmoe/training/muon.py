"""timm's and PyTorch's Muon (https://kellerjordan.github.io/posts/muon/), for each expert's matrix by itself.

    optimizer = Muon(vmoe.param_groups(model, weight_decay=0.05, optimizer="muon"), lr=1e-3)

timm's own takes stacked experts, (E, F, D) with E experts and a layer's widths F and D, for a convolution's kernel.
PyTorch's refuses them.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import timm.optim
import torch
from torch import Tensor, nn

from vmoe.moe import GroupedLinear, SparseMoE

PER_EXPERT = "per_expert"  # in a group: its tensors are matrices stacked over experts
STACKS = {PER_EXPERT: True, "use_muon": False}  # the second is for timm's own Muon: leave them to AdamW


class _PerExpert(torch.optim.Optimizer):
    """An optimizer of matrices that takes the tensors of groups with "per_expert": True for stacks of them."""

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None if closure is None else torch.enable_grad()(closure)()
        with self._unstacked():
            super().step()
        return loss

    @contextmanager
    def _unstacked(self) -> Iterator[None]:
        """Replaces stacks by their matrices in the groups and the state."""
        stacks = [(group, dict(group)) for group in self.param_groups if group.get(PER_EXPERT)]
        matrices = {p: list(p.detach().unbind()) for _, old in stacks for p in old["params"] if p.grad is not None}
        for stack, parts in matrices.items():
            state = self.state.pop(stack, {})
            for e, part in enumerate(parts):
                part.grad = stack.grad[e]
                self.state[part] = {key: _of_expert(value, e, stack) for key, value in state.items()}
        for group, old in stacks:
            group["params"] = [part for stack in old["params"] for part in matrices.get(stack, ())]
            group.pop("use_muon", None)
        try:
            yield
        finally:
            for group, old in stacks:
                group |= old
        for stack, parts in matrices.items():
            self.state[stack] = _of_stack([self.state.pop(part) for part in parts])


class Muon(_PerExpert, timm.optim.Muon):
    """timm's Muon, with its arguments; AdamW updates the groups with "use_fallback": True."""


class TorchMuon(_PerExpert, torch.optim.Muon):
    """PyTorch's Muon, with its arguments; the groups with "use_fallback": True need an optimizer of their own."""

    def __init__(self, params: Iterable[dict[str, Any]], *args, **kwargs) -> None:
        groups = [{**group, "params": list(group["params"])} for group in params]
        if any(group.get("use_fallback") for group in groups):
            raise ValueError('groups with "use_fallback": True are not for torch.optim.Muon: give them to AdamW')
        super().__init__([{**group, "params": _matrices(group)} for group in groups], *args, **kwargs)
        for own, group in zip(self.param_groups, groups):  # it looked at their shapes
            own["params"] = group["params"]


def _matrices(group: dict[str, Any]) -> list[Tensor]:
    """The parameters of a group, stacks as their matrices."""
    return [m for p in group["params"] for m in (p.detach().unbind() if group.get(PER_EXPERT) else (p,))]


def _of_expert(value: Any, expert: int, stack_EFD: Tensor) -> Any:
    """An expert's part of a state, or its own copy of a number."""
    if not isinstance(value, Tensor):
        return value
    return value[expert] if value.shape == stack_EFD.shape else value.clone()


def _of_stack(states: list[dict[str, Any]]) -> dict[str, Any]:
    """The state of a stack from those of its matrices."""
    return {
        key: torch.stack([state[key] for state in states]) if isinstance(value, Tensor) and value.ndim > 0 else value
        for key, value in states[0].items()
    }


def divide_stacks(model: nn.Module, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups, with stacks of experts in groups of their own."""
    stacks = {module.weight for module in model.modules() if isinstance(module, GroupedLinear)}
    divided = []
    for group in groups:
        for extra, stacked in (({}, False), (STACKS, True)):
            if params := [parameter for parameter in group["params"] if (parameter in stacks) == stacked]:
                divided.append({**group, "params": params, **extra})
    return divided


def not_for_muon(model: nn.Module) -> set[str]:
    """Names of the parameters for AdamW: all but the matrices in numbered blocks (`blocks.3.attn.qkv.weight`).

    Routers, biases, norms, embeddings, the first convolution, heads, and the model's `no_weight_decay()`.
    """
    names = set(getattr(model, "no_weight_decay", set)())
    outside = []  # beginnings of names
    for prefix, module in model.named_modules():
        config = getattr(module, "pretrained_cfg", None) or {}
        parts = [config.get(key) or () for key in ("first_conv", "classifier")]
        parts = [part for each in parts for part in ([each] if isinstance(each, str) else each)]
        parts += ["router"] * isinstance(module, SparseMoE)
        outside += [f"{prefix}.{part}.".lstrip(".") for part in parts]
        outside += [f"{prefix}."] * isinstance(module, nn.Embedding)
    for name, parameter in model.named_parameters():
        hidden = re.search(r"(^|\.)\d+\.", name) and not name.startswith(tuple(outside))
        if not hidden or parameter.ndim < 2 or name.endswith(".bias"):
            names.add(name)
    return names
