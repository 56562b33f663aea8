"""Swin-MoE's checkpoints (github.com/microsoft/Swin-Transformer, trained with Tutel), and back to any number of ranks.

NAME.pth.master holds all but the experts, NAME.pth.rankN the experts of one GPU: some of them or, where there were more
GPUs than experts, a slice of the hidden units of one. NAME.pth.global holds all. Each is {"model": state dict}.
"""

import glob
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import nn

from vmoe.convert.arrays import CheckpointError, StoredArray, state_arrays
from vmoe.convert.fit import Fill, Rows, filled, fit, without_memory
from vmoe.convert.layout import Entry, same, transposed
from vmoe.convert.section import COUNT, FLAG, NOT_NEGATIVE, NUMBER, PAIR, SIZE, ConfigError, Kind, Section
from vmoe.convert.torch_file import is_torch_file, open_torch
from vmoe.models.factory import build
from vmoe.models.serialization import read_pretrained_metadata
from vmoe.models.spec import on_meta
from vmoe.models.swin_moe import SWIN_MOE_MODELS, PositionMlpAttention, SwinMoE, log_offsets
from vmoe.moe import SparseMoE
from vmoe.utils.files import atomic_file

_EXPERTS = "._moe_layer.experts."
_BUFFERS = re.compile(r".*\.(relative_position_index|relative_coords_table|attn_mask|_num_global_experts)")
_GENERIC = "swin_moe_tiny_patch4_window4_32"  # for sizes that were not released; every setting is given
# Our tensors in a sparse layer -> theirs.
_LINEAR = {f"experts.fc{i}.bias": (f"experts.batched_fc{i}_bias", same) for i in (1, 2)}
_LINEAR |= {"experts.fc1.weight": ("experts.batched_fc1_w", same)}
_LINEAR |= {"experts.fc2.weight": ("experts.batched_fc2_w", transposed), "router.weight": ("gates.0.wg.weight", same)}
_COSINE = {**_LINEAR, "router.weight": ("gates.0.sim_matrix", transposed)}
_COSINE |= {"router.temperature": ("gates.0.temperature", same)}
_COSINE |= {"router.projection": ("gates.0.cosine_projector.weight", same)}
_COSINE |= {"router.projection_bias": ("gates.0.cosine_projector.bias", same)}
# Their constructor's arguments, what their values must be, and their defaults; and our names of those that differ.
_STAGES = Kind("a whole number for each stage", lambda values: list(map(COUNT.convert, values)))
_BLOCKS = Kind("a list of blocks for each stage", lambda values: [list(map(int, own)) for own in values])
_ARGS = {"img_size": (PAIR, 224), "patch_size": (SIZE, 4), "in_chans": (SIZE, 3), "num_classes": (COUNT, 1000)}
_ARGS |= {"embed_dim": (SIZE, 96), "depths": (_STAGES, (2, 2, 6, 2)), "num_heads": (_STAGES, (3, 6, 12, 24))}
_ARGS |= {"window_size": (SIZE, 7), "pretrained_window_sizes": (_STAGES, ()), "mlp_ratio": (NOT_NEGATIVE, 4.0)}
_ARGS |= {"qkv_bias": (FLAG, True), "mlp_fc2_bias": (FLAG, True), "drop_rate": (NOT_NEGATIVE, 0.0)}
_ARGS |= {"attn_drop_rate": (NOT_NEGATIVE, 0.0), "drop_path_rate": (NOT_NEGATIVE, 0.1)}
_ROUTING = {"top_value": (SIZE, 1), "capacity_factor": (NUMBER, 1.25), "normalize_gate": (FLAG, False)}
_ROUTING |= {"use_bpr": (FLAG, True), "gate_noise": (NOT_NEGATIVE, 1.0), "moe_drop": (NOT_NEGATIVE, 0.0)}
_OURS = {"drop_rate": "proj_drop_rate", "top_value": "num_selected_experts", "normalize_gate": "normalize_weights"}
_OURS |= {"use_bpr": "batch_priority", "gate_noise": "noise_std", "moe_drop": "expert_drop"}


