"""What every test of hostile input asks: a right result or a refusal of one sentence, in bounded time and memory."""

import copy
import json
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

Result = TypeVar("Result")
MEGABYTE = 2**20


@contextmanager
def limited_memory(megabytes: int) -> Iterator[None]:
    """More than this is a MemoryError; counted are addresses, of which libraries take some more than they use."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + megabytes * MEGABYTE, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def outcome(
    call: Callable[[], Result], refusals: tuple[type[Exception], ...], seconds: float = 5, megabytes: int | None = 300
) -> Result | str:
    """What the call returns, or the sentence of its refusal; any other exception goes on.

    Args:
        refusals: the exceptions that the call documents.
        seconds: of the processor.
        megabytes: see `limited_memory`; None: libraries of C++ end the process where they get no memory.
    """
    start = time.process_time()
    try:
        with limited_memory(megabytes) if megabytes else nullcontext():
            result = call()
    except refusals as error:
        result = str(error)
        one_line = bool(result.strip()) and "\n" not in result
        if not one_line:
            pytest.fail(f"{type(error).__name__} says no sentence of one line: {result!r}")
    took = time.process_time() - start
    assert took < seconds, f"took {took:.1f} s"
    return result


def fuzz(property_: Callable, few: int, many: int) -> tuple[Callable, Callable]:
    """The property as two tests: a short one, and one of many examples that `-m exhaustive` runs."""
    quiet = list(HealthCheck)

    def drawn(count: int) -> Callable:
        return settings(max_examples=count, deadline=None, suppress_health_check=quiet)(given(st.data())(property_))

    return drawn(few), pytest.mark.timeout(7200)(pytest.mark.exhaustive(drawn(many)))


@st.composite
def damaged(draw, content: bytes, pieces: tuple[bytes, ...] = ()) -> bytes:
    """Bytes with some of them changed, cut out, doubled, or with something else between them."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        offset = draw(st.integers(0, max(0, len(content) - 1)))
        length = draw(st.sampled_from([1, 1, 2, 4, 8, 64]))
        kind = draw(st.sampled_from(["change", "insert", "remove", "double", "cut", "extreme"]))
        if kind == "change":
            content[offset : offset + length] = draw(st.binary(min_size=length, max_size=length))
        elif kind == "extreme":
            content[offset : offset + length] = draw(st.sampled_from([b"\xff", b"\x00", b"\x7f", b"\x80"])) * length
        elif kind == "insert":
            content[offset:offset] = draw(st.sampled_from(pieces) if pieces else st.binary(max_size=16))
        elif kind == "remove":
            del content[offset : offset + length]
        elif kind == "double":
            content[offset:offset] = content[offset : offset + length]
        elif draw(st.booleans()):  # not too often: most of what is left after a cut is refused at once
            del content[offset:]
    return bytes(content)


# Values that readers of settings seldom meet.
NASTY = (
    *(None, True, False, 0, -1, 1, 2, 3, 7, 2**31 - 1, 2**31, 2**40, 2**63, 2**64, 10**400, -(2**63)),
    *(0.0, -0.5, 0.5, 1e-300, 1e300, float("nan"), float("inf"), float("-inf")),
    *("", "x", "os.system", "__import__('os').system('true')", "a" * 5000),
    *("\0", "\x1b[31m", "\ud800", "../../x", "9" * 30),
    *([], {}, [[]], [1, 2], [0], [-1], [2**40, 2**40], {"name": "x"}, {"class_path": "os.system"}, [None], {"": {}}),
)


@st.composite
def damaged_tree(draw, tree):
    """A tree of dictionaries and lists with one to three values changed, removed, renamed or added."""
    tree = json.loads(json.dumps(tree))
    for _ in range(draw(st.integers(1, 3))):
        node = tree
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            inner = [key for key in keys if isinstance(node[key], (dict, list)) and node[key]]
            if not inner or not draw(st.integers(0, 2)):
                break
            node = node[draw(st.sampled_from(inner))]
        if not keys:
            continue
        key = draw(st.sampled_from(keys))
        kind = draw(st.sampled_from(["value", "value", "value", "remove", "rename"]))
        if kind == "value":
            node[key] = copy.deepcopy(draw(st.sampled_from(NASTY)))  # which the next change may change
        elif kind == "remove":
            del node[key]
        elif isinstance(node, dict):
            node[draw(st.sampled_from(["x", "", "pretrained", "file", "url", key.upper(), key + " "]))] = node.pop(key)
    return tree
