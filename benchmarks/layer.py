"""The sparse layer against the dense MLP of the same active compute and against other packages' layers.

Each comparison is measured by itself, in turn (see `measure.py`): without gradients in `eval()`, with the capacity in
use, and forward with backward in training mode, gradients of the input and of all parameters.

Shapes, by suffix: B batch, T length, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from benchmarks import contenders
from benchmarks.contenders import CUDA_PEERS, Contender, match_st_moe
from benchmarks.measure import DTYPES, Ceiling, activation_bytes, milliseconds, ratios
from benchmarks.session import SIZES, Session, make_parser

# Further inputs, on which shares of dropped tokens are measured.
SHARE_INPUTS = range(10_000, 10_002)
PASSES = ("forward", "forward + backward")
COMPARISONS = ("mlp", "image", "swiglu", "st_moe", "soft", "dropless")


@dataclass
class Comparison:
    """Layers that do the same work."""

    name: str
    shape: tuple[int, int]  # (B, T) of the tokens
    contenders: list[Contender]  # to measure in turn: the dense one, ours, the peers
    flops: float  # of a forward pass of the dense one
    selected: int  # K
    passes: Sequence[str] = PASSES
    ceiling: bool = False  # measure a large matrix multiplication and a large copy in turn with the others too
    setting: dict = field(default_factory=dict)


def make_comparison(name: str, session: Session) -> Comparison:
    """The layers of a comparison on the session's device, in float32."""
    args = session.args
    D, F, E, K = args.width, args.hidden, args.experts, args.selected
    sequences = (max(1, args.tokens // args.length), min(args.tokens, args.length))
    several = min(max(K, 2), E)
    capacity = {"capacity": args.capacity}

    def compare(dense: Contender, ours: Contender, peers: Sequence[tuple], hidden: int, **options) -> Comparison:
        shape = options.pop("shape", (1, args.tokens))
        flops = 2 * options.pop("matrices", 2) * shape[0] * shape[1] * D * hidden
        layers = [dense, ours, *_peers(session, [partial(make, D, F, E, *more) for make, *more in peers])]
        return Comparison(name, shape, layers, flops, options.pop("selected", K), **options)

    def ours(limit: float | None, selected: int = K, **settings) -> Contender:
        return contenders.sparse(D, F, limit, num_experts=E, num_selected_experts=selected, **settings)

    if name == "mlp":
        layer = ours(args.capacity, batch_priority=True)
        return compare(contenders.dense(D, F * K), layer, [], F * K, ceiling=True, setting=capacity)
    if name == "image":
        shape = (1, min(args.tokens, args.length))
        return compare(contenders.dense(D, F * K), ours(None), [], F * K, shape=shape, passes=PASSES[:1])
    if name == "swiglu":
        layer = ours(None, several, bias=False, expert_mlp="swiglu", normalize_weights=True)
        dense, peers = contenders.dense_swiglu(D, F * several), [(contenders.mixtral, several)]
        return compare(dense, layer, peers, F * several, matrices=3, selected=several)
    if name == "st_moe":
        layer = ours(args.capacity, several, batch_priority=True, normalize_weights=True)
        dense, peers = contenders.dense(D, F * several), [(contenders.st_moe, several)]
        return compare(dense, layer, peers, F * several, shape=sequences, selected=several, setting=capacity)
    if name == "soft":
        slots = max(1, -(-sequences[1] // E))
        layer, peers = contenders.sparse_soft(D, F, E, slots), [(contenders.soft_moe, slots)]
        return compare(contenders.dense(D, F), layer, peers, F, shape=sequences, selected=1, setting={"slots": slots})
    assert name == "dropless"
    return compare(contenders.dense(D, F * K), ours(None), [(make, K) for make in CUDA_PEERS.values()], F * K)


def _peers(session: Session, makers: Sequence[partial[Contender]]) -> list[Contender]:
    """The layers of the packages that are installed; notes name the others."""
    found = []
    for make in makers:
        try:
            found.append(make())
        except ModuleNotFoundError as error:
            session.note(f"{make.func.__name__}: not installed here (no module {error.name})")
        except ImportError as error:
            session.note(f"{make.func.__name__}: cannot be imported here ({str(error).splitlines()[0]})")
    return found


def run_comparison(comparison: Comparison, dtype: str, session: Session) -> None:
    """Measures a comparison in one type and adds its rows to the session."""
    args, device = session.args, session.device
    for contender in comparison.contenders:
        contender.module.to(device, DTYPES[dtype])
        if args.compile:
            contender.compiled = torch.compile(contender.module, mode=args.compile)

    def make_input(number: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator(device).manual_seed(20_000 + number)
        shape = (2, *comparison.shape, args.width)
        return torch.randn(shape, generator=generator, device=device, dtype=DTYPES[dtype]).unbind()

    _remove_what_fails(comparison, make_input(-100), dtype, session)
    layers = {contender.name: contender for contender in comparison.contenders}
    ceiling = Ceiling(device, DTYPES[dtype]) if comparison.ceiling else None
    for one_pass in comparison.passes:
        backward = one_pass == PASSES[1]
        for layer in layers.values():
            layer.module.train(backward)
        shares = _shares(layers, make_input)
        calls = {name: partial(_forward_backward if backward else _forward, layer) for name, layer in layers.items()}
        modules = [layer.module for layer in layers.values()]
        # One image takes next to no time, and peers do not need the precision of the goals.
        rounds = {"mlp": args.rounds, "image": 4 * args.rounds}.get(comparison.name, (args.rounds + 1) // 2)
        seconds = session.alternate(calls, make_input, modules, rounds, warmup=2 if args.compile or ceiling else 1)
        rows = {name: _row(comparison, name, dtype, one_pass, shares[name], seconds, args) for name in layers}
        if backward:
            for name, layer in layers.items():
                rows[name] |= {"activations_mib": round(_activations(layer, make_input, session) / 2**20, 2)}
            least = max(rows["dense"]["activations_mib"], 2**-20)
            for name, row in rows.items():
                row |= {"activations_ratio": round(row["activations_mib"] / least, 4)}
                kept = row["tokens"] * comparison.selected * shares[name]
                row |= {"gathered_copy_mib": round(kept * args.width * DTYPES[dtype].itemsize / 2**20, 2)}
        if ceiling:
            # In a run of its own: after the large copy nothing is left in the cache.
            beside = session.alternate({**calls, **ceiling.calls}, make_input, modules, min(args.rounds, 5))
            for name, row in rows.items():
                flops = comparison.flops * (3 if backward else 1) * shares[name]
                row["share_of_gemm"] = ceiling.share(flops, beside[name], beside["gemm"])
        for row in rows.values():
            session.add(row)
        _note_other_shares(comparison, dtype, one_pass, shares, seconds, session)


def _shares(layers: dict[str, Contender], make_input: Callable) -> dict[str, float]:
    """Shares of the assignments that the experts keep; the peer with a capacity is set to keep what ours keeps."""
    inputs = [make_input(number)[0] for number in SHARE_INPUTS]

    def kept(layer: Contender) -> float:
        return sum(map(layer.kept, inputs)) / len(inputs)

    if "st_moe_pytorch" in layers:
        match_st_moe(layers["st_moe_pytorch"], inputs[0], kept(layers["vmoe"]))
    return {name: kept(layer) for name, layer in layers.items()}


def _row(comparison: Comparison, name: str, dtype: str, one_pass: str, share: float, seconds: dict, args) -> dict:
    others = {"dense": [], "vmoe": ["dense"]}.get(name, ["dense", "vmoe"])
    return {
        **{"comparison": comparison.name, "name": name, "dtype": dtype, "pass": one_pass},
        **{"tokens": comparison.shape[0] * comparison.shape[1], "width": args.width, "hidden": args.hidden},
        **{"experts": args.experts, "selected": comparison.selected, **comparison.setting, "kept": round(share, 4)},
        "ms": milliseconds(seconds[name]),
        "ratios": {other: ratios(seconds[name], seconds[other]) for other in others},
    }


def _note_other_shares(
    comparison: Comparison, dtype: str, one_pass: str, shares: dict, seconds: dict, session: Session
) -> None:
    """Notes the peers that keep another share than ours."""
    for name, share in shares.items():
        if name not in ("dense", "vmoe") and abs(share - shares["vmoe"]) > 0.01:
            ratio = ratios(seconds[name], seconds["vmoe"])["median"] * shares["vmoe"] / share
            session.note(
                f"{comparison.name}, {dtype}, {one_pass}: {name} keeps {share:.1%} of the assignments, vmoe "
                f"{shares['vmoe']:.1%}; per kept assignment it takes {ratio:.2f} of the time"
            )


def _forward(layer: Contender, value: tuple[Tensor, Tensor]) -> Tensor:
    with torch.no_grad():
        return layer(value[0])


def _forward_backward(layer: Contender, value: tuple[Tensor, Tensor]) -> None:
    x_BTD, gradient_BTD = value
    layer(x_BTD.detach().requires_grad_()).backward(gradient_BTD)


def _activations(layer: Contender, make_input: Callable, session: Session) -> int:
    x_BTD, _ = make_input(SHARE_INPUTS[0])
    layer.module.zero_grad(set_to_none=True)
    return activation_bytes(lambda: layer(x_BTD.detach().requires_grad_()), [layer.module], session.device)


def _remove_what_fails(comparison: Comparison, value: tuple[Tensor, Tensor], dtype: str, session: Session) -> None:
    """Removes, with a note, peers that do not run: other packages support fewer types and versions than ours."""
    for peer in comparison.contenders[2:]:
        try:
            _forward_backward(peer, value)
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            session.note(f"{peer.name} does not run in {dtype} here: {type(error).__name__}: {reason}")
            comparison.contenders.remove(peer)


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser("layer", __doc__.splitlines()[0], rounds=11, sizes=tuple(SIZES))
    parser.add_argument("--length", type=int, default=197, help="tokens of an image (%(default)s)")
    parser.add_argument(
        "--comparisons",
        nargs="+",
        choices=COMPARISONS,
        help="mlp: the dense MLP; image: the same for the tokens of one image; swiglu: transformers' Mixtral block; "
        "st_moe: st_moe_pytorch; soft: soft_moe_pytorch; dropless: packages for CUDA. Default: all that the device has",
    )
    session = Session("layer", parser, argv)
    on_device = COMPARISONS if session.device.type == "cuda" else COMPARISONS[:-1]

    def measure(session: Session, dtype: str, _rates: dict) -> None:
        for name in session.args.comparisons or on_device:
            run_comparison(make_comparison(name, session), dtype, session)

    session.run(measure)


if __name__ == "__main__":
    main()
