"""CLIP-MoE (arXiv 2409.19291): its own figures, its files by their content, and files that are refused."""

import json

import numpy as np
import pytest
import torch

import vmoe
from tests.convert.golden import GOLDEN, load, part
from vmoe.cli.convert import main
from vmoe.convert import CheckpointError, ConfigError, from_clip_moe
from vmoe.convert.clip_moe import clip_moe_spec
from vmoe.models.factory import preprocess_config
from vmoe.moe import SparseMoE


@pytest.fixture(scope="module")
def golden():
    args, figures = load("clip_moe_e4_k2", GOLDEN / "released")
    return args, part(figures, "state/"), figures


@pytest.fixture(scope="module")
def model(golden):
    return from_clip_moe(golden[0], golden[1])


def near(ours, theirs):
    assert np.abs(ours.numpy() - theirs).max() <= 1e-5 * np.abs(theirs).max()


@torch.no_grad()
def test_features_and_routing_are_its_own(golden, model):
    _, _, figures = golden
    images, texts = torch.tensor(figures["images"]), torch.tensor(figures["texts"])
    with vmoe.record_routing(model) as record:
        image, text = model.encode_image(images), model.encode_text(texts)
    near(image, figures["image_features"])
    near(text, figures["text_features"])
    near(model.encode_text(texts, normalize=True).norm(dim=1), np.ones(4, np.float32))
    near(model.logit_scale.exp(), figures["logit_scale"])
    towers = {"visual.": ("image_router_logits", len(images)), "transformer.": ("text_router_logits", len(texts))}
    for prefix, (key, batch) in towers.items():
        calls = [call for name, call in record.layers.items() if name.startswith(prefix)]
        assert len(calls) == len(figures[key]) == 2
        for call, logits in zip(calls, figures[key], strict=True):
            logits = torch.tensor(logits).view(-1, batch, 4).transpose(0, 1)  # theirs lie position by position
            near(call.tokens(call.routing.logits_GNE), logits.numpy())
            assert torch.equal(call.tokens(call.expert_index), logits.softmax(-1).topk(2).indices)
            assert call.kept.all()
            torch.testing.assert_close(call.combine_weights.sum(-1), torch.ones_like(call.combine_weights[..., 0]))


def test_it_is_an_open_clip_model_with_our_experts(model, tmp_path):
    assert type(model).__module__ == "open_clip.model"
    assert sum(isinstance(module, SparseMoE) for module in model.modules()) == 4
    tokens = vmoe.get_tokenizer(model)(["a photo " * 200, "a cat"])
    assert tokens.shape == (2, 248)
    assert tokens[0, -1] == tokens.max()  # cut, with the end of text
    config = preprocess_config(model)
    assert (config["input_size"], config["interpolation"], config["crop_mode"]) == ((3, 24, 24), "bicubic", "center")
    assert config["mean"] == (0.48145466, 0.4578275, 0.40821073)
    vmoe.save_pretrained(model, tmp_path / "saved.safetensors")
    again = vmoe.create_model(pretrained=tmp_path / "saved.safetensors", num_selected_experts=3).eval()
    assert again.transformer.resblocks[1].mlp.num_selected_experts == 3
    image = torch.ones(1, 3, 24, 24)
    with torch.no_grad():
        assert not torch.equal(again.encode_image(image), model.encode_image(image))


def test_a_file_is_known_by_its_content(golden, tmp_path, capsys):
    args, state, figures = golden
    state = {name: torch.tensor(array) for name, array in state.items()}
    torch.save({**state, "input_resolution": torch.tensor(24)}, tmp_path / "weights.pt")
    # Its two heads of 16 are no rule of CLIP's, of one head for 64 channels.
    (tmp_path / "args.json").write_text(json.dumps(args))
    command = ["--from", str(tmp_path / "weights.pt"), "--to", str(tmp_path / "out.safetensors")]
    assert main([*command, "--config", str(tmp_path / "args.json")]) == 0
    assert "(CLIP-MoE); 1 others skipped" in capsys.readouterr().out
    converted, _, _ = vmoe.create_model_and_transforms(pretrained=tmp_path / "out.safetensors")
    with torch.no_grad():
        near(converted.encode_text(torch.tensor(figures["texts"])), figures["text_features"])
    assert main(command) == 0  # without arguments: those that the shapes tell
    inferred = vmoe.create_model(pretrained=tmp_path / "out.safetensors").eval()
    with torch.no_grad():
        near(inferred.encode_image(torch.tensor(figures["images"])), figures["image_features"])
    assert inferred.transformer.resblocks[0].attn.num_heads == 1


