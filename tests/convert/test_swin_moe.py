"""Swin-MoE: golden figures of Microsoft's code on Tutel; files in any number of ranks, here and back; bad files."""

import argparse
import json
import re

import pytest
import torch
from safetensors.torch import load_file

import vmoe
from tests.convert.golden import GOLDEN, close, load, part
from vmoe.cli.convert import main
from vmoe.convert import CheckpointError, convert_checkpoint, save_ranks
from vmoe.convert.arrays import StoredArray
from vmoe.convert.section import ConfigError
from vmoe.convert.swin_moe import Tensors, plan_rows, swin_moe_layout, swin_moe_spec
from vmoe.models.factory import create_model
from vmoe.models.swin_moe import log_offsets

NAME = "swin_moe_cosine"
MOE = "layers.1.blocks.1.mlp._moe_layer."


@pytest.fixture(scope="module")
def golden():
    args, figures = load(NAME, GOLDEN / "released")
    return args, {name: torch.tensor(array) for name, array in part(figures, "state/").items()}


def split(state, target, ranks):
    """Writes the files as Swin-MoE's training does on so many GPUs, for 4 experts."""
    experts = {name: tensor for name, tensor in state.items() if "_moe_layer.experts." in name}
    torch.save({"model": {name: state[name] for name in state.keys() - experts.keys()}}, f"{target}.master")
    for rank in range(ranks):
        if ranks <= 4:
            own = {name: tensor.chunk(ranks)[rank].clone() for name, tensor in experts.items()}
        else:  # several GPUs have a slice of the hidden units of one expert each
            shares, axis = ranks // 4, 1
            own = {
                name: tensor[rank // shares : rank // shares + 1].chunk(shares, axis)[rank % shares].clone()
                for name, tensor in experts.items()
            }
        torch.save({"model": own}, f"{target}.rank{rank}")


@pytest.fixture
def ranks(golden, tmp_path):
    """The prefix of a checkpoint in four ranks."""
    split(golden[1], tmp_path / "a.pth", 4)
    return tmp_path / "a.pth"


def gathered(target, ranks):
    """The state dict of all files together."""
    state = torch.load(f"{target}.master", weights_only=True)["model"]
    parts = [torch.load(f"{target}.rank{rank}", weights_only=True)["model"] for rank in range(ranks)]
    return state | {name: torch.cat([each[name] for each in parts]) for name in parts[0]}


def equal(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name].view_as(a[name])) for name in a)


@pytest.mark.parametrize("name", ["swin_moe_e4_dropless", "swin_moe_e4_c125_bpr", "swin_moe_cosine"])
def test_golden(name):
    args, figures = load(name, GOLDEN / "released")
    model = vmoe.convert.from_swin_moe(args, part(figures, "state/"))
    with vmoe.record_routing(model) as record, torch.no_grad():
        close(model(torch.tensor(figures["images"])), figures["logits"], "logits")
    close(record.auxiliary_loss(), figures["aux"], "auxiliary loss")
    dropped = sum(int((~layer.kept).sum()) for layer in record.layers.values())
    assert (dropped > 0) == ("c125" in name)
    for attention in (block.attn for stage in model.layers for block in stage.blocks):
        offsets = log_offsets(attention.window_size)
        assert torch.equal(torch.tensor(figures["state/layers.0.blocks.0.attn.relative_coords_table"]), offsets)


def test_four_ranks_to_one_file_to_two_ranks_to_one_file_is_bit_equal(golden, ranks, tmp_path):
    args, state = golden
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    convert_checkpoint(f"{ranks}.master", args, one)
    save_ranks(one, tmp_path / "b.pth", 2)
    equal(gathered(tmp_path / "b.pth", 2), state)
    convert_checkpoint(tmp_path / "b.pth", args, two)
    equal(load_file(one), load_file(two))
    equal(create_model(pretrained=one).state_dict(), vmoe.convert.from_swin_moe(args, state).state_dict())


@pytest.mark.parametrize("ranks", [1, 8])
def test_more_gpus_than_experts_and_one(golden, tmp_path, ranks):
    args, state = golden
    split(state, tmp_path / "a.pth", ranks)
    convert_checkpoint(tmp_path / "a.pth.rank0", args, tmp_path / "one.safetensors")
    equal(load_file(tmp_path / "one.safetensors"), vmoe.convert.from_swin_moe(args, state).state_dict())
    save_ranks(tmp_path / "one.safetensors", tmp_path / "b.pth", ranks)
    for rank in range(ranks):
        files = [torch.load(tmp_path / f"{name}.pth.rank{rank}", weights_only=True)["model"] for name in "ab"]
        equal(*files)