class Tensors(dict[str, StoredArray]):
    """The arrays of a file."""

    name = "the state"

    def read(self, name: str) -> np.ndarray:
        """An array's numbers; a CheckpointError if they are not floating-point."""
        if "float" not in (dtype := self[name].dtype):
            raise CheckpointError(f"{self.name} holds {name} as {dtype}, not as floating-point numbers")
        return self[name].read()


def _open(file: str | Path) -> Tensors:
    """The arrays of a file. CheckpointError."""
    if not Path(file).is_file():
        raise CheckpointError(f"{file} is missing")
    tensors = Tensors(open_torch(file))
    tensors.name = str(file)
    return tensors


def find_swin_moe(source: str | Path) -> list[Tensors]:
    """The open files of a Swin-MoE, that with all but the experts first; [] if the content is something else.

    `source`: NAME.pth, NAME.pth.master or any NAME.pth.rankN; NAME.pth.global or another file with all.
    CheckpointError: a file is missing, doubled, damaged or of another model.
    """
    path = Path(source)
    part = re.fullmatch(r"(.+)\.(?:master|rank\d+)", path.name)
    stem = str(path.with_name(part[1]) if part else path)
    for whole in [Path(f"{stem}.global"), path] if not part else []:
        if whole.is_file():
            files = [_open(whole)] if is_torch_file(whole) else []
            return files if files and any(".cpb_mlp." in name for name in files[0]) else []
    named = [(re.search(r"\.rank(\d+)$", name), name) for name in glob.glob(f"{glob.escape(stem)}.rank*")]
    found = [(int(match[1]), name) for match, name in named if match]
    ranks, count = dict(sorted(found)), 1 + max(found, default=(0, ""))[0]
    if not found and not Path(f"{stem}.master").is_file():
        return []
    if len(ranks) != len(found):
        raise CheckpointError(f"{stem} has two files of one rank: {', '.join(sorted(name for _, name in found))}")
    if missing := sorted(set(range(count)) - ranks.keys()):
        raise CheckpointError(f"{stem}.rank{missing[0]} is missing: {len(ranks)} of {count} ranks are there")
    files = [_open(name) for name in (f"{stem}.master", *ranks.values())]
    if not any(".cpb_mlp." in name for name in files[0]):
        raise CheckpointError(f"{files[0].name} holds no Swin-MoE: no tensor is one of a position MLP (cpb_mlp)")
    _check_ranks(files[1:])
    _check_count(files, _gate(files[0])[1])
    return files


def _check_ranks(files: list[Tensors]) -> None:
    """CheckpointError: ranks are of different models, or one is another's copy."""
    first, seen = files[0], {}
    for file in files:
        for name in sorted(first.keys() | file.keys()):
            a, b = ([*each[name].shape] if name in each else "missing" for each in (file, first))
            if a != b:
                raise CheckpointError(f"{file.name} and {first.name} are of different models: {name} is {a}, not {b}")
        digest = hashlib.blake2b()
        for name in sorted(file):  # copies of one MLP, that training starts from, may differ in a bias alone
            digest.update(np.ascontiguousarray(file[name].read()))
        if file and (other := seen.setdefault(digest.digest(), file)) is not file:
            raise CheckpointError(
                f"{file.name} is doubled: it holds the experts of {other.name}: get the right file, or all experts are "
                "equal: then give one file (.global)"
            )


def _check_count(files: list[Tensors], E: int) -> None:
    """CheckpointError: the ranks after the last are not there, of the E experts that the router has."""
    shapes = [array.shape for name, array in files[1].items() if name.endswith("batched_fc1_w")]
    if not E or not shapes or len(shapes[0]) != 3:
        return
    own, count = shapes[0][0], len(files) - 1
    if own * count < E or (count > E and count % E):
        raise CheckpointError(
            f"ranks are missing after {files[-1].name}: {count} of them do not hold all of the router's {E} experts"
        )


