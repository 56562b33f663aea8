"""docs/performance.md and the program that makes it."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from benchmarks import report
from benchmarks.bars import LAYER, bars
from benchmarks.session import write_section

CPU = {"kind": "cpu", "name": "Some CPU", "cores": 2, "instructions": ["avx2"]}
GPU = {"kind": "cuda", "name": "Some GPU", "memory_gib": 79.6, "cpu": "Some CPU"}


def figure(median: float) -> dict[str, float]:
    return {"median": median, "min": median - 0.01, "max": median + 0.02}


def layer_section(ratio: float, command: str = "python -m benchmarks.layer", **changes) -> dict:
    row = {
        **{"comparison": "mlp", "name": "vmoe", "dtype": "float32", "pass": "forward", **LAYER, "kept": 0.98},
        **{"ms": figure(100.0), "ratios": {"dense": figure(ratio)}},
    }
    return {
        "benchmark": "layer",
        "command": command,
        "finished": "2026-03-04T10:00:00Z",
        "commit": "0123456789abcdef",
        "changed": False,
        "versions": {"python": "3.11.7", "torch": "2.15.0"},
        "threads": 2,
        "allocator": "glibc's",
        "rounds": 5,
        "rows": [{**row, **changes.pop("row", {})}],
        "notes": ["Something was left out."],
        **changes,
    }


def write(folder, section, device=CPU, day=4, key="python -m benchmarks.layer"):
    return write_section(folder, device, datetime(2026, 3, day, tzinfo=UTC), key, section)


def test_the_page_is_what_the_files_give(capsys):
    assert report.main(["--check"]) == 0, capsys.readouterr().err


def test_check_says_what_to_do_when_the_page_is_another(tmp_path, capsys):
    results, page = tmp_path / "results", tmp_path / "performance.md"
    write(results, layer_section(1.02))
    words = ["--results", str(results), "--page", str(page)]
    sentence = "performance.md is not what the files in results give; run python -m benchmarks.report\n"
    assert report.main([*words, "--check"]) == 1
    assert capsys.readouterr().err == sentence
    assert not page.exists()
    assert report.main(words) == 0
    assert report.main([*words, "--check"]) == 0
    write(results, layer_section(1.03))
    assert report.main([*words, "--check"]) == 1
    assert capsys.readouterr().err == sentence


def test_a_damaged_file_is_one_sentence(tmp_path, capsys):
    (tmp_path / "cpu-2026-01-01.json").write_text("{")
    assert report.main(["--results", str(tmp_path), "--page", str(tmp_path / "page.md")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("benchmarks.report: error: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "page.md").exists()


def test_tables_hold_the_figures_the_command_and_where_they_come_from(tmp_path):
    write(tmp_path, layer_section(1.024))
    text = report.page(tmp_path)
    for words in (
        "## Some CPU, 2 cores, avx2",
        "### layer: `python -m benchmarks.layer`",
        "2026-03-04, commit 0123456789; rounds: 5; threads: 2; allocator: glibc's; python 3.11.7, torch 2.15.0.",
        "6304 tokens, D = 384, F = 1536, E = 8, K = 1, capacity 1:",
        "| vmoe | float32 | forward | 98.0% | 100 | 1.024 (1.014-1.044) |",
        "- Something was left out.",
    ):
        assert words in text
    assert "with uncommitted changes" not in text
    assert all(len(line) <= 120 or line.startswith("|") for line in text.splitlines())


@pytest.mark.parametrize(("ratio", "verdict"), [(1.024, "met"), (1.05, "met"), (1.1, "missed by 0.050")])
def test_goals_say_met_or_missed_and_by_how_much(tmp_path, ratio, verdict):
    write(tmp_path, layer_section(ratio))
    line = next(
        line for line in report.page(tmp_path).splitlines() if line.startswith("| layer / dense MLP, float32, f")
    )
    assert line.split(" | ")[1:4] == ["≤ 1.05", f"{ratio:.3f} ({ratio - 0.01:.3f}-{ratio + 0.02:.3f})", verdict]


def test_goals_that_want_more_are_missed_from_below():
    section = {
        **layer_section(1.0),
        "benchmark": "model",
        "rows": [
            {
                **{"comparison": "model", "name": "dropless", "dtype": "float32", "pass": "inference"},
                **{"batch": 32, "image_size": 224, "speed_ratio": figure(0.90), "ratios": {}},
            }
        ],
    }
    (bar,) = [bar for bar in bars([section]) if bar.what.endswith("per second, inference")]
    assert bar.goal == "≥ 0.95"
    assert not bar.met
    assert bar.found["median"] == 0.90


@pytest.mark.parametrize(
    "other",
    [
        {"command": "python -m benchmarks.layer --compile"},
        {"command": "python -m benchmarks.layer --allocator system"},
        {"command": "python -m benchmarks.layer --depth 2"},
        {"row": {"tokens": 64}},
        {"row": {"dtype": "bfloat16"}},
        {"row": {"comparison": "swiglu"}},
    ],
)
def test_goals_take_no_other_setting(other):
    bar = bars([layer_section(1.0, **other)])[0]
    assert bar.what == "layer / dense MLP, float32, forward"
    assert bar.found is None


def test_a_missing_row_is_not_measured(tmp_path):
    write(tmp_path, layer_section(1.0))
    assert "| capacity 0.5 / 1.0, time of the experts, forward | ≤ 0.56 | not measured |" in report.page(tmp_path)


def test_activations_are_judged_without_one_gathered_copy():
    memory = {
        "pass": "forward + backward",
        "activations_mib": 130.0,
        "activations_ratio": 1.3,
        "gathered_copy_mib": 20.0,
    }
    (bar, _) = [bar for bar in bars([layer_section(1.0, row=memory)]) if bar.what.startswith("activations")]
    assert bar.found["median"] == pytest.approx(1.1)
    assert bar.met


def test_of_several_days_the_latest_counts(tmp_path):
    write(tmp_path, layer_section(1.30, finished="2026-03-05T10:00:00Z"), day=5)
    write(tmp_path, layer_section(1.02), day=4)
    write(tmp_path, layer_section(1.09, "python -m benchmarks.layer --compile"), day=4, key="other")
    text = report.page(tmp_path)
    assert "1.300 (1.290-1.320)" in text
    assert "1.090" in text
    assert "1.020" not in text


def test_gpus_are_shown_only_where_one_was_measured(tmp_path):
    write(tmp_path, layer_section(1.02))
    assert "None was measured: there is no file of a GPU" in report.page(tmp_path)
    write(tmp_path, layer_section(1.2, row={"dtype": "bfloat16", "pass": "forward + backward"}), device=GPU)
    text = report.page(tmp_path)
    assert "None was measured" not in text
    assert "## Some GPU, 79.6 GiB (host: Some CPU)" in text


def test_an_empty_folder_says_that_nothing_was_measured(tmp_path):
    assert "Nothing was measured" in report.page(tmp_path)


def test_goals_say_how_much_was_computed():
    (bar,) = [bar for bar in bars([layer_section(1.0)]) if bar.found]
    assert bar.what == "layer / dense MLP, float32, forward (98.0% kept)"


def test_trainers_have_their_cpu_time_and_speed(tmp_path):
    rows = [
        {"comparison": "V-MoE", "name": "train.py", "cpu_ms_per_image": figure(50.0), "speed_ratio": figure(1.5)},
        {"comparison": "V-MoE", "name": "timm's train.py", "cpu_ms_per_image": figure(75.0)},
    ]
    rows = [{**row, "ratios": {}} for row in rows]
    section = {**layer_section(1.0), "benchmark": "trainers", "rows": rows}
    write(tmp_path, section, key="python -m benchmarks.trainers")
    text = report.page(tmp_path)
    assert "| V-MoE | CPU ms an image | speed |" in text
    assert "| train.py | 50.00 (49.99-50.02) | 1.500 (1.490-1.520) |" in text
    assert "| timm's train.py | 75.00 (74.99-75.02) |  |" in text
