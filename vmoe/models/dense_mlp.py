"""The dense MLPs of timm and open_clip, and their weights as experts and back.

Experts are `fc1` (of a gated MLP: gate first, then value), an optional `norm` of the hidden units, and `fc2`; they
share the activation. Weights and an optimizer's moments are rearranged alike.

Shapes, by suffix: E experts, D model width, F hidden width, G virtual experts that a dense MLP is split into.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from timm.layers import GluMlp, Mlp, SwiGLU
from torch import Tensor, nn

from vmoe.moe.experts import Experts


class UpcycleError(ValueError):
    """A model that cannot be made sparse or dense."""


@dataclass(frozen=True)
class MlpLayout:
    """Names of an MLP's parts. A gated MLP, hidden = act(gate) * value, has two layers `fc1`, the gate's first, or one
    that holds both, with `gate_last` the value first."""

    fc1: tuple[str, ...] = ("fc1",)
    fc2: str = "fc2"
    act: str = "act"
    norm: str | None = None
    drop: str | None = "drop1"
    gated: bool = False
    gate_last: bool = False

    def sources(self, name: str) -> list[str]:
        """The MLP's tensors that an expert's tensor, such as "fc1.weight", is made of."""
        part, _, kind = name.partition(".")
        parts = {"fc1": self.fc1, "act": (self.act,), "norm": (self.norm,), "fc2": (self.fc2,)}
        return [f"{each}.{kind}" for each in parts.get(part, ())]


@dataclass(frozen=True)
class UpcycledFrom:
    """What a sparse layer remembers of its MLP, which was split into G experts; `skeleton` is it on the meta device."""

    layout: MlpLayout
    skeleton: nn.Module
    granularity: int


def mlp_layout(mlp: nn.Module) -> MlpLayout:
    """The layout of timm's `Mlp`, `GluMlp` (SwiGLUPacked) or `SwiGLU`, or of open_clip's MLP; else an UpcycleError."""
    names = tuple(name for name, _ in mlp.named_children())
    norm = None if isinstance(getattr(mlp, "norm", nn.Identity()), nn.Identity) else "norm"
    # The classes themselves: a subclass may compute something else.
    if type(mlp) is Mlp:
        layout = MlpLayout(norm=norm)
    elif type(mlp) is GluMlp:
        layout = MlpLayout(norm=norm, gated=True, gate_last=mlp.gate_last)
    elif type(mlp) is SwiGLU:
        layout = MlpLayout(("fc1_g", "fc1_x"), norm=norm, gated=True)
    elif type(mlp) is nn.Sequential and names in (("c_fc", "gelu", "c_proj"), ("c_fc", "gelu", "ln", "c_proj")):
        layout = MlpLayout(("c_fc",), "c_proj", "gelu", "ln" if "ln" in names else None, drop=None)
    else:
        raise UpcycleError(f"an MLP of class {type(mlp).__name__} cannot be made into experts; see docs/upcycling.md")
    for name in (*layout.fc1, layout.fc2, *filter(None, [layout.norm])):
        kind = type(mlp.get_submodule(name))
        if not (issubclass(kind, nn.LayerNorm) if name == layout.norm else kind is nn.Linear):
            raise UpcycleError(
                f"the layer {name} of an MLP is a {kind.__name__}; experts have linear layers, LayerNorm"
            )
    act = mlp.get_submodule(layout.act)
    if any(parameter.numel() != 1 for parameter in act.parameters()):
        name = type(act).__name__
        raise UpcycleError(f"the activation {name} of an MLP learns a number for each channel; experts can share one")
    return layout


def stacked_parameters(experts: Experts) -> dict[str, nn.Parameter]:
    """The parameters of which each expert has its own, by name: all but those of a learned activation."""
    return {name: each for name, each in experts.named_parameters() if not name.startswith("act.")}


def to_experts(
    layout: MlpLayout, tensors: Mapping[str, Tensor], num_experts: int, granularity: int = 1, fc2_scale: float = 1.0
) -> dict[str, Tensor]:
    """Fresh copies of an MLP's tensors for E experts, a multiple of G; `fc2_scale` multiplies the second weight.

    "fc1.weight" (E, F/G or 2F/G, D), "fc2.weight" (E, D, F/G), and those of "norm.weight" (E, F) and the biases that
    the MLP has. Expert e holds the hidden units of slice e % G; all keep the full bias of fc2.
    """
    G, copies = granularity, num_experts // granularity
    experts = {}
    for kind in ("weight", "bias"):
        parts = [tensors[name] for name in layout.sources(f"fc1.{kind}") if name in tensors]
        if parts:
            if layout.gated and len(parts) == 1:
                parts = parts[0].chunk(2)
            if layout.gate_last:
                parts = parts[::-1]
            experts[f"fc1.{kind}"] = torch.cat([part.unflatten(0, (G, -1)) for part in parts], dim=1)
        norm = f"{layout.norm}.{kind}"
        if norm in tensors:
            experts[f"norm.{kind}"] = tensors[norm].unflatten(0, (G, -1))
    experts["fc2.weight"] = tensors[f"{layout.fc2}.weight"].unflatten(1, (G, -1)).transpose(0, 1) * fc2_scale
    if f"{layout.fc2}.bias" in tensors:
        experts["fc2.bias"] = tensors[f"{layout.fc2}.bias"].expand(G, -1)
    return {name: tensor.repeat(copies, *[1] * (tensor.ndim - 1)) for name, tensor in experts.items()}


def from_experts(layout: MlpLayout, tensors: Mapping[str, Tensor], fc2_scale: float = 1.0) -> dict[str, Tensor]:
    """The inverse of `to_experts` for E = G: the tensors of an MLP; the slices' biases of fc2 are averaged."""
    dense = {}
    for kind in ("weight", "bias"):
        if f"fc1.{kind}" in tensors:
            first = tensors[f"fc1.{kind}"]
            parts = [part.flatten(0, 1) for part in (first.chunk(2, dim=1) if layout.gated else (first,))]
            if layout.gate_last:
                parts.reverse()
            parts = parts if len(parts) == len(layout.fc1) else [torch.cat(parts)]
            dense |= dict(zip(layout.sources(f"fc1.{kind}"), parts, strict=True))
        if f"norm.{kind}" in tensors:
            dense[f"{layout.norm}.{kind}"] = tensors[f"norm.{kind}"].flatten(0, 1)
    dense[f"{layout.fc2}.weight"] = (tensors["fc2.weight"] / fc2_scale).transpose(0, 1).flatten(1)
    if "fc2.bias" in tensors:
        bias_GD = tensors["fc2.bias"]
        dense[f"{layout.fc2}.bias"] = bias_GD[0] if (bias_GD == bias_GD[0]).all() else bias_GD.mean(dim=0)
    return dense
