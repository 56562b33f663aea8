"""Any text as a config file and any words on the command line: settings or one sentence."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from hypothesis import strategies as st

from vmoe.utils.config import ConfigError, read_config, shipped_config_dirs
from vmoe.utils.printable import printable

from .bounds import damaged, fuzz, outcome

PIECES = (
    *(b"&a ", b"*a", b"&a [*a, *a]", b"<<: *a", b"!!python/object/apply:os.system [true]", b"!!binary ", b"!!set {a}"),
    *(b"[", b"]", b"{", b"}", b": ", b"- ", b"? ", b"|\n", b">\n", b"\t", b"\0", b"---\n", b"...\n", b"%YAML 1.1\n"),
    *(b"2022-99-99", b"1:2:3", b".nan", b"-.inf", b"1e999", b"0x", b"9" * 5000, b"~", b"null", b"'", b'"', b"\\x1b"),
    *(b"\x1b", b"\xc2\x85", b"\xe2\x80\xa8", b"\xff", b"\xed\xa0\x80", b"class_path: os.system", b"${oc.env:HOME}"),
)


@dataclass
class Part:
    """A section.

    Attributes:
        rate: a number.
        sizes: two of them.
        kwargs: anything.
    """

    rate: float = 0.1
    sizes: tuple[int, int] = (1, 2)
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class Settings:
    """All of it.

    Attributes:
        output_dir: a folder.
        part: a section.
        more: an optional one.
        task: a choice.
        names: a list.
        count: an optional number.
    """

    output_dir: str
    part: Part = field(default_factory=Part)
    more: Part | None = None
    task: Literal["a", "b"] = "a"
    names: list[str] | None = None
    count: int | None = None


TEXT = b"""# settings
output_dir: runs/x
part:
  rate: 1.0e-3
  sizes: [3, 4]
  kwargs: {depth: 12, image: {num_experts: 8, layers: [1, 3]}, name: "a b"}
more:
  kwargs: {layers: [1, 3]}
  rate: .5
task: b
names:
  - one
  - 'two: "2"'
count: 7
"""


def read(content: bytes, folder: Path, config_class: type = Settings) -> Any:
    file = folder / "config.yaml"
    file.write_bytes(content)
    return outcome(lambda: read_config(config_class, ["--config", str(file)]), (ConfigError,))


def test_the_undamaged_file_is_read(tmp_path):
    settings = read(TEXT, tmp_path)
    assert settings.more.kwargs["layers"] == [1, 3]
    assert settings.more.rate == 0.5


def any_file(tmp_path_factory, data) -> None:
    folder = tmp_path_factory.mktemp("config")
    content = data.draw(damaged(TEXT, PIECES) | damaged(b"output_dir: x\n", PIECES) | st.binary(max_size=60))
    settings = read(content, folder)
    if isinstance(settings, Settings):
        yaml.safe_dump(vars(settings.part))  # plain values, as they are written to a run's config.yaml
        assert isinstance(settings.output_dir, str)


test_any_file, test_many_files = fuzz(any_file, few=30, many=3000)


def any_shipped_config(tmp_path_factory, data) -> None:
    from vmoe.training.config import Config

    files = sorted(file for folder in shipped_config_dirs() for file in folder.rglob("*.yaml"))
    content = data.draw(st.sampled_from(files)).read_bytes()
    read(data.draw(damaged(content, PIECES)), tmp_path_factory.mktemp("config"), Config)


test_any_shipped_config, test_many_shipped_configs = fuzz(any_shipped_config, few=4, many=500)

KEYS = (
    *("output_dir", "part", "part.rate", "part.sizes", "part.kwargs", "part.kwargs.a", "part.kwargs.a.b", "more"),
    *("more.rate", "task", "names", "names+", "count", "", ".", "part.", ".part", "part..rate", "x", "part.kwargs."),
    *("more.x", "-", "conf"),
)


def any_command_line(data) -> None:
    words = st.sampled_from([piece.decode(errors="replace") for piece in PIECES]) | st.text(max_size=8)
    words |= st.sampled_from(["1", "[1, 2]", "{a: 1}", "a", "null", "", "/etc/passwd", ".", "{class_path: os.system}"])
    argv = ["--output_dir=x"]
    for key in data.draw(st.lists(st.sampled_from(KEYS), max_size=3)):
        word = data.draw(words)
        argv += data.draw(st.sampled_from([[f"--{key}={word}"], [f"--{key}", word], [word], [f"--{key}"]]))
    settings = outcome(lambda: read_config(Settings, argv), (ConfigError,))
    assert isinstance(settings, (Settings, str))


test_any_command_line, test_many_command_lines = fuzz(any_command_line, few=30, many=3000)


def any_text(data) -> None:
    text = data.draw(st.text())
    line = printable(text)
    assert line.isprintable() or all(character == " " or not character.isspace() for character in line)
    assert "\n" not in line
    line.encode()


test_any_text_is_printable, test_many_texts_are_printable = fuzz(any_text, few=50, many=3000)
