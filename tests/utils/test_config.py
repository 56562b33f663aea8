import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentError, ArgumentParser

from vmoe.utils.config import ConfigError, check_types, find_config, parse_config, read_config, shipped_config_dirs


@dataclass
class Optim:
    """The optimizer.

    Attributes:
        lr: Learning rate.
        betas: Two decays.
        kwargs: Further arguments.
    """

    lr: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.lr < 0:
            raise ValueError(f"lr must be >= 0, got {self.lr}")


@dataclass
class Settings:
    """All of it.

    Attributes:
        output_dir: Folder.
        optim: Optimizer.
        second: Optional optimizer.
        task: What to do.
        names: Texts, or a file.
    """

    output_dir: str
    optim: Optim = field(default_factory=Optim)
    second: Optim | None = None
    task: Literal["a", "b"] = "a"
    names: list[str] | str | None = None


def write(folder, text):
    file = folder / "config.yaml"
    file.write_text(text)
    return str(file)


def test_overrides_deep_in_a_free_form_setting_leave_their_neighbours(tmp_path):
    file = write(tmp_path, "output_dir: here\noptim: {kwargs: {image: {a: 1, b: 2}, text: {c: 3}}}\n")
    arguments = ["--config", file, "--optim.kwargs.image.b", "1e-3", "--optim.kwargs.image.d.e=[1, 2]"]
    config = read_config(Settings, [*arguments, "--optim.kwargs.sound.f", "4", "--optim.lr", "3e-4"])
    expected = {"image": {"a": 1, "b": 1e-3, "d": {"e": [1, 2]}}, "text": {"c": 3}, "sound": {"f": 4}}
    assert config == Settings("here", Optim(lr=3e-4, kwargs=expected))


def test_file_then_overrides_wherever_they_stand(tmp_path):
    file = write(tmp_path, "output_dir: here\noptim: {lr: 1e-3, kwargs: {a: 1, b: {c: [1, 2]}}}\n")
    config = read_config(Settings, ["--optim.lr", "3e-4", "--config", file, "--optim.kwargs.num_experts", "8"])
    assert config == Settings("here", Optim(lr=3e-4, kwargs={"a": 1, "b": {"c": [1, 2]}, "num_experts": 8}))
    assert isinstance(config.optim, Optim)


def test_a_dictionary_on_the_command_line_gets_further_keys():
    config = read_config(Settings, ["--output_dir", "x", "--optim.kwargs", "{a: 1, b: 2}", "--optim.kwargs.b", "3"])
    assert config.optim.kwargs == {"a": 1, "b": 3}


def test_a_text_on_the_command_line_needs_no_quotes():
    for text in ("*all", "a: b: c", "[", "2026-01-01", "1_0", "@x", "%y"):
        assert read_config(Settings, ["--output_dir", text]).output_dir == text


def test_later_files_win(tmp_path):
    first = write(tmp_path, "output_dir: here\noptim: {lr: 1}\n")
    second = tmp_path / "second.yaml"
    second.write_text("optim: {lr: 2}\n")
    config = read_config(Settings, ["--config", first, f"--config={second}"])
    assert (config.output_dir, config.optim.lr) == ("here", 2)


def test_optional_section_is_made_by_its_first_key():
    assert read_config(Settings, ["--output_dir=x"]).second is None
    assert read_config(Settings, ["--output_dir=x", "--second.lr=3"]).second == Optim(lr=3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {lrr: 1}", "unknown key 'optim.lrr'; the nearest known key is 'optim.lr'"),
        ("second: {betta: 1}", "unknown key 'second.betta'"),
        ("lr: 1", "unknown key 'lr'; the nearest known key is 'optim.lr'"),
        ("optim: {lr: fast}", "optim.lr must be float, got fast"),
        ("second: {lr: fast}", "second.lr must be float, got fast"),
        ("optim: 3", "optim must be a section with the keys lr, betas, kwargs, got 3"),
        ("task: c", "task must be Literal['a', 'b'], got c"),
        ("optim: {betas: [1, 2, 3]}", "optim.betas must be tuple[float, float], got [1, 2, 3]"),
        ("optim: {lr: -1}", "lr must be >= 0, got -1"),
        ("optim: [1", "config.yaml line 1: not valid YAML"),
        ("- 1", "must hold settings as `key: value`, got a list"),
    ],
)
def test_mistakes_in_a_file_are_one_sentence(tmp_path, text, message):
    with pytest.raises(ConfigError) as caught:
        read_config(Settings, ["--output_dir=x", "--config", write(tmp_path, text)])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@dataclass
