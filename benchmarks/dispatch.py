"""What routing, dispatch and combine cost by themselves, piece by piece, and what batch priority adds.

The pieces are those of the plain path (`vmoe.moe.dispatch`), beside the whole layer and the dense MLP of one expert's
width. On few tokens the one-hot way of GShard and V-MoE's reference is measured too: products with a tensor of
tokens x experts x capacity.

Shapes, by suffix: G groups, N tokens, D width, E experts, K choices, A assignments, C capacity, R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor

from benchmarks.contenders import kept_share
from benchmarks.measure import DTYPES, Ceiling, alternate, milliseconds, ratios, synchronizer
from benchmarks.session import Session, make_parser, measure_ceiling
from vmoe.moe import SparseMoE
from vmoe.moe.dispatch import DispatchPlan, combine, dispatch, expert_capacity, plan_dispatch
from vmoe.moe.router import Routing


@dataclass
class Given:
    """What the pieces start from in a round; each has what the pieces before it made."""

    x_GND: Tensor
    gradient_GND: Tensor
    routing: Routing
    plan: DispatchPlan
    rows_RD: Tensor


def one_hot(x_GND: Tensor, given: Given, num_experts: int, capacity: int) -> Tensor:
    """Dispatch and combine as products with (N, E, C) tensors, from the same places in the queues."""
    plan, routing = given.plan, given.routing
    kept_GNK = plan.kept_GNK
    expert_GNKE = F.one_hot(routing.expert_index_GNK, num_experts) * kept_GNK[..., None]
    place_GNKC = F.one_hot(plan.position_GNK.clamp(max=capacity - 1), capacity)
    dispatch_GNKEC = (expert_GNKE[..., None] * place_GNKC[..., None, :]).to(x_GND.dtype)
    weights_GNK11 = routing.combine_weights_GNK.to(x_GND.dtype)[..., None, None]
    combine_GNEC = (dispatch_GNKEC * weights_GNK11).sum(2)
    rows_GECD = torch.einsum("gnd,gnec->gecd", x_GND, dispatch_GNKEC.sum(2))
    return torch.einsum("gecd,gnec->gnd", rows_GECD, combine_GNEC)


def measure(session: Session, dtype: str, comparison: str) -> None:
    """One comparison: "pieces" of the layer, the layer by "priority" and without, or the "one-hot" way."""
    args, device = session.args, session.device
    D, E, K = args.width, args.experts, args.selected
    tokens = args.small if comparison == "one-hot" else args.tokens
    settings = {
        "num_experts": E,
        "num_selected_experts": K,
        "capacity_factor": args.capacity,
        "eval_capacity_factor": args.capacity,
    }
    layers = {
        "layer, BPR": SparseMoE(D, args.hidden, batch_priority=True, **settings),
        "layer, vanilla": SparseMoE(D, args.hidden, **settings),
        "dense": Mlp(D, args.hidden * K),
    }
    layers["layer, vanilla"].load_state_dict(layers["layer, BPR"].state_dict())
    for layer in layers.values():
        layer.to(device, DTYPES[dtype])
    router = layers["layer, BPR"].router
    capacity = expert_capacity(tokens, E, K, args.capacity)

    def plan(routing: Routing, priority: bool = True) -> DispatchPlan:
        return plan_dispatch(routing.expert_index_GNK, E, capacity, routing.priority_GN if priority else None)

    def make_input(number: int) -> Given:
        generator = torch.Generator(device).manual_seed(30_000 + number)
        x_GND, gradient_GND = torch.randn(
            2, 1, tokens, D, generator=generator, device=device, dtype=DTYPES[dtype]
        ).unbind()
        with torch.no_grad():
            routing = router.route(x_GND)
            planned = plan(routing)
            return Given(x_GND, gradient_GND, routing, planned, dispatch(x_GND, planned))

    def all_but_experts(x_GND: Tensor) -> Tensor:
        routing = router.route(x_GND)
        planned = plan(routing)
        return combine(dispatch(x_GND, planned), routing.combine_weights_GNK, planned)

    def sorting(given: Given) -> Any:
        given.routing.priority_GN.argsort(dim=1, descending=True, stable=True)
        return given.routing.expert_index_GNK.flatten().sort(stable=True)

    whole = {name: lambda given, layer=layer: layer(given.x_GND) for name, layer in layers.items()}
    trained: dict[str, Callable[[Tensor], Tensor]] = {}
    if comparison == "pieces":
        pieces: dict[str, Callable[[Given], Any]] = {
            "router": lambda given: router.route(given.x_GND),
            "plan, BPR": lambda given: plan(given.routing),
            "plan, vanilla": lambda given: plan(given.routing, priority=False),
            "two sorts alone": sorting,
            "dispatch": lambda given: dispatch(given.x_GND, given.plan),
            "combine": lambda given: combine(given.rows_RD, given.routing.combine_weights_GNK, given.plan),
            "all but experts": lambda given: all_but_experts(given.x_GND),
            "layer, BPR": whole["layer, BPR"],
            "dense": whole["dense"],
        }
        trained = {"all but experts": all_but_experts, **{name: layers[name] for name in ("layer, BPR", "dense")}}
    elif comparison == "priority":
        pieces = {name: whole[name] for name in ("layer, BPR", "layer, vanilla")}
        trained = {name: layers[name] for name in pieces}
    else:
        pieces = {
            "dispatch and combine": lambda given: combine(
                dispatch(given.x_GND, given.plan), given.routing.combine_weights_GNK, given.plan
            ),
            "one-hot products": lambda given: one_hot(given.x_GND, given, E, capacity),
        }

    def without_gradient(call: Callable[[Given], Any]) -> Callable[[Given], Any]:
        return torch.no_grad()(call)

    def with_backward(module: Callable[[Tensor], Tensor]) -> Callable[[Given], None]:
        return lambda given: module(given.x_GND.detach().requires_grad_()).backward(given.gradient_GND)

    passes = {"forward": {name: without_gradient(call) for name, call in pieces.items()}}
    if trained:
        passes["forward + backward"] = {name: with_backward(module) for name, module in trained.items()}
    kept = round(kept_share(layers["layer, BPR"].eval(), make_input(10_000).x_GND), 4)
    base = {"pieces": "dense", "priority": "layer, vanilla", "one-hot": "dispatch and combine"}[comparison]
    for one_pass, calls in passes.items():
        for layer in layers.values():
            layer.train(one_pass != "forward")
        seconds = alternate(
            calls,
            make_input,
            args.rounds,
            before=lambda: [layer.zero_grad(set_to_none=True) for layer in layers.values()],
            synchronize=synchronizer(device),
        )
        for name, own in seconds.items():
            row = {
                "comparison": comparison,
                "name": name,
                "dtype": dtype,
                "pass": one_pass,
                "tokens": tokens,
                "width": D,
                "hidden": args.hidden,
                "experts": E,
                "selected": K,
                "capacity": args.capacity,
                "kept": 1.0 if name == "dense" else kept,
                "ms": milliseconds(own),
                "ratios": {} if name == base else {base: ratios(own, seconds[base])},
            }
            session.add(row)


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser("dispatch", __doc__.splitlines()[0], rounds=21)
    parser.add_argument("--tokens", type=int, default=6304, help="of a call (%(default)s: 32 pictures)")
    parser.add_argument("--small", type=int, default=788, help="tokens for the one-hot way (%(default)s)")
    parser.add_argument("--width", type=int, default=384, help="D (%(default)s)")
    parser.add_argument("--hidden", type=int, default=1536, help="F, of each expert (%(default)s)")
    parser.add_argument("--experts", type=int, default=8, help="E (%(default)s)")
    parser.add_argument("--selected", type=int, default=1, help="K (%(default)s)")
    parser.add_argument("--capacity", type=float, default=1.0, help="capacity factor (%(default)s)")
    session = Session("dispatch", parser, argv, compiles=False)
    for dtype in session.args.dtype:
        try:
            measure_ceiling(session, dtype, Ceiling(session.device, DTYPES[dtype]))
            for comparison in ("pieces", "priority", "one-hot"):
                measure(session, dtype, comparison)
        except ValueError as error:
            parser.error(str(error))
    session.finish()


if __name__ == "__main__":
    main()