def from_swin_moe(args: Mapping[str, Any], state: Mapping[str, Any]) -> nn.Module:
    """A Swin-MoE of Microsoft's repository as a `SwinMoE` in eval mode, with Tutel's capacity and priority there too.

    Dropout after the patch embedding, which acts in training only, is left out.

    Args:
        args: of its constructor; those that are absent have its defaults, and names that it has not are ignored.
        state: its state dict, {name: array}, with all experts.

    ConfigError: a setting cannot be converted. CheckpointError: the weights do not fit.
    """
    files = [Tensors(state_arrays(state))]
    spec = swin_moe_spec(files, Section(args).values)
    rows = plan_rows(without_memory(lambda: build(spec)), files)
    return filled(build(spec), rows)


def plan_swin_moe(files: list[Tensors], args: Mapping[str, Any] | None, name: str | None) -> tuple:
    """What `vmoe.convert.to_safetensors` writes: by the arguments, the name of a released model, or the content."""
    if args is not None and name is not None:
        raise ConfigError("give either the arguments or the name of a model, not both")
    spec = swin_moe_spec(files, name if args is None else args)
    model = without_memory(lambda: build(spec))
    stored = {f"{file.name}:{array}": file[array] for file in files for array in file}
    return files[0].name, "Swin-MoE", stored, 0, (spec["name"], spec["kwargs"], model, plan_rows(model, files))


def swin_moe_spec(files: Sequence[Tensors], config: str | Mapping[str, Any] | None = None) -> dict[str, Any]:
    """How to build the model of a checkpoint: by a released name, that of its content, or its constructor's arguments.
    ConfigError."""
    state = files[0]
    width, classes = (
        next(iter(state[name].shape), 0) if name in state else 0 for name in ("patch_embed.proj.weight", "head.weight")
    )
    blocks = sum(name.endswith(".norm1.weight") for name in state)
    gate, E = _gate(state)
    released = {
        (args["embed_dim"], sum(args["depths"]), args["num_experts"], args.get("gate", "softmax")): name
        for name, args in SWIN_MOE_MODELS.items()
    }
    name = released.get((width, blocks, E, gate))
    if isinstance(config, Mapping):
        return {"name": name or _GENERIC, "kwargs": _settings(Section(config), E, blocks)}
    if (name := config or name) not in SWIN_MOE_MODELS:
        if name is None:
            raise ConfigError(f"{state.name} is a Swin-MoE of no released size: give --config FILE.json")
        known = ", ".join(each for each in released.values() if each != _GENERIC)
        raise ConfigError(f"{state.name} is a Swin-MoE: --model must be one of {known}, got {name!r}")
    return {"name": name, "kwargs": {} if classes == 21841 else {"num_classes": classes}}


def _gate(state: Tensors) -> tuple[str, int]:
    """The kind of the first gate, and its number of experts."""
    for name, array in state.items():
        if name.endswith("wg.weight"):
            return "softmax", next(iter(array.shape), 0)
        if name.endswith("sim_matrix"):
            return "cosine", next(reversed(array.shape), 0)
    return "softmax", 0


