"""The encoder as it is used after training: preprocessing, dense cells and pooled embeddings per level."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hjepa.models.hjepa import merge_cells
from hjepa.models.vit import VisionTransformer

ALL, MEAN = "all", "mean"


class HierarchicalEncoder(nn.Module):
    """A frozen vision transformer read at every level of the hierarchy.

    Level l describes an image by its cells of 2^l x 2^l patches, which are what training predicted: means of
    layer-normed patch tokens. The embedding of a level is the maximum over its cells. The mean over cells, I-JEPA's
    readout, is the same at every level; it goes by the name ``mean`` and is a part of ``all`` once.
    """

    def __init__(self, vit: VisionTransformer, *, num_levels: int):
        super().__init__()
        self.vit = vit
        self.num_levels = num_levels

    @property
    def levels(self) -> list[int]:
        return list(range(self.num_levels))

    def embedding_dim(self, level: int | str = ALL) -> int:
        return self.vit.embed_dim * (self.num_levels + 1 if self._check(level) == ALL else 1)

    def _check(self, level: int | str) -> int | str:
        if level in (ALL, MEAN) or level in self.levels:
            return level
        raise ValueError(f"level: expected one of {self.levels}, {MEAN!r} or {ALL!r}, got {level!r}")

    def tokens(self, x: Tensor, level: int = 0) -> Tensor:
        """Dense features of normalised images ``x`` (B, C, S, S): (B, cells of the level, D), raster order."""
        self._check(level)
        patches = self.vit(x).float()
        return merge_cells(F.layer_norm(patches, patches.shape[-1:]), level)

    def embed(self, x: Tensor) -> dict[str, Tensor]:
        """Pooled embeddings of normalised images ``x`` (B, C, S, S) by readout: ``mean``, ``0``, ..., ``all``."""
        return self.pool(self.tokens(x))

    def pool(self, patches: Tensor) -> dict[str, Tensor]:
        """The embeddings of images whose ``tokens`` of level 0 are ``patches`` (B, N, D)."""
        pooled = {MEAN: patches.mean(1)}
        pooled |= {str(level): merge_cells(patches, level).amax(1) for level in self.levels}
        return pooled | {ALL: torch.cat(list(pooled.values()), 1)}

    def forward(self, x: Tensor, level: int | str = ALL) -> Tensor:
        """Pooled embedding (B, embedding_dim(level)) of normalised images ``x`` (B, C, S, S)."""
        return self.embed(x)[str(self._check(level))]
