import pytest
import torch

import vmoe
from vmoe.training.checkpoint import (
    CheckpointError,
    list_checkpoints,
    load_checkpoint,
    remove_unfinished,
    save_checkpoint,
    step_of,
)

from .conftest import TINY_VIT


def build(**kwargs):
    return vmoe.create_model("vmoe_tiny_patch8_48", num_classes=3, **{**TINY_VIT, **kwargs})


def save(run, step, model, keep_last=2, ema=None, **trainer):
    return save_checkpoint(
        run, step, model, ema, {"step": step, **trainer}, {"class_names": ["a", "b", "c"]}, keep_last
    )


def test_what_is_saved_is_loaded(tmp_path):
    model, ema = build(), build()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    optimizer.step()
    folder = save(tmp_path, 12, model, ema=ema, optimizer=optimizer.state_dict())
    assert sorted(file.name for file in folder.iterdir()) == ["ema.safetensors", "model.safetensors", "trainer.pt"]
    loaded, loaded_ema = build(), build()
    state = load_checkpoint(folder, loaded, loaded_ema)
    for source, target in ((model, loaded), (ema, loaded_ema)):
        for name, tensor in source.state_dict().items():
            assert torch.equal(tensor, target.state_dict()[name]), name
    again = torch.optim.AdamW(loaded.parameters())
    again.load_state_dict(state["optimizer"])
    for ours, theirs in zip(optimizer.state.values(), again.state.values()):
        assert torch.equal(ours["exp_avg"], theirs["exp_avg"])


def test_only_the_last_are_kept_and_steps_sort_as_numbers(tmp_path):
    model = build()
    for step in (5, 999_999, 1_000_000, 1_000_001):
        save(tmp_path, step, model, keep_last=2)
    assert [step_of(folder) for folder in list_checkpoints(tmp_path)] == [1_000_000, 1_000_001]


def test_a_process_that_dies_while_saving_leaves_no_checkpoint(tmp_path, monkeypatch):
    model = build()
    save(tmp_path, 1, model)
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save(tmp_path, 2, model)
    monkeypatch.undo()
    assert [step_of(folder) for folder in list_checkpoints(tmp_path)] == [1]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
    remove_unfinished(tmp_path)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1
    save(tmp_path, 2, model)
    assert [step_of(folder) for folder in list_checkpoints(tmp_path)] == [1, 2]


def test_a_checkpoint_of_another_model_names_tensors_and_shapes(tmp_path):
    folder = save(tmp_path, 1, build())
    wider = build(embed_dim=64)
    with pytest.raises(ValueError) as error:
        load_checkpoint(folder, wider, None)
    assert "patch_embed.proj.weight" in str(error.value)
    assert "(32, 3, 8, 8)" in str(error.value)
    assert "(64, 3, 8, 8)" in str(error.value)


def test_a_damaged_trainer_state_says_what_to_do(tmp_path):
    folder = save(tmp_path, 1, build())
    (folder / "trainer.pt").write_bytes(b"not a file of torch")
    with pytest.raises(CheckpointError, match=r"trainer\.pt cannot be read.*remove"):
        load_checkpoint(folder, build(), None)


def test_code_hidden_in_a_trainer_state_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("run",))

    folder = save(tmp_path, 1, build(), evil=Evil())
    with pytest.raises(CheckpointError):
        load_checkpoint(folder, build(), None)
