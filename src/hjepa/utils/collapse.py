"""Is the encoder collapsing? The self-distillation loss cannot tell, so its embeddings are watched."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hjepa.config import CollapseConfig


def embedding_std(z: Tensor) -> float:
    """Mean over dimensions of the standard deviation across images of ``z`` (n, D); 0 when all images look alike."""
    return float(z.std(0, correction=0).mean())


def effective_rank(z: Tensor) -> float:
    """RankMe (Garrido et al. 2023, eq. 1) of the centred embeddings ``z`` (n, D), in 1 .. min(n, D).

    exp of the entropy of the singular values, normalised to sum 1. A cloud without any spread has rank 0.
    """
    singular = torch.linalg.svdvals((z - z.mean(0)).double())
    total = singular.sum()
    if total <= 1e-12 * max(1.0, float(z.abs().max())) * len(z):
        return 0.0
    p = singular / total
    return float(torch.exp(-torch.special.xlogy(p, p).sum()))


def mean_cosine(z: Tensor) -> float:
    """Mean cosine over all pairs of different images of ``z`` (n, D); 1 when all point the same way."""
    unit = F.normalize(z.double(), dim=1)
    n = len(z)
    if n < 2:
        raise ValueError("the mean cosine needs at least two images")
    return float((unit.sum(0).square().sum() - unit.square().sum()) / (n * (n - 1)))


def collapse_metrics(z: Tensor) -> dict[str, float]:
    """The three measures of pooled embeddings (n, D) of different images."""
    z = z.float()
    return {"std": embedding_std(z), "rankme": effective_rank(z), "cosine": mean_cosine(z)}


@dataclass
class CollapseMonitor:
    """Counts collapsed measurements in a row; ``strikes`` belongs to the training state."""

    config: CollapseConfig
    strikes: int = 0
    diagnosis: str = "collapse"  # of the latest collapsed measurement

    def update(self, metrics: dict[str, float]) -> str | None:
        """The diagnosis if these measurements (of ``collapse_metrics``) are collapsed, else None."""
        found = []
        if metrics["std"] < self.config.min_std:
            found.append(
                f"the embedding's standard deviation across images is {metrics['std']:.2g}, "
                f"below {self.config.min_std:g}"
            )
        if metrics["rankme"] < self.config.min_rank:
            found.append(f"its effective rank is {metrics['rankme']:.2f}, below {self.config.min_rank:g}")
        self.strikes = self.strikes + 1 if found else 0
        if not found:
            return None
        self.diagnosis = f"collapse: {' and '.join(found)} ({self.strikes} in a row)"
        return self.diagnosis

    @property
    def must_stop(self) -> bool:
        return self.config.action == "stop" and self.strikes >= self.config.patience
