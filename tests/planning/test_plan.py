import json

import pytest

from benchmarks.plan_memory import CHECKPOINTING, DROPLESS, classifier, measure, pairs, plan, read
from vmoe.cli.plan import main
from vmoe.distributed.mesh import MeshSize


def test_a_shipped_config_with_changes(tmp_path, capsys):
    options = ["--config", "limoe_tiny_emoji", "--model.kwargs.depth", "2", "--gpus_per_node", "4", "--top", "3"]
    assert main([*options, "--gpu", "a100", "--train.precision", "bf16", "--output", str(tmp_path / "plan.json")]) == 0
    shown = capsys.readouterr().out
    assert "batch 256 = 4 processes x 64; bf16; adamw" in shown
    assert "more fit (--top shows them)" in shown
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["processes"] == 4
    best = written["candidates"][0]
    assert f"Best: --parallel.dp_replicate {best['mesh']['dp_replicate']} --parallel.dp_shard" in shown
    assert all(one["total"] == pytest.approx(sum(one["memory"].values()))
               for one in written["candidates"])  # fmt: skip
    assert {one["grad_checkpointing"] for one in written["candidates"]} == {False, True}


def test_a_narrow_terminal_shows_every_figure(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    options = ["--config", "limoe_tiny_emoji", "--model.kwargs.depth", "2", "--top", "20"]
    assert main([*options, "--output", str(tmp_path / "plan.json")]) == 0
    shown = capsys.readouterr().out.partition("the whole plan is in")[0]
    assert "…" not in shown
    assert all(len(line) <= 80 for line in shown.splitlines())
    lines = [[cell.strip() for cell in line.split("│")[1:]] for line in shown.splitlines()]
    for one in json.loads((tmp_path / "plan.json").read_text())["candidates"]:
        mesh = " x ".join(str(one["mesh"][name]) for name in ("dp_replicate", "dp_shard", "ep"))
        checkpointing = "yes" if one["grad_checkpointing"] else "no"
        cells = [cell for line in lines if line[:2] == [mesh, checkpointing] for cell in line]
        assert f"{one['step_seconds']:.3g}" in cells
        for size in one["memory"].values():
            assert not size or f"{size / 2**30:.2f}" in cells
        for size in one["traffic"].values():
            assert not size or f"{size / 1e9:.2f}" in cells
        for seconds in one["seconds"].values():
            assert f"{seconds * 1e3:.3g}" in cells


def test_nothing_fits(capsys):
    assert main(["--config", "limoe_tiny_emoji", "--model.kwargs.depth", "2", "--gpus_per_node", "1",
                 "--hardware.memory", "0.1"]) == 0  # fmt: skip
    shown = " ".join(capsys.readouterr().out.split())
    assert "Nothing fits: the smallest, dp_replicate 1 x dp_shard 1 x ep 1 with checkpointing, needs" in shown
    assert "Best:" not in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu", "tpu"], "--gpu must be one of"),
        (["--nodes", "0"], "nodes must be >= 1, got 0"),
        (["--gpus_per_node", "3"], "cannot share it evenly; set it to 255"),
        (["--model.name", "limoe_tinny_patch8_48"], "did you mean 'limoe_tiny_patch8_48'"),
        (["--task", "classification"], "needs a classifier"),
        (["--lora.targets", '["experts"]'], "lora.targets cannot be planned; leave it out"),
        (["--hardware.speed", "3"], "unknown key 'hardware.speed'"),
    ],
)
def test_mistakes_are_one_sentence(options, message, capsys):
    try:
        code = main(["--config", "limoe_tiny_emoji", *options])
    except SystemExit as stopped:
        code = stopped.code
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert error.count("\n") == 1


def test_what_a_config_leaves_open_is_said(capsys):
    assert main(["--config", "vmoe_finetune_folder", "--model.kwargs.depth", "4", "--gpus_per_node", "1"]) == 0
    assert "num_classes comes from the data; 1000 are counted" in capsys.readouterr().out


# The whole table is benchmarks/plan_memory.py.
@pytest.mark.parametrize(
    "options",
    [
        classifier("vmoe_tiny_patch8_48", 32, *DROPLESS),
        classifier("vmoe_tiny_patch8_48", 32, *DROPLESS, *CHECKPOINTING),
        pairs("limoe_tiny_patch12_48", 4, *DROPLESS),
    ],
    ids=["activations", "checkpointed", "weights"],
)
def test_memory_is_within_a_tenth_of_what_is_measured(options):
    config = read((*options, "--model.kwargs.depth", "3"))
    assert plan(config).total == pytest.approx(measure(config), rel=0.1)


def test_so_is_that_of_sharded_weights():
    options = classifier("vmoe_tiny_patch8_48", 16, *DROPLESS, "--model.kwargs.num_experts", "64")
    config, mesh = read((*options, "--model.kwargs.depth", "2", "--train.accumulate_steps", "2")), MeshSize(1, 8, 1)
    assert plan(config, mesh).total == pytest.approx(measure(config, mesh), rel=0.1)


@pytest.mark.slow
def test_billions_of_parameters_are_planned_without_their_memory(forks, tmp_path):
    (tmp_path / "plan.py").write_text(
        "import resource, sys; from vmoe.cli.plan import main;"
        # As many experts in fewer blocks.
        "options = ['--model.kwargs.depth', '6', '--model.kwargs.num_experts', '256'];"
        "code = main(['--config', 'paper/vmoe_15b', '--nodes', '32', '--gpus_per_node', '8', *options]);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(code)"
    )
    said = forks.run(tmp_path / "plan.py", [], tmp_path / "output.txt")
    assert "13,992.9 M parameters" in said
    assert "Best: --parallel.dp_replicate" in said
    # The weights alone would take 52 GiB.
    assert int(said.split()[-1]) < 4 * 2**20  # KiB