def test_the_whole_in_one_file_of_any_name_and_a_bias_that_never_trained(golden, tmp_path):
    args, state = golden
    torch.save({"model": state}, tmp_path / "odd.pt")
    convert_checkpoint(tmp_path / "odd.pt", args, tmp_path / "one.safetensors")
    zero = {**state, f"{MOE}experts.batched_fc2_bias": torch.zeros(4, 32)}
    # On four GPUs the master's file has the first rank's part of it.
    split({name: tensor for name, tensor in zero.items() if "fc2_bias" not in name}, tmp_path / "a.pth", 4)
    master = torch.load(tmp_path / "a.pth.master", weights_only=True)
    for value in (0.0, 1.0):
        master["model"][f"{MOE}experts.batched_fc2_bias"] = torch.full((1, 32), value)
        torch.save(master, tmp_path / "a.pth.master")
        if value:
            with pytest.raises(CheckpointError, match="fc2_bias is that of the first rank alone, and not zero"):
                convert_checkpoint(tmp_path / "a.pth", args, tmp_path / "one.safetensors")
        else:
            convert_checkpoint(tmp_path / "a.pth", args, tmp_path / "one.safetensors")
            equal(load_file(tmp_path / "one.safetensors"), vmoe.convert.from_swin_moe(args, zero).state_dict())


def damage(kind, ranks, state):
    """Spoils the files."""
    last = f"{ranks}.rank3"
    parts = torch.load(last, weights_only=True)
    if kind == "gap":
        (ranks.parent / "a.pth.rank1").unlink()
    elif kind == "last":
        (ranks.parent / "a.pth.rank3").unlink()
    elif kind == "master":
        (ranks.parent / "a.pth.master").unlink()
    elif kind == "doubled":
        (ranks.parent / "a.pth.rank3").write_bytes((ranks.parent / "a.pth.rank1").read_bytes())
    elif kind == "number":
        (ranks.parent / "a.pth.rank03").write_bytes((ranks.parent / "a.pth.rank3").read_bytes())
    elif kind == "other":
        torch.save({"model": {name: torch.randn(1, 7) for name in parts["model"]}}, last)
    elif kind == "short":
        (ranks.parent / "a.pth.rank3").write_bytes((ranks.parent / "a.pth.rank3").read_bytes()[:3000])
    elif kind == "code":
        torch.save({**parts, "config": argparse.Namespace(a=1)}, last)
    elif kind == "list":
        torch.save([1], last)
    elif kind == "transposed":
        split({**state, f"{MOE}experts.batched_fc2_w": state[f"{MOE}experts.batched_fc1_w"].mT}, ranks, 4)
    elif kind == "integers":
        split({**state, "norm.weight": torch.ones(32, dtype=torch.long)}, ranks, 4)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("gap", "a.pth.rank1 is missing: 3 of 4 ranks are there"),
        ("last", "ranks are missing after .*a.pth.rank2: 3 of them do not hold all of the router's 4 experts"),
        ("master", "a.pth.master is missing"),
        ("doubled", r"a.pth.rank3 is doubled: it holds the experts of .*a.pth.rank1: .* give one file \(.global\)"),
        ("number", "a.pth has two files of one rank: .*a.pth.rank03, .*a.pth.rank3"),
        ("other", r"rank3 and .*rank0 are of different models: .*batched_fc1_bias is \[1, 7\], not \[1, 64\]"),
        ("short", "rank3 cannot be read by torch.load .*; is it complete"),
        ("code", "rank3 is not read: it holds more than tensors"),
        ("list", "rank3 holds no state dict"),
        ("transposed", r"batched_fc2_w has shape \(1, 32, 64\) in .*rank0, one of 4 ranks needs \(1, 64, 32\)"),
        ("integers", "holds norm.weight as int64, not as floating-point numbers"),
    ],
)
def test_bad_files_are_one_sentence_and_nothing_is_written(golden, ranks, tmp_path, kind, message):
    damage(kind, ranks, golden[1])
    with pytest.raises(CheckpointError, match=message) as raised:
        convert_checkpoint(ranks, golden[0], tmp_path / "out.safetensors")
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.glob("*.safetensors"))


