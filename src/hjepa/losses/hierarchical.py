"""The hierarchical prediction loss and, beside it, a regulariser against collapse."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hjepa.config import Config
from hjepa.losses.sigreg import directions, sigreg
from hjepa.losses.vicreg import vicreg


class HierarchicalLoss(nn.Module):
    """sum_l w_l L_l / sum_l w_l + weight * sum_l v_l R_l / sum_l v_l.

    L_l is the smooth L1 distance averaged over the cells of level l. All images of a step have the same number of
    cells, so its mean over a rank's cells, averaged over ranks and accumulation steps by their images, is the mean over
    the global batch. One level is I-JEPA's loss (Assran et al. 2023, in the published code's smooth-L1 form).

    R_l is ``loss.regularizer`` of level l's pooled vectors, one per image. It is a statistic of the micro-batch over
    all ranks, so every rank must call this together and with as many images.
    """

    def __init__(self, config: Config):
        super().__init__()
        loss, levels = config.loss, config.model.num_levels
        self.weights = _shares(loss.level_weights, levels)
        self.beta = loss.smooth_l1_beta
        regularizer = loss.regularizer
        self.regularizer = regularizer.name
        self.regularizer_weight = regularizer.weight
        self.regularizer_weights = _shares(regularizer.level_weights, levels)
        self.num_slices, self.seed = regularizer.num_slices, config.seed

    def forward(
        self,
        predictions: Sequence[Tensor],
        targets: Sequence[Tensor],
        embeddings: Sequence[Tensor] = (),
        *,
        step: int = 0,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compare per-level predictions with targets of the same shapes.

        Args:
            embeddings: Per level, (B, K) vectors to regularise; without a regulariser there are none.
            step: The optimiser step; SIGReg's directions depend on it.

        Returns:
            The loss () and its parts, detached: "level_0", ... and, unweighted, "regularizer" where there is one.
        """
        levels = [
            F.smooth_l1_loss(prediction.float(), target, beta=self.beta)
            for prediction, target in zip(predictions, targets, strict=True)
        ]
        loss = _weighted_sum(levels, self.weights)
        parts = {f"level_{level}": value.detach() for level, value in enumerate(levels)}
        if self.regularizer != "none":
            term = _weighted_sum(self._regularize(embeddings, step).unbind(), self.regularizer_weights)
            loss = loss.add(term, alpha=self.regularizer_weight)
            parts["regularizer"] = term.detach()
        return loss, parts

    def _regularize(self, embeddings: Sequence[Tensor], step: int) -> Tensor:
        """(L,) terms of the levels."""
        if len(embeddings) != len(self.weights):
            raise ValueError(
                f"loss.regularizer.name={self.regularizer}: expected embeddings of {len(self.weights)} levels, "
                f"got {len(embeddings)}"
            )
        z = torch.stack([vectors.float() for vectors in embeddings])  # (L, B, K)
        if self.regularizer == "vicreg":
            return vicreg(z)
        return sigreg(z, directions(z.shape[2], self.num_slices, seed=self.seed, step=step, device=z.device))


def _shares(weights: Sequence[float] | None, levels: int) -> list[float]:
    """Weights that sum to 1; as numbers of the host they belong to no device."""
    weights = weights or (1.0,) * levels
    return [weight / sum(weights) for weight in weights]


def _weighted_sum(values: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
    first, *rest = zip(values, weights, strict=True)
    total = first[0] * first[1]
    for value, weight in rest:
        total = total.add(value, alpha=weight)
    return total
