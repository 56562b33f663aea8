"""How the layer's time grows with experts, tokens, capacity and choices: one axis at a time, around a base case.

The base is E = 8, K = 1, capacity 1.0, with batch priority. All cases of an axis run in turn, with the base and the
dense MLPs of the same active compute. "experts" is the time of the expert MLPs alone, on rows already gathered.

Shapes, by suffix: B batch, T length, D width, R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from benchmarks.contenders import kept_share
from benchmarks.measure import DTYPES, milliseconds, ratios
from benchmarks.session import Session, make_parser
from vmoe.moe import SparseMoE
from vmoe.moe.dispatch import dispatch, expert_capacity, plan_dispatch

AXES = {
    "experts": (4, 8, 16, 32, 64, 128, 256),
    "tokens": (197, 788, 1576, 3152, 6304, 12608),
    "capacity": (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0),
    "selected": (1, 2, 3, 4),
}


@dataclass(frozen=True)
class Case:
    """A layer and its input."""

    tokens: int
    experts: int = 8
    capacity: float = 1.0
    selected: int = 1


def measure_axis(session: Session, axis: str, dtype: str, bandwidth: float) -> None:
    """Times all cases of an axis in turn and adds their rows; `bandwidth` is that of a large copy, GB/s."""
    args, device = session.args, session.device
    base = Case(args.tokens)
    kind = float if axis == "capacity" else int
    cases = dict.fromkeys([base, *(replace(base, **{axis: kind(value)}) for value in args.values or AXES[axis])])
    baselines = {case: (case.tokens, case.selected) for case in cases}
    factory = {"device": device, "dtype": DTYPES[dtype]}
    layers: dict[Any, nn.Module] = {case: make_layer(case, args.width, args.hidden, **factory) for case in cases}
    layers |= {key: Mlp(args.width, args.hidden * key[1], **factory) for key in baselines.values()}
    called = {key: torch.compile(layer, mode=args.compile) if args.compile else layer for key, layer in layers.items()}
    tokens_of = {key: key.tokens if isinstance(key, Case) else key[0] for key in layers}
    alone = cases if axis == "capacity" and not args.compile else ()  # whose experts are measured alone too

    def make_input(number: int) -> dict[Any, tuple[Tensor, ...]]:
        generator = torch.Generator(device).manual_seed(40_000 + number)
        x_TD = torch.randn(max(tokens_of.values()), args.width, generator=generator, **factory)
        inputs = {tokens: (x_TD[None, :tokens],) for tokens in set(tokens_of.values())}
        return inputs | {case: _rows(layers[case], case, x_TD[None, : case.tokens]) for case in alone}

    for one_pass in ("forward", "forward + backward"):
        backward = one_pass != "forward"
        for layer in layers.values():
            layer.train(backward)
        calls: dict[Any, Callable] = {
            key: partial(_call, module, tokens_of[key], backward) for key, module in called.items()
        }
        calls |= {("experts", case): partial(_call, layers[case].experts, case, backward) for case in alone}
        seconds = session.alternate(calls, make_input, layers.values())
        for key in [key for key in calls if key not in baselines.values()]:
            part, case = key if isinstance(key, tuple) else ("layer", key)
            others = {"base": (part, base) if part == "experts" else base, "dense": baselines[case]}
            session.add(
                {
                    **{"comparison": axis, "name": part, "dtype": dtype, "pass": one_pass},
                    **{**asdict(case), "width": args.width, "hidden": args.hidden},
                    "kept": round(kept_share(layers[case], make_input(10_000)[case.tokens][0]), 4),
                    "ms": milliseconds(seconds[key]),
                    "ratios": {to: ratios(seconds[key], seconds[one]) for to, one in others.items() if one != key},
                    **_reading(layers[case], backward, bandwidth),
                }
            )


def make_layer(case: Case, width: int, hidden: int, **factory) -> SparseMoE:
    """Our layer of a case."""
    sizes = {"num_experts": case.experts, "num_selected_experts": case.selected}
    capacity = {"capacity_factor": case.capacity, "eval_capacity_factor": case.capacity}
    return SparseMoE(width, hidden, **sizes, **capacity, batch_priority=True, **factory)


def _reading(layer: SparseMoE, backward: bool, bandwidth: float) -> dict[str, float]:
    """The size of the experts' weights, and the time that reading them takes at the speed of a large copy."""
    weights = layer.experts.fc1.weight.nbytes + layer.experts.fc2.weight.nbytes
    # Forward and backward pass each read them, and a gradient of the same size is written.
    milliseconds = 1e3 * weights * (3 if backward else 1) / (1e9 * bandwidth)
    return {"weights_mib": round(weights / 2**20, 1), "weights_ms": round(milliseconds, 3)}


def _call(module: nn.Module, key: Any, backward: bool, inputs: dict[Any, tuple[Tensor, ...]]) -> None:
    x, *more = inputs[key]
    if backward:
        module(x.detach().requires_grad_(), *more).backward(x)  # any gradient of this shape
    else:
        with torch.no_grad():
            module(x, *more)


@torch.no_grad()
def _rows(layer: SparseMoE, case: Case, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """The input of the experts of a layer for this input: (rows, rows of each expert)."""
    routing = layer.router.choose(layer.router.forward(x_BTD))
    capacity = expert_capacity(case.tokens, case.experts, case.selected, case.capacity)
    plan = plan_dispatch(routing.expert_index_GNK, case.experts, capacity, routing.priority_GN)
    return dispatch(x_BTD, plan), plan.count_E


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser("scaling", __doc__.splitlines()[0], rounds=7, sizes=("tokens", "width", "hidden"))
    parser.set_defaults(dtype=["float32"])
    parser.add_argument("--axis", choices=list(AXES), nargs="+", default=list(AXES), help="which (all)")
    parser.add_argument("--values", type=float, nargs="+", help="on one axis, in place of its own")
    session = Session("scaling", parser, argv)
    args = session.args
    if args.values and len(args.axis) != 1:
        parser.error("--values needs one --axis to stand for")

    def measure(session: Session, dtype: str, rates: dict[str, dict[str, float]]) -> None:
        for axis in args.axis:
            measure_axis(session, axis, dtype, rates["copy_gbps"]["median"])

    session.run(measure)


if __name__ == "__main__":
    main()
