"""Low-shot: the linear probe on 1 % and 10 % of the labelled images, as Assran et al. (2023, section 5.1) use 1 %."""

from __future__ import annotations

from torch import Tensor

from hjepa.config import EvaluationConfig
from hjepa.evaluation import linear
from hjepa.evaluation.outcome import Outcome, accuracy_over_seeds, stratified

SHARES = {"low_shot_1pct_top1": 0.01, "low_shot_10pct_top1": 0.1}  # of each class, but one image at least


def judge(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, config: EvaluationConfig, num_classes: int
) -> dict[str, Outcome]:
    """Accuracy on all test images; mean and spread over one subset of the training images per seed.

    A subset is too small to choose a penalty on, so it is the strongest of ``evaluation.linear_l2``.
    """
    found = {}
    for name, share in SHARES.items():
        answers = []
        for seed in config.seeds:
            subset = stratified(train_y, share, seed=seed, at_least=1)
            probe = linear.fit(
                train_x[subset],
                train_y[subset],
                num_classes=num_classes,
                l2=max(config.linear_l2),
                iterations=config.linear_iterations,
            )
            answers.append(probe.predict(test_x))
        found[name] = accuracy_over_seeds(answers, test_y)
    return found
