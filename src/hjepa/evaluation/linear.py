"""Linear probe: multinomial logistic regression on frozen, standardised features.

The objective is convex and is minimised over the full training set, so there is no learning rate, no batch order and
no seed to choose, and two encoders differ only by their features. A grid of learning rates would only be a grid of
distances to this minimum. What remains to choose, the penalty, is chosen on a held-out part of the training images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hjepa.config import EvaluationConfig
from hjepa.evaluation.outcome import Outcome, accuracy, stratified

HELD_OUT = 0.1  # of each class of the training images


@dataclass(frozen=True)
class LinearProbe:
    mean: Tensor  # [D]
    inverse_std: Tensor  # [D], 0 for features that are constant in training
    weight: Tensor  # [C, D], on standardised features
    bias: Tensor  # [C]

    def logits(self, x: Tensor) -> Tensor:
        """float [M, D] -> [M, C]."""
        return torch.addmm(self.bias, (x - self.mean) * self.inverse_std, self.weight.T)

    def predict(self, x: Tensor) -> Tensor:
        """float [M, D] -> int64 [M]."""
        return torch.cat([self.logits(chunk).argmax(dim=1) for chunk in torch.split(x, 16384)])


def judge(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, config: EvaluationConfig, num_classes: int
) -> dict[str, Outcome]:
    """``linear_top1``: the penalty is chosen without the test images, and the probe refit on all training images."""
    l2, start = choose_l2(
        train_x,
        train_y,
        num_classes=num_classes,
        grid=config.linear_l2,
        iterations=config.linear_iterations,
        seed=config.seeds[0],
    )
    probe = fit(train_x, train_y, num_classes=num_classes, l2=l2, iterations=config.linear_iterations, start=start)
    return {"linear_top1": accuracy(probe.predict(test_x), test_y)}


def choose_l2(
    x: Tensor, y: Tensor, *, num_classes: int, grid: Sequence[float], iterations: int, seed: int
) -> tuple[float, LinearProbe | None]:
    """The penalty of ``grid`` with the best accuracy on held-out images of ``x``, and the probe that it gave.

    From the strongest to the weakest, each fit starting where the last one ended, with half of the iterations, which
    that start makes up for; of equals the strongest is taken.
    Where no class has enough images to hold one out, it is the middle of the grid.
    """
    penalties = sorted(grid, reverse=True)
    held_out = stratified(y, HELD_OUT, seed=seed)
    if len(penalties) == 1 or not held_out.any():
        return penalties[len(penalties) // 2], None
    kept_x, kept_y = x[~held_out], y[~held_out]
    probe: LinearProbe | None = None
    best: tuple[float, LinearProbe | None] = penalties[0], None
    best_score = -1.0
    for l2 in penalties:
        probe = fit(kept_x, kept_y, num_classes=num_classes, l2=l2, iterations=-(-iterations // 2), start=probe)
        score = accuracy(probe.predict(x[held_out]), y[held_out]).value
        if score > best_score:
            best, best_score = (l2, probe), score
    return best


@torch.inference_mode()
def fit(
    x: Tensor,
    y: Tensor,
    *,
    num_classes: int,
    l2: float,
    iterations: int,
    start: LinearProbe | None = None,
    chunk_rows: int = 16384,
) -> LinearProbe:
    """Minimise ``mean cross-entropy + l2 * sum(weight^2)`` with L-BFGS; the bias is not penalised.

    Works where the features are; needs a standardised copy of ``x`` and ``chunk_rows x C`` logits. The parameters and
    all sums over chunks are in double precision, so that the chunk size does not steer the line search.

    Args:
        x: float [N, D].
        y: int64 [N], in [0, num_classes).
        iterations: At most so many L-BFGS steps; fewer when the gradient vanishes.
        start: Begins with the weights of this probe, on features as the two standardise them; None: with zeros.
    """
    mean = x.mean(dim=0)
    std = x.std(dim=0, correction=0)
    # Rounding leaves a little spread in a constant column; dividing by it would turn the noise into a feature.
    inverse_std = torch.where(std > 1e-6 * mean.abs(), 1 / std, 0)
    inputs = (x - mean) * inverse_std  # [N, D]
    weight = torch.zeros(num_classes, x.shape[1], dtype=torch.float64, device=x.device)
    bias = torch.zeros(num_classes, dtype=torch.float64, device=x.device)
    if start is not None:
        weight += start.weight
        bias += start.bias
    weight.grad, bias.grad = torch.zeros_like(weight), torch.zeros_like(bias)

    def objective() -> float:
        """The loss at the current parameters; leaves its gradient, which is simple in closed form, in ``.grad``."""
        weight_gradient, bias_gradient = 2 * l2 * weight, torch.zeros_like(bias)
        loss = l2 * weight.square().sum()
        weight_now, bias_now = weight.to(inputs.dtype), bias.to(inputs.dtype)
        for rows, classes in zip(torch.split(inputs, chunk_rows), torch.split(y, chunk_rows), strict=True):
            # Images run along the last dimension: a softmax over few classes is many times faster like this.
            log_probability = torch.addmm(bias_now[:, None], weight_now, rows.T).log_softmax(dim=0)  # [C, n]
            loss -= log_probability.gather(0, classes[None]).sum(dtype=torch.float64) / len(inputs)
            error = log_probability.exp_()
            error.scatter_add_(0, classes[None], error.new_full((1, len(rows)), -1.0))
            weight_gradient += (error @ rows).double() / len(inputs)
            bias_gradient += error.sum(dim=1, dtype=torch.float64) / len(inputs)
        weight.grad, bias.grad = weight_gradient, bias_gradient
        return loss.item()

    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=iterations,
        max_eval=4 * iterations,
        tolerance_grad=1e-7,
        tolerance_change=1e-12,
        history_size=20,
        line_search_fn="strong_wolfe",
    )
    optimizer.step(objective)  # type: ignore[no-untyped-call]
    return LinearProbe(mean, inverse_std, weight.to(x.dtype), bias.to(x.dtype))
