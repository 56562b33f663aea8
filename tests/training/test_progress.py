import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from tests.training.test_logger import METRICS
from vmoe.training.progress import ProgressBar, TimeLeft, final_table, say, short_texts

HEALTH = {"routing/share_dropped": 0.034, "routing/load_max_over_mean": 1.42, "routing/experts_without_tokens": 2.0}


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_loss_throughput_routing_and_time_left(terminal):
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=140)
    with ProgressBar(console, 5, 100) as display:
        display.step_done(6, seconds=2.0)
        display.show(6, {**METRICS, **HEALTH})
        say(console, "a message")
    text = output.getvalue()
    shown = ("loss 1.5", "320 img/s", "waiting for data 20%", "dropped 3.4%", "1.42", "idle experts 2", "a message")
    for words in shown:
        assert words in text, words
    if not terminal:
        assert "step 6/100" in text
        assert "3:08 left" in text
        assert "\x1b" not in text


@given(st.integers(50, 200), st.integers(2, 10**6))
def test_progress_takes_one_line_of_whole_metrics(width, steps):
    console = Console(file=io.StringIO(), force_terminal=True, width=width)
    display = ProgressBar(console, 0, steps)
    display.step_done(1, seconds=0.3)
    display.show(1, {**METRICS, **HEALTH})
    plain = Console(file=io.StringIO(), width=width)
    plain.print(display.get_renderable())
    (line,) = plain.file.getvalue().splitlines()
    assert len(line) <= width
    shown = line[line.index("loss") :].rstrip().split(", ")
    texts = short_texts({**METRICS, **HEALTH})
    assert shown == texts[: len(shown)]
    if width >= 150:
        assert shown == texts


@given(st.floats(0.01, 100), st.floats(0, 1e5), st.integers(2, 50), st.data(), st.integers(0, 1000))
def test_one_slow_step_does_not_change_the_time_left(seconds, longer, count, data, more):
    slow = data.draw(st.integers(0, count - 1))
    estimate = TimeLeft(count + more)
    for step in range(count):
        estimate.add("step", seconds + longer * (step == slow))
    assert estimate.seconds(count) == pytest.approx(more * seconds)


def test_evaluations_and_checkpoints_are_part_of_the_time_left():
    estimate = TimeLeft(1050, evaluation=100, checkpoint=0)
    for _ in range(100):
        estimate.add("step", 2.0)
    assert estimate.seconds(100) == pytest.approx(950 * 2)
    estimate.add("evaluation", 30.0)
    # after steps 200, 300, ..., 1000 and 1050
    assert estimate.seconds(101) == estimate.seconds(100) - 2 - 30 == pytest.approx(949 * 2 + 10 * 30)
    assert estimate.seconds(1050) == 30


def test_the_time_left_follows_a_run_that_becomes_slower():
    estimate = TimeLeft(10_000)
    for step in range(1000):
        estimate.add("step", 1.0 if step < 500 else 3.0)
    assert estimate.seconds(1000) == pytest.approx(9000 * 3)


@pytest.mark.parametrize("width", [40, 80])
def test_the_final_table_loses_no_metric(width):
    summary = {"model": "limoe_huge_patch14", "task": "contrastive", "steps": 123_456_789, "parameters_total": 5.6e9}
    summary |= {"parameters_active": 6.75e8, "gflops_per_image": 1234.567, "images_per_second": 54_321.0}
    summary |= {"train_seconds": 987_654.0, "loss": 1.23456, "evaluation": {"image_to_text_recall@10": 0.98765}}
    console = Console(file=io.StringIO(), width=width)
    console.print(final_table(summary))
    shown = ("123456789", "5600.00 M", "675.00 M", "1234.567", "54321 images/s", "987654 s", "1.2346", "0.9877")
    for metric in shown:
        assert metric in console.file.getvalue()
