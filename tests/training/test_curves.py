import json

import pytest
from matplotlib.figure import Figure
from PIL import Image

from vmoe.training.curves import draw_curves

from .test_trainer import _path, run

LAYERS = ("visual.blocks.1.mlp", "text.blocks.1.mlp")


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, file: (figures.append(self), save(self, file)))
    return figures


def write(folder, lines):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_curves_show_what_was_logged(tmp_path, drawn):
    lines = [{"step": step, "loss": 3.0 / step, "task_loss": None if step == 2 else 2.0 / step} for step in (1, 2, 3)]
    for line in lines:
        line |= {f"routing/{layer}/load_max_over_mean": 1.5 for layer in LAYERS}
        line |= {f"routing/{LAYERS[0]}/image/load_max_over_mean": 9.0}
    lines[2] |= {"evaluation/top1": 0.5, "evaluation/ece": 0.2, "evaluation/num_samples": 10}
    write(tmp_path, lines)
    draw_curves(tmp_path, {"metric": "ece", "value": 0.2, "step": 3})
    found = {
        ax.get_title(loc="left"): {
            line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in ax.lines
        }
        for ax in drawn[0].axes
    }
    assert found["loss"] == {"loss": ([1, 2, 3], [3.0, 1.5, 1.0]), "task_loss": ([1, 3], [2.0, 2.0 / 3])}
    best = found["evaluation"].popitem()[1]
    assert best[0] == [3, 3]
    assert found["evaluation"] == {"top1": ([3], [0.5]), "ece": ([3], [0.2])}
    assert list(found["load of the busiest expert / mean"]) == list(LAYERS)


def test_a_run_draws_its_curves(make_config):
    config = make_config("contrastive", **{"train.steps": 2, "train.eval_every": 1})
    run(config)
    with Image.open(_path(config) / "curves.png") as image:
        assert image.width > 3 * 400
        assert len(image.convert("RGB").getcolors(2**20)) > 10


def test_no_curves_are_no_error(tmp_path, caplog):
    write(tmp_path, [])
    draw_curves(tmp_path)
    assert not (tmp_path / "curves.png").exists()
    write(tmp_path, [{"step": 1, "loss": 2.0}])
    (tmp_path / "curves.png").mkdir()
    draw_curves(tmp_path)
    assert "no curves.png: " in caplog.text
