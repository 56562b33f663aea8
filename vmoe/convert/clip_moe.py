"""CLIP-MoE (https://github.com/OpenSparseLLMs/CLIP-MoE, arXiv 2409.19291) as open_clip's CLIP with our experts.

Of its two tables of positions the first 20 rows of one and the rest of the other are used: here they are one table.
"""

import math
import re
from collections.abc import Iterator, Mapping
from functools import partial
from operator import itemgetter
from typing import Any

from torch import nn

from vmoe.convert.arrays import CheckpointError, StoredArray, state_arrays
from vmoe.convert.fit import Rows, filled, filler, fit, without_memory
from vmoe.convert.layout import Entry, same
from vmoe.convert.section import RATE, SIZE, ConfigError, Section
from vmoe.models.factory import build

NAME = "clip_moe"
CONTEXT_LENGTH, KEPT_POSITIONS = 248, 20  # of Long-CLIP (arXiv 2403.15378), which it starts from
HEAD_WIDTH = 64
RELEASED_CHOICES = 2  # experts of a token in the released files, which do not say it
UNUSED = frozenset({"input_resolution", "context_length", "vocab_size"})  # numbers beside the weights of CLIP's files
_PARTS = {"fc1": "c_fc", "fc2": "c_proj"}


def from_clip_moe(args: Mapping[str, Any], state: Mapping[str, Any]) -> nn.Module:
    """A CLIP-MoE in eval mode, with open_clip's interface: `encode_image`, `encode_text`, `logit_scale`.

    Args:
        args: the arguments of its constructor, of which "moe_args" is {"num_experts", "top_k", "dropout",
            "moe_layers"}.
        state: its state dict, {"visual.transformer.resblocks.0.gate.weight": array or tensor, ...}.

    ConfigError: an argument cannot be converted. CheckpointError: the weights do not fit the arguments.
    """
    _, spec, _, rows = plan_clip_moe(state_arrays(state), "state", args)
    return filled(build(spec), rows)


def is_clip_moe(arrays: Mapping[str, StoredArray]) -> bool:
    """Whether these are the tensors of a CLIP-MoE."""
    gates = any(re.fullmatch(r"(visual\.)?transformer\.resblocks\.\d+\.gate\.weight", name) for name in arrays)
    return gates and {"positional_embedding_res", "visual.conv1.weight", "text_projection"} <= arrays.keys()


def plan_clip_moe(
    stored: Mapping[str, StoredArray], source: object, args: Mapping[str, Any] | None = None, name: str | None = None
) -> tuple[str, dict[str, Any], nn.Module, Rows]:
    """Checks that weights, `source` in errors, fit the arguments, before any number is read.

    Returns the model's name and specification, the model on the meta device, and for each part of its tensors an entry
    and a function that reads the weights into its view. Without arguments they are those of the shapes, K being 2.
    """
    if name not in (None, NAME):
        raise ConfigError(f"{source} is a CLIP-MoE: --model must be {NAME} or left out, got {name!r}")
    stored = {key: array for key, array in stored.items() if key not in UNUSED}
    if args is None:
        try:
            args = _args_of(stored)
        except (LookupError, ValueError) as error:
            raise CheckpointError(
                f"{source} lacks tensors of a CLIP-MoE, or they have other shapes: {error}"
            ) from error
    spec = clip_moe_spec(args)
    model = without_memory(lambda: build(spec))
    return NAME, spec, model, fit(model, _layout(model), stored, partial(filler, stored), source, "the arguments")


