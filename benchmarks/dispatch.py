"""What routing, dispatch and combine cost by themselves, piece by piece, and what batch priority adds.

The pieces are those of the plain path (`vmoe.moe.dispatch`), beside the whole layer and the dense MLP of one expert's
width. On few tokens the one-hot way of GShard and V-MoE's reference is measured too: matrix multiplications with a
tensor of tokens x experts x capacity.

Shapes, by suffix: G groups, N tokens, D width, E experts, K choices, A assignments, C capacity, R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from benchmarks.contenders import kept_share
from benchmarks.measure import DTYPES
from benchmarks.session import SIZES, Session, make_parser
from vmoe.moe import SparseMoE
from vmoe.moe.dispatch import DispatchPlan, combine, dispatch, expert_capacity, plan_dispatch
from vmoe.moe.router import Routing
from vmoe.moe.top_k import TopKRouter


@dataclass
class Given:
    """The input of the pieces in a round; each has what the pieces before it made."""

    x_GND: Tensor
    gradient_GND: Tensor
    routing: Routing
    plan: DispatchPlan
    rows_RD: Tensor


def one_hot(x_GND: Tensor, given: Given, num_experts: int, capacity: int) -> Tensor:
    """Dispatch and combine as matrix multiplications with (N, E, C) tensors, from the same positions in the queues."""
    plan, routing = given.plan, given.routing
    kept_GNK = plan.kept_GNK
    expert_GNKE = F.one_hot(routing.expert_index_GNK, num_experts) * kept_GNK[..., None]
    position_GNKC = F.one_hot(plan.position_GNK.clamp(max=capacity - 1), capacity)
    dispatch_GNKEC = (expert_GNKE[..., None] * position_GNKC[..., None, :]).to(x_GND.dtype)
    weights_GNK11 = routing.combine_weights_GNK.to(x_GND.dtype)[..., None, None]
    combine_GNEC = (dispatch_GNKEC * weights_GNK11).sum(2)
    rows_GECD = torch.einsum("gnd,gnec->gecd", x_GND, dispatch_GNKEC.sum(2))
    return torch.einsum("gecd,gnec->gnd", rows_GECD, combine_GNEC)


def make_layers(args, device: torch.device, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Our layer with and without priority, with the same weights, and the dense MLP."""
    settings = {
        "num_experts": args.experts,
        "num_selected_experts": args.selected,
        "capacity_factor": args.capacity,
        "eval_capacity_factor": args.capacity,
    }
    layers = {
        "layer, BPR": SparseMoE(args.width, args.hidden, batch_priority=True, **settings),
        "layer, vanilla": SparseMoE(args.width, args.hidden, **settings),
        "dense": Mlp(args.width, args.hidden * args.selected),
    }
    layers["layer, vanilla"].load_state_dict(layers["layer, BPR"].state_dict())
    return {name: layer.to(device, dtype) for name, layer in layers.items()}


