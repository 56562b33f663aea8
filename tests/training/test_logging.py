import io
import json
import logging
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import vmoe
from vmoe.training.logging import (
    CollapseWatch,
    DataWatch,
    MetricsLog,
    ProgressDisplay,
    asked_experts,
    expert_figures,
    largest_share,
    read_metrics,
    routing_figures,
)

FIGURES = {"loss": 1.5, "images_per_second": 320.0, "data_wait_share": 0.2}


def routed(expert_index, num_experts=4):
    """What the log reads of a layer's record, for tokens that ask for these experts; the last token is padding."""
    index = torch.tensor([*expert_index, 0]).view(1, -1, 1)
    mask = torch.ones(1, index.shape[1], dtype=torch.bool)
    mask[0, -1] = False
    return SimpleNamespace(gates=torch.zeros(1, index.shape[1], num_experts), expert_index=index, mask=mask)


@given(steps=st.lists(st.integers(1, 50), unique=True), resume=st.integers(0, 50))
def test_a_continued_log_has_every_step_once(tmp_path_factory, steps, resume):
    run = tmp_path_factory.mktemp("run")
    log = MetricsLog(run, 0, tensorboard=False)
    for step in sorted(steps):
        log.write(step, {"loss": float(step)})
    log.close()
    log = MetricsLog(run, resume, tensorboard=False)
    log.write(resume + 1, {"loss": 0.0})
    log.close()
    logged = [entry["step"] for entry in read_metrics(run / "metrics.jsonl")]
    assert logged == [step for step in sorted(steps) if step <= resume] + [resume + 1]


def test_a_line_that_was_cut_off_is_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    log = MetricsLog(tmp_path, 5, tensorboard=False)
    log.write(6, {"loss": float("nan")})
    log.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1, "loss": 2.0}, {"step": 6, "loss": None}]


def test_every_figure_goes_to_tensorboard_too(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(tmp_path, 0, tensorboard=True)
    log.write(3, FIGURES)
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(FIGURES)
    assert events.Scalars("loss")[0].step == 3


def test_largest_share_counts_what_was_asked_for():
    share, idle = largest_share(asked_experts({"layer": routed([0, 0, 0, 1, 2, 0, 0, 0])})["layer"])
    assert share == pytest.approx(6 / 8)
    assert idle == 1


def test_routing_figures_name_layers_and_modalities():
    model = vmoe.create_model("vmoe_tiny_patch8_48", img_size=16, embed_dim=16, num_heads=2, depth=4, num_experts=4)
    with vmoe.record_routing(model) as record:
        model(torch.randn(2, 3, 16, 16))
    figures = routing_figures(record)
    assert figures["routing/load_max_over_mean"] == max(
        figures[f"routing/blocks.{block}.mlp/load_max_over_mean"] for block in (1, 3)
    )
    assert 0 <= figures["routing/share_dropped"] <= 1
    assert "routing/blocks.3.mlp/gate_entropy" in figures
    dense = torch.nn.Linear(2, 2)
    with vmoe.record_routing(dense) as record:
        dense(torch.ones(1, 2))
    assert routing_figures(record) == {}


@pytest.mark.parametrize(
    ("bad", "words"), [([0] * 7 + [1, 2, 3], "70% of its tokens"), ([0, 1, 2] * 3, "1 experts get no token")]
)
def test_a_collapse_is_reported_once_by_name_after_many_steps(caplog, bad, words):
    watch = CollapseWatch(after=50)
    with caplog.at_level(logging.WARNING):
        for step in range(0, 50, 10):
            watch.update(step, {"blocks.1.mlp": routed(bad), "blocks.3.mlp": routed([0, 1, 2, 3])})
        assert not caplog.records
        for step in range(50, 100, 10):
            watch.update(step, {"blocks.1.mlp": routed(bad), "blocks.3.mlp": routed([0, 1, 2, 3])})
    assert len(caplog.records) == 1
    assert "blocks.1.mlp" in caplog.text
    assert words in caplog.text


def test_a_layer_that_recovers_is_not_reported(caplog):
    watch = CollapseWatch(after=50)
    with caplog.at_level(logging.WARNING):
        for step in range(0, 200, 10):
            watch.update(step, {"blocks.1.mlp": routed([0, 0, 0, 0] if step % 40 else [0, 1, 2, 3])})
    assert not caplog.records


def test_two_experts_shared_evenly_are_no_collapse(caplog):
    watch = CollapseWatch(after=1)
    with caplog.at_level(logging.WARNING):
        for step in range(5):
            watch.update(step, {"mlp": routed([0, 1, 0, 1], num_experts=2)})
    assert not caplog.records


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_loss_throughput_routing_and_time_left(terminal):
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=140)
    health = {
        "routing/share_dropped": 0.034,
        "routing/load_max_over_mean": 1.42,
        "routing/experts_without_tokens": 2.0,
    }
    with ProgressDisplay(console, 5, 100) as display:
        display.advance(6, seconds=2.0)
        display.show(6, {**FIGURES, **health})
        display.message("a message")
    text = output.getvalue()
    for words in (
        "loss 1.5",
        "320 img/s",
        "waiting for data 20%",
        "dropped 3.4%",
        "1.42",
        "idle experts 2",
        "a message",
    ):
        assert words in text, words
    if not terminal:
        assert "step 6/100" in text
        assert "3:08 left" in text
        assert "\x1b" not in text


@pytest.mark.parametrize(("router", "has_load"), [("top_k", True), ("expert_choice", True), ("soft", False)])
def test_only_soft_routing_has_no_load(router, has_load):
    settings = {} if router == "top_k" else {"router": router}
    if router == "expert_choice":
        settings["capacity_factor"] = 8.0  # every expert takes every token: all is kept
    model = vmoe.create_model(
        "vmoe_tiny_patch8_48", img_size=16, embed_dim=16, num_heads=2, depth=2, num_experts=4, **settings
    )
    with vmoe.record_routing(model) as record:
        model(torch.randn(2, 3, 16, 16))
    [layer] = record.layers.values()
    assert layer.router == router
    if router == "expert_choice":
        assert layer.kept.all()
    assert any("/load_" in name for name in expert_figures(record)) == has_load


WAITING = {"images_per_second": 300.0, "data_wait_share": 0.5}  # the model could take 600


@pytest.mark.parametrize(
    ("workers", "cores", "remedy"),
    [
        (1, 8, "1 worker reads 200; raise data.loader.num_workers to 3"),
        (0, 8, "the training process itself reads 200; raise data.loader.num_workers to 3"),
        (1, 2, "to 2 (the model needs 3, and there are 2 CPU cores"),
        (2, 2, "2 workers read 200; all 2 CPU cores read already"),
    ],
)
def test_waiting_for_data_is_told_once_with_a_remedy(workers, cores, remedy, caplog):
    watch = DataWatch(workers, cores)
    for _ in range(4):
        watch.update(WAITING, 200.0)
    watch.update({**WAITING, "data_wait_share": 0.1}, 200.0)  # it passed
    assert caplog.messages == []
    for _ in range(20):
        watch.update(WAITING, 200.0)
    (message,) = caplog.messages
    assert "waits for data 50% of the time: it could take 600 pictures/s" in message
    assert remedy in message