def clip_moe_spec(args: Mapping[str, Any]) -> dict[str, Any]:
    """How `vmoe.models.factory.build` makes the model of these arguments: an open_clip model, upcycled."""
    section = Section(args)
    get, moe = section.get, section.section("moe_args")
    layers = {"image": get("vision_layers", SIZE), "text": get("transformer_layers", SIZE)}
    widths = {"image": get("vision_width", SIZE), "text": get("transformer_width", SIZE)}
    heads = get("transformer_heads", SIZE, max(1, widths["text"] // HEAD_WIDTH))
    E, K, sparse = moe.get("num_experts", SIZE), moe.get("top_k", SIZE), moe.get("moe_layers", SIZE)
    drop = moe.get("dropout", RATE, 0.0)
    if K > E:
        raise moe.wrong("top_k", K, f"1..num_experts, {E}")
    for key, width, number in (
        ("vision_width", widths["image"], widths["image"] // HEAD_WIDTH),  # as OpenAI's CLIP and open_clip count them
        ("transformer_width", widths["text"], heads),
    ):
        if not number or width % number:
            wanted = f"a multiple of its {number} heads" if number else f"at least {HEAD_WIDTH}, the width of a head"
            raise section.wrong(key, width, wanted)
    if sparse > layers["image"]:
        raise moe.wrong("moe_layers", sparse, f"at most vision_layers, {layers['image']}")
    if get("context_length", SIZE, CONTEXT_LENGTH) != CONTEXT_LENGTH:
        raise section.wrong("context_length", args["context_length"], f"{CONTEXT_LENGTH}, as its code has it")
    vision = {"layers": layers["image"], "width": widths["image"], "head_width": HEAD_WIDTH}
    vision |= {"patch_size": get("vision_patch_size", SIZE), "image_size": get("image_resolution", SIZE)}
    text = {"layers": layers["text"], "width": widths["text"], "heads": heads}
    text |= {"context_length": CONTEXT_LENGTH, "vocab_size": get("vocab_size", SIZE)}
    kwargs = {"embed_dim": get("embed_dim", SIZE), "vision_cfg": vision, "text_cfg": text, "quick_gelu": True}
    moe.finish()
    section.finish("load_from_clip", "use_short_text")
    routing = {"num_experts": E, "num_selected_experts": K, "normalize_weights": True, "noise_std": 0.0}
    routing |= {"capacity_factor": None, "importance_loss": 0.0, "load_loss": 0.0, "gshard_loss": 0.01}
    routing |= {"expert_drop": drop}
    steps = [
        {"tower": tower, "layers": list(range(max(0, depth - sparse), depth)), **routing}
        for tower, depth in layers.items()
    ]
    return {"name": NAME, "kwargs": kwargs, "upcycle": steps}


def _args_of(stored: Mapping[str, StoredArray]) -> dict[str, Any]:
    """The arguments that shapes tell, with the K of the released files."""

    def count(pattern: str) -> int:
        return len({match[0] for name in stored if (match := re.match(pattern, name))})

    shapes = {name: array.shape for name, array in stored.items()}
    width, _, _, patch = shapes["visual.conv1.weight"]
    side = math.isqrt(max(1, shapes["visual.positional_embedding"][0] - 1))
    gate = next(name for name in stored if name.endswith(".gate.weight"))
    moe_args = {"num_experts": shapes[gate][0], "top_k": min(RELEASED_CHOICES, shapes[gate][0])}
    moe_args["moe_layers"] = max(
        count(rf"{tower}transformer\.resblocks\.\d+\.gate\.") for tower in (r"visual\.", "(?!visual)")
    )
    return {
        "moe_args": moe_args,
        "embed_dim": shapes["text_projection"][1],
        "image_resolution": side * patch,
        "vision_layers": count(r"visual\.transformer\.resblocks\.\d+\."),
        "vision_width": width,
        "vision_patch_size": patch,
        "vocab_size": shapes["token_embedding.weight"][0],
        "transformer_width": shapes["ln_final.weight"][0],
        "transformer_layers": count(r"transformer\.resblocks\.\d+\."),
    }


def _layout(model: nn.Module) -> Iterator[tuple[str, Entry]]:
    """The array that each tensor, or a part of it, comes from, and where it lies."""
    for tensor, mine in model.state_dict().items():
        if tensor == "positional_embedding":  # the second overwrites rows of the first
            yield tensor, Entry(tensor, same)
            rest = slice(KEPT_POSITIONS, None)
            yield f"{tensor}_res", Entry(tensor, itemgetter(rest), rest)
        elif match := re.fullmatch(r"(.*)\.mlp\.experts\.(fc1|fc2)\.(weight|bias)", tensor):
            for e in range(len(mine)):
                yield f"{match[1]}.experts.{e}.{_PARTS[match[2]]}.{match[3]}", Entry(tensor, itemgetter(e))
        else:
            yield tensor.replace(".mlp.router.weight", ".gate.weight"), Entry(tensor, same)
