"""What a user types, and what comes back."""

import dataclasses

import pytest

from vmoe.training.config import Config, ModelConfig, TrainConfig, changed_settings, flatten, load_config, to_yaml
from vmoe.utils.config import ConfigError, read_config, shipped_config_dirs

SHIPPED = sorted(path.stem for folder in shipped_config_dirs() for path in folder.glob("*.yaml"))
REQUIRED = ["--output_dir=x", "--task=classification", "--model.name=vmoe_tiny_patch8_48"]


def test_help_lists_every_setting_with_its_type_and_words(capsys):
    with pytest.raises(SystemExit) as exit_:
        load_config(["--help", "all"])
    assert exit_.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for key in flatten(dataclasses.asdict(Config(output_dir="x", task="contrastive"))):
        words, type_, _ = text.rpartition(f"--{key} ")[2].partition("type: ")
        assert type_, key
        assert len(words.split()) > 3, f"{key} has no description"
        assert len(words) < 600, f"{key} has no type of its own"


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_config_loads(name):
    config = load_config(["--config", name])
    assert config.output_dir == f"runs/{name}"


def test_the_dense_baselines_differ_in_their_experts_only():
    for name in ("limoe_tiny_emoji", "vmoe_tiny_emoji_groups"):
        sparse, dense = (flatten(dataclasses.asdict(load_config(["--config", n]))) for n in (name, f"{name}_dense"))
        changed = {key for key in {**sparse, **dense} if sparse.get(key) != dense.get(key)}
        routing = {key for key in changed if key.startswith("model.kwargs.")}
        assert "model.kwargs.num_experts" in routing
        assert changed - routing == {"output_dir"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--train.stpes", "3"], ["train.stpes", "train.steps"]),
        (["--train.steps", "many"], ["train.steps", "int", "many"]),
        (["--train.steps", "0"], ["train.steps", ">= 1", "0"]),
        (["--train.precision", "fp8"], ["train.precision", "fp8", "bf16"]),
        (["--train.ema_decay", "0"], ["train.ema_decay must be > 0 and <= 1, got 0.0; null keeps no moving average"]),
        (["--train.clip_grad_norm", "0"], ["train.clip_grad_norm must be > 0 and finite, got 0.0; null does not clip"]),
        (["--train.max_minutes", "-1"], ["train.max_minutes", "> 0", "null sets no limit"]),
        (["--train.eval_every", "-1"], ["train.eval_every must be >= 0, got -1"]),
        (["--optim.layer_decay", "2"], ["optim.layer_decay", "<= 1", "null gives all layers"]),
        (["--train.freeze", "head.*"], ["train.freeze", 'write a list, as in ["head.*"]']),
        (["--evaluate.templates", "a {}"], ["evaluate.templates", 'write a list, as in ["a {}"]']),
        (["--optim.betas", "0.9,0.95"], ["optim.betas", "write a list of 2 values"]),
        (["--config", "no_such_config"], ["no_such_config", "limoe_tiny_emoji"]),
        (["--optim.warmup_steps", "1000"], ["optim.warmup_steps", "train.steps (1000)"]),
        (["--optim.betas", "[0.9, 2]"], ["optim.betas must be in [0, 1), got"]),
        (["--optim.betas", "[0.9]"], ["optim.betas must be tuple[float, float]", "got [0.9]"]),
        (["--model.kwargs.auxiliary_loss", "attach"], ["auxiliary_loss", "record"]),
        (["--data.augmentation.mixup", "0.2", "--data.loader.batch_size", "7"], ["batch_size", "even", "7"]),
        (["--task", "contrastive", "--data.augmentation.mixup", "0.2"], ["data.augmentation.mixup", "0"]),
        (["--task", "contrastive", "--evaluate.task", "classification"], ["evaluate.task", "zero_shot"]),
        (["--evaluate.task", "retrieval"], ["evaluate.task", "contrastive"]),
        (["--data.val.type", "pairs"], ["data.val: data source of type 'pairs' needs a path"]),
        (["--data.augmentation.hflip", "2"], ["error: data.augmentation.hflip must be >= 0 and <= 1, got 2"]),
        (["--model.name", "null"], ["model.name"]),
        (["--train.epochs", ".inf"], ["train.epochs", "finite"]),
        (["--optim.lr", ".inf"], ["optim.lr", "finite"]),
        (["--parallel.timeout", ".inf"], ["parallel.timeout", "2592000", "inf"]),
        (["--parallel.timeout", ".nan"], ["parallel.timeout", "nan"]),
        (["--parallel.timeout", "0.001"], ["parallel.timeout", "1", "0.001"]),
    ],
)
def test_a_mistake_is_one_sentence_that_names_it(arguments, words, capsys):
    with pytest.raises(SystemExit) as exit_:
        load_config(REQUIRED + arguments)
    assert exit_.value.code == 2
    message = capsys.readouterr().err.strip()
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": TrainConfig(freeze="head.*")}, r'train\.freeze must be .* write a list, as in \["head\.\*"\]'),
        ({"train": TrainConfig(steps=10.0)}, r"train\.steps must be int \| None, got 10\.0"),
        ({"model": ModelConfig(pretrained=["a"])}, r"model\.pretrained must be .* give one value, not a list"),
        ({"output_dir": ["x"]}, r"output_dir must be str, got \['x'\]; give one value"),
    ],
)
def test_settings_made_in_python_are_checked(change, message):
    config = Config(**{"output_dir": "x", "task": "classification", **change})
    with pytest.raises(ConfigError, match=message):
        config.check()