def _settings(top: Section, E: int, blocks: int) -> dict[str, Any]:
    """Arguments for `create_model`, from those of Swin-MoE's constructor."""
    for key, needed in {"ape": False, "patch_norm": True, "qk_scale": None}.items():
        if top.take(key, needed) != needed:
            raise top.wrong(key, top.values[key], f"{needed}, as in all released models")
    kwargs = {_OURS.get(key, key): top.get(key, *own) for key, own in _ARGS.items()}
    kwargs["pos_drop_rate"] = kwargs["proj_drop_rate"]  # one rate there
    depths = kwargs["depths"]
    kwargs["num_heads"] = kwargs["num_heads"][: len(depths)]  # the project takes the first of more
    if sum(depths) != blocks or len(kwargs["num_heads"]) != len(depths):
        raise top.wrong("depths", depths, f"{blocks} blocks as in the weights, in as many stages as num_heads has")
    kwargs["pretrained_window_sizes"] = [*kwargs["pretrained_window_sizes"], *[0] * len(depths)][: len(depths)]
    sparse = top.get("moe_blocks", _BLOCKS, ())[: len(depths)]
    kwargs["moe_layers"] = [sum(depths[:i]) + j for i, own in enumerate(sparse) for j in own if 0 <= j < depths[i]]
    if not kwargs["moe_layers"]:
        return {**kwargs, "num_experts": 0}
    kwargs |= {_OURS.get(key, key): top.get(key, *own) for key, own in _ROUTING.items()}
    kwargs |= {"num_experts": E, "num_selected_experts": max(1, min(E, kwargs["num_selected_experts"]))}
    kwargs["normalize_weights"] &= kwargs["num_selected_experts"] > 1
    # In Tutel 0 means no limit, and -f a limit of f that adapts to less.
    if (factor := kwargs["capacity_factor"]) <= 0 and kwargs["batch_priority"]:
        needed = "> 0 with use_bpr, where Tutel takes the capacity from the queue position of the last token"
        raise top.wrong("capacity_factor", factor, needed)
    kwargs["capacity_factor"] = kwargs["eval_capacity_factor"] = abs(kwargs["capacity_factor"]) or math.inf
    kwargs["gate"] = "softmax"  # a released name may bring the other
    if top.get("cosine_router", FLAG, False):
        kwargs |= {"gate": "cosine", "cosine_dim": top.get("cosine_router_dim", SIZE, 256)}
    losses = ["load_importance_loss", "gshard_loss"]
    weights = [0.0, top.get("aux_loss_weight", NOT_NEGATIVE, 0.01)]
    return kwargs | dict(zip(losses if top.get("is_gshard_loss", FLAG, True) else losses[::-1], weights, strict=True))


def swin_moe_layout(model: nn.Module) -> dict[str, Entry]:
    """{the name in Swin-MoE's checkpoints: where it lies in the model}; a ValueError for what they do not have."""
    modules, layout = dict(model.named_modules()), {}
    for tensor in model.state_dict():
        block, _, own = tensor.partition(".mlp.")
        theirs, view = tensor, same
        if isinstance(layer := modules.get(f"{block}.mlp"), SparseMoE):
            settings, known = layer.settings, _COSINE if layer.settings.gate == "cosine" else _LINEAR
            if own not in known or settings.router != "top_k" or settings.gate == "sigmoid" or settings.per_image:
                raise ValueError(
                    f"Tutel's checkpoints have nothing like {tensor}: write a model with its routers alone"
                )
            theirs, view = f"{block}.mlp._moe_layer.{known[own][0]}", known[own][1]
        elif match := re.fullmatch(r"layers\.(\d+)(\.downsample\..*)", tensor):  # there after a stage, here before it
            theirs = f"layers.{int(match[1]) - 1}{match[2]}"
        layout[theirs.replace("head.fc.", "head.")] = Entry(tensor, view)
    return layout


def plan_rows(model: nn.Module, files: Sequence[Tensors]) -> Rows:
    """For each tensor of a model, what reads it from the files; a CheckpointError for those that do not fit it."""
    windows = [
        f"{name} is that of another window: {tuple(files[0][name].shape)}, not {tuple(buffer.shape)}"
        for name, buffer in model.named_buffers()
        if name.endswith("coords_table") and name in files[0] and files[0][name].shape != buffer.shape
    ]
    names = [name for file in files for name in file if not _BUFFERS.fullmatch(name)]
    layout = swin_moe_layout(model).items()
    return fit(model, layout, names, partial(_filler, files), files[0].name, "the model", windows)


