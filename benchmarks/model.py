"""A whole V-MoE of ViT-S/16's widths against timm's ViT-S/16: images per second, and the time of one image.

The V-MoE has experts in every second block, E = 8, K = 1; both have exact GELU. Its weights are fresh, and fresh
routers balance tokens worse than trained ones, so the rows to compare are those in which nothing is dropped: there both
sides do the same work. With the capacity of training (1.05, batch priority) the share that is kept is given.

Shapes, by suffix: B batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vmoe
from benchmarks.measure import DTYPES, ratios, spread
from benchmarks.session import Session, make_parser

# Widths of timm's vit_small_patch16_224 under the name of a larger V-MoE.
SMALL = {"embed_dim": 384, "depth": 12, "num_heads": 6}
DROPLESS = {"capacity_factor": float("inf")}
TRAINED = {"capacity_factor": 1.05, "eval_capacity_factor": 1.05, "batch_priority": True}
VARIANTS = {
    "dropless": DROPLESS,
    "capacity 1.05": TRAINED,
    "expert_choice": {"router": "expert_choice", "capacity_factor": 1.0},
    "soft": {"router": "soft", "num_slots": 25},  # 8 x 25 slots for 197 tokens
}


def vision_models(variants: Sequence[str], image_size: int = 224, **sizes) -> dict[str, nn.Module]:
    """{"dense": timm's model, name of the variant (of `VARIANTS`): V-MoE}, all of the same sizes."""
    sizes = {**SMALL, **sizes}
    models = {"dense": timm.create_model("vit_small_patch16_224", img_size=image_size, **sizes)}
    for variant in variants:
        settings = VARIANTS[variant]
        chosen = {} if "router" in settings else {"num_selected_experts": 1}
        models[variant] = timm.create_model(
            "vmoe_base_patch16_224",
            img_size=image_size,
            act_layer=nn.GELU,  # as in timm's; V-MoE's own is the tanh approximation
            moe_layers="every2",
            num_experts=8,
            **sizes,
            **chosen,
            **settings,
        )
    return models


@torch.no_grad()
def kept_of(model: nn.Module, images: Tensor) -> float:
    """Share of the assignments that the experts of all sparse layers keep; 1 for a dense model."""
    with vmoe.record_routing(model) as record:
        model(images)
    shares = [call.metrics["share_dropped"].item() for _, call in record.calls]
    return 1 - sum(shares) / len(shares) if shares else 1.0


def measure(session: Session, dtype: str, _rates: dict) -> None:
    """Inference and training at the batch size, and inference of one image."""
    args, device = session.args, session.device
    sizes = {} if args.depth is None else {"depth": args.depth}
    models = {
        name: model.to(device, DTYPES[dtype])
        for name, model in vision_models(args.variants, args.image_size, **sizes).items()
    }
    called: dict[str, Any] = dict(models)
    if args.compile:
        called = {name: torch.compile(model, mode=args.compile) for name, model in models.items()}

    def make_input(batch: int, number: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator(device).manual_seed(50_000 + number)
        shape = (batch, 3, args.image_size, args.image_size)
        images = torch.randn(shape, generator=generator, device=device, dtype=DTYPES[dtype])
        return images, torch.randint(1000, (batch,), generator=generator, device=device)

    cases: tuple[tuple[str, Callable, int, int], ...] = (
        ("inference", _infer, args.batch, args.rounds),
        ("training", _train, args.batch, args.rounds),
        ("one image", _infer, 1, args.rounds * 4),
    )
    for one_pass, call, batch, rounds in cases:
        for model in models.values():
            model.train(one_pass == "training")
        kept = {name: round(kept_of(model, make_input(batch, 10_000)[0]), 4) for name, model in models.items()}
        calls = {name: partial(call, model) for name, model in called.items()}
        warmup = 1 if batch > 1 and not args.compile else 2
        seconds = session.alternate(calls, partial(make_input, batch), models.values(), rounds, warmup)
        common = {
            "comparison": "model",
            "dtype": dtype,
            "pass": one_pass,
            "batch": batch,
            "image_size": args.image_size,
        }
        rows = {
            name: {
                **common,
                "kept": kept[name],
                "images_per_second": spread([batch / value for value in own]),
                "speed_ratio": ratios(seconds["dense"], own),  # of speeds, so that more is better
            }
            for name, own in seconds.items()
        }
        session.add_times(seconds, "dense", rows.__getitem__)


def _infer(model: nn.Module, value: tuple[Tensor, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(value[0])


def _train(model: nn.Module, value: tuple[Tensor, Tensor]) -> None:
    images, labels_B = value
    F.cross_entropy(model(images).float(), labels_B).backward()


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser("model", __doc__.splitlines()[0], rounds=5)
    parser.set_defaults(dtype=["float32"])
    parser.add_argument("--batch", type=int, default=32, help="images (%(default)s)")
    parser.add_argument("--image_size", type=int, default=224, help="side in pixels (%(default)s)")
    parser.add_argument("--depth", type=int, help="blocks, in place of 12")
    parser.add_argument(
        "--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS)[:2], help="of the V-MoE (%(default)s)"
    )
    Session("model", parser, argv).run(measure)


if __name__ == "__main__":
    main()