class Pieces:
    """The pieces of a layer, for a number of experts and a capacity."""

    def __init__(self, router: TopKRouter, num_experts: int, capacity: int) -> None:
        self.router, self.num_experts, self.capacity = router, num_experts, capacity

    def plan(self, routing: Routing, priority: bool = True) -> DispatchPlan:
        ranking = routing.priority_GN if priority else None
        return plan_dispatch(routing.expert_index_GNK, self.num_experts, self.capacity, ranking)

    @torch.no_grad()
    def given(self, x_GND: Tensor, gradient_GND: Tensor) -> Given:
        routing = self.router.choose(self.router.forward(x_GND))
        plan = self.plan(routing)
        return Given(x_GND, gradient_GND, routing, plan, dispatch(x_GND, plan))

    def all_but_experts(self, x_GND: Tensor) -> Tensor:
        routing = self.router.choose(self.router.forward(x_GND))
        plan = self.plan(routing)
        return combine(dispatch(x_GND, plan), routing.combine_weights_GNK, plan)

    @staticmethod
    def sort(given: Given) -> Any:
        given.routing.priority_GN.argsort(dim=1, descending=True, stable=True)
        return given.routing.expert_index_GNK.flatten().sort(stable=True)

    @staticmethod
    def combine(given: Given, rows_RD: Tensor) -> Tensor:
        return combine(rows_RD, given.routing.combine_weights_GNK, given.plan)

    def calls(self, comparison: str, whole: dict[str, Callable]) -> dict[str, Callable[[Given], Any]]:
        """What a comparison measures without gradients."""
        if comparison == "priority":
            return {name: whole[name] for name in ("layer, BPR", "layer, vanilla")}
        if comparison == "one-hot":
            return {
                "dispatch and combine": lambda given: self.combine(given, dispatch(given.x_GND, given.plan)),
                "one-hot matrices": lambda given: one_hot(given.x_GND, given, self.num_experts, self.capacity),
            }
        return {
            "router": lambda given: self.router.choose(self.router.forward(given.x_GND)),
            "plan, BPR": lambda given: self.plan(given.routing),
            "plan, vanilla": lambda given: self.plan(given.routing, priority=False),
            "two sorts alone": self.sort,
            "dispatch": lambda given: dispatch(given.x_GND, given.plan),
            "combine": lambda given: self.combine(given, given.rows_RD),
            **{name: whole[name] for name in ("all but experts", "layer, BPR", "dense")},
        }


def measure(session: Session, dtype: str, comparison: str) -> None:
    """One comparison: "pieces" of the layer, the layer by "priority" and without, or the "one-hot" way."""
    args, device = session.args, session.device
    tokens = args.small if comparison == "one-hot" else args.tokens
    layers = make_layers(args, device, DTYPES[dtype])
    capacity = expert_capacity(tokens, args.experts, args.selected, args.capacity)
    pieces = Pieces(layers["layer, BPR"].router, args.experts, capacity)

    def make_input(number: int) -> Given:
        generator = torch.Generator(device).manual_seed(30_000 + number)
        shape = (2, 1, tokens, args.width)
        return pieces.given(*torch.randn(shape, generator=generator, device=device, dtype=DTYPES[dtype]).unbind())

    def with_backward(module: Callable[[Tensor], Tensor]) -> Callable[[Given], None]:
        return lambda given: module(given.x_GND.detach().requires_grad_()).backward(given.gradient_GND)

    modules: dict[str, Callable[[Tensor], Tensor]] = {"all but experts": pieces.all_but_experts, **layers}
    whole = {name: lambda given, module=module: module(given.x_GND) for name, module in modules.items()}
    calls = pieces.calls(comparison, whole)
    passes = {"forward": {name: torch.no_grad()(call) for name, call in calls.items()}}
    if comparison != "one-hot":
        passes["forward + backward"] = {name: with_backward(modules[name]) for name in calls if name in modules}
    kept = round(kept_share(layers["layer, BPR"].eval(), make_input(10_000).x_GND), 4)
    base = {"pieces": "dense", "priority": "layer, vanilla", "one-hot": "dispatch and combine"}[comparison]
    sizes = {**{name: getattr(args, name) for name in SIZES}, "tokens": tokens}
    for one_pass, calls in passes.items():
        for layer in layers.values():
            layer.train(one_pass != "forward")
        common = {"comparison": comparison, "dtype": dtype, "pass": one_pass, **sizes}
        rows = {name: {**common, "kept": 1.0 if name == "dense" else kept} for name in calls}
        session.add_times(session.alternate(calls, make_input, layers.values()), base, rows.__getitem__)


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser("dispatch", __doc__.splitlines()[0], rounds=21, sizes=tuple(SIZES))
    parser.add_argument("--small", type=int, default=788, help="tokens for the one-hot way (%(default)s)")

    def measure_all(session: Session, dtype: str, _rates: dict) -> None:
        for comparison in ("pieces", "priority", "one-hot"):
            measure(session, dtype, comparison)

    Session("dispatch", parser, argv, compiles=False).run(measure_all)


if __name__ == "__main__":
    main()