def _filler(files: Sequence[Tensors], name: str, _: Entry, shape: tuple[int, ...]) -> Fill:
    """What reads an array from all files that hold a part of it; a ValueError if that is not the whole."""
    holders = [file for file in files[1:] if name in file and _EXPERTS in name]
    holders = holders or [file for file in files[:1] if name in file]
    if not holders:
        raise ValueError("is missing")
    whole, nbytes = np.broadcast_to(np.float32(0), shape), 4 * math.prod(shape)  # takes no memory
    if name.endswith("batched_fc2_bias") and holders[0] is files[0] and math.prod(files[0][name].shape) < whole.size:
        if files[0].read(name).any():
            raise ValueError("is that of the first rank alone, and not zero as a bias that is not trained")
        return StoredArray(shape, "float32", nbytes, [(..., lambda: whole)]).read_into
    parts = []
    for rank, file in enumerate(holders):
        where = _part(rank, len(holders), shape)
        needed, found = whole[where].shape, tuple(file[name].shape)
        if [n for n in needed if n > 1] != [n for n in found if n > 1]:  # old versions of Tutel have more axes of one
            of = f"one of {len(holders)} ranks needs" if len(holders) > 1 else "the model's is"
            raise ValueError(f"has shape {found} in {file.name}, {of} {needed}")
        parts.append((where, partial(_read, file, name, needed)))
    return StoredArray(shape, "float32", nbytes, parts).read_into


def _read(file: Tensors, name: str, shape: tuple[int, ...]) -> np.ndarray:
    return file.read(name).reshape(shape)


def _part(rank: int, ranks: int, shape: Sequence[int]) -> tuple[slice, ...]:
    """Where the part of a rank lies in an array, (experts, hidden units, ...); ValueError: they cannot share it."""
    if ranks == 1:
        return ()
    E, F = shape[:2]
    if E % ranks == 0:
        return (slice(rank * E // ranks, (rank + 1) * E // ranks),)
    shares = max(1, ranks // E)
    if ranks % E or F % shares:
        raise ValueError(f"of {E} experts cannot be shared by {ranks} ranks: one number must divide the other")
    expert, share, width = rank // shares, rank % shares, F // shares
    return slice(expert, expert + 1), slice(share * width, (share + 1) * width)


def save_ranks(file: str | Path, target: str | Path, ranks: int) -> list[str]:
    """Writes a Swin-MoE of this package as TARGET.master and TARGET.rankN, for Tutel on that many GPUs; returns their
    names. ValueError: the ranks cannot share the experts, the model is another, or older files would be read too."""
    spec = read_pretrained_metadata(file)
    model = on_meta(build, spec)
    sparse = any(isinstance(module, SparseMoE) for module in model.modules())
    if not isinstance(model, SwinMoE) or "experts" in spec or not sparse:
        raise ValueError(
            f"{file} holds no Swin-MoE with experts in full precision, which alone can be split into ranks"
        )
    _check_target(str(target), ranks)
    layout, written = swin_moe_layout(model), []
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        for rank in (None, *range(ranks)):
            state = _buffers(model) if rank is None else {}
            for name, entry in layout.items():
                if (_EXPERTS in name) == (rank is not None):
                    tensor = entry.view(_read_tensor(file, entry.tensor))
                    where = () if rank is None else _part(rank, ranks, tensor.shape)
                    state[name] = tensor[where].clone(memory_format=torch.contiguous_format)
            written.append(f"{target}.{'master' if rank is None else f'rank{rank}'}")
            torch.save({"model": state}, stack.enter_context(atomic_file(Path(written[-1]))))
    return written


# The file is opened for each tensor, since all that was read of a map counts as memory until it is closed.
def _read_tensor(file: str | Path, name: str) -> torch.Tensor:
    with safe_open(str(file), framework="pt") as opened:
        return opened.get_tensor(name)


def _check_target(target: str, ranks: int) -> None:
    """ValueError: a file of an older checkpoint would be read with the new files, or instead of them."""
    own = {f"{target}.rank{rank}" for rank in range(ranks)}
    others = [name for name in glob.glob(f"{glob.escape(target)}.rank*") if re.search(r"\.rank\d+$", name)]
    for name in [target, f"{target}.global", *sorted(set(others) - own)]:
        if Path(name).is_file():
            raise ValueError(
                f"{name} is there already and would be read with the new ranks or instead: remove it, or give "
                "another name"
            )


def _buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """What their state dict holds beside weights."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, PositionMlpAttention):
            offsets = log_offsets(module.window_size, module.pretrained_window_size)
            found[f"{name}.relative_coords_table"] = offsets
        elif isinstance(module, SparseMoE):
            found[f"{name}._moe_layer._num_global_experts"] = torch.tensor(module.num_experts)
    return found
