import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vmoe
from vmoe.training.logger import MetricsLog, expert_metrics, read_metrics, requested_shares, routing_metrics

METRICS = {"loss": 1.5, "images_per_second": 320.0, "data_wait_share": 0.2}


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
