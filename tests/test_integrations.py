"""The recipes of docs/integrations.md, in other people's training loops: the sparse layers' losses count in each.

Each takes one step of plain SGD, also over several accumulated batches, and must end where a loop with
`vmoe.record_routing` ends.
"""

import copy
import os
import runpy
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

import vmoe
import vmoe.run

LR = 0.1
SETTINGS = {"depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 3, "num_experts": 4, "img_size": 16}
SETTINGS |= {"importance_loss": 0.5, "load_loss": 0.0, "noise_std": 0.0}


def make(**settings):
    torch.manual_seed(0)
    model = timm.create_model("vmoe_tiny_patch8_48", **{**SETTINGS, **settings})
    nn.init.normal_(model.head.weight)
    return model


class Images(Dataset):
    """Eight noise images and their labels."""

    def __init__(self, as_dict=False):
        generator = torch.Generator().manual_seed(0)
        self.images, self.labels = torch.randn(8, 3, 16, 16, generator=generator), torch.arange(8) % 3
        self.as_dict = as_dict

    def __len__(self):
        return 8

    def __getitem__(self, index):
        image, label = self.images[index], self.labels[index]
        return {"pixel_values": image, "labels": label} if self.as_dict else (image, label)


def stepped(model, batches, weight=1.0, dtype=None, loss_of=cross_entropy):
    """A copy of the model after the step of a loop with `record_routing` over accumulated batches."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for images, labels in batches:
        with torch.autocast("cpu", dtype, enabled=dtype is not None), vmoe.record_routing(model) as record:
            loss = loss_of(model(images), labels) + weight * record.auxiliary_loss()
        (loss / len(batches)).backward()
    optimizer.step()
    return model


def assert_losses_count(trained, start, batches, **kwargs):
    """`trained` equals the recorded loop's model, and its gates are not those of a loop without auxiliary losses."""
    recorded, without = stepped(start, batches, **kwargs), stepped(start, batches, weight=0.0, **kwargs)
    for (name, ours), theirs in zip(trained.named_parameters(), recorded.parameters()):
        torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}")
    ours, theirs = trained.blocks[1].mlp.router.weight, without.blocks[1].mlp.router.weight
    assert (ours - theirs).abs().max() > 1e-4


def batches_of(size):
    data = Images()
    return list(zip(data.images.split(size), data.labels.split(size)))


# --- loops of one's own ---


