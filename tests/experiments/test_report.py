"""docs/results.md: what the records give, its verdicts, and that it is up to date."""

from __future__ import annotations

import re
import shutil

import pytest
import yaml

from experiments import figure, launch, report
from experiments.records import read_records, write_record


def edit(lab, run, seed, **metrics):
    record = read_records(lab.records)[run, seed]
    record["metrics"] |= metrics
    write_record(lab.records, record)


def row(lab, run):
    [line] = [line for line in lab.page.read_text().splitlines() if line.startswith(f"| {run} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_page_is_made_from_the_records_alone(lab, capsys):
    lab.write(metrics=["top1", "ece", "loss"])
    assert lab.launch() == 0
    shutil.rmtree(lab.runs)
    edit(lab, "sparse", 1, top1=0.63)
    assert lab.report() == 0
    text = lab.page.read_text()
    costs = ["0.00 M", "0.00 M", "0.5"]
    assert row(lab, "dense") == ["dense", "2", "50.50 ± 0.50", "10.00 ± 0.00", "1 ± 0", "", "", *costs]
    difference, p = "+11.00 ± 1.00", "< 0.001"  # 10 bytes of 8 images, twice the same
    assert row(lab, "sparse") == ["sparse", "2", "61.50 ± 1.50", "10.00 ± 0.00", "1 ± 0", difference, p, *costs]
    assert (
        "**sparse has the best top1, 61.50 ± 1.50 (2 seeds); clearly better than dense: sparse (+11.00 ± 1.00).**"
        in text
    )
    assert "Source: arXiv 2106.05974." in text
    assert "`optim.warmup_steps 0.1`" in text
    assert "optim.lr 0.002" not in text.replace("--optim.lr 0.002", "")  # a setting of one row alone
    assert "Measured on Some CPU, 2 cores, 2 threads, torch 2.10; commit c0ffee." in text
    assert "python train.py --config configs/vmoe_tiny_emoji_groups.yaml --train.precision float32 --optim.lr" in text
    assert max(map(len, text.split("```")[0].splitlines())) <= 120 or "|" in text


def test_seeds_without_the_first_metric_do_not_count(lab):
    lab.write(metrics=["ece", "top1"])
    assert lab.launch() == 0
    record = read_records(lab.records)["sparse", 1]
    del record["metrics"]["ece"]
    write_record(lab.records, record)
    assert lab.report() == 0
    assert [row(lab, run)[1] for run in ("dense", "sparse")] == ["2", "1"]


@pytest.mark.parametrize(
    ("top1", "sentence"),
    [
        ((0.40, 0.41), "no run is clearly better than dense; clearly worse than dense: sparse"),
        ((0.70, 0.45), "no run is clearly better than dense; not clearly different from dense: sparse"),
    ],
)
def test_the_verdict_follows_the_numbers(lab, capsys, top1, sentence):
    lab.launch()
    for seed, value in enumerate(top1):
        edit(lab, "sparse", seed, top1=value)
    assert lab.report() == 0
    assert sentence in " ".join(capsys.readouterr().out.split())


def test_lower_may_be_better(lab, capsys):
    lab.write(metrics=["loss"])
    lab.launch()
    for seed in (0, 1):
        edit(lab, "sparse", seed, loss=0.5 + 0.01 * seed)
    assert lab.report() == 0
    assert (
        "sparse has the best loss, 0.505 ± 0.005 (2 seeds); clearly better than dense: sparse"
        in capsys.readouterr().out
    )


def test_many_runs_are_counted_and_one_seed_is_not_clear(lab, capsys):
    lab.write(grid={"optim.lr": [0.1, 0.2, 0.3, 0.4]}, seeds=[0], baseline="dense, lr=0.1")
    lab.launch()
    assert lab.report() == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "against dense, lr=0.1 with one or two seeds: sparse, lr=0.1 (+10.00)," in said
    assert "and 2 others." in said
    assert "clearly" not in said


def test_another_question_has_the_runs_and_records_of_an_experiment(lab, capsys):
    sweep = {"config": "emoji_capacity", "data.type": "emoji_groups", "data.split": "val"}
    lab.write(evaluate={"capacity": sweep}, runs={"dense": {}, "sparse": {}, "other": {}})
    assert lab.launch() == 0
    part = {"question": "Does priority help?", "of": "lab", "only": ["spar*"]}
    metrics = ["capacity/top1_bpr_0.5 - top1", "capacity/top1_bpr_0.5"]
    file = lab.file.with_name("part.yaml")
    file.write_text(yaml.safe_dump({**part, "metrics": metrics}))
    lab.calls()
    assert launch.main([str(file), "--output_dir", str(lab.runs.parent)]) == 0
    assert lab.calls() == []
    assert report.main([str(file), "--output", str(lab.page)]) == 0
    text = " ".join(lab.page.read_text().split())
    assert "**capacity/top1_bpr_0.5; no run is clearly higher than top1; clearly lower than top1: sparse (-35.5" in text
    assert row(lab, "sparse")[2:4] == ["-35.50 ± 0.50", "25.00 ± 0.00"]
    assert "| dense |" not in text
    assert "| other |" not in text


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"seeds": [0]}, "part.yaml: seeds: it belongs in lab.yaml, whose runs these are; leave it out here"),
        ({"only": ["nothing"]}, "part.yaml: only: 'nothing' is none of the runs of lab: dense, sparse"),
        ({"only": ["sparse"], "baseline": "dense"}, "part.yaml: baseline 'dense' is none of the runs: sparse"),
        ({"of": "missing"}, "missing.yaml: no such experiment"),
        ({"of": "part"}, "part.yaml: it has the runs of part; write of: part"),
        ({"baseline": "dense", "metrics": ["top1 - ece"]}, "'top1 - ece' is compared with 0; leave the baseline out"),
        ({"of": ""}, "base: name a config of train.py, or with `of` another experiment"),
    ],
)
def test_a_mistake_in_another_question_is_one_sentence(lab, capsys, changes, sentence):
    file = lab.file.with_name("part.yaml")
    file.write_text(yaml.safe_dump({"question": "Why?", "of": "lab", **changes}))
    assert report.main([str(file), "--output", str(lab.page)]) == 1
    assert sentence in capsys.readouterr().err
    assert not lab.page.exists()


