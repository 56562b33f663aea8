"""SigLino's models against its own figures and a plain loop, and its files through the command."""

import json

import numpy as np
import pytest
import torch

import vmoe
from tests.convert import siglino_plain
from tests.convert.golden import GOLDEN, load, part
from vmoe.cli.convert import main
from vmoe.convert import CheckpointError, ConfigError, from_siglino
from vmoe.convert.arrays import StoredArray
from vmoe.convert.siglino import plan_siglino, siglino_layout, siglino_settings
from vmoe.models.factory import create_model, save_pretrained
from vmoe.models.siglino import SigLino

RELEASED = GOLDEN / "released"
CASES = ("siglino_moe_k3", "siglino_mixed", "siglino_dense_plain_norm")


def inputs(figures):
    names = ("pixel_values", "padding_mask", "spatial_shapes")
    return {name: torch.tensor(figures[name]) for name in names}


@pytest.fixture(scope="module")
def sparse():
    """(arguments, state, inputs) of the case whose blocks are all sparse."""
    args, figures = load("siglino_moe_k3", RELEASED)
    return args, part(figures, "state/"), inputs(figures)


@pytest.mark.parametrize("case", CASES)
def test_golden(case):
    args, figures = load(case, RELEASED)
    state = part(figures, "state/")
    model, given = from_siglino(args, state), inputs(figures)
    mask_BP = given["padding_mask"].bool()
    with torch.no_grad(), vmoe.record_routing(model) as record:
        outputs = model(**given)
        for kind, features in outputs.items():
            theirs = part(figures, f"out/{kind}/")
            assert features.keys() == theirs.keys()
            for name, ours in features.items():
                real = mask_BP if kind == "patch_features" else slice(None)
                wanted, found = torch.tensor(theirs[name])[real], ours[real]
                assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max(), (kind, name)
    sparse = [name for name, _ in model.named_modules() if name.endswith("experts")]
    assert len(sparse) == args["n_layers"] - args["first_n_layers_dense"] == len(record.layers)
    # An image alone gives what it gives beside others, and so do its pixels.
    first = outputs["patch_features"]["siglino"][0][mask_BP[0]]
    with torch.no_grad():
        alone = model.forward_features(torch.tensor(figures["image0_hwc"]).permute(2, 0, 1)[None])
    torch.testing.assert_close(alone[0, model.num_prefix_tokens :], first, atol=1e-5, rtol=1e-5)


OTHERS = {
    "default_head_dim": {"head_dim": None, "n_kv_heads": None},
    "grouped_shared": {"n_kv_heads": 2, "num_shared_experts": 2, "activation": "relu2"},
    "normalized_scaled": {"route_norm": True, "route_scale": 0.8633, "top_k": 5},
    "softmax_no_registers": {"score_func": "softmax", "n_storage_tokens": 0, "use_qk_norm": False, "top_k": 1},
    "one_head_for_keys": {"n_kv_heads": 1, "norm_eps": 1e-3, "first_n_layers_dense": 1, "ffn_dim": 20},
}


def changed(args, settings):
    moe = {key: value for key, value in settings.items() if key in args["moe_args"]}
    own = {key: value for key, value in settings.items() if key in args}
    return {**args, **own, "moe_args": {**args["moe_args"], **moe}}


def array_shapes(name, **kwargs):
    """{SigLino's name: shape} of the arrays that make a model."""
    with torch.device("meta"):
        model = create_model(name, **kwargs)
    own, found = model.state_dict(), {}
    for array, entry in siglino_layout(model):
        shape = entry.view(np.broadcast_to(np.float32(0), own[entry.tensor].shape)).shape
        rows = shape[0] + (found[array][0] if array in found else 0)  # of queries, then keys and values
        found[array] = (rows, *shape[1:])
    return found


def random_state(args):
    """Random weights, and a balancing bias, for a model of these arguments."""
    generator = torch.Generator().manual_seed(3)
    shapes = array_shapes("siglino_moe_0_3b", **siglino_settings(args)[0])
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("settings", OTHERS.values(), ids=OTHERS)
def test_other_settings_against_a_plain_loop(sparse, settings):
    args = changed(sparse[0], settings)
    state = random_state(args)
    model, given = from_siglino(args, state), sparse[2]
    with torch.no_grad(), vmoe.record_routing(model) as record:
        x_BTD = model.forward_features(*given.values())
    for row in range(3):
        shape = given["spatial_shapes"][row].tolist()
        plain_TD, chosen = siglino_plain.tokens(given["pixel_values"][row, : shape[0] * shape[1]], shape, args, state)
        found_TD = x_BTD[row, : len(plain_TD)]
        assert (found_TD - plain_TD).abs().max() <= 1e-5 * plain_TD.abs().max()
        for index_TK, layer in zip(chosen, record.layers.values(), strict=True):
            ours_TK = layer.expert_index.view(3, x_BTD.shape[1], -1)[row, : len(plain_TD)]
            assert torch.equal(ours_TK, index_TK)


