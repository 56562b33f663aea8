"""Contrasting all accumulated batches is one large batch: its loss and gradients, whatever is random."""

import pytest
import torch
from torch import nn

from vmoe.training import trainer
from vmoe.training.large_batch import LargeBatch
from vmoe.training.trainer import Trainer, train
from vmoe.utils.config import ConfigError

STEP = {"train.steps": 1, "train.clip_grad_norm": None, "optim.name": "sgd", "optim.schedule": "constant"}
ACCUMULATED = {"data.loader.batch_size": 2, "train.accumulate_steps": 4, "train.accumulate_features": True}
# A group is an image's 4 patches and its caption's 8 positions, so that routing does not depend on the batch.
LIMOE = {f"model.kwargs.{key}": value for key, value in (("group_size", 12), ("noise_std", 0.0))}
TOWER = {"depth": 2, "num_heads": 2, "num_experts": 4}
TOWERS = {
    "embed_dim": 16,
    "image": {**TOWER, "embed_dim": 32, "img_size": 16, "patch_size": 8, "group_size": 5, "noise_std": 0.0},
    "text": {**TOWER, "width": 32, "context_length": 8, "group_size": 8, "noise_std": 0.0},
}


@pytest.fixture
def steps_of(make_config, tmp_path, monkeypatch):
    """steps_of(name, settings, towers) -> [(metrics, {name: gradient}) of each step]."""

    def run(name, settings, towers=None):
        config = make_config("contrastive", output_dir=tmp_path / name, **{**STEP, **settings})
        if towers is not None:
            config.model.name, config.model.kwargs = "two_tower_tiny_patch8_48", towers
        found, gradients = [], {}
        update, step = Trainer._update_weights, Trainer.train_step

        def updating(self):
            gradients.update((n, p.grad.clone()) for n, p in self.model.named_parameters() if p.grad is not None)
            update(self)

        def stepping(self):
            metrics, record = step(self)
            found.append((metrics, dict(gradients)))
            return metrics, record

        with monkeypatch.context() as context:
            context.setattr(Trainer, "_update_weights", updating)
            context.setattr(Trainer, "train_step", stepping)
            train(config)
        return found

    return run


@pytest.mark.parametrize(
    ("settings", "towers"),
    [
        (LIMOE, None),
        ({**LIMOE, "train.loss": "sigmoid", "model.kwargs.init_logit_bias": -2.0}, None),
        ({"train.freeze": '["logit_scale", "visual.*"]'}, TOWERS),
    ],
    ids=["softmax", "sigmoid", "two towers, one locked"],
)
def test_accumulated_features_are_one_large_batch(steps_of, settings, towers):
    large = steps_of("large", {**settings, "data.loader.batch_size": 8}, towers)
    small = steps_of("small", {**settings, **ACCUMULATED}, towers)
    for (ours, our_gradients), (theirs, their_gradients) in zip(small, large, strict=True):
        assert theirs["loss"] != theirs["task_loss"]  # the routing has losses
        for key in ("loss", "task_loss", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5)
        assert our_gradients.keys() == their_gradients.keys()
        for name, gradient in their_gradients.items():
            limit = 1e-5 * gradient.abs().max().item()
            torch.testing.assert_close(our_gradients[name], gradient, rtol=1e-5, atol=limit, msg=name)
    assert len(large) == 1


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
def test_both_passes_draw_the_same_random_numbers_and_count_once(steps_of, monkeypatch, precision):
    class Watched(LargeBatch):
        def __init__(self, outputs, compare):
            super().__init__(outputs, compare)
            self.outputs = outputs

        def loss(self, part, outputs):
            assert outputs.keys() == self.outputs[part].keys()
            assert all(torch.equal(tensor, self.outputs[part][name]) for name, tensor in outputs.items())
            compared.append(part)
            return super().loss(part, outputs)

    compared, norms, finish = [], [], Trainer.finish

    def finishing(self):
        norms.extend(map(_moves, self.model.modules()))
        return finish(self)

    monkeypatch.setattr(trainer, "LargeBatch", Watched)
    monkeypatch.setattr(Trainer, "finish", finishing)
    text = {**TOWERS["text"], "noise_std": 1.0, "drop_path_rate": 0.5, "expert_drop": 0.2, "router_preset": "deepseek"}
    towers = {**TOWERS, "image": {"name": "test_efficientnet", "drop_path_rate": 0.5, "drop_rate": 0.1}, "text": text}
    settings = {**ACCUMULATED, "train.precision": precision}
    if precision != "float32":  # convolutions are slow in other types
        settings |= {f"model.kwargs.{key}": 0.5 for key in ("noise_std", "drop_path_rate", "expert_drop")}
        towers = None
    found = steps_of("run", settings, towers)
    assert compared == [0, 1, 2, 3]
    assert set(norms) == ({None} if towers is None else {None, 4})  # batch norms saw each batch once
    if precision != "fp16":  # whose scaler begins with a scale that is too large
        assert all(gradient.isfinite().all() for _, gradients in found for gradient in gradients.values())


def _moves(module):
    return int(module.num_batches_tracked) if isinstance(module, nn.modules.batchnorm._BatchNorm) else None


def test_features_are_accumulated_only_where_there_are_some(make_config):
    for overrides in ({"train.accumulate_steps": 2}, {"task": "contrastive"}):
        config = make_config(**{**overrides, "train.accumulate_features": True})
        with pytest.raises(ConfigError, match=r"accumulate_features needs task 'contrastive'.*set it to false"):
            train(config)