def test_a_path_is_written_as_text(tmp_path):
    config = Config(output_dir=tmp_path, task="classification", model=ModelConfig(name="vmoe_tiny_patch8_48"))
    config.check()
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(["--config", str(tmp_path / "config.yaml")]).output_dir == str(tmp_path)


def test_an_unknown_key_in_a_file_is_named_with_the_nearest_known_one(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("output_dir: x\ntask: classification\ntrain:\n  precison: bf16\n")
    with pytest.raises(ConfigError, match=r"train\.precison.*train\.precision"):
        read_config(Config, ["--config", str(file)])


def test_the_written_config_reads_back_the_same(tmp_path):
    config = load_config([*REQUIRED, "--model.kwargs.moe_layers", "[1, 3]", "--optim.betas", "[0.9, 0.98]"])
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    again = load_config(["--config", str(file)])
    assert again == config
    assert changed_settings(file, again) == {}


def test_only_settings_that_matter_count_as_changed(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(load_config([*REQUIRED, "--model.kwargs.num_experts", "4"])))
    harmless = ["--train.log_every=3", "--train.steps=77", "--data.loader.num_workers=0", "--evaluate.batch_size=5"]
    same = load_config([*REQUIRED, *harmless, "--model.kwargs.num_experts=4", "--data.val.split=held_out"])
    assert changed_settings(file, same) == {}
    other = load_config([*REQUIRED, "--model.kwargs.num_experts=8", "--optim.lr=0.5", "--seed=3"])
    assert changed_settings(file, other) == {
        "model.kwargs.num_experts": (4, 8),
        "optim.lr": (0.001, 0.5),
        "seed": (0, 3),
    }


def test_a_length_on_the_command_line_replaces_both_of_a_file(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("train: {steps: 6, epochs: 2}")
    for arguments, length in (
        ([], (6, 2)),
        (["--train.epochs", "3"], (None, 3)),
        (["--train.epochs=3"], (None, 3)),
        (["--train.steps", "9"], (9, None)),
        (["--train.steps", "null"], (None, 2)),
        (["--train.epochs=null"], (6, None)),
        (["--train.steps", "9", "--train.epochs", "3"], (9, 3)),
    ):
        train = load_config(["--config", str(file), *REQUIRED, *arguments]).train
        assert (train.steps, train.epochs) == length
