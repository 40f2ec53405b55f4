"""H-JEPA: I-JEPA (Assran et al. 2023) whose targets form a spatial hierarchy.

Level l lies on the patch grid merged 2^l x 2^l. The target of a cell is the mean, over its patches, of the target
encoder's outputs after a LayerNorm without affine parameters; so a coarse cell is the mean of its four children.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hjepa.config import Config
from hjepa.models.predictor import Predictor
from hjepa.models.vit import VisionTransformer, gather_tokens


class Forward(NamedTuple):
    """What the loss compares: per level l, (B, M, m_l, D) for M target blocks of m_l cells."""

    predictions: list[Tensor]
    targets: list[Tensor]


def merge_cells(tokens: Tensor, level: int) -> Tensor:
    """Average the raster of patch tokens (B, N, D) over 2^level x 2^level cells -> (B, N / 4^level, D)."""
    if level == 0:
        return tokens
    b, n, d = tokens.shape
    grid, cell = round(n**0.5), 2**level
    if grid % cell:
        raise ValueError(f"a {grid}x{grid} grid cannot be merged {cell}x{cell}")
    small = grid // cell
    return tokens.view(b, small, cell, small, cell, d).mean((2, 4)).view(b, small * small, d)


def build_encoder(config: Config) -> VisionTransformer:
    return VisionTransformer(
        image_size=config.data.image_size,
        patch_size=config.model.patch_size,
        channels=config.data.channels,
        embed_dim=config.model.embed_dim,
        depth=config.model.depth,
        num_heads=config.model.num_heads,
        mlp_ratio=config.model.mlp_ratio,
    )


class HJEPAModel(nn.Module):
    """Context encoder, its EMA copy (the target encoder), and the predictor."""

    def __init__(self, config: Config):
        super().__init__()
        self.num_levels = config.model.num_levels
        self.context_encoder = build_encoder(config)
        self.predictor = Predictor(
            grid=config.grid_size,
            num_levels=config.model.num_levels,
            encoder_dim=config.model.embed_dim,
            embed_dim=config.model.predictor.embed_dim,
            depth=config.model.predictor.depth,
            num_heads=config.model.predictor.num_heads,
            mlp_ratio=config.model.mlp_ratio,
        )
        # Copied after initialisation: the first targets are the student's own.
        self.target_encoder = copy.deepcopy(self.context_encoder).requires_grad_(False)

    def forward(self, images: Tensor, context_index: Tensor, targets: list[Tensor]) -> Forward:
        """Predict the masked cells of every level from the visible patches.

        Args:
            images: (B, C, S, S), normalised.
            context_index: (B, n) indices of the visible patches.
            targets: per level l, (B, M, m_l) indices of the masked cells.
        """
        context = self.context_encoder(images, context_index)
        predictions = self.predictor(context, context_index, targets)
        return Forward(predictions, self.target_cells(images, targets))

    @torch.no_grad()
    def target_cells(self, images: Tensor, targets: list[Tensor]) -> list[Tensor]:
        """The target encoder's cells at ``targets``: per level (B, M, m_l, D), in float32."""
        tokens = self.target_encoder(images).float()
        tokens = F.layer_norm(tokens, tokens.shape[-1:])
        return [
            gather_tokens(merge_cells(tokens, level), cells.flatten(1)).view(*cells.shape, -1)
            for level, cells in enumerate(targets)
        ]

    @torch.no_grad()
    def update_target(self, momentum: float) -> None:
        """target <- momentum * target + (1 - momentum) * context, buffers copied. Call after the optimiser's step."""
        target: list[Tensor] = list(self.target_encoder.parameters())
        context: list[Tensor] = list(self.context_encoder.parameters())
        torch._foreach_lerp_(target, context, 1.0 - momentum)
        for mine, theirs in zip(self.target_encoder.buffers(), self.context_encoder.buffers(), strict=True):
            mine.copy_(theirs)
