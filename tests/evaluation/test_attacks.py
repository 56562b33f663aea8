"""Attacks on classifiers whose weakest images are known, and against torchattacks."""

from itertools import combinations

import pytest
import torch
from torch import nn

from vmoe.evaluation.adversarial import attacked_images, random_starts
from vmoe.evaluation.attacks import apgd, apgd_t, cross_entropy, hits, targeted_dlr
from vmoe.evaluation.config import AdversarialConfig

ATTACKS = ("pgd", "apgd_ce", "apgd_t")
EPSILON = 0.03


@pytest.fixture(scope="module")
def linear():
    """A linear classifier of 6 classes."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 6)).double()


@pytest.fixture(scope="module")
def network():
    """A small network of 6 classes, whose gradients change with the image."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, 2), nn.GELU(), nn.Conv2d(16, 16, 3), nn.GELU(), nn.Flatten(), nn.Linear(64, 6)]
    return nn.Sequential(*layers).double()


def images(model, size=4, number=40, low=0.0, high=1.0):
    """(images, the model's own classes)"""
    generator = torch.Generator().manual_seed(1)
    pixels = low + (high - low) * torch.rand(number, 3, size, size, generator=generator, dtype=torch.double)
    with torch.no_grad():
        return pixels, model(pixels).argmax(1)


def attacked(name, model, pixels, label, index=None, epsilon=EPSILON, **settings):
    noise = random_starts(pixels, torch.arange(len(pixels)) if index is None else index, 0)
    with torch.no_grad():
        return attacked_images(name, model, pixels, label, noise, epsilon, AdversarialConfig(**settings))


@pytest.mark.parametrize("name", ATTACKS)
def test_images_stay_within_epsilon_and_the_range_of_pixels(name, network):
    pixels, label = images(network, 9)
    pixels[:10], pixels[10:20] = pixels[:10].round(), pixels[10:20] * 0.01
    label = network(pixels).argmax(1)
    found = attacked(name, network, pixels, label)
    change = (found - pixels).abs().amax((1, 2, 3))
    assert change.max() <= EPSILON + 1e-12
    assert change.min() > EPSILON / 2
    assert 0 <= found.min() <= found.max() <= 1


@pytest.mark.parametrize("name", ATTACKS)
def test_a_linear_classifier_fails_exactly_where_it_must(name, linear):
    """An image withstands epsilon if its score leads that of each class by more than epsilon times the weights."""
    pixels, label = images(linear, number=200, low=0.2, high=0.8)
    weight, logits = linear[1].weight, linear(pixels)
    lead = logits.gather(1, label[:, None]) - logits - EPSILON * (weight[label][:, None] - weight).abs().sum(2)
    others = torch.ones_like(logits).scatter(1, label[:, None], 0).bool()
    robust = (lead.masked_fill(~others, torch.inf) > 0).all(1)
    with torch.no_grad():
        right = hits(linear(attacked(name, linear, pixels, label)), label)
    assert 0.1 < robust.double().mean() < 0.9
    # Cross-entropy also raises other classes than the nearest, and may miss it.
    assert (right & ~robust).double().mean() <= (0 if name == "apgd_t" else 0.05)
    assert not (robust & ~right).any()


@pytest.mark.parametrize("name", ATTACKS)
def test_an_image_does_not_depend_on_its_batch(name, network):
    pixels, label = images(network, 9, number=12)
    together = attacked(name, network, pixels, label, epsilon=0.1)
    alone = [attacked(name, network, pixels[[i]], label[[i]], torch.tensor([i]), epsilon=0.1) for i in range(12)]
    torch.testing.assert_close(torch.cat(alone), together, rtol=0, atol=1e-9)


def test_apgd_stops_at_the_first_mistake_or_keeps_the_highest_loss(network):
    pixels, label = images(network, 9)
    seen = []

    def score(x):
        seen.append(len(x))
        return network(x)

    noise = random_starts(pixels, torch.arange(len(pixels)), 0)[0]
    found, fooled = apgd(score, cross_entropy, pixels, label, label, noise, 0.02, 40)
    with torch.no_grad():
        assert (hits(network(found), label) == ~fooled).all()
        assert 0 < fooled.sum() < len(fooled)
        assert seen[0] == len(pixels)
        assert seen == sorted(seen, reverse=True)
        assert seen[-1] == (~fooled).sum()  # images with a mistake cost nothing more
        start = cross_entropy(network(pixels), label, label)
        assert (cross_entropy(network(found), label, label) > start).all()


def test_each_seed_and_image_has_its_own_start():
    pixels = torch.zeros(3, 3, 5, 5)
    one = random_starts(pixels, torch.tensor([4, 5, 6]), 0)
    assert torch.equal(random_starts(pixels[:2], torch.tensor([6, 4]), 0), one[:, [2, 0]])
    assert not torch.equal(random_starts(pixels, torch.tensor([4, 5, 6]), 1), one)
    assert not torch.equal(one[0], one[1])  # apgd_t has one for each target
    assert -1 <= one.min() < -0.8 < 0.8 < one.max() <= 1


@pytest.mark.parametrize("name", ATTACKS)
def test_it_is_what_torchattacks_does(name, network):
    torchattacks = pytest.importorskip("torchattacks", reason="needs torchattacks (pip install --no-deps torchattacks)")
    pixels, label = images(network, 9)
    common = {"eps": 0.02, "steps": 40}

    def start(of):  # as APGD draws it
        torch.manual_seed(0)
        return 2 * torch.rand(of.shape).double() - 1

    with torch.no_grad():
        if name == "pgd":
            torch.manual_seed(0)
            noise = torch.empty_like(pixels).uniform_(-0.02, 0.02) / 0.02
            torch.manual_seed(0)
            with torch.enable_grad():
                expected = torchattacks.PGD(network, alpha=0.002, **common)(pixels, label)
            config = AdversarialConfig(steps=40, step_size=0.1)
            found = attacked_images("pgd", network, pixels, label, noise[None], 0.02, config)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
            return
        loss, target, theirs = cross_entropy, label, torchattacks.APGD(network, **common)
        if name == "apgd_t":
            loss, target = targeted_dlr, network(pixels).argsort(dim=1)[:, -2]
            theirs = torchattacks.APGDT(network, n_classes=2, **common)  # one target
            theirs.target_class = 2
        _, fooled = apgd(network, loss, pixels, label, target, start(pixels), 0.02, 40)
        assert 0 < fooled.sum() < len(fooled)
        assert torch.equal(~hits(network(theirs(pixels, label)), label), fooled)
        left = (pixels[~fooled], label[~fooled], target[~fooled], start(pixels[~fooled]))
        found, _ = apgd(network, loss, *left, 0.02, 40)
        torch.manual_seed(0)
        expected, *_ = theirs.attack_single_run(*left[:2])
        different = (found - expected).abs() > 1e-6  # a few, since their steps are float32
        assert different.double().mean() < 0.01


def test_apgd_t_tries_the_nine_best_targets(linear):
    pixels, label = images(linear)
    asked, seen = [], []

    def score(x):
        asked.append(len(x)), seen.append(x)
        return linear(x)

    with torch.no_grad():
        noise = random_starts(pixels, torch.arange(len(pixels)), 0)
        found = apgd_t(score, pixels, label, noise, 1e-6, 3)  # too small for a mistake
    assert hits(linear(found), label).all()
    assert asked == [40] * (1 + 5 * 4)  # the order of the classes, then each other class with its start and steps
    starts = [(each - pixels).flatten() for each in seen[1::4]]
    assert not any(torch.equal(one, other) for one, other in combinations(starts, 2))