def test_file_is_what_from_siglino_gives(sparse, tmp_path, capsys):
    args, state, given = sparse
    torch.save({name: torch.tensor(array) for name, array in state.items()}, tmp_path / "tiny.pt")
    (tmp_path / "args.json").write_text(json.dumps(args))
    file = tmp_path / "out.safetensors"
    command = ["--from", str(tmp_path / "tiny.pt"), "--config", str(tmp_path / "args.json"), "--to", str(file)]
    assert main(command) == 0
    assert "2 others skipped" in capsys.readouterr().out
    model, by_state = create_model(pretrained=file).eval(), from_siglino(args, state)
    assert isinstance(model, SigLino)
    with torch.no_grad():
        for ours, theirs in zip(model(**given).values(), by_state(**given).values(), strict=True):
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    save_pretrained(by_state, tmp_path / "saved.safetensors")
    again = create_model(pretrained=tmp_path / "saved.safetensors").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


def shapes_of(name):
    """What a released file of this model holds, without its numbers."""
    return {key: StoredArray(shape, "bfloat16", 0, ()) for key, shape in array_shapes(name).items()}


def test_released_files_are_known_by_their_shapes():
    assert plan_siglino(shapes_of("siglino_30m"), "dense.pt")[:2] == ("siglino_30m", {})
    sparse = shapes_of("siglino_moe_0_3b")
    with pytest.raises(ConfigError, match="siglino_moe_0_3b and siglino_moe_0_15b.*--model"):
        plan_siglino(sparse, "amoe.pt")
    assert plan_siglino(sparse, "amoe.pt", name="siglino_moe_0_15b")[0] == "siglino_moe_0_15b"
    with pytest.raises(CheckpointError, match="amoe.pt does not fit siglino_70m: "):
        plan_siglino(sparse, "amoe.pt", name="siglino_70m")


class Harmful:
    def __reduce__(self):
        return (print, ("code was run",))


def test_files_that_are_refused(sparse, tmp_path, capsys):
    args, state, _ = sparse
    tensors = {name: torch.tensor(array) for name, array in state.items()}
    (tmp_path / "args.json").write_text(json.dumps(args))
    torch.save(tensors, tmp_path / "good.pt")
    (tmp_path / "truncated.pt").write_bytes((tmp_path / "good.pt").read_bytes()[:-5000])
    torch.save({**tensors, "more": Harmful()}, tmp_path / "code.pt")
    torch.save({"conv.weight": torch.zeros(2)}, tmp_path / "other.pt")
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    torch.save({**tensors, "norm.weight": torch.zeros(3)}, tmp_path / "shape.pt")
    torch.save({**tensors, "cls_token": torch.zeros(1, 1, 48, dtype=torch.int64)}, tmp_path / "type.pt")
    torch.save({name: tensor for name, tensor in tensors.items() if "sinks" not in name}, tmp_path / "missing.pt")
    torch.save({**tensors, "head.weight": torch.zeros(3)}, tmp_path / "more.pt")
    (tmp_path / "text.pt").write_text("hello")
    config = ["--config", str(tmp_path / "args.json")]
    cases = [
        ("truncated", config, "cannot be read by torch.load"),
        ("code", config, "could run code"),
        ("other", config, "no model that can be converted; it holds conv.weight"),
        ("list", config, "no state dict"),
        ("shape", config, r"norm.weight has shape (3,), the model's is (48,)"),
        ("type", config, "cls_token is of type int64"),
        ("missing", config, "layers.0.attention.sinks is missing"),
        ("more", config, "head.weight is not part of the model"),
        ("text", config, "a file of another format"),
        ("good", [], "a SigLino of other sizes than siglino_moe_0_3b"),
        ("good", ["--model", "siglino_70m"], "does not fit siglino_70m: "),
        ("good", ["--model", "siglino_7b"], "--model must be one of siglino_moe_0_3b"),
        ("good", [*config, "--model", "siglino_70m"], "not both"),
        ("good", [*config, "--step", "3"], "leave them out"),
    ]
    for name, more, message in cases:
        assert main(["--from", str(tmp_path / f"{name}.pt"), "--to", str(tmp_path / "out.safetensors"), *more]) != 0
        said = capsys.readouterr()
        assert message in said.err, (name, said.err)
        assert len(said.err.strip().splitlines()) == 1, said.err
        assert "code was run" not in said.out
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"score_before_experts": True}, "moe_args.score_before_experts = True"),
        ({"activation": "tanh"}, "activation = 'tanh'"),
        ({"teachers_dim": [32]}, "teachers_dim"),
        ({"n_heads": 8, "n_kv_heads": 2}, "does not fit the arguments"),
        ({"dim": 10**9}, "fit the arguments|cannot be built"),
    ],
)
def test_arguments_that_are_refused(sparse, settings, message):
    args, state, _ = sparse
    with pytest.raises(ValueError, match=message):
        from_siglino(changed(args, settings), state)
    with pytest.raises(ConfigError, match="new_thing"):
        from_siglino({**args, "new_thing": 1}, state)