def test_experts_that_differ_in_one_bias_alone_are_not_doubled(golden, tmp_path):
    state = {name: torch.zeros_like(t) if ".experts." in name else t for name, t in golden[1].items()}
    state[f"{MOE}experts.batched_fc2_bias"] = torch.arange(4.0)[:, None].expand(4, 32).clone()
    split(state, tmp_path / "a.pth", 4)
    convert_checkpoint(tmp_path / "a.pth", golden[0], tmp_path / "one.safetensors")
    equal(load_file(tmp_path / "one.safetensors"), vmoe.convert.from_swin_moe(golden[0], state).state_dict())


@pytest.mark.parametrize("ranks", [2, 8])
def test_a_last_rank_that_is_missing(golden, tmp_path, ranks):
    split(golden[1], tmp_path / "a.pth", ranks)
    (tmp_path / f"a.pth.rank{ranks - 1}").unlink()
    with pytest.raises(CheckpointError, match=rf"ranks are missing after .*a.pth.rank{ranks - 2}: "):
        convert_checkpoint(tmp_path / "a.pth", golden[0], tmp_path / "out.safetensors")


def test_names_and_arguments_that_contradict_the_file(golden, ranks, tmp_path):
    args, state = golden
    out = tmp_path / "out.safetensors"
    for config, message in (
        (None, r"a\.pth\.master is a Swin-MoE of no released size: give --config FILE\.json$"),
        ("vit_base", r"is a Swin-MoE: --model must be one of swin_moe_small_(?!.*tiny).*, got 'vit_base'$"),
        ("swin_moe_small_patch4_window12_192_densebaseline_22k", "does not fit the model: patch_embed.proj.weight has"),
        ({**args, "depths": [2, 4]}, r"depths = \[2, 4\] cannot be converted: it must be 4 blocks"),
        ({**args, "ape": True}, "ape = True cannot be converted"),
        ({**args, "window_size": 2}, "relative_coords_table is that of another window"),
        ({**args, "cosine_router": False}, "gates.0.wg.weight is missing"),
        ({**args, "capacity_factor": "x"}, "capacity_factor = 'x' cannot be converted"),
        ({**args, "capacity_factor": 0}, "capacity_factor = 0.0 cannot be converted: it must be > 0 with use_bpr"),
    ):
        given = {"config": None, "model": config} if isinstance(config, str) else {"config": config}
        with pytest.raises((CheckpointError, ConfigError), match=re.compile(message)):
            convert_checkpoint(ranks, **given, file=out)
    with pytest.raises(CheckpointError, match="norm.weight is missing"):
        vmoe.convert.from_swin_moe(args, {name: each for name, each in state.items() if name != "norm.weight"})
    assert not out.exists()


def test_a_released_model_is_known_by_its_sizes():
    name = "swin_moe_small_patch4_window12_192_8expert_32gpu_22k"
    with torch.device("meta"):
        model = create_model(name)
    own = model.state_dict()
    shapes = {theirs: entry.view(own[entry.tensor]).shape for theirs, entry in swin_moe_layout(model).items()}
    files = [Tensors({theirs: StoredArray(tuple(shape), "float32", 0, []) for theirs, shape in shapes.items()})]
    assert swin_moe_spec(files) == {"name": name, "kwargs": {}}
    assert len(plan_rows(model, files)) == len(own)


@pytest.mark.parametrize(
    ("args", "state", "message"),
    [
        ({}, [1], "state must be a dictionary of arrays, got list"),
        ({}, None, "state must be a dictionary of arrays, got NoneType"),
        ({}, {7: torch.ones(1)}, "7 is not part of the model"),
        ([1], {}, "the config must be a dictionary"),
        ({}, {f"{MOE}gates.0.sim_matrix": torch.tensor(1.0)}, "the state does not fit the model"),
        ({}, {f"{MOE}gates.0.wg.weight": torch.tensor(1.0)}, "wg.weight is not part of the model"),
        ({}, {"head.weight": torch.tensor(1.0)}, r"head.weight has shape \(\)"),
        ({}, {"patch_embed.proj.weight": torch.tensor(1.0)}, r"patch_embed.proj.weight has shape \(\)"),
        ({"num_heads": [0, 4]}, {}, "the model of these arguments cannot be built"),
        ({"embed_dim": 2**31 - 1}, {}, "the model of these arguments cannot be built"),
    ],
)
def test_bad_arguments_and_states_are_one_sentence(golden, args, state, message):
    args = {**golden[0], **args} if isinstance(args, dict) else args
    state = {**golden[1], **state} if isinstance(state, dict) else state
    with pytest.raises((CheckpointError, ConfigError), match=message) as raised:
        vmoe.convert.from_swin_moe(args, state)
    assert "\n" not in str(raised.value)


