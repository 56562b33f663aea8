"""Training in several processes is training in one: same losses, gradients and weights, whatever lies where."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

STEPS = Path(__file__).with_name("steps.py")
DDP, FSDP, EP = [2, 1, 1], [1, 2, 1], [1, 1, 2]
CASES = [
    "top_1",
    "top_2_bpr",
    "dropless",
    "dropless_all",
    "expert_choice",
    "soft",
    "deepseek",
    "batch_losses",
    "limoe",
    "limoe_dropless",
    "limoe_sigmoid",
]
ALL = ["accumulate", "ema", "checkpointing"]
COMPILED = ("top_1", "dropless", "expert_choice", "limoe")
# A fused optimizer is one operation on sharded weights, of which each has to be planned first in every process. The
# other one, which is many, takes the same steps, whatever the model: one case on each kind of mesh has it.
RUNS = {
    2: [
        *([case, DDP, []] for case in CASES),
        *([case, EP, [] if case == "top_1" else ["fused"]] for case in CASES),
        ["top_1", FSDP, []],
        *([case, FSDP, ["fused"]] for case in ("dropless", "expert_choice", "deepseek", "limoe")),
        ["limoe_dropless", DDP, ALL],
        *([["limoe_dropless", mesh, [*ALL, "fused"]] for mesh in (FSDP, EP)]),
        *(["dropless", mesh, ["bf16", "fused"]] for mesh in (FSDP, EP)),
        *([["limoe", DDP, ["lora", "accumulate"]]] if find_spec("peft") else []),
        ["limoe", DDP, ["features"]],
        *([case, mesh, ["features", "fused"]] for case, mesh in (("limoe", EP), ("limoe_sigmoid", FSDP))),
    ],
    4: [
        *([case, [1, 2, 2], ["fused"]] for case in ("top_2_bpr", "dropless", "limoe")),
        ["top_1", [2, 1, 2], ["fused"]],
        ["limoe_sigmoid", [4, 1, 1], []],
    ],
}
# Every case on every mesh, with everything: `pytest -m exhaustive`.
EXHAUSTIVE = {
    2: [
        [case, mesh, options]
        for case in CASES
        for mesh in (DDP, FSDP, EP)
        for options in ([], ALL, ["bf16"], *([["compile"]] if case in COMPILED else []))
    ],
    4: [
        [case, mesh, options]
        for case in CASES
        for mesh in ([4, 1, 1], [1, 4, 1], [1, 1, 4], [2, 2, 1], [2, 1, 2], [1, 2, 2])
        for options in ([], ALL)
    ]
    + [["limoe_sigmoid", [2, 2, 1], ["features"]]],
}


def alone(case: str, options: list[str]) -> list:
    """What a run is compared with: one process. What else a run does must change nothing; bfloat16 rounds."""
    return [case, None, [option for option in options if option not in ("checkpointing", "compile", "fused")]]


def train(forks, folder: Path, runs: dict[int, list], seconds: float = 240) -> dict[str, dict[str, torch.Tensor]]:
    """{what was run: its losses, gradients and weights}; one start for all."""
    single = [alone(case, options) for every in runs.values() for case, _, options in every]
    jobs = {1: list({json.dumps(run): run for run in single}.values()), **runs}
    forks.run(STEPS, [str(folder), json.dumps(jobs)], folder / "output.txt", seconds)
    found = {}
    for world in jobs:
        found |= torch.load(folder / f"{world}.pt")
    return found


def check(results: dict[str, dict[str, torch.Tensor]], run: list) -> None:
    """Several processes gave what one does."""
    case, _, options = run
    expected, found = results[json.dumps(alone(case, options))], results[json.dumps(run)]
    assert expected.keys() == found.keys()
    tolerance = 3e-2 if "bf16" in options else 1e-5
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{run}: {name}: {text}"
        )


@pytest.fixture(scope="module")
def results(forks, tmp_path_factory) -> dict[str, dict[str, torch.Tensor]]:
    return train(forks, tmp_path_factory.mktemp("steps"), RUNS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "run", [run for runs in RUNS.values() for run in runs], ids=lambda run: "-".join(map(str, run))
)
def test_several_processes_train_as_one(results, run):
    check(results, run)


@pytest.mark.exhaustive
@pytest.mark.timeout(7200)
def test_all_meshes_train_as_one(forks, tmp_path):
    found = train(forks, tmp_path, EXHAUSTIVE, seconds=7200)
    for runs in EXHAUSTIVE.values():
        for run in runs:
            check(found, run)


@pytest.mark.slow
def test_what_is_compared_was_trained(results):
    for case in CASES:
        single = results[json.dumps(alone(case, []))]
        assert len(single["losses"][:, 0].unique()) == 3  # three steps, on other data and with other weights
        experts = [tensor for name, tensor in single.items() if name.startswith("gradient") and "fc1.weight" in name]
        assert experts
        assert all(tensor.abs().max() > 0 for tensor in experts)
