"""Configs and command lines made to do harm, each with the sentence that refuses it."""

import json

import pytest

from vmoe.data.images import BadSample
from vmoe.training.config import Config
from vmoe.utils.config import parse_config, read_config

from .hostile import refused

LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefg", "bcdefgh", strict=True)
)
CONFIGS = {
    "python object": ("seed: !!python/object/apply:pathlib.Path.touch [CANARY]", "plain values"),
    "python name": ("seed: !!python/name:os.system", "plain values"),
    "python module": ("seed: !!python/module:antigravity", "plain values"),
    "class path": ("class_path: pathlib.Path.touch\ninit_args: {self: CANARY}", "unknown key 'class_path'"),
    "class path of a section": ("optim: {class_path: os.system, init_args: {}}", "unknown key 'optim.class_path'"),
    "code": ("seed: __import__('pathlib').Path('CANARY').touch()", "seed must be int"),
    "shell": ("seed: $(touch CANARY)", "seed must be int"),
    "environment": ("seed: ${oc.env:HOME}", "seed must be int"),
    "another file": ("optim: /etc/passwd", "optim must be a section"),
    "another config": ("config: /etc/passwd", "unknown key 'config'"),
    "billion laughs": (LAUGHS, "line 3: the alias *a is not allowed"),
    "laughs by merging": (
        "a: &b0 {x: 1}\n" + "".join(f"b{i}: &b{i + 1}\n  <<: [*b{i}, *b{i}]\n" for i in range(40)),
        "the alias *b0 is not allowed",
    ),
    "alias of itself": ("model: &a {kwargs: *a}", "the alias *a is not allowed"),
    "many values": ("model: {kwargs: {x: [" + "0," * 20_000 + "]}}", "more than 10000 values"),
    "brackets": ("seed: " + "[" * 500_000, "nest"),
    "digits": ("seed: " + "9" * 4000, "too large"),
    "more digits": ("seed: " + "9" * 500_000, "characters"),
    "no date": ("seed: 2022-99-99", "seed must be int"),
    "terminal": ('output_dir: "\\e]0;owned\\a"', "control character"),
    "NUL in a path": ('output_dir: "a\\0b"', "control character"),
    "long": ("#" * 2**21, "more than the limit of 1048576"),
    "binary": ("\x7fELF", "not valid YAML"),
    "set": ("seed: !!set {a, b}", "plain values"),
    "a key twice": ("seed: 1\noptim:\n  lr: 1\nseed: 2", "line 5: the key 'seed' is there already, on line 2"),
    "a key twice, deep": ("model: {kwargs: {x: [{a: 1, 'a': 2}]}}", "line 2: the key 'a' is there already"),
}


@pytest.mark.parametrize(("text", "words"), CONFIGS.values(), ids=CONFIGS)
def test_configs(tmp_path, canary, text, words):
    file = tmp_path / "config.yaml"
    file.write_text("task: contrastive\n" + text.replace("CANARY", str(canary)) + "\n")
    refused(lambda: read_config(Config, ["--config", str(file)]), words, str(file) if "seed must" not in words else "")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--seed", "__import__('os').system('true')"], "seed must be int"),
        (["--model.kwargs.a", "[" * 500], "nested deeper"),
        (["--model.kwargs.a", "&a [*a]"], "the alias *a is not allowed"),
        (["--model.kwargs.a", "!!python/name:os.system"], "plain values"),
        (["--optim", "/etc/passwd"], "optim must be a section"),
        (["--config", "x" * 5000], "no such file"),
        (["--config", "/dev/zero"], "no such file"),
        (["--output_dir", "/tmp/\udcff"], r"--output_dir /tmp/\udcff: not UTF-8"),
        (["--model.kwargs.a=\udcff"], r"--model.kwargs.a \udcff: not UTF-8"),
        (["--model.kwargs.\udcff", "1"], "not UTF-8"),
        (["--config", "\udcff"], "no such file"),
        (["--model.kwargs", "{a: 1, a: 2}"], "the key 'a' is there already"),
    ],
)
def test_command_lines(argv, words):
    refused(lambda: read_config(Config, ["--output_dir=x", "--task=contrastive", *argv]), words)


def test_a_class_path_among_free_settings_is_a_word_like_others(tmp_path, canary):
    file = tmp_path / "config.yaml"
    harm = {"class_path": "pathlib.Path.touch", "init_args": {"self": str(canary)}}
    file.write_text(json.dumps({"output_dir": "x", "task": "contrastive", "model": {"kwargs": {"x": harm}}}))
    assert read_config(Config, ["--config", str(file)]).model.kwargs == {"x": harm}


@pytest.mark.parametrize("text", ["&a [*a]", "[" * 15_000, "!!python/name:os.system"])
def test_a_text_is_read_again_with_the_same_bounds(tmp_path, text):
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps({"output_dir": "x", "task": "contrastive", "model": {"kwargs": {"x": text}}}))
    assert read_config(Config, ["--config", str(file)]).model.kwargs == {"x": text}


def test_a_command_line_that_is_not_utf8_ends_with_a_sentence(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_config(Config, ["--task=contrastive", "--output_dir", "/tmp/\udcff"], "train.py", "")
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith(r"train.py: error: command line: --output_dir /tmp/\udcff: not UTF-8")


def test_errors_do_not_act_on_the_terminal(capsys):
    from vmoe.cli.command import exit_code

    def run() -> None:
        raise BadSample("\x1b]0;owned\x07\x1b[2J\u202egpj.exe", "torn")

    assert exit_code("vmoe-x", run) == 1
    assert capsys.readouterr().err == "vmoe-x: error: \\x1b]0;owned\\x07\\x1b[2J\\u202egpj.exe: torn\n"
