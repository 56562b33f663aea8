"""Every benchmark on tiny sizes: it runs, and what it writes is what the page is made from."""

from __future__ import annotations

import gc
import sys

import pytest
import torch

from benchmarks import dispatch, layer, measure, model, report, scaling, train_step
from benchmarks.contenders import match_st_moe, st_moe
from benchmarks.session import read_results
from vmoe.moe.config import RoutingSettings
from vmoe.moe.dispatch import combine, plan_dispatch
from vmoe.moe.dispatch import dispatch as gather
from vmoe.moe.top_k import TopKRouter

TINY = ["--rounds", "1", "--allocator", "system", "--device", "cpu"]
SIZES = ["--tokens", "32", "--width", "16", "--hidden", "32"]
BOTH = {"forward", "forward + backward"}


@pytest.fixture(scope="module", autouse=True)
def little_garbage():
    """Every measurement collects garbage first; looking through all of PyTorch took longer than all else here."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def small_ceiling(monkeypatch):
    monkeypatch.setitem(measure.PRODUCT_SIZE, "cpu", 16)
    monkeypatch.setitem(measure.COPY_BYTES, "cpu", 1024)


def section_of(module, folder, *words: str) -> dict:
    """The section that a run writes; the page shows its tables and notes."""
    module.main([*TINY, *words, "--results", str(folder)])
    (file,) = folder.glob("*.json")
    (section,) = read_results(file)["sections"].values()
    text = report.page(folder)
    for row in section["rows"]:
        if row["comparison"] == "ceiling":
            assert row["gemm_gflops"]["median"] > 0
            assert row["copy_gbps"]["median"] > 0
            continue
        assert 0 < row["ms"]["min"] <= row["ms"]["median"] <= row["ms"]["max"]
        for one in row["ratios"].values():
            assert 0 < one["min"] <= one["median"] <= one["max"]
        assert 0 < row.get("kept", 1) <= 1
        assert f"{row['ms']['median']:.4g}" in text
    assert section["command"] in text
    return section


def rows(section: dict, **wanted) -> list[dict]:
    return [row for row in section["rows"] if all(row.get(name) == value for name, value in wanted.items())]


def test_layer(tmp_path):
    words = [*SIZES, "--length", "16", "--dtype", "float32", "--comparisons", "mlp", "image"]
    section = section_of(layer, tmp_path, *words)
    for one_pass in BOTH:
        dense, ours = rows(section, comparison="mlp", **{"pass": one_pass})
        assert (dense["name"], ours["name"]) == ("dense", "vmoe")
        assert dense["kept"] == 1
        assert ours["ratios"].keys() == {"dense"}
        assert ours["share_of_gemm"]["median"] > 0
    (ours,) = rows(section, comparison="mlp", name="vmoe", **{"pass": "forward + backward"})
    assert ours["activations_mib"] > 0
    assert ours["activations_ratio"] > 0
    assert [row["pass"] for row in rows(section, comparison="image")] == ["forward"] * 2


@pytest.mark.slow  # these packages take seconds to import
@pytest.mark.parametrize(
    ("comparison", "package", "name"),
    [
        ("swiglu", "transformers", "transformers Mixtral, grouped_mm"),
        ("st_moe", "st_moe_pytorch", "st_moe_pytorch"),
        ("soft", "soft_moe_pytorch", "soft_moe_pytorch"),
    ],
)
def test_layer_against_peers(tmp_path, comparison, package, name):
    pytest.importorskip(package)
    words = [*SIZES, "--length", "16", "--dtype", "float32", "--comparisons", comparison]
    section = section_of(layer, tmp_path, *words)
    for one_pass in BOTH:
        dense, ours, peer = rows(section, comparison=comparison, **{"pass": one_pass})
        assert (dense["name"], ours["name"], peer["name"]) == ("dense", "vmoe", name)
        assert peer["ratios"].keys() == {"dense", "vmoe"}
        assert peer["kept"] == pytest.approx(ours["kept"], abs=0.15)  # 16 tokens leave little to choose


def test_a_peer_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "soft_moe_pytorch", None)
    words = [*SIZES, "--length", "16", "--dtype", "float32", "--comparisons", "soft"]
    section = section_of(layer, tmp_path, *words)
    assert {row["name"] for row in rows(section, comparison="soft")} == {"dense", "vmoe"}
    assert section["notes"] == ["soft_moe: not installed here (no module soft_moe_pytorch)"]


@pytest.mark.slow
def test_layer_in_bfloat16_names_the_peers_that_fail(tmp_path):
    section = section_of(layer, tmp_path, *SIZES, "--length", "16", "--dtype", "bfloat16", "--comparisons", "st_moe")
    assert {row["name"] for row in rows(section, comparison="st_moe")} == {"dense", "vmoe"}
    assert any(note.startswith("st_moe") for note in section["notes"])


def test_layer_refuses_in_one_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit):
        layer.main([*TINY, *SIZES, "--selected", "9", "--results", str(tmp_path)])
    assert "error: num_selected_experts must be 1..num_experts (8), got 9" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_peers_capacity_is_set_to_keep_the_same_share():
    pytest.importorskip("st_moe_pytorch")
    torch.manual_seed(0)
    peer, x = st_moe(16, 32, 4, 2), torch.randn(4, 64, 16)
    for goal in (0.6, 0.8, 1.0):
        match_st_moe(peer, x, goal)
        assert peer.kept(x) == pytest.approx(goal, abs=0.02)


def test_dispatch(tmp_path):
    section = section_of(dispatch, tmp_path, *SIZES, "--small", "16", "--dtype", "float32", "bfloat16")
    for dtype in ("float32", "bfloat16"):
        for one_pass in BOTH:
            with_priority, vanilla = rows(section, comparison="priority", dtype=dtype, **{"pass": one_pass})
            assert with_priority["ratios"].keys() == {"layer, vanilla"}
            assert not vanilla["ratios"]
        pieces = {row["name"] for row in rows(section, comparison="pieces", dtype=dtype, **{"pass": "forward"})}
        assert pieces >= {"router", "plan, BPR", "two sorts alone", "dispatch", "combine", "dense"}
        assert len(rows(section, comparison="one-hot", dtype=dtype)) == 2


def test_the_one_hot_way_gives_the_same():
    torch.manual_seed(0)
    config = RoutingSettings(num_experts=4, num_selected_experts=2)
    router, x_GND = TopKRouter(8, config).eval(), torch.randn(2, 10, 8)
    routing = router.choose(router.forward(x_GND))
    plan = plan_dispatch(routing.expert_index_GNK, 4, 4, routing.priority_GN)
    assert not plan.kept_GNK.all()
    given = dispatch.Given(x_GND, x_GND, routing, plan, gather(x_GND, plan))
    ours = combine(given.rows_RD, routing.combine_weights_GNK, plan)
    torch.testing.assert_close(dispatch.one_hot(x_GND, given, 4, 4), ours)


def test_scaling(tmp_path):
    section = section_of(scaling, tmp_path, *SIZES, "--axis", "capacity", "selected")
    halves = rows(section, comparison="capacity", capacity=0.5)
    assert {(row["name"], row["pass"]) for row in halves} == {(n, p) for n in ("layer", "experts") for p in BOTH}
    assert all(row["ratios"].keys() == {"base", "dense"} and row["kept"] < 1 for row in halves)
    assert {row["selected"] for row in rows(section, comparison="selected")} == {1, 2, 3, 4}
    one = rows(section, comparison="selected", selected=1)[0]
    assert one["weights_mib"] == pytest.approx(8 * 2 * 16 * 32 * 4 / 2**20, abs=0.05)


def test_scaling_wants_one_axis_for_values(tmp_path, capsys):
    with pytest.raises(SystemExit):
        scaling.main([*TINY, *SIZES, "--values", "3", "--results", str(tmp_path)])
    assert "error: --values needs one --axis to stand for" in capsys.readouterr().err


def test_model(tmp_path):
    section = section_of(model, tmp_path, "--batch", "2", "--image_size", "32", "--depth", "2")
    for one_pass in ("inference", "training", "one image"):
        dense, dropless, limited = rows(section, comparison="model", **{"pass": one_pass})
        assert dense["speed_ratio"]["median"] == 1
        assert dropless["kept"] == 1
        assert limited["ratios"].keys() == {"dense"}
        assert dense["batch"] == (1 if one_pass == "one image" else 2)


def test_both_sides_of_the_model_have_the_same_parts():
    models = model.vision_models(["dropless"], 32, depth=2)
    dense, sparse = models["dense"], models["dropless"]
    assert dense.blocks[1].mlp.fc1.weight.shape == sparse.blocks[1].mlp.experts.fc1.weight.shape[1:]
    for part in ("mlp.act", "norm1", "attn"):
        assert str(dense.blocks[0].get_submodule(part)) == str(sparse.blocks[0].get_submodule(part))
    assert str(sparse.blocks[1].mlp.experts.act) == str(dense.blocks[1].mlp.act)
    assert str(dense.head) == str(sparse.head)
    assert dense.pos_embed.shape == sparse.pos_embed.shape


def test_train_step(tmp_path):
    words = ["--batch", "2", "--image_size", "32", "--depth", "2", "--pairs", "3"]
    section = section_of(train_step, tmp_path, *words, "--dtype", "bfloat16")
    for name in ("vmoe_small", "limoe_tiny"):
        dense, sparse = rows(section, comparison=name)
        assert (dense["name"], sparse["name"]) == ("dense", "sparse")
        assert sparse["activations_ratio"] > 0
        assert sparse["ratios"].keys() == {"dense"}


def test_a_training_step_changes_the_weights():
    models, loss, make_input = train_step.limoe(type("Args", (), {"pairs": 2}), torch.device("cpu"))
    trained = train_step.Trained(models["sparse"], loss, models["sparse"])
    before = [parameter.detach().clone() for parameter in models["sparse"].parameters()]
    trained.step("float32", torch.device("cpu"), make_input(0))
    changed = [not torch.equal(old, new) for old, new in zip(before, models["sparse"].parameters(), strict=True)]
    assert sum(changed) > 0.9 * len(changed)
    assert all(parameter.grad is None for parameter in models["sparse"].parameters())
