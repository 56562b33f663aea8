import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

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


def test_overrides_wherever_they_stand_leave_their_neighbours(tmp_path):
    file = write(tmp_path, "output_dir: here\noptim: {lr: 1e-3, kwargs: {image: {a: 1, b: 2}, text: {c: 3}}}\n")
    arguments = ["--optim.lr", "3e-4", "--config", file, "--optim.kwargs.image.b", "1e-3"]
    config = read_config(Settings, [*arguments, "--optim.kwargs.image.d.e=[1, 2]", "--optim.kwargs.sound.f", "4"])
    expected = {"image": {"a": 1, "b": 1e-3, "d": {"e": [1, 2]}}, "text": {"c": 3}, "sound": {"f": 4}}
    assert config == Settings("here", Optim(lr=3e-4, kwargs=expected))
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
        ("optim: {lr: fast}", "optim.lr must be float, got 'fast'"),
        ("second: {lr: fast}", "second.lr must be float, got 'fast'"),
        ("optim: 3", "optim must be a section with the keys lr, betas, kwargs, got 3"),
        ("task: c", "task must be one of 'a', 'b', got 'c'"),
        ("optim: {betas: [1, 2, 3]}", "optim.betas must be tuple[float, float], got [1, 2, 3]"),
        ("optim: {betas: [1, x]}", "optim.betas[1] must be float, got 'x'"),
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
        free: Anything.
    """

    texts: list[str] = field(default_factory=list)
    numbers: list[float] | None = None
    pair: tuple[float, float] = (0.0, 1.0)
    path: str | None = None
    share: float | None = None
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
        ("free", "depth", "write settings, as in {key: value}"),
        ("free", ["depth"], "write settings, as in {key: value}"),
        ("texts", None, "leave it out for its default"),
    ],
)
def test_a_value_of_another_type_comes_with_the_remedy(tmp_path, name, value, remedy):
    with pytest.raises(ConfigError) as caught:
        check_types(Kinds(**{name: value}))
    in_python = str(caught.value)
    file = write(tmp_path, yaml.safe_dump({name: value}))
    with pytest.raises(ConfigError) as caught:
        read_config(Kinds, ["--config", file])
    assert str(caught.value) == f"{file}: {in_python}"
    assert in_python.startswith(f"{name} must be ")
    assert f"; {remedy}" in in_python
    assert "\n" not in in_python


def test_a_text_for_a_number_gets_no_advice_on_quotation_marks():
    with pytest.raises(ConfigError) as caught:
        read_config(Kinds, ["--share", "abc"])
    assert "quotation" not in str(caught.value)


def test_types_of_sections_are_checked_too():
    check_types(Settings("x", second=Optim(lr=1, betas=[0.5, 0.9])))
    settings = Settings("x", second=Optim())
    settings.second.lr = "fast"
    with pytest.raises(ConfigError, match=r"^second\.lr must be float, got 'fast'"):
        check_types(settings)
    check_types(Settings(Path("x"), names=("a", "b")))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "missing setting output_dir: give it in the config file or as --output_dir VALUE"),
        (["--outputdir", "x"], "unknown key 'outputdir'; the nearest known key is 'output_dir'"),
        (["--output_dir", "x", "--optim.lrr", "1"], "the nearest known key is 'optim.lr'"),
        (["--output_dir", "x", "--optim.lr.x", "1"], "unknown key 'optim.lr.x'; the nearest known key is 'optim.lr'"),
        (["--output_dir", "x", "--optim.lr", "fast"], "command line: optim.lr must be float, got 'fast'"),
        (["--output_dir", "x", "--task", "c"], "task must be one of 'a', 'b', got 'c'"),
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


@settings(max_examples=30)
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


def shown_help(capsys, *topic):
    with pytest.raises(SystemExit) as stopped:
        parse_config(Settings, ["--names", "x", "--help", *topic], prog="tool", description="A tool.")
    assert stopped.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_help_lists_settings_with_type_default_and_meaning(capsys):
    shown = shown_help(capsys, "all")
    assert "--optim.lr LR Learning rate. (type: float, default: 0.1)" in shown
    assert "--second.lr" in shown
    assert "--names NAMES Texts, or a file. (type: list[str] | str | None, default: null)" in shown
    assert "--output_dir OUTPUT_DIR Folder. (type: str, required)" in shown
    for topic in ("all", "optim"):
        with pytest.raises(SystemExit) as stopped:
            parse_config(Settings, [f"--help={topic}"], prog="tool", description="A tool.")
        assert stopped.value.code == 0
        assert " ".join(capsys.readouterr().out.split()) == shown_help(capsys, topic)


def test_help_is_a_page_and_names_the_sections(capsys):
    shown = shown_help(capsys)
    assert "--output_dir OUTPUT_DIR Folder (required) --task {a,b} What to do --names NAMES Texts, or a file" in shown
    assert "optim, second lr, betas, kwargs" in shown
    assert "Learning rate" not in shown
    assert shown == shown_help(capsys, "--task", "a")


def test_help_of_a_section(capsys):
    shown = shown_help(capsys, "optim")
    assert "--optim.lr LR Learning rate. (type: float, default: 0.1)" in shown
    assert not {"--output_dir", "--second.lr"} & set(shown.split())
    with pytest.raises(SystemExit) as stopped:
        parse_config(Settings, ["--help", "lr"], prog="tool", description="A tool.")
    assert stopped.value.code == 2
    message = "tool: error: no section is called 'lr': --help takes all, optim, second\n"
    assert capsys.readouterr().err == message


def test_bare_names_of_shipped_configs():
    assert shipped_config_dirs()
    assert find_config("emoji_zero_shot", "eval") == find_config("emoji_zero_shot.yaml", "eval")
    with pytest.raises(ConfigError, match=r"did you mean 'emoji_zero_shot'\? shipped configs: .*retrieval_pairs"):
        find_config("emoji_zeroshot", "eval")
    with pytest.raises(ConfigError, match=r"did you mean 'lab/cifar10'\? shipped configs: "):
        find_config("cifar10")
    with pytest.raises(ConfigError, match="did you mean 'limoe_tiny_emoji'"):
        find_config("/old/project/configs/limoe_tiny_emoij.yaml")
