"""Training that starts from a dense model made sparse, and the fine-tuning recipes on a small real task."""

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from vmoe.data import SourceConfig, build_dataset
from vmoe.models.factory import create_model, save_pretrained
from vmoe.models.upcycle import upcycle
from vmoe.planning.model_plan import make_model
from vmoe.training.config import Config, ModelConfig, OptimConfig
from vmoe.training.distill import PROJECTION
from vmoe.training.optim import create_optimizer
from vmoe.training.trainer import train
from vmoe.utils.config import ConfigError, read_config, shipped_config_dirs


def metrics(config: Config, key: str) -> list[float]:
    lines = [json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def weights(config: Config) -> dict[str, torch.Tensor]:
    return load_file(max(Path(config.output_dir).glob("checkpoints/step_*/model.safetensors")))


# --- a dense run, made sparse ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory):
    return tmp_path_factory.mktemp("dense") / "run"


@pytest.fixture
def dense_run(make_config, trained_once, tmp_path):
    """The folder of a short run of a dense LIMoE: a copy of one that all tests share."""
    if not trained_once.exists():
        settings = {"output_dir": str(trained_once), "train.steps": 3, "model.kwargs.num_experts": 0}
        train(make_config("contrastive", **settings))
    return str(shutil.copytree(trained_once, tmp_path / "dense"))


@pytest.fixture
def make_second(make_config, dense_run, tmp_path):
    """make_second(name, upcycle, **{"train.steps": 3}) -> Config of a run that starts from `dense_run`."""

    def make(name, upcycle=None, pretrained_optimizer=True, **overrides):
        config = make_config("contrastive", **{"output_dir": str(tmp_path / name), "train.steps": 4, **overrides})
        return dataclasses.replace(config, model=ModelConfig(None, dense_run, {}, upcycle or {}, pretrained_optimizer))

    return make


ALL = {"num_experts": 4, "layers": [1], "capacity_factor": float("inf"), "noise_std": 0.0}


def test_an_upcycled_run_starts_where_the_dense_one_stood(make_second):
    sparse, dense = make_second("sparse", ALL), make_second("longer")
    summary = train(sparse)
    train(dense)
    assert summary["parameters_total"] > summary["parameters_active"]
    ours, theirs = metrics(sparse, "task_loss"), metrics(dense, "task_loss")
    assert ours[0] == pytest.approx(theirs[0], abs=1e-4)
    assert ours[-1] != pytest.approx(theirs[-1], abs=1e-6)
    assert metrics(sparse, "loss")[0] > ours[0]  # the auxiliary losses are at work
    state = load_file(Path(sparse.output_dir) / "checkpoints/step_000004/optimizer.safetensors")
    steps = {int(value) for key, value in state.items() if key.startswith("step/")}
    assert steps == {4, 7}  # the router's own, and three of the dense run before
    train(fresh := make_second("fresh", ALL, pretrained_optimizer=False))
    assert metrics(fresh, "task_loss")[0] == ours[0]
    assert metrics(fresh, "task_loss")[2] != ours[2]


def test_an_upcycled_run_that_was_stopped_goes_on(make_second, dense_run, tmp_path):
    schedule = {"optim.schedule": "constant"}
    train(whole := make_second("whole", ALL, **schedule))
    train(make_second("parts", ALL, **schedule, **{"train.steps": 2}))
    Path(dense_run).rename(tmp_path / "gone")  # the checkpoint is all that it needs
    parts = make_second("parts", ALL, **schedule)
    train(parts)
    torch.testing.assert_close(weights(parts), weights(whole), rtol=0, atol=0)
    assert metrics(parts, "loss") == metrics(whole, "loss")


def test_the_optimizer_of_a_run_taught_by_features_is_carried_over(make_config, tmp_path):
    teacher = create_model("test_efficientnet", num_classes=3)
    save_pretrained(teacher, tmp_path / "t.safetensors")
    taught = {"train.distill.teacher": str(tmp_path / "t.safetensors"), "train.distill.features": 0.5}
    first = make_config(**taught, **{"train.steps": 2})
    train(first)
    start = {"model.pretrained": first.output_dir, "model.pretrained_optimizer": True, "train.steps": 1}
    for name, settings in (("labels", {}), ("taught", taught)):
        train(make_config(**start, **settings, output_dir=str(tmp_path / name)))
        state = load_file(tmp_path / name / "checkpoints/step_000001/optimizer.safetensors")
        steps = {key.removeprefix("step/"): int(value) for key, value in state.items() if key.startswith("step/")}
        assert {value for key, value in steps.items() if not key.startswith(PROJECTION)} == {3}
        assert {value for key, value in steps.items() if key.startswith(PROJECTION)} == ({1} if settings else set())


def test_bad_settings_are_config_errors(make_second, make_config, dense_run, tmp_path):
    for settings, message in [
        ({"num_expert": 4}, "model.upcycle: upcycle has no setting 'num_expert'"),
        ({"layers": "last7"}, "model.upcycle: layers='last7' asks for more"),
        ({"auxiliary_loss": "attach"}, "model.upcycle.auxiliary_loss must be 'record'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            train(make_second("bad", settings))
    sparse = make_config("contrastive")
    sparse.model.upcycle = ALL
    with pytest.raises(ConfigError, match="model.upcycle: LIMoE is sparse already"):
        train(sparse)
    with pytest.raises(ConfigError, match="pretrained_optimizer needs model.pretrained"):
        train(make_config("contrastive", **{"model.pretrained_optimizer": True}))
    file = tmp_path / "m.safetensors"
    save_pretrained(create_model(pretrained=dense_run), file)
    config = make_second("bad", ALL)
    config.model.pretrained = str(file)
    with pytest.raises(ConfigError, match="config.yaml does not exist; set it to false"):
        train(config)
    with pytest.raises(ConfigError, match="state of AdamW is of no use to Lion"):
        train(make_second("bad", ALL, **{"optim.name": "lion"}))


def test_experts_of_several_runs_whose_routers_alone_are_trained(make_second, dense_run, tmp_path):
    train(other := make_second("other", pretrained_optimizer=False, **{"train.freeze": '["*", "!*.mlp.*"]'}))
    settings, routers = {"others": [other.output_dir]}, {"train.freeze": '["*", "!*.router.*"]', "optim.lr": 0.1}
    with pytest.raises(ConfigError, match="pretrained_optimizer has the state of one model"):
        train(make_second("both", settings))
    with pytest.raises(ConfigError, match=r"^model\.upcycle\.clusters are of one model's tokens, and others"):
        train(make_second("both", settings | {"clusters": 4}, pretrained_optimizer=False))
    differs = rf"model.upcycle: others: \[{other.output_dir}\] differs from {dense_run} in blocks.0.mlp.fc1.weight, but"
    with pytest.raises(ConfigError, match=differs):
        train(make_second("both", settings | {"layers": [1]}, pretrained_optimizer=False))
    train(both := make_second("both", settings, pretrained_optimizer=False, **routers))
    name, new = "blocks.1.mlp.fc1.weight", weights(both)
    dense, own = (create_model(pretrained=run).state_dict() for run in (dense_run, other.output_dir))
    assert not torch.equal(dense[name], own[name])
    assert torch.equal(new["blocks.1.mlp.experts.fc1.weight"], torch.stack([dense[name], own[name]]))
    assert all(torch.equal(tensor, dense[key]) for key, tensor in new.items() if ".mlp." not in key)
    assert new["blocks.1.mlp.router.weight"].std() > 0.05  # 0.02 when it is new
    planned = make_model(both)[0].state_dict()
    assert {key: tensor.shape for key, tensor in planned.items()} == {key: each.shape for key, each in new.items()}


def test_a_new_head_of_zeros_says_nothing_of_clusters(make_config):
    config, console = make_config(**{"model.kwargs.num_experts": 0, "train.steps": 1}), Console(width=200, record=True)
    config.model.upcycle = {"num_experts": 2, "layers": [1], "clusters": 4}
    train(config, console)
    line = next(line for line in console.export_text().splitlines() if line.startswith("clusters: "))
    assert re.fullmatch(
        r"clusters: outputs of layers differ by (\S+)% to \1% from the .* on their examples", line.strip()
    )


def test_a_run_starts_from_clusters_of_its_training_data(make_second):
    one, console = {"train.steps": 1, "optim.lr": 1e-12}, Console(width=200, record=True)
    train(dense := make_second("longer", **one))
    settings = {**ALL, "clusters": 12, "cluster_energy": 1}
    train(sparse := make_second("sparse", settings, **one), console)
    assert metrics(sparse, "task_loss")[0] == pytest.approx(metrics(dense, "task_loss")[0], abs=1e-4)
    assert "from the dense model's on their examples, of the model by 0.0%" in console.export_text()
    torch.testing.assert_close(weights(sparse)["blocks.1.mlp.router.weight"].norm(dim=1), torch.ones(4))
    train(make_second("sparse", settings, **one | {"train.steps": 2}))  # continues without them
    for key, value in (("clusters", -1), ("others", "a")):
        with pytest.raises(ConfigError, match=rf"model\.upcycle\.{key} must be .*, got {value!r}"):
            train(make_second("bad", {key: value}, pretrained_optimizer=False))
    for key, value, instead in (("calibration", 16, "clusters"), ("models", ["runs/b"], "others")):
        for start in (train, make_model):
            with pytest.raises(ConfigError, match=rf"^model\.upcycle\.{key}: give {instead}"):
                start(make_second("bad", {key: value}, pretrained_optimizer=False))


# --- fine-tuning recipes ---------------------------------------------------------------------------------------------

FINETUNE = next(root / "finetune" for root in shipped_config_dirs())
SMALL = {"img_size": 24, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}


GROUPS = ("Flags", "Food & Drink", "Smileys & Emotion")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Folders of emoji of three groups, the same number of each: whoever does not look is right in one of three."""
    root = tmp_path_factory.mktemp("emoji")
    for split, number in (("train", 100), ("val", 20)):
        emoji = build_dataset(SourceConfig("emoji_groups", split=split))
        for group in GROUPS:
            (root / split / group).mkdir(parents=True)
            of_group = [i for i, label in enumerate(emoji.labels) if label == emoji.classes.index(group)]
            for index in of_group[:: len(of_group) // number][:number]:
                emoji[index].image.save(root / split / group / f"{index}.png")
    return root


def groups_config(file: Path, run: Path, folders: Path, **overrides) -> Config:
    """A config on the emoji groups, small enough for a test."""
    settings = {
        "output_dir": str(run),
        "device": "cpu",
        "data.train.path": str(folders / "train"),
        "data.val.path": str(folders / "val"),
        "data.train.type": "image_folder",
        "data.val.type": "image_folder",
        "data.loader.batch_size": 32,
        "data.loader.num_workers": 0,
        "train.precision": "float32",
        "train.accumulate_steps": 1,
        "train.log_every": 1,
        "train.eval_every": 20,
        "train.steps": 20,
        "train.tensorboard": "false",
        "evaluate.examples": 0,
        **overrides,
    }
    return read_config(Config, ["--config", str(file), *[f"--{key}={value}" for key, value in settings.items()]])


def first_and_last(config: Config) -> tuple[float, float]:
    losses = metrics(config, "task_loss")
    return sum(losses[:6]) / 6, sum(losses[-6:]) / 6


@pytest.mark.parametrize("name", ["vmoe_higher_resolution", "vit_upcycled"])
def test_the_shipped_recipes_load(name):
    config = read_config(Config, ["--config", f"finetune/{name}"])
    config.check()
    assert config.output_dir == f"runs/{name}"


def test_a_vmoe_is_fine_tuned_at_a_higher_resolution(folders, tmp_path):
    before = groups_config(
        FINETUNE.parent / "vmoe_tiny_emoji_groups.yaml",
        tmp_path / "before",
        folders,
        **{f"model.kwargs.{key}": value for key, value in {**SMALL, "num_experts": 4}.items()},
    )
    train(before)
    config = groups_config(
        FINETUNE / "vmoe_higher_resolution.yaml",
        tmp_path / "after",
        folders,
        **{"model.pretrained": before.output_dir, "model.kwargs.img_size": 32, "optim.lr": 0.03},
    )
    summary = train(config)
    first, last = first_and_last(config)
    assert first < first_and_last(before)[0]  # what was learned at 24 px is of use at 32 px
    assert last < first
    assert summary["evaluation"]["top1"] > 0.6  # one answer for all: 0.333
    assert last < math.log(len(GROUPS)) - 0.15  # what a constant gives at best
    assert metrics(config, "loss") == pytest.approx(metrics(config, "task_loss"), abs=1e-6)  # no auxiliary losses
    old, new = weights(before), weights(config)
    assert new["pos_embed"].shape == (1, 17, 48)
    assert torch.equal(old["blocks.1.mlp.router.weight"], new["blocks.1.mlp.router.weight"])
    assert not torch.equal(old["blocks.1.mlp.experts.fc1.weight"], new["blocks.1.mlp.experts.fc1.weight"])
    layer = create_model(pretrained=config.output_dir).blocks[1].mlp
    assert (layer.capacity_factor, layer.experts.drop.p) == (1.5, 0.1)


def test_what_experts_add_is_spared_from_weight_decay():
    dense = create_model("eva02_base_patch14_224", **{**SMALL, "patch_size": 14, "img_size": 28})
    sparse = upcycle(dense, num_experts=2, layers=[1])
    for layer_decay in (None, 0.7):
        optimizer = create_optimizer(sparse, OptimConfig(weight_decay=0.1, layer_decay=layer_decay))
        decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        for name, parameter in sparse.blocks[1].mlp.named_parameters():
            kernel = name in ("router.weight", "experts.fc1.weight", "experts.fc2.weight")
            assert decay[id(parameter)] == (0.1 if kernel else 0.0), name
        assert decay[id(sparse.pos_embed)] == 0.0


def test_a_dense_vit_is_made_sparse_and_fine_tuned(folders, tmp_path):
    torch.manual_seed(0)
    save_pretrained(create_model("vit_tiny_patch16_224", **SMALL, num_classes=7), tmp_path / "vit.safetensors")
    config = groups_config(
        FINETUNE / "vit_upcycled.yaml",
        tmp_path / "run",
        folders,
        **{"model.pretrained": str(tmp_path / "vit.safetensors"), "optim.lr": 0.003, "data.loader.batch_size": 64},
    )
    summary = train(config)
    first, last = first_and_last(config)
    assert last < first - 0.1
    assert summary["evaluation"]["top1"] > 0.6  # one answer for all: 0.333
    assert last < math.log(len(GROUPS)) - 0.15  # what a constant gives at best
    model = create_model(pretrained=config.output_dir)
    layer = model.blocks[3].mlp
    assert (model.head.out_features, layer.num_experts, layer.experts.drop.p) == (3, 8, 0.1)
    weight = layer.experts.fc1.weight
    assert not torch.equal(weight[0], weight[1])  # the copies went their own ways
