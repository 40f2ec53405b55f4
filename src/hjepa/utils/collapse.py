"""Is the encoder collapsing? The self-distillation loss cannot tell, so its embeddings are watched."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hjepa.config import CollapseConfig


def embedding_std(z: Tensor) -> float:
    """Mean over dimensions of the standard deviation across images of ``z`` (n, D); 0 when all images look alike."""
    return float(z.double().std(0, correction=0).mean())


def effective_rank(z: Tensor) -> float:
    """RankMe (Garrido et al. 2023, eq. 1) of the centred embeddings ``z`` (n, D), in 1 .. min(n, D).

    exp of the entropy of the singular values, normalised to sum 1. A cloud without any spread has rank 0; spread that
    rounding to float32 explains is none.
    """
    z = z.double()
    centred = z - z.mean(0)
    # The singular values by way of the smaller Gram matrix: several times cheaper than an SVD of (n, D).
    gram = centred @ centred.T if len(z) <= z.shape[1] else centred.T @ centred
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    total = singular.sum()
    if total <= 16 * torch.finfo(torch.float32).eps * math.sqrt(len(gram)) * z.norm():
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


def mean_norm(z: Tensor) -> float:
    """Mean L2 norm of the embeddings ``z`` (n, D)."""
    return float(z.norm(dim=1).mean())


def collapse_metrics(z: Tensor) -> dict[str, float]:
    """The measures of pooled embeddings (n, D) of different images; NaN where an embedding is not finite."""
    measures = {"std": embedding_std, "rankme": effective_rank, "cosine": mean_cosine, "norm": mean_norm}
    finite = bool(z.isfinite().all())
    return {name: measure(z) if finite else math.nan for name, measure in measures.items()}


def collapse_of_levels(embeddings: Mapping[str, Tensor]) -> dict[str, float]:
    """The measures as a probe reports them: "collapse/std" of the readout "all", "collapse/level_0/std" of level "0".

    Args:
        embeddings: (n, D) by readout, as ``HierarchicalEncoder.embed`` returns them.
    """
    return {
        f"collapse/{'' if readout == 'all' else f'level_{readout}/'}{name}": value
        for readout, z in embeddings.items()
        if readout == "all" or readout.isdigit()
        for name, value in collapse_metrics(z).items()
    }


@dataclass
class CollapseMonitor:
    """Counts collapsed measurements in a row; ``strikes`` belongs to the training state."""

    config: CollapseConfig
    strikes: int = 0
    diagnosis: str = "collapse"  # of the latest collapsed measurement

    def update(self, found: Mapping[str, float]) -> str | None:
        """The diagnosis if some level is collapsed, else None.

        Args:
            found: What a probe measured. Keys are "collapse/std" and "collapse/rankme" of the whole embedding and
                "collapse/level_0/std" and so on of a level; what is missing is not judged, other keys are ignored.
        """
        measures = {
            "std": ("standard deviation across images", self.config.min_std, ".2g"),
            "rankme": ("effective rank", self.config.min_rank, ".2f"),
        }
        judged, collapsed = False, list[str]()
        for where in sorted({key.rpartition("/")[0] for key in found if key.startswith("collapse/")}):
            complaints = []
            for name, (words, limit, digits) in measures.items():
                value = found.get(f"{where}/{name}")
                judged |= value is not None
                if value is not None and not value >= limit:  # NaN too
                    complaints.append(f"{words} is {value:{digits}}, below {limit:g}")
            if complaints:
                level = where.removeprefix("collapse").lstrip("/").replace("_", " ") or "the whole embedding"
                collapsed.append(f"of {level} the {' and the '.join(complaints)}")
        if not judged:
            return None
        self.strikes = self.strikes + 1 if collapsed else 0
        if not collapsed:
            return None
        self.diagnosis = f"collapse: {'; '.join(collapsed)} ({self.strikes} in a row)"
        return self.diagnosis

    @property
    def must_stop(self) -> bool:
        return self.config.action == "stop" and self.strikes >= self.config.patience
