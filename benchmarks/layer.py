"""The sparse layer against the dense MLP of the same active compute and against other packages' layers.

Each comparison is measured by itself, in turn (see `measure.py`): without gradients in `eval()`, with the capacity in
use, and forward with backward in training mode, gradients of the input and of all parameters.

Shapes, by suffix: B batch, T length, D width.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from benchmarks import contenders
from benchmarks.contenders import CUDA_PEERS, Contender, match_st_moe
from benchmarks.measure import DTYPES, Ceiling, activation_bytes, alternate, milliseconds, ratios, synchronizer
from benchmarks.session import Session, make_parser, measure_ceiling

# Further inputs, on which shares of dropped tokens are measured.
SHARE_INPUTS = range(10_000, 10_002)
PASSES = ("forward", "forward + backward")


@dataclass
class Comparison:
    """Layers that do the same work.

    Attributes:
        name: of the comparison.
        shape: (B, T) of the tokens.
        contenders: to measure in turn; the first is the dense twin, the second ours, the others peers.
        flops: of a forward pass of the dense twin.
        selected: K.
        passes: which of `PASSES`.
        ceiling: measure a large product and a large copy in turn with the others too.
    """

    name: str
    shape: tuple[int, int]
    contenders: list[Contender]
    flops: float
    selected: int
    passes: Sequence[str] = PASSES
    ceiling: bool = False
    setting: dict = field(default_factory=dict)


def make_comparison(name: str, session: Session) -> Comparison:
    """The layers of a comparison on the session's device, in float32."""
    args = session.args
    D, F, E, K = args.width, args.hidden, args.experts, args.selected
    sequences = (max(1, args.tokens // args.length), min(args.tokens, args.length))
    several = min(max(K, 2), E)

    def flops(tokens: int, hidden: int, matrices: int = 2) -> float:
        return 2 * matrices * tokens * D * hidden

    def peers(*makers: tuple[Callable[..., Contender], tuple]) -> list[Contender]:
        found = []
        for make, shape in makers:
            try:
                found.append(make(D, F, E, *shape))
            except ModuleNotFoundError as error:
                session.note(f"{make.__name__}: not installed here (no module {error.name})")
            except ImportError as error:
                session.note(f"{make.__name__}: cannot be imported here ({str(error).splitlines()[0]})")
        return found

    if name == "mlp":
        ours = contenders.sparse(D, F, args.capacity, num_experts=E, num_selected_experts=K, batch_priority=True)
        return Comparison(
            name,
            (1, args.tokens),
            [contenders.dense(D, F * K), ours],
            flops(args.tokens, F * K),
            K,
            ceiling=True,
            setting={"capacity": args.capacity},
        )
    if name == "picture":
        ours = contenders.sparse(D, F, None, num_experts=E, num_selected_experts=K)
        tokens = min(args.tokens, args.length)
        layers = [contenders.dense(D, F * K), ours]
        return Comparison(name, (1, tokens), layers, flops(tokens, F * K), K, passes=PASSES[:1])
    if name == "swiglu":
        ours = contenders.sparse(
            D, F, None, bias=False, expert_mlp="swiglu", num_experts=E, num_selected_experts=several,
            normalize_weights=True,
        )  # fmt: skip
        layers = [contenders.dense_swiglu(D, F * several), ours, *peers((contenders.mixtral, (several,)))]
        return Comparison(name, (1, args.tokens), layers, flops(args.tokens, F * several, 3), several)
    if name == "st_moe":
        ours = contenders.sparse(
            D, F, args.capacity, num_experts=E, num_selected_experts=several, batch_priority=True,
            normalize_weights=True,
        )  # fmt: skip
        layers = [contenders.dense(D, F * several), ours, *peers((contenders.st_moe, (several,)))]
        tokens = sequences[0] * sequences[1]
        setting = {"capacity": args.capacity}
        return Comparison(name, sequences, layers, flops(tokens, F * several), several, setting=setting)
    if name == "soft":
        slots = max(1, -(-sequences[1] // E))
        ours = contenders.sparse_soft(D, F, E, slots)
        layers = [contenders.dense(D, F), ours, *peers((contenders.soft_moe, (slots,)))]
        tokens = sequences[0] * sequences[1]
        return Comparison(name, sequences, layers, flops(tokens, F), 1, setting={"slots": slots})
    assert name == "dropless"
    ours = contenders.sparse(D, F, None, num_experts=E, num_selected_experts=K)
    layers = [contenders.dense(D, F * K), ours, *peers(*((make, (K,)) for make in CUDA_PEERS.values()))]
    return Comparison(name, (1, args.tokens), layers, flops(args.tokens, F * K), K)


def run_comparison(comparison: Comparison, dtype: str, session: Session) -> None:
    """Measure a comparison in one type and add its rows to the session."""
    args, device = session.args, session.device
    for contender in comparison.contenders:
        contender.module.to(device, DTYPES[dtype])
        if args.compile:
            contender.compiled = torch.compile(contender.module, mode=args.compile)

    def make_input(number: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator(device).manual_seed(20_000 + number)
        shape = (2, *comparison.shape, args.width)
        return torch.randn(shape, generator=generator, device=device, dtype=DTYPES[dtype]).unbind()

    _leave_out_what_fails(comparison, make_input(-100), dtype, session)
    layers = {contender.name: contender for contender in comparison.contenders}
    dense, ours = comparison.contenders[:2]
    ceiling = Ceiling(device, DTYPES[dtype]) if comparison.ceiling else None
    for one_pass in comparison.passes:
        backward = one_pass == PASSES[1]
        for layer in layers.values():
            layer.module.train(backward)
        shares = {ours.name: _kept(ours, make_input)}
        if "st_moe_pytorch" in layers:
            match_st_moe(layers["st_moe_pytorch"], make_input(SHARE_INPUTS[0])[0], shares[ours.name])
        shares |= {name: _kept(layer, make_input) for name, layer in layers.items() if name not in shares}
        call = _forward_backward if backward else _forward
        calls = {name: partial(call, layer) for name, layer in layers.items()}
        measure = partial(
            alternate,
            make_input=make_input,
            before=lambda: [layer.module.zero_grad(set_to_none=True) for layer in layers.values()],
            synchronize=synchronizer(device),
        )
        # One picture takes next to no time, and peers do not need the precision of the goals.
        rounds = {"mlp": args.rounds, "picture": 4 * args.rounds}.get(comparison.name, (args.rounds + 1) // 2)
        seconds = measure(calls, rounds=rounds, warmup=2 if args.compile or ceiling else 1)
        # By themselves: whoever runs after the large copy finds nothing in the cache.
        beside = measure({**calls, **ceiling.calls}, rounds=min(args.rounds, 5)) if ceiling else {}
        memory = {}
        if backward:
            memory = {name: _activations(layer, make_input, session) for name, layer in layers.items()}
        for name in layers:
            tokens = comparison.shape[0] * comparison.shape[1]
            row = {
                "comparison": comparison.name,
                "name": name,
                "dtype": dtype,
                "pass": one_pass,
                "tokens": tokens,
                "width": args.width,
                "hidden": args.hidden,
                "experts": args.experts,
                "selected": comparison.selected,
                **comparison.setting,
                "kept": round(shares[name], 4),
                "ms": milliseconds(seconds[name]),
                "ratios": {
                    other: ratios(seconds[name], seconds[other])
                    for other in (dense.name, ours.name)
                    if other != name and not (name == dense.name and other == ours.name)
                },
            }
            if memory:
                row |= {"activations_mib": round(memory[name] / 2**20, 2)}
                row |= {"activations_ratio": round(memory[name] / max(memory[dense.name], 1), 4)}
                rows = tokens * comparison.selected * shares[name]
                row |= {"gathered_copy_mib": round(rows * args.width * DTYPES[dtype].itemsize / 2**20, 2)}
            if ceiling:
                flops = comparison.flops * (3 if backward else 1) * shares[name]
                row["share_of_gemm"] = ceiling.share(flops, beside[name], beside["gemm"])
            session.add(row)
        for name, share in shares.items():
            if name not in (dense.name, ours.name) and abs(share - shares[ours.name]) > 0.01:
                ratio = ratios(seconds[name], seconds[ours.name])["median"] * shares[ours.name] / share
                session.note(
                    f"{comparison.name}, {dtype}, {one_pass}: {name} keeps {share:.1%} of the assignments, {ours.name} "
                    f"{shares[ours.name]:.1%}; per kept assignment it takes {ratio:.2f} of the time"
                )


def _forward(layer: Contender, value: tuple[Tensor, Tensor]) -> Tensor:
    with torch.no_grad():
        return layer(value[0])


def _forward_backward(layer: Contender, value: tuple[Tensor, Tensor]) -> None:
    x_BTD, gradient_BTD = value
    layer(x_BTD.detach().requires_grad_()).backward(gradient_BTD)


def _kept(layer: Contender, make_input: Callable[[int], tuple[Tensor, Tensor]]) -> float:
    shares = [layer.kept(make_input(number)[0]) for number in SHARE_INPUTS]
    return sum(shares) / len(shares)


def _activations(layer: Contender, make_input: Callable, session: Session) -> int:
    x_BTD, _ = make_input(SHARE_INPUTS[0])
    layer.module.zero_grad(set_to_none=True)
    return activation_bytes(lambda: layer(x_BTD.detach().requires_grad_()), [layer.module], session.device)


def _leave_out_what_fails(comparison: Comparison, value: tuple[Tensor, Tensor], dtype: str, session: Session) -> None:
    """Other packages know fewer types and versions than ours: one that fails is named, and left out."""
    for peer in comparison.contenders[2:]:
        try:
            _forward_backward(peer, value)
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            session.note(f"{peer.name} does not run in {dtype} here: {type(error).__name__}: {reason}")
            comparison.contenders.remove(peer)


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser("layer", __doc__.splitlines()[0], rounds=11)
    parser.add_argument("--tokens", type=int, default=6304, help="of a call (%(default)s: 32 pictures)")
    parser.add_argument("--length", type=int, default=197, help="tokens of a picture (%(default)s)")
    parser.add_argument("--width", type=int, default=384, help="D (%(default)s)")
    parser.add_argument("--hidden", type=int, default=1536, help="F, of each expert (%(default)s)")
    parser.add_argument("--experts", type=int, default=8, help="E (%(default)s)")
    parser.add_argument("--selected", type=int, default=1, help="K (%(default)s); two at least for some peers")
    parser.add_argument("--capacity", type=float, default=1.0, help="capacity factor (%(default)s)")
    names = ["mlp", "picture", "swiglu", "st_moe", "soft", "dropless"]
    parser.add_argument(
        "--comparisons",
        nargs="+",
        choices=names,
        help="mlp: the dense MLP; picture: the same for the tokens of one; swiglu: transformers' Mixtral block; "
        "st_moe: st_moe_pytorch; soft: soft_moe_pytorch; dropless: packages for CUDA. Default: all that the device has",
    )
    session = Session("layer", parser, argv)
    run(
        session,
        session.args.comparisons or [name for name in names if name != "dropless" or session.device.type == "cuda"],
    )


def run(session: Session, names: Sequence[str]) -> None:
    """Measure the comparisons in each type, and write the section."""
    _check(session.parser, session.args)
    for dtype in session.args.dtype:
        measure_ceiling(session, dtype, Ceiling(session.device, DTYPES[dtype]))
        for name in names:
            try:
                comparison = make_comparison(name, session)
            except ValueError as error:
                session.parser.error(str(error))
            run_comparison(comparison, dtype, session)
    session.finish()


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for name in ("tokens", "length", "width", "hidden", "experts", "selected"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")


if __name__ == "__main__":
    main()