@pytest.mark.parametrize("accumulation", [1, 2])
def test_attached_losses_with_a_gradient_scaler(accumulation):
    start, batches = make(), batches_of(8 // accumulation)
    model, scaler = make(auxiliary_loss="attach"), torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    try:
        for images, labels in batches:
            vmoe.set_auxiliary_loss_scale(scaler.get_scale() / accumulation)
            scaler.scale(cross_entropy(model(images), labels) / accumulation).backward()
        scaler.step(optimizer)
    finally:
        vmoe.set_auxiliary_loss_scale(1.0)
    assert_losses_count(model, start, batches)


@pytest.mark.parametrize(("accumulation", "precision"), [(1, "no"), (2, "bf16")])
def test_accelerate(accumulation, precision):
    accelerate = pytest.importorskip("accelerate", reason="needs Accelerate (pip install -e '.[test]')")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulation, mixed_precision=precision)
    try:
        model = make()
        start, loader = copy.deepcopy(model), DataLoader(Images(), batch_size=8 // accumulation)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        for images, labels in loader:
            with accelerator.accumulate(model):
                with vmoe.record_routing(model) as record, accelerator.autocast():
                    loss = cross_entropy(model(images), labels) + record.auxiliary_loss()
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        dtype = torch.bfloat16 if precision == "bf16" else None
        assert_losses_count(accelerator.unwrap_model(model), start, batches_of(8 // accumulation), dtype=dtype)
    finally:
        accelerate.state.AcceleratorState._reset_state(True)


# --- Lightning ---


@pytest.mark.parametrize(("accumulation", "precision"), [(1, "32-true"), (2, "bf16-mixed")])
def test_lightning(tmp_path, accumulation, precision):
    lightning = pytest.importorskip("lightning", reason="needs Lightning (pip install -e '.[test]')")

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = make()

        def training_step(self, batch, _index):
            images, labels = batch
            with vmoe.record_routing(self.model) as record:
                return cross_entropy(self.model(images), labels) + record.auxiliary_loss()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=LR)

    task = Classifier()
    start = copy.deepcopy(task.model)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=1, accumulate_grad_batches=accumulation, precision=precision,
        default_root_dir=tmp_path, enable_model_summary=False, **quiet,
    )  # fmt: skip
    trainer.fit(task, DataLoader(Images(), batch_size=8 // accumulation))
    dtype = None if precision == "32-true" else torch.bfloat16
    assert_losses_count(task.model, start, batches_of(8 // accumulation), dtype=dtype)


# --- Hugging Face's Trainer ---


class Classifier(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values, labels=None):
        with vmoe.record_routing(self.model) as record:
            logits = self.model(pixel_values)
        if labels is None:
            return {"logits": logits}
        loss = cross_entropy(logits, labels)
        return {"loss": loss + record.auxiliary_loss() if self.training else loss, "logits": logits}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_trainer_of_hugging_face(tmp_path, accumulation):
    pytest.importorskip("accelerate", reason="needs Accelerate (pip install -e '.[test]')")
    transformers = pytest.importorskip("transformers", reason="needs Transformers (pip install -e '.[benchmark]')")
    model = make()
    start = copy.deepcopy(model)
    arguments = transformers.TrainingArguments(
        tmp_path, use_cpu=True, max_steps=1, learning_rate=LR, lr_scheduler_type="constant", optim="sgd",
        max_grad_norm=0.0, weight_decay=0.0, per_device_train_batch_size=8 // accumulation, report_to=[],
        gradient_accumulation_steps=accumulation, save_strategy="no", disable_tqdm=True,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = transformers.Trainer(Classifier(model), arguments, train_dataset=Images(as_dict=True))
    trainer.train()
    assert_losses_count(model, start, batches_of(8 // accumulation))
    assert trainer.evaluate(Images(as_dict=True))["eval_loss"] > 0


# --- open_clip's trainer ---


@pytest.mark.parametrize("accumulation", [1, 2])
def test_trainer_of_open_clip(tmp_path, monkeypatch, accumulation):
    reason = "needs open_clip's trainer (pip install 'open_clip_torch[training]')"
    pytest.importorskip("open_clip_train", reason=reason)
    pytest.importorskip("vmoe.open_clip", reason="needs vmoe.open_clip").register()
    from open_clip import ClipLoss
    from open_clip_train.main import main

    seen, calls = {}, []

    def before(module, inputs):
        if type(module).__name__ == "LIMoE":
            for layer in sparse_layers(module):
                layer.router.noise_std = 0.0  # open_clip's accumulation is exact without noise only
            if torch.is_grad_enabled():
                seen.setdefault("start", copy.deepcopy(module))
                seen["model"] = module
                calls.append([each.clone() for each in inputs])

    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: None)  # the gradients stay as they are
    vmoe.set_auxiliary_loss_scale(1 / accumulation)
    try:
        with nn.modules.module.register_module_forward_pre_hook(before):
            main([
                "--model", "limoe_tiny_patch12_48", "--dataset-type", "synthetic", "--train-num-samples", "4",
                "--batch-size", str(4 // accumulation), "--accum-freq", str(accumulation), "--epochs", "1",
                "--workers", "0", "--device", "cpu", "--precision", "fp32", "--logs", str(tmp_path),
            ])  # fmt: skip
    finally:
        vmoe.set_auxiliary_loss_scale(1.0)
    assert len(calls) == accumulation
    trained, recorded = gate_gradients(seen["model"]), {}
    for weight in (1.0, 0.0):
        model = seen["start"]
        model.zero_grad()
        for layer in sparse_layers(model):
            layer.auxiliary_loss = "record"
        with vmoe.record_routing(model) as record:
            outputs = [model(images, texts) for images, texts in calls]
        image_BC, text_BC = (torch.cat([each[key] for each in outputs]) for key in ("image_features", "text_features"))
        loss = ClipLoss()(image_BC, text_BC, outputs[0]["logit_scale"])
        (loss + weight * record.auxiliary_loss() / accumulation).backward()
        recorded[weight] = gate_gradients(model)
    for name, gradient in trained.items():
        torch.testing.assert_close(gradient, recorded[1.0][name], rtol=1e-4, atol=1e-7)
        assert not gradient.allclose(recorded[0.0][name], rtol=1e-2)


def sparse_layers(model):
    return [layer for layer in model.modules() if isinstance(layer, vmoe.SparseMoE)]


def gate_gradients(model):
    return {name: each.grad.clone() for name, each in model.named_parameters() if name.endswith("router.weight")}


# --- timm's scripts ---


@pytest.fixture
def scripts():
    folder = os.environ.get("TIMM_SCRIPTS")
    if folder is None:
        pytest.skip("needs TIMM_SCRIPTS, the folder of timm's train.py, validate.py and inference.py (its repository)")
    return Path(folder)


@pytest.fixture
def image_folder(tmp_path):
    data = Images()
    for split in ("train", "val"):
        for index, (image, label) in enumerate(zip(data.images, data.labels.tolist())):
            folder = tmp_path / split / f"class{label}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = ((image.permute(1, 2, 0) * 40 + 128).clamp(0, 255)).byte().numpy()
            Image.fromarray(pixels).save(folder / f"{index}.png")
    return tmp_path


def run(monkeypatch, *argv):
    """`python -m vmoe.run ARGV` in this process."""
    monkeypatch.setattr(sys, "argv", [*sys.argv])
    monkeypatch.setattr(sys, "path", [*sys.path])
    vmoe.run.main([str(each) for each in argv])


MODEL = ["--model", "vmoe_tiny_patch8_48", "--num-classes", "3", "--device", "cpu", "--workers", "0"]
KWARGS = ["--model-kwargs", "img_size=16", "depth=2", "embed_dim=32", "num_heads=2", "num_experts=4"]
KWARGS += ["load_loss=0.0", "noise_std=0.0"]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_scripts_of_timm(scripts, image_folder, monkeypatch, accumulation):
    seen = {"batches": []}

    def before(module, inputs):
        if isinstance(module, vmoe.models.vision.VisionMoE) and module.training:
            seen.setdefault("start", copy.deepcopy(module))
            seen["model"], seen["images"] = module, inputs[0].clone()
        if isinstance(module, timm.loss.LabelSmoothingCrossEntropy):
            seen["loss_of"] = module
            seen["batches"].append((seen["images"], inputs[1].clone()))

    handle = nn.modules.module.register_module_forward_pre_hook(before)
    output = image_folder / "output"
    with handle:
        monkeypatch.setattr(sys, "argv", [
            "train.py", str(image_folder), "--device-modules", "vmoe", *MODEL, *KWARGS, "auxiliary_loss=attach",
            f"importance_loss={0.5 / accumulation}", "--batch-size", str(8 // accumulation), "--epochs", "1",
            "--grad-accum-steps", str(accumulation), "--opt", "momentum", "--momentum", "0", "--weight-decay", "0",
            "--lr", str(LR), "--sched", "step", "--warmup-epochs", "0", "--output", str(output), "--experiment", "run",
            "--img-size", "16",
        ])  # fmt: skip
        runpy.run_path(str(scripts / "train.py"), run_name="__main__")
    start = seen["start"]
    for layer in sparse_layers(start):
        layer.auxiliary_loss, layer.losses = "record", make().blocks[1].mlp.losses
    assert len(seen["batches"]) == accumulation
    assert_losses_count(seen["model"], start, seen["batches"], loss_of=seen["loss_of"])

    checkpoint = ["--checkpoint", output / "run" / "last.pth.tar", "--img-size", "16"]
    run(monkeypatch, scripts / "validate.py", image_folder, "--split", "val", *MODEL, *KWARGS, *checkpoint,
        "--results-file", image_folder / "validate.csv")  # fmt: skip
    assert "vmoe_tiny_patch8_48" in (image_folder / "validate.csv").read_text()
    run(monkeypatch, scripts / "inference.py", image_folder / "val", *MODEL, *KWARGS, *checkpoint,
        "--results-dir", image_folder, "--results-file", "inference", "--topk", "1", "--include-index")  # fmt: skip
    assert len((image_folder / "inference.csv").read_text().splitlines()) == 9