def test_a_question_whose_evaluation_is_still_to_come_is_left_out(lab):
    assert lab.launch() == 0
    lab.write(evaluate={"sweep": {"config": "emoji_capacity"}}, metrics=["sweep/top1_bpr_0.5"])
    assert lab.report() == 0
    assert "There is no record" in lab.page.read_text()


def test_runs_are_compared_at_the_same_point_of_the_grid(lab):
    lab.write(grid={"optim.lr": [0.001, 0.002]}, runs={"dense": {}, "sparse": {}, "start": {"grid": {}}})
    assert lab.launch() == 0
    edit(lab, "dense, lr=0.002", 0, top1=0.4)
    edit(lab, "dense, lr=0.002", 1, top1=0.4)
    assert lab.report() == 0
    assert row(lab, "sparse, lr=0.001")[3] == "+10.00 ± 0.00"
    assert row(lab, "sparse, lr=0.002")[3] == "+20.50 ± 0.50"
    assert row(lab, "dense, lr=0.002")[3] == row(lab, "start")[3] == ""


def test_check_finds_a_page_that_is_out_of_date(lab, capsys):
    lab.launch("--only", "*seed0")
    assert lab.report("--check") == 1
    assert not lab.page.exists()
    lab.report()
    assert lab.report("--check") == 0
    assert "Not made yet: dense-seed1, sparse-seed1." in lab.page.read_text()
    lab.page.write_text(lab.page.read_text().replace("50.00", "51.00"))
    assert lab.report("--check") == 1
    lab.report()
    lab.launch()
    assert lab.report("--check") == 1
    assert "results.md is not what the records give; run python -m experiments.report" in capsys.readouterr().err


def test_other_images_are_not_compared(lab):
    lab.launch()
    own = {"optim.lr": 0.002, "data.val.path": "elsewhere"}
    lab.write(runs={"dense": {"model.kwargs.num_experts": 0}, "sparse": own})
    for seed in (0, 1):
        record = read_records(lab.records)["sparse", seed]
        record["images"]["data"] = record["inputs"]["data.val"] = "of other images"
        write_record(lab.records, record)
    assert lab.report() == 0
    assert row(lab, "sparse")[4] == ""


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"runs": {"dense": {"model.kwargs.num_experts": 0}}}, "run 'sparse', seed 0 is not in"),
        ({"metrics": ["top1", "nll"]}, "no record has the metric 'nll'; there are"),
        ({"plot": {"x": "gflops"}}, "no record has the metric 'gflops'; there are"),
        ({"plot": {"y": "top2"}}, "no record has the metric 'top2'; there are"),
        (
            {"plot": {"y": ["capacity/top1_bpr_*", "capacity/top1_brp_*"]}},
            "the metric 'capacity/top1_brp_*'; there are",
        ),
        ({"metrics": ["top1", "capacity/top1_brp_0.5"]}, "no record has the metric 'capacity/top1_brp_0.5'; there are"),
        (
            {"settings": {"train.precision": "float32", "optim.weight_decay": 0.5}},
            "dense-seed0: optim.weight_decay was 'the default' and is 0.5 now",
        ),
    ],
)
def test_records_of_other_settings_are_not_shown(lab, capsys, changes, sentence):
    evaluate = {"capacity": "emoji_capacity"}
    lab.write(evaluate=evaluate)
    lab.launch("--only", "*seed0")
    lab.write(**{"evaluate": evaluate, **changes})
    assert lab.report() == 1
    assert sentence in capsys.readouterr().err
    assert not lab.page.exists()


