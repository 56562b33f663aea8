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
from vmoe.training import logger
from vmoe.training.logger import (
    CollapseWatch,
    DataWatch,
    MetricsLog,
    ProgressBar,
    TimeLeft,
    expert_metrics,
    final_table,
    read_metrics,
    requested_shares,
    routing_metrics,
    say,
    short_texts,
)

METRICS = {"loss": 1.5, "images_per_second": 320.0, "data_wait_share": 0.2}
HEALTH = {"routing/share_dropped": 0.034, "routing/load_max_over_mean": 1.42, "routing/experts_without_tokens": 2.0}


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


def test_every_metric_goes_to_tensorboard_and_those_of_experts_only_there(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(tmp_path, 0, tensorboard=True)
    log.write(3, {**METRICS, "experts/blocks.1.mlp/image/load_00": 0.5})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {*METRICS, "experts/blocks.1.mlp/image/load_00"}
    assert events.Scalars("loss")[0].step == 3
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 3, **METRICS}]


def test_largest_share_counts_what_was_asked_for():
    share_E = requested_shares({"layer": routed([0, 0, 0, 1, 2, 0, 0, 0])})["layer"]
    assert share_E.tolist() == pytest.approx([6 / 8, 1 / 8, 1 / 8, 0])


def test_routing_metrics_name_layers_and_modalities():
    model = vmoe.create_model("vmoe_tiny_patch8_48", img_size=16, embed_dim=16, num_heads=2, depth=4, num_experts=4)
    with vmoe.record_routing(model) as record:
        model(torch.randn(2, 3, 16, 16))
    measured = routing_metrics(record)
    assert measured["routing/load_max_over_mean"] == max(
        measured[f"routing/blocks.{block}.mlp/load_max_over_mean"] for block in (1, 3)
    )
    assert 0 <= measured["routing/share_dropped"] <= 1
    assert "routing/blocks.3.mlp/gate_entropy" in measured
    dense = torch.nn.Linear(2, 2)
    with vmoe.record_routing(dense) as record:
        dense(torch.ones(1, 2))
    assert routing_metrics(record) == {}


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


@pytest.mark.parametrize(
    ("workers", "cores", "words"),
    [
        (1, 8, "data.loader.num_workers 1 reads 200; raise it to 3"),
        (0, 8, "data.loader.num_workers 0 reads 200; raise it to 3"),
        (1, 2, "data.loader.num_workers 1 reads 200; raise it to 2"),
        (2, 2, "data.loader.num_workers 2 reads 200; all 2 CPU cores read already"),
    ],
)
def test_waiting_for_data_is_reported_once_with_a_remedy(workers, cores, words, caplog, monkeypatch):
    monkeypatch.setattr(logger, "own_cores", lambda: cores)
    waiting, watch = {"images_per_second": 300.0, "data_wait_share": 0.5}, DataWatch(workers)
    for share in (0.5, 0.5, 0.5, 0.5, 0.1):  # it passed
        watch.update({**waiting, "data_wait_share": share}, 200.0)
    assert caplog.messages == []
    for share in (*[0.5] * 20, 0.1, *[0.5] * 20):
        watch.update({**waiting, "data_wait_share": share}, 200.0)
    (message,) = caplog.messages
    assert "waits for data 50% of the time: each process could take 600 images/s" in message
    assert words in message
    assert message.endswith(", or set data.cache memory if the decoded images fit into it")


def test_a_cache_is_no_remedy_where_there_is_one(caplog):
    watch = DataWatch(0, cached=True)
    for _ in range(5):
        watch.update({"images_per_second": 300.0, "data_wait_share": 0.5}, 200.0)
    (message,) = caplog.messages
    assert "data.cache" not in message


def test_a_layer_that_recovers_or_shares_evenly_is_not_reported(caplog):
    recovers, even = CollapseWatch(after=50), CollapseWatch(after=1)
    with caplog.at_level(logging.WARNING):
        for step in range(0, 200, 10):
            recovers.update(step, {"blocks.1.mlp": routed([0, 0, 0, 0] if step % 40 else [0, 1, 2, 3])})
            even.update(step, {"mlp": routed([0, 1, 0, 1], num_experts=2)})
    assert not caplog.records


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


@pytest.mark.parametrize(
    ("router", "settings"), [("top_k", {}), ("expert_choice", {"capacity_factor": 8.0}), ("soft", {})]
)
def test_metrics_of_experts_are_those_of_the_record_and_soft_routing_has_no_load(router, settings):
    model = vmoe.create_model(
        "vmoe_tiny_patch8_48",
        **{"img_size": 16, "embed_dim": 16, "num_heads": 2, "depth": 2, "num_experts": 4},
        **({} if router == "top_k" else {"router": router}),
        **settings,
    )
    with vmoe.record_routing(model.eval()) as record:
        model(torch.randn(3, 3, 16, 16))
    layer, measured = record.layers["blocks.1.mlp"], expert_metrics(record)
    assert layer.routing.per_token == (router == "top_k")
    assert layer.routing.soft == (router == "soft")
    for expert in range(4):
        name = f"experts/blocks.1.mlp/image/{{}}_{expert:02d}"
        assert measured[name.format("importance")] == pytest.approx(layer.gates[..., expert].mean().item())
        if router == "soft":
            assert name.format("load") not in measured
        else:
            share = layer.load[expert].item() / layer.load.sum().item()
            assert measured[name.format("load")] == pytest.approx(share)