class Kinds:
    """One setting of each kind.

    Attributes:
        texts: Texts.
        numbers: Numbers.
        pair: Two numbers.
        path: A path.
        share: A number or none.
        count: A whole number.
        flag: Yes or no.
        free: Anything.
    """

    texts: list[str] = field(default_factory=list)
    numbers: list[float] | None = None
    pair: tuple[float, float] = (0.0, 1.0)
    path: str | None = None
    share: float | None = None
    count: int = 1
    flag: bool = False
    free: dict[str, Any] = field(default_factory=dict)


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("texts", "head.*", 'write a list, as in ["head.*"]'),
        ("texts", "{}", 'write a list, as in ["{}"]'),
        ("numbers", 0.9, "write a list, as in [0.9]"),
        ("pair", 0.9, "write a list of 2 values"),
        ("pair", [0.9], "write a list of 2 values"),
        ("path", ["a", "b"], "give one path"),
        ("share", ["a"], "give one value, not a list"),
        ("share", "none", "write null for none"),
        ("share", False, "write null for none"),
        ("share", "0.5", "leave the quotation marks out"),
        ("count", 1000.0, "write 1000"),
        ("flag", 3, "write true or false"),
        ("free", "depth", "write settings, as in {key: value}"),
        ("free", ["depth"], "write settings, as in {key: value}"),
        ("texts", None, "leave it out for its default"),
    ],
)
def test_a_value_of_another_type_comes_with_the_remedy(tmp_path, name, value, remedy):
    with pytest.raises(ConfigError) as caught:
        check_types(Kinds(**{name: value}))
    messages = [str(caught.value)]
    if value not in (None, "0.5"):  # jsonargparse takes them
        with pytest.raises(ConfigError) as caught:
            read_config(Kinds, ["--config", write(tmp_path, yaml.safe_dump({name: value}))])
        messages.append(str(caught.value))
    for message in messages:
        assert message.startswith(f"{name} must be ")
        assert f"; {remedy}" in message
        assert "\n" not in message


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda values: st.lists(values, max_size=2) | st.dictionaries(st.text("ab", min_size=1, max_size=2), values),
    max_leaves=4,
)


@given(st.sampled_from([one.name for one in dataclasses.fields(Kinds)]), VALUES)
def test_settings_made_in_python_are_checked_as_those_of_a_file(name, value):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Kinds)
    try:
        parser.parse_object({name: value})
        refused = False
    except ArgumentError:
        refused = True
    message = ""
    try:
        check_types(Kinds(**{name: value}))
    except ConfigError as error:
        message = str(error)
    if refused:
        assert message.startswith(f"{name} must be ")
    elif message:  # jsonargparse takes null for anything, and a text for what it says in YAML
        assert any(isinstance(leaf, str) or leaf is None for leaf in leaves([value]))


def leaves(value):
    if isinstance(value, dict):
        value = list(value.values())
    return [leaf for each in value for leaf in leaves(each)] if isinstance(value, list) else [value]


def test_types_of_sections_are_checked_too():
    check_types(Settings("x", second=Optim(lr=1, betas=[0.5, 0.9])))
    with pytest.raises(ConfigError, match=r"^second\.lr must be float, got 'fast'"):
        check_types(Settings("x", second=Optim(lr=LowerFast("fast"))))
    check_types(Settings(Path("x"), names=("a", "b")))


class LowerFast(str):
    """A text that may be compared with a number."""

    def __lt__(self, other):
        return False


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "missing setting output_dir: give it in the config file or as --output_dir VALUE"),
        (["--outputdir", "x"], "unknown key 'outputdir'; the nearest known key is 'output_dir'"),
        (["--output_dir", "x", "--optim.lrr", "1"], "the nearest known key is 'optim.lr'"),
        (["--output_dir", "x", "--optim.lr.x", "1"], "unknown key 'optim.lr.x'; the nearest known key is 'optim.lr'"),
        (["--output_dir", "x", "--task", "c"], "task must be Literal['a', 'b'], got c"),
        (["--output_dir", "x", "--config", "limoe_tiny_emoij"], "limoe_tiny_emoij: no such file"),
        (["--output_dir", "x", "--config"], "--config needs a value"),
        (["--output_dir", "x", "more"], "unrecognized arguments: more"),
    ],
)
def test_mistakes_on_the_command_line_exit_with_2(argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_config(Settings, argv, prog="tool", description="A tool.")
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("tool: error: ")
    assert message in error
    assert error.count("\n") == 1


@given(
    st.floats(0, 10),
    st.sampled_from(["a", "b"]),
    st.dictionaries(st.text("abc", min_size=1), st.integers() | st.booleans() | st.lists(st.floats(-1, 1))),
)
def test_what_is_written_is_read_back(tmp_path_factory, lr, task, kwargs):
    config = Settings("x", Optim(lr=lr, kwargs=kwargs), task=task, names=["one", "two"])
    plain = dataclasses.asdict(config)
    plain["optim"]["betas"] = list(config.optim.betas)
    file = tmp_path_factory.mktemp("config") / "config.yaml"
    file.write_text(yaml.safe_dump(plain))
    assert read_config(Settings, ["--config", str(file)]) == config


def test_help_lists_settings_with_type_default_and_meaning(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_config(Settings, ["--help"], prog="tool", description="A tool.")
    assert stopped.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "--optim.lr LR Learning rate. (type: float, default: 0.1)" in shown


def test_bare_names_of_shipped_configs():
    assert shipped_config_dirs()
    assert find_config("emoji_zero_shot", "eval") == find_config("emoji_zero_shot.yaml", "eval")
    with pytest.raises(ConfigError, match=r"did you mean 'emoji_zero_shot'\? shipped configs: .*retrieval_pairs"):
        find_config("emoji_zeroshot", "eval")
