"""White-box attacks that change each value of an image by at most epsilon (L-infinity), with pixels in 0..1.

PGD is projected gradient descent (Madry et al., arXiv 1706.06083), its last step. APGD is AutoAttack's (Croce and Hein,
arXiv 2003.01690, algorithm 1), on cross-entropy and on the targeted DLR loss. An image's result does not depend on its
batch: torchattacks, which the tests compare with, draws the starts by batch and cannot be installed beside `datasets`.

Shapes, by suffix: B images, C classes. Images (B, 3, H, W) have no suffix.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from vmoe.evaluation.metrics import ranks

Logits = Callable[[Tensor], Tensor]  # pixels -> logits (B, C)
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # logits (B, C), labels (B,), targets (B,) -> (B,), to be raised

MOST_TARGETS = 9  # of "apgd_t", as in AutoAttack: the best wrong classes


def cross_entropy(logits_BC: Tensor, label_B: Tensor, _target_B: Tensor) -> Tensor:
    return F.cross_entropy(logits_BC, label_B, reduction="none")


def targeted_dlr(logits_BC: Tensor, label_B: Tensor, target_B: Tensor) -> Tensor:
    """The targeted difference of logits ratio (equation 7); there are at least four classes."""
    gap_B = (logits_BC.gather(1, target_B[:, None]) - logits_BC.gather(1, label_B[:, None]))[:, 0]
    top_B4 = logits_BC.topk(4, dim=1).values
    return gap_B / (top_B4[:, 0] - (top_B4[:, 2] + top_B4[:, 3]) / 2 + 1e-12)


def hits(logits_BC: Tensor, label_B: Tensor) -> Tensor:
    """(B,) bool: the label has the highest score; ties are misses."""
    return ranks(logits_BC, F.one_hot(label_B, logits_BC.shape[1]).bool()) == 0


def _gradient(score: Logits, loss: Loss, x: Tensor, label_B: Tensor, target_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (B, C), losses (B,), and the gradient of each image's loss."""
    with torch.enable_grad():
        logits_BC = score(x := x.detach().requires_grad_())
        loss_B = loss(logits_BC, label_B, target_B)
        (gradient,) = torch.autograd.grad(loss_B.sum(), x)
    return logits_BC.detach(), loss_B.detach(), gradient


def _within(x: Tensor, pixels: Tensor, epsilon: float) -> Tensor:
    """The nearest images within epsilon of `pixels` and in 0..1."""
    return x.clamp(pixels - epsilon, pixels + epsilon).clamp(0, 1)


def pgd(
    score: Logits, pixels: Tensor, label_B: Tensor, noise: Tensor, epsilon: float, steps: int, step: float
) -> Tensor:
    """Images after `steps` steps of the gradient's sign on cross-entropy, each of size `step`.

    `noise`, uniform in -1..1, times epsilon is the start.
    """
    x = _within(pixels + epsilon * noise, pixels, epsilon)
    for _ in range(steps):
        gradient = _gradient(score, cross_entropy, x, label_B, label_B)[2]
        x = _within(x + step * gradient.sign(), pixels, epsilon)
    return x


def apgd_t(score: Logits, pixels: Tensor, label_B: Tensor, noise: Tensor, epsilon: float, steps: int) -> Tensor:
    """:func:`apgd` with each of the best wrong classes as target, while an image is classified rightly.

    `noise` has a start for each target in its first dimension.
    """
    attacked, order_BC = pixels.clone(), score(pixels).argsort(dim=1, descending=True)
    row = torch.arange(len(pixels), device=pixels.device)  # images without a mistake so far
    for target_B, start in zip(order_BC.T[1 : MOST_TARGETS + 1], noise):
        where = (pixels[row], label_B[row], target_B[row], start[row])
        attacked[row], fooled_B = apgd(score, targeted_dlr, *where, epsilon, steps)
        row = row[~fooled_B]
    return attacked


# The images that are still classified rightly, with their row in the batch. The best are those of the highest loss,
# `rises` counts the steps that raised the loss since the last check, and `halved` says whether that one halved `step`.
_IMAGES = "row pixels label target x previous gradient loss best_x best_gradient best_loss"
_State = namedtuple("_State", f"{_IMAGES} checked_loss step rises halved")


def apgd(
    score: Logits,
    loss: Loss,
    pixels: Tensor,
    label_B: Tensor,
    target_B: Tensor,
    noise: Tensor,
    epsilon: float,
    steps: int,
) -> tuple[Tensor, Tensor]:
    """(images, (B,) bool whether they fool the classifier): at the first mistake, else where the loss was highest.

    The start is that of :func:`pgd`, scaled up to epsilon; the sizes of the steps are those of AutoAttack's code.
    """
    x = _within(pixels + epsilon * noise / noise.abs().amax(dim=(1, 2, 3), keepdim=True), pixels, epsilon)
    logits_BC, loss_B, gradient = _gradient(score, loss, x, label_B, target_B)
    row, zero_B = torch.arange(len(x), device=x.device), torch.zeros_like(loss_B)  # its first rise is one above zero
    best = (x, gradient, loss_B, loss_B)
    step = torch.full_like(x[:, :1, :1, :1], 2 * epsilon)
    state = _State(row, pixels, label_B, target_B, x, x, gradient, zero_B, *best, step, zero_B, zero_B == 0)
    attacked, fooled_B = x.clone(), ~hits(logits_BC, label_B)
    state = _State(*(tensor[~fooled_B] for tensor in state))
    period, count = max(int(0.22 * steps), 1), 0
    for number in range(steps):
        if not len(state.row):
            break
        state, logits_BC = _step(score, loss, state, epsilon, momentum=0.25 if number else 0.0)
        wrong_B = ~hits(logits_BC, state.label)
        attacked[state.row[wrong_B]], fooled_B[state.row[wrong_B]] = state.x[wrong_B], True
        state, count = _State(*(tensor[~wrong_B] for tensor in state)), count + 1
        if count == period:
            state, count = _checked(state, period), 0
            period = max(period - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
    attacked[state.row] = state.best_x
    return attacked, fooled_B


def _step(score: Logits, loss: Loss, s: _State, epsilon: float, momentum: float) -> tuple[_State, Tensor]:
    """The state after a step, and its logits."""
    z = _within(s.x + s.step * s.gradient.sign(), s.pixels, epsilon)
    x = _within(s.x + (1 - momentum) * (z - s.x) + momentum * (s.x - s.previous), s.pixels, epsilon)
    logits_BC, loss_B, gradient = _gradient(score, loss, x, s.label, s.target)
    better = (loss_B > s.best_loss)[:, None, None, None]
    best_x, best_gradient = torch.where(better, x, s.best_x), torch.where(better, gradient, s.best_gradient)
    s = s._replace(previous=s.x, rises=s.rises + (loss_B > s.loss), best_loss=torch.maximum(loss_B, s.best_loss))
    return s._replace(x=x, gradient=gradient, loss=loss_B, best_x=best_x, best_gradient=best_gradient), logits_BC


def _checked(s: _State, period: int) -> _State:
    """Sends images back to their best with half the step, if their loss rose too seldom or their best is the old."""
    halved_B = (s.rises <= 0.75 * period) | (~s.halved & (s.checked_loss >= s.best_loss))
    halved = halved_B[:, None, None, None]
    x, gradient = torch.where(halved, s.best_x, s.x), torch.where(halved, s.best_gradient, s.gradient)
    step, rises = torch.where(halved, s.step / 2, s.step), torch.zeros_like(s.rises)
    return s._replace(x=x, gradient=gradient, step=step, rises=rises, checked_loss=s.best_loss, halved=halved_B)