def test_experts_in_the_last_blocks_and_a_shallower_text_tower(golden):
    args = golden[0] | {"vision_layers": 5, "transformer_layers": 3}
    steps = clip_moe_spec(args | {"moe_args": {"num_experts": 4, "top_k": 1, "moe_layers": 4}})["upcycle"]
    assert [(step["tower"], step["layers"]) for step in steps] == [("image", [1, 2, 3, 4]), ("text", [0, 1, 2])]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda a, s: a["moe_args"].update(top_k=5), ConfigError, r"moe_args.top_k = 5 .* 1\.\.num_experts, 4"),
        (lambda a, s: a["moe_args"].update(moe_layers=3), ConfigError, "moe_args.moe_layers = 3 .* at most"),
        (lambda a, s: a.update(context_length=77), ConfigError, "context_length = 77 .* 248"),
        (lambda a, s: a.update(vision_width=200), ConfigError, "vision_width = 200 .* a multiple of its 3 heads"),
        (lambda a, s: a.update(vision_width=32), ConfigError, "vision_width = 32 .* at least 64"),
        (lambda a, s: a.update(colour="red"), ConfigError, "not known to the converter: colour"),
        (lambda a, s: s.pop("positional_embedding_res"), CheckpointError, "positional_embedding_res is missing"),
        (lambda a, s: s.update(extra=np.zeros(3)), CheckpointError, "extra is not part of the model"),
        (
            lambda a, s: s.update({"visual.transformer.resblocks.0.gate.weight": np.zeros((3, 64), np.float32)}),
            CheckpointError,
            r"resblocks.0.gate.weight has shape \(3, 64\), the model's is \(4, 64\)",
        ),
        (
            lambda a, s: s.update(positional_embedding=np.zeros((77, 32), np.float32)),
            CheckpointError,
            r"positional_embedding has shape \(77, 32\), the model's is \(248, 32\)",
        ),
    ],
)
def test_what_does_not_fit_is_named(golden, change, error, message):
    args, state = json.loads(json.dumps(golden[0])), dict(golden[1])
    change(args, state)
    with pytest.raises(error, match=message):
        from_clip_moe(args, state)


def test_files_that_are_refused_leave_nothing(golden, tmp_path, capsys):
    state = {name: torch.tensor(array) for name, array in golden[1].items()}
    dense = {name: tensor for name, tensor in state.items() if ".gate." not in name}
    flat = {**state, "visual.conv1.weight": torch.zeros(3)}
    cases = {
        "of no model that can be converted": dense,
        "lacks tensors of a CLIP-MoE, or they have other shapes": flat,
        "--model must be clip_moe or left out": state,
        "holds more than tensors": {"model": np.random.default_rng},
    }
    for message, content in cases.items():
        torch.save(content, tmp_path / "weights.pt")
        more = ["--model", "siglino"] if "--model" in message else []
        command = ["--from", str(tmp_path / "weights.pt"), "--to", str(tmp_path / "out.safetensors"), *more]
        assert main(command) == 1
        found = capsys.readouterr().err
        assert message in found
        assert found.count("\n") == 1
    file = tmp_path / "weights.pt"
    torch.save(state, file)
    file.write_bytes(file.read_bytes()[:-2000])
    assert main(["--from", str(file), "--to", str(tmp_path / "out.safetensors")]) == 1
    assert "cannot be read by torch.load" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pt"]
