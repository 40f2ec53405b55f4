"""The hierarchical prediction loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hjepa.config import Config


class HierarchicalLoss(nn.Module):
    """sum_l w_l L_l / sum_l w_l, L_l the smooth L1 distance averaged over the cells of level l.

    All images of a step have the same number of cells, so the mean over a rank's cells, averaged over ranks and
    accumulation steps of equal size, is the mean over the global batch. One level is I-JEPA's loss (Assran et al.
    2023, in the published code's smooth-L1 form).
    """

    weights: Tensor

    def __init__(self, config: Config):
        super().__init__()
        weights = config.loss.level_weights or (1.0,) * config.model.num_levels
        normalised = torch.tensor(weights, dtype=torch.float32) / sum(weights)
        self.register_buffer("weights", normalised, persistent=False)
        self.beta = config.loss.smooth_l1_beta

    def forward(self, predictions: Sequence[Tensor], targets: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Compare per-level predictions with targets of the same shapes.

        Returns:
            The loss () and the losses of the levels (L,), detached.
        """
        levels = torch.stack(
            [
                F.smooth_l1_loss(prediction.float(), target, beta=self.beta)
                for prediction, target in zip(predictions, targets, strict=True)
            ]
        )
        return (self.weights * levels).sum(), levels.detach()