def test_an_evaluation_with_other_settings_is_not_shown(lab, capsys):
    evaluate = {"config": "emoji_capacity", "runs": ["sparse"]}
    lab.write(evaluate={"capacity": evaluate})
    assert lab.launch() == 0
    lab.write(evaluate={"capacity": {**evaluate, "capacity.factors": [2.0]}})
    assert lab.report() == 1
    sentence = "sparse-seed0: evaluate.capacity was made with other settings than it has in"
    assert sentence in capsys.readouterr().err
    shutil.rmtree(lab.runs)
    assert lab.launch() == 2
    assert sentence in capsys.readouterr().err


def test_runs_with_other_numbers_of_images_are_named(lab, capsys):
    lab.launch()
    record = read_records(lab.records)["sparse", 0]
    record["images"]["correct"] = "/w=="
    write_record(lab.records, record)
    assert lab.report() == 1
    assert "runs 'sparse' and 'dense' cannot be compared: the numbers of images differ" in capsys.readouterr().err


def test_the_page_names_the_commits_and_uncommitted_changes(lab):
    lab.launch()
    record = {**read_records(lab.records)["sparse", 0], "commit": "1234567890abcdef", "changed": True}
    write_record(lab.records, record)
    assert lab.report() == 0
    assert "commits 1234567890 with uncommitted changes, c0ffee." in " ".join(lab.page.read_text().split())


def test_a_record_without_the_training_data_is_said_to_be(lab):
    lab.launch()
    record = read_records(lab.records)["sparse", 0]
    del record["inputs"]
    write_record(lab.records, record)
    assert lab.report() == 0
    assert "The records of sparse-seed0 do not say on which images they were trained." in lab.page.read_text()


@pytest.mark.parametrize("line", ["{", "[]", '{"run": "dense", "seed": 0}'])
def test_a_damaged_record_is_named(lab, capsys, line):
    lab.launch("--only", "dense-seed0")
    with open(lab.records, "a") as file:
        file.write(line + "\n")
    assert lab.report() == 1
    assert re.search(r"lab\.jsonl line 2: not the record of a run", capsys.readouterr().err)
    assert lab.launch() == 2


def test_the_figure_has_a_point_for_each_run_or_a_line_through_a_sweep(lab, tmp_path):
    lab.launch()
    drawn = figure.draw(report.Results(lab.file, lab.runs), tmp_path / "points.png").axes[0]
    assert [text.get_text() for text in drawn.get_legend().get_texts()] == ["dense", "sparse"]
    assert (drawn.get_xlabel(), drawn.get_ylabel()) == ("GFLOPs per image", "top1, %")
    lab.write(plot={"x": "capacity", "y": ["capacity/top1_bpr_*", "capacity/top1_vanilla_*"]})
    for seed in (0, 1):
        edit(lab, "sparse", seed, **{"capacity/top1_bpr_1": 0.5 + seed, "capacity/top1_bpr_0.5": 0.25, "capacity/n": 3})
        edit(lab, "sparse", seed, **{"capacity/top1_vanilla_0.5": 0.125})
    drawn = figure.draw(report.Results(lab.file, lab.runs), tmp_path / "line.png").axes[0]
    labels = ["sparse: capacity/top1_bpr_*", "sparse: capacity/top1_vanilla_*"]
    assert [text.get_text() for text in drawn.get_legend().get_texts()] == labels
    assert (drawn.get_xlabel(), drawn.get_ylabel()) == ("capacity", "capacity/top1_bpr_*, %")
    assert drawn.lines[0].get_xydata().tolist() == [[0.5, 25], [1, 100]]
    assert (tmp_path / "line.png").stat().st_size > 5000


def test_the_committed_page_is_what_the_committed_records_give():
    assert report.main(["--check"]) == 0


def test_a_page_gets_a_short_table_between_its_marks(lab, tmp_path):
    lab.launch()
    results = [report.Results(lab.file, lab.runs)]
    file = tmp_path / "README.md"
    file.write_text("Before.\n<!-- results of lab -->\nold\n<!-- end of results -->\nAfter.")
    text = report.with_tables(file, results)
    assert results[0].experiment.question in text
    assert "old" not in text
    assert "| run | seeds | top1 | difference to dense | parameters | active | GFLOPs |" in text
    assert text.endswith("\n<!-- end of results -->\nAfter.")
    file.write_text(text)
    assert report.with_tables(file, results) == text  # a second time changes nothing
    assert report.check({file: text}, lab.page, []) == 0
    assert report.check({file: text + " "}, lab.page, []) == 1
    for wrong in (text.replace("<!-- end of results -->", "", 1), text.replace("of lab", "of the lab")):
        file.write_text(f"{wrong}\n<!-- results of lab -->\n<!-- end of results -->")
        with pytest.raises(ValueError, match="README.md: write '<!-- results of NAME -->' and '<!-- end of"):
            report.with_tables(file, results)
    file.write_text(text.replace("results of lab", "results of other"))
    with pytest.raises(ValueError, match="README.md: no experiment is called 'other'; a mark names a file"):
        report.with_tables(file, results)
