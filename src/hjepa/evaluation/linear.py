"""Linear probe: multinomial logistic regression on frozen, standardised features.

The objective is convex and is minimised over the full training set, so there is no learning rate, no batch order and
no seed to choose, and two encoders differ only by their features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hjepa.config import EvaluationConfig


@dataclass(frozen=True)
class LinearProbe:
    mean: Tensor  # [D]
    inverse_std: Tensor  # [D], 0 for features that are constant in training
    weight: Tensor  # [C, D], on standardised features
    bias: Tensor  # [C]

    def logits(self, x: Tensor) -> Tensor:
        """float [M, D] -> [M, C]."""
        return torch.addmm(self.bias, (x - self.mean) * self.inverse_std, self.weight.T)


def evaluate(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, config: EvaluationConfig, num_classes: int
) -> dict[str, float]:
    """``linear_top1``: the share of test images whose class is predicted, from 0 to 1."""
    probe = fit(train_x, train_y, num_classes=num_classes, l2=config.linear_l2, iterations=config.linear_iterations)
    predicted = torch.cat([probe.logits(chunk).argmax(dim=1) for chunk in torch.split(test_x, 16384)])
    return {"linear_top1": (predicted == test_y).double().mean().item()}


@torch.inference_mode()
def fit(x: Tensor, y: Tensor, *, num_classes: int, l2: float, iterations: int, chunk_rows: int = 16384) -> LinearProbe:
    """Minimise ``mean cross-entropy + l2 * sum(weight^2)`` from zero with L-BFGS; the bias is not penalised.

    Works where the features are; needs a standardised copy of ``x`` and ``chunk_rows x C`` logits. The parameters and
    all sums over chunks are in double precision, so that the chunk size does not steer the line search.

    Args:
        x: float [N, D].
        y: int64 [N], in [0, num_classes).
        iterations: At most so many L-BFGS steps; fewer when the gradient vanishes.
    """
    mean = x.mean(dim=0)
    std = x.std(dim=0, correction=0)
    # Rounding leaves a little spread in a constant column; dividing by it would turn the noise into a feature.
    inverse_std = torch.where(std > 1e-6 * mean.abs(), 1 / std, 0)
    inputs = (x - mean) * inverse_std  # [N, D]
    weight = torch.zeros(num_classes, x.shape[1], dtype=torch.float64, device=x.device)
    bias = torch.zeros(num_classes, dtype=torch.float64, device=x.device)
    weight.grad, bias.grad = torch.zeros_like(weight), torch.zeros_like(bias)

    def objective() -> float:
        """The loss at the current parameters; leaves its gradient, which is simple in closed form, in ``.grad``."""
        weight_gradient, bias_gradient = 2 * l2 * weight, torch.zeros_like(bias)
        loss = l2 * weight.square().sum()
        weight_now, bias_now = weight.to(inputs.dtype), bias.to(inputs.dtype)
        for rows, classes in zip(torch.split(inputs, chunk_rows), torch.split(y, chunk_rows), strict=True):
            log_probability = torch.addmm(bias_now, rows, weight_now.T).log_softmax(dim=1)  # [n, C]
            loss -= log_probability.gather(1, classes[:, None]).sum(dtype=torch.float64) / len(inputs)
            error = log_probability.exp_()
            error.scatter_add_(1, classes[:, None], error.new_full((len(rows), 1), -1.0))
            weight_gradient += (error.T @ rows).double() / len(inputs)
            bias_gradient += error.sum(dim=0, dtype=torch.float64) / len(inputs)
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