def test_older_files_beside_new_ranks_are_refused_and_a_folder_is_made(golden, ranks, tmp_path):
    one, target = tmp_path / "one.safetensors", tmp_path / "new" / "b.pth"
    convert_checkpoint(ranks, golden[0], one)
    save_ranks(one, target, 4)
    save_ranks(one, target, 4)  # replaces all
    before = {file.name: file.read_bytes() for file in target.parent.iterdir()}
    for older, count in (("global", 4), ("rank07", 4), ("rank2", 2)):
        file = target.with_name(f"b.pth.{older}")
        file.touch()
        with pytest.raises(ValueError, match=f"b.pth.{older} is there already .*: remove it, or give another name"):
            save_ranks(one, target, count)
        assert all(target.with_name(name).read_bytes() == content for name, content in before.items())
        file.unlink()


def test_more_heads_and_sparse_blocks_than_stages(golden):
    args, state = golden
    more = {**args, "num_heads": [*args["num_heads"], 12, 24], "moe_blocks": [*args["moe_blocks"], [0, 1], [0]]}
    model = vmoe.convert.from_swin_moe(more, state)
    equal(model.state_dict(), vmoe.convert.from_swin_moe(args, state).state_dict())


def test_dropout_is_applied_wherever_the_original_has_it(golden):
    args, state = golden
    model = vmoe.convert.from_swin_moe({**args, "drop_rate": 0.3}, state)
    assert model.patch_embed.drop.p == model.layers[0].blocks[0].attn.proj_drop.p == 0.3
    assert model.head.drop.p == 0  # timm's drop_rate


def test_the_arguments_gate_counts_for_a_file_of_a_released_size():
    args = {"embed_dim": 96, "depths": [2, 2, 18, 2], "window_size": 12, "moe_blocks": [[], [], [1], [1]]}
    sizes = {f"layers.2.blocks.{i}.norm1.weight": (96,) for i in range(24)}
    sizes |= {"patch_embed.proj.weight": (96, 3, 4, 4), f"{MOE}gates.0.sim_matrix": (256, 32)}
    file = Tensors({name: StoredArray(shape, "float32", 0, []) for name, shape in sizes.items()})
    for cosine, gate in ((False, "softmax"), (True, "cosine")):
        spec = swin_moe_spec([file], {**args, "cosine_router": cosine})
        assert "cosine_router" in spec["name"]
        assert spec["kwargs"]["gate"] == gate


def test_the_command_there_and_back(golden, ranks, tmp_path, capsys):
    (tmp_path / "args.json").write_text(json.dumps(golden[0]))
    one, target = str(tmp_path / "one.safetensors"), str(tmp_path / "b.pth")
    assert main(["--from", f"{ranks}.master", "--config", str(tmp_path / "args.json"), "--to", one]) == 0
    assert "(Swin-MoE)" in capsys.readouterr().out
    assert main(["--from", one, "--to", target, "--ranks", "2"]) == 0
    assert f"wrote    {target}.master and 2 files from {target}.rank0 on" in capsys.readouterr().out
    assert main(["--from", str(tmp_path / "none"), "--to", one]) == 1
    assert "none: there is nothing of that name" in capsys.readouterr().err
    assert main(["--from", one, "--to", str(tmp_path / "c.pth"), "--ranks", "3"]) == 1
    assert "of 4 experts cannot be shared by 3 ranks" in capsys.readouterr().err
    assert not list(tmp_path.glob("c.pth*"))
    assert main(["--from", one, "--to", target, "--ranks", "1"]) == 1
    assert "b.pth.rank1 is there already" in capsys.readouterr().err
    assert not list(tmp_path.glob(".*"))
