"""The capacity sweep: who is dropped, what it costs, and that nothing else decides the metrics."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

import vmoe
from vmoe.cli.evaluate import run
from vmoe.evaluation.capacity import Setting, limited, sparse_image_layers, sweep_capacity, sweep_settings
from vmoe.evaluation.capacity_report import draw_sweep, flat_results, print_sweep, sweep_details, verdict
from vmoe.evaluation.classification import evaluate_classification
from vmoe.evaluation.config import CapacityConfig, EvaluationConfig
from vmoe.evaluation.inference import evaluating
from vmoe.models.factory import save_pretrained
from vmoe.models.flops import forward_flops, model_profile
from vmoe.moe.dispatch import expert_capacity
from vmoe.utils.config import ConfigError

TINY = {"depth": 2, "num_heads": 2, "moe_layers": "every1"}
NUM_CLASSES, NUM_IMAGES, GROUP = 6, 22, 8  # the last group is smaller


class Groups(list):
    """Routing groups of random images, labelled by the model itself when nothing is dropped."""

    num_skipped = 0

    def __init__(self, model):
        images = torch.randn(NUM_IMAGES, 3, 48, 48, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            labels = model(images).argmax(1)
        for index in torch.arange(NUM_IMAGES).split(GROUP):
            self.append({"image": images[index], "label": labels[index], "index": index})


def classifier(num_classes=NUM_CLASSES, **kwargs):
    torch.manual_seed(0)
    model = vmoe.create_model("vmoe_tiny_patch8_48", num_classes=num_classes, embed_dim=32, **TINY, **kwargs).eval()
    with torch.no_grad():  # a fresh head and fresh gates hardly tell images apart
        model.head.weight.normal_()
        for block in model.blocks:
            if getattr(block.mlp, "router_type", None) == "top_k":
                block.mlp.router.weight.normal_()
    return model


@pytest.fixture
def model():
    return classifier(num_selected_experts=2)


def layers_of(model):
    with torch.no_grad():
        return sparse_image_layers(model, model, torch.zeros(1, 3, 48, 48), "runs/x")


def sweep(model, config=None, **kwargs):
    layers = layers_of(model)
    settings = sweep_settings(config or CapacityConfig(factors=[0.2, 0.5, 1.0, None]), layers)
    with evaluating(model, "cpu"):
        return sweep_capacity(model, model, Groups(model), layers, settings, "cpu", **kwargs)


@pytest.fixture(scope="module")
def swept():
    """A model and its sweep."""
    model = classifier(num_selected_experts=2)
    return model, sweep(model, timing_rounds=3)


@torch.no_grad()
def record(model, setting, images):
    with limited(layers_of(model).values(), setting), vmoe.record_routing(model) as record:
        model(images)
    return record.layers


@pytest.mark.parametrize("factor", [0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("K", [1, 2, 3])
def test_each_expert_keeps_what_the_factor_gives_it(factor, K):
    model = classifier(num_selected_experts=K)
    images = Groups(model)[0]["image"]
    for call in record(model, Setting("bpr", factor), images).values():
        tokens = GROUP * 37  # 36 patches and the class token; all images of the call are one group
        assert call.expert_index.shape == (1, tokens, K)
        asked_E = call.expert_index.flatten().bincount(minlength=8)
        capacity = expert_capacity(tokens, 8, K, factor)
        assert call.load.tolist() == asked_E.clamp(max=capacity).tolist()
    assert factor > 1 or (asked_E > capacity).any()


def test_bpr_keeps_the_surest_tokens_and_vanilla_the_first():
    model = classifier(num_selected_experts=1)
    images = Groups(model)[0]["image"]
    for curve in ("bpr", "vanilla"):
        for call in record(model, Setting(curve, 0.5), images).values():
            rank_N = -call.combine_weights[0, :, 0] if curve == "bpr" else torch.arange(call.mask.shape[1])
            for expert in range(8):
                asked_N = call.expert_index[0, :, 0] == expert
                kept_N = call.kept[0, :, 0] & asked_N
                if kept_N.sum() < asked_N.sum():
                    assert rank_N[kept_N].max() <= rank_N[asked_N & ~kept_N].min()


def test_without_a_limit_it_is_the_plain_evaluation(swept):
    model, result = swept
    plain = evaluate_classification(model, Groups(model), device="cpu")
    assert result.points[-1][:2] == ("both", None)
    assert (result.points[-1].top1, result.points[-1].top5) == (plain["top1"], plain["top5"])
    assert result.points[-1].top1 == 1.0
    assert result.points[-1].share_dropped == 0
    assert (result.num_samples, result.num_skipped) == (NUM_IMAGES, 0)
    # and capacity is what the others lack
    assert all(point.top1 < 1 for point in result.points if point.factor == 0.2)


def test_metrics_equal_a_run_with_that_setting(swept):
    model, result = swept
    point = next(point for point in result.points if point[:2] == ("bpr", 0.2))
    groups = Groups(model)
    with limited(layers_of(model).values(), Setting(*point[:2])):
        plain = evaluate_classification(model, groups, device="cpu")
    assert point.top1 == plain["top1"]
    assert point.top1_error == pytest.approx((plain["top1"] * (1 - plain["top1"]) / NUM_IMAGES) ** 0.5)


def test_cost_is_that_of_the_rows_kept(swept):
    model, result = swept
    layers = layers_of(model)
    for point in result.points:
        with limited(layers.values(), Setting(*point[:2])), torch.no_grad():
            counted = sum(forward_flops(lambda: model(batch["image"])) for batch in Groups(model))  # noqa: B023
        assert point.gflops_per_image == pytest.approx(counted / NUM_IMAGES / 1e9, rel=1e-12)
    assert result.points[-1].gflops_per_image == pytest.approx(model_profile(model)["gflops_per_image"], rel=1e-12)
    by_factor = [point.gflops_per_image for point in result.points if point.curve == "bpr"]
    assert by_factor == sorted(by_factor)


def test_share_dropped_is_of_all_choices_in_all_layers(swept):
    model, result = swept
    for point in result.points:
        asked = dropped = 0
        for batch in Groups(model):
            for call in record(model, Setting(*point[:2]), batch["image"]).values():
                asked += call.kept.numel()
                dropped += int((~call.kept).sum())
        assert point.share_dropped == pytest.approx(dropped / asked)


def test_results_are_named_by_order_and_factor(swept):
    results = flat_results(swept[1])
    assert list(results) == [
        *(f"top1_{curve}_{factor}" for factor in ("0.2", "0.5", "1") for curve in ("bpr", "vanilla")),
        *("top1_no_limit", "bpr_gain_below_1", "num_samples", "num_skipped"),
    ]
    gains = [results[f"top1_bpr_{factor}"] - results[f"top1_vanilla_{factor}"] for factor in ("0.2", "0.5")]
    assert results["bpr_gain_below_1"] == pytest.approx(sum(gains) / 2)


def test_gain_and_its_error_come_from_pairs_of_the_same_image(swept):
    _, result = swept
    by_setting = {Setting(*point[:2]): point.top1 for point in result.points}
    gains = {gain.factor: gain for gain in result.gains}
    assert set(gains) == {0.2, 0.5, 1.0, None}
    for factor in (0.2, 0.5, 1.0):
        better = by_setting[Setting("bpr", factor)] - by_setting[Setting("vanilla", factor)]
        assert gains[factor].gain == pytest.approx(better)
    assert gains[None].gain == pytest.approx((gains[0.2].gain + gains[0.5].gain) / 2)  # 1.0 is not below 1
    assert 0 < gains[None].error < 0.25


def test_layers_are_as_before_also_after_an_error(model):
    for layer in layers_of(model).values():
        layer.capacity, layer.group_size, layer.eval_capacity_factor = 7, 16, 3.0

    def state():
        layers = layers_of(model).values()
        return [layer.settings for layer in layers]

    before = state()
    config = CapacityConfig(factors=[0.5, None])
    sweep(model, config, timing_rounds=1)
    assert state() == before

    calls = []

    def fail(images):
        calls.append(len(images))
        if len(calls) == 2:
            raise RuntimeError("stop")
        return model(images)

    layers = layers_of(model)
    with pytest.raises(RuntimeError, match="stop"), evaluating(model, "cpu"):
        sweep_capacity(model, fail, Groups(model), layers, sweep_settings(config, layers), "cpu")
    assert state() == before


def test_expert_choice_has_a_capacity_alone():
    model = classifier(router="expert_choice", capacity_factor=1.0)
    result = sweep(model, CapacityConfig(factors=[0.5, 1.0, 4.0]))
    assert [point.curve for point in result.points] == ["experts"] * 3
    dropped = [point.share_dropped for point in result.points]
    assert dropped == sorted(dropped, reverse=True)
    assert dropped[0] >= 5 / 37 > dropped[-1]  # 8 experts take 4 of an image's 37 tokens each
    assert result.gains == []
    images = torch.cat([batch["image"] for batch in Groups(model)])
    for point in result.points:
        with limited(layers_of(model).values(), Setting(*point[:2])), torch.no_grad():
            counted = forward_flops(lambda: model(images))
        assert point.gflops_per_image == pytest.approx(counted / NUM_IMAGES / 1e9, rel=1e-12)
    with pytest.raises(ConfigError, match="always has a capacity"):
        sweep(model)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_experts": 0}, "runs/x has none \\(a dense model\\)"),
        ({"router": "soft"}, "with router='top_k' or 'expert_choice', and runs/x has router soft"),
    ],
)
def test_models_without_a_limit_to_set(kwargs, message):
    with pytest.raises(ConfigError, match=message):
        layers_of(classifier(**kwargs))


def test_experts_of_text_alone_are_not_swept():
    routing = {"num_experts": 4, "moe_layers": "every1"}
    model = vmoe.create_model("two_tower_tiny_patch12_48", image={"num_experts": 0}, text=routing).eval()
    with pytest.raises(ConfigError, match="experts that images go through"), torch.no_grad():
        sparse_image_layers(model, model.encode_image, torch.zeros(1, 3, 48, 48), "runs/x")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"factors": [0.5, 0]}, r"factors must be > 0 and finite, each once, got \[0.5, 0\]"),
        ({"factors": [0.5, 0.5, None]}, "factors must be > 0 and finite, each once"),
        ({"factors": [1, None, None]}, "factors must be .*, each once"),
        ({"factors": []}, r"factors must be .*, got \[\]"),
        ({"images_per_group": 0}, "images_per_group must be >= 1"),
        ({"timing_rounds": -1}, "timing_rounds must be >= 0"),
    ],
)
def test_wrong_settings(wrong, message):
    with pytest.raises(ConfigError, match=message):
        CapacityConfig(**wrong)


@pytest.mark.parametrize(
    ("gain", "error", "words"),
    [(0.05, 0.01, "BPR is the better"), (-0.05, 0.01, "BPR is the WORSE"), (0.015, 0.01, "no clear difference")],
)
def test_verdict(gain, error, words):
    assert words in verdict(gain, error)


def test_table_and_figure_show_the_points(swept, tmp_path):
    _, result = swept
    points = json.loads(json.dumps(sweep_details(result)))["points"]  # plain JSON
    assert [point["top1"] for point in points] == [point.top1 for point in result.points]
    text = io.StringIO()
    print_sweep(result, "runs/x", Console(file=text, width=80))
    rows = [line for line in text.getvalue().splitlines() if "│" in line]
    assert len(rows) == len(result.points)
    assert "…" not in text.getvalue()
    for row, point in zip(rows, result.points):
        assert f"{point.top1:.3f} ± {point.top1_error:.3f}" in row
        median, lower, upper = point.images_per_second.values()
        assert 0 < lower <= median <= upper
        assert f"{median:.0f} ({lower:.0f}-{upper:.0f})" in row
    assert points[0]["images_per_second"] == result.points[0].images_per_second
    untimed = [{**point, "images_per_second": None} for point in points]
    widths = []
    for name, drawn in (("timed", points), ("untimed", untimed)):
        draw_sweep(drawn, tmp_path / f"{name}.png")
        with Image.open(tmp_path / f"{name}.png") as figure:
            assert len(figure.convert("RGB").getcolors(1 << 24)) > 3
            widths.append(figure.width)
    assert widths[0] > widths[1]  # no speed, no panel for it


# --- as a user runs it, with an unreadable image in the middle; test_distributed.py has several processes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("capacity")
    generator = np.random.default_rng(0)
    for name in ("cat", "dog", "eel"):
        (root / "tree" / name).mkdir(parents=True)
        for number in range(9):
            pixels = generator.integers(0, 255, (48, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "tree" / name / f"{number}.png")
    (root / "tree" / "dog" / "0.png").write_bytes(b"torn")
    file = root / "classifier" / "model.safetensors"
    save_pretrained(classifier(num_classes=3), file, extra={"class_names": ["cat", "dog", "eel"]})
    limoe = vmoe.create_model("limoe_tiny_patch8_48", width=32, embed_dim=16, **TINY)
    save_pretrained(limoe, root / "limoe" / "model.safetensors")
    return root


@pytest.mark.parametrize(("checkpoint", "task"), [("classifier", "classification"), ("limoe", "zero_shot")])
def test_no_limit_equals_the_task_itself(folder, tmp_path, checkpoint, task):
    arguments = {
        "checkpoint": str(folder / checkpoint),
        "data": {"type": "image_folder", "path": str(folder / "tree")},
        "loader": {"num_workers": 0, "on_bad": "skip"},
        "device": "cpu",
    }
    config = parse(arguments, tmp_path, task)
    plain = run(config, Console(quiet=True))["results"]
    config = parse({**arguments, "capacity": {"factors": [None], "timing_rounds": 0}}, tmp_path, "capacity")
    swept = run(config, Console(quiet=True))
    assert swept["results"]["top1_no_limit"] == plain["top1"]
    assert "top5" not in plain  # of three classes
    [point] = swept["checkpoints"][0]["details"]["points"]
    assert (point["top5"], point["images_per_second"]) == (None, None)
    assert all((tmp_path / f"capacity.{kind}").stat().st_size > 0 for kind in ("json", "png"))


def parse(arguments, folder, task) -> EvaluationConfig:
    from vmoe.utils.config import parse_config

    file = folder / f"{task}.config.json"
    file.write_text(json.dumps({**arguments, "task": task, "output": str(folder / f"{task}.json")}))
    return parse_config(EvaluationConfig, ["--config", str(file)], prog="x", description="", folder="eval")
