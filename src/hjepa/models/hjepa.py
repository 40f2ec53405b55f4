"""H-JEPA: I-JEPA (Assran et al. 2023) whose targets form a spatial hierarchy.

Level l lies on the patch grid merged 2^l x 2^l. The target of a cell is the mean, over its patches, of the target
encoder's outputs after a LayerNorm without affine parameters; so a coarse cell is the mean of its four children.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hjepa.config import Config
from hjepa.models.predictor import Predictor
from hjepa.models.vit import VisionTransformer, gather_tokens


class MaskTensors(NamedTuple):
    """``hjepa.masks.Masks`` on the model's device, int64. N patches per image, M target blocks."""

    context: Tensor  # (B, n) visible patches
    targets: list[Tensor]  # per level l, (B, M, m_l) masked cells, a block's cells in raster order
    union: Tensor  # (B, U) every patch of a target block, and perhaps others; no patch twice
    place: Tensor  # (B, M, m_0) where in ``union`` the patches of ``targets[0]`` stand
    rows: int  # height of a target block in cells of the coarsest level


class Forward(NamedTuple):
    """What the loss reads."""

    predictions: list[Tensor]  # per level l, (B, M, m_l, D) for M target blocks of m_l cells
    targets: list[Tensor]  # the same shapes, float32
    embeddings: list[Tensor]  # per level, (B, projector_dim) for a regulariser; empty without one


def merge_cells(tokens: Tensor, level: int) -> Tensor:
    """Average the raster of patch tokens (B, N, D) over 2^level x 2^level cells -> (B, N / 4^level, D)."""
    if level == 0:
        return tokens
    grid, cell = round(tokens.shape[1] ** 0.5), 2**level
    if grid % cell:
        raise ValueError(f"a {grid}x{grid} grid cannot be merged {cell}x{cell}")
    return _merge_raster(tokens, grid, cell)


def _merge_raster(tokens: Tensor, height: int, cell: int) -> Tensor:
    """(..., height*width, D) -> (..., height*width / cell^2, D), the means of cell x cell neighbours."""
    *batch, cells, dim = tokens.shape
    rows, columns = height // cell, cells // height // cell
    return tokens.view(*batch, rows, cell, columns, cell, dim).mean((-4, -2)).flatten(-3, -2)


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


def _projector(dim: int, hidden: int, out: int) -> nn.Sequential:
    """No batch statistics: they would tie an image's embedding to its micro-batch and its rank."""
    return nn.Sequential(nn.Linear(dim, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, out))


class HJEPAModel(nn.Module):
    """Context encoder, its EMA copy (the target encoder), the predictor, and projectors if there is a regulariser."""

    def __init__(self, config: Config):
        super().__init__()
        self.num_levels = config.model.num_levels
        self.stop_gradient = config.model.stop_gradient
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
        dim, regularizer = config.model.embed_dim, config.loss.regularizer
        self.projectors = nn.ModuleList(
            _projector(dim, round(dim * config.model.mlp_ratio), regularizer.projector_dim)
            for _ in range(self.num_levels if regularizer.name != "none" else 0)
        )

    def compile_blocks(self) -> None:
        """torch.compile every transformer block in place; parameter names stay."""
        for part in (self.context_encoder, self.target_encoder, self.predictor):
            part.compile_blocks()

    def forward(self, images: Tensor, masks: MaskTensors) -> Forward:
        """Predict the masked cells of every level from the visible patches of ``images`` (B, C, S, S), normalised."""
        targets = self.target_cells(images, masks)
        context = self.context_encoder(images, masks.context)
        predictions: list[Tensor] = self.predictor(context, masks.context, masks.targets)
        pooled = [prediction.float().mean((1, 2)) for prediction in predictions[: len(self.projectors)]]
        embeddings = [project(vectors) for project, vectors in zip(self.projectors, pooled, strict=True)]
        return Forward(predictions, targets, embeddings)

    def target_cells(self, images: Tensor, masks: MaskTensors) -> list[Tensor]:
        """The targets: per level (B, M, m_l, D), in float32, from the whole image.

        The target encoder's, without gradient; with ``stop_gradient`` off the context encoder's, with gradient.
        """
        encoder = self.target_encoder if self.stop_gradient else self.context_encoder
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.stop_gradient):
            tokens = encoder(images, wanted=masks.union).float()
            tokens = F.layer_norm(tokens, tokens.shape[-1:])
            patches = gather_tokens(tokens, masks.place.flatten(1)).view(*masks.place.shape, -1)
            height = masks.rows * 2 ** (self.num_levels - 1)  # of a target block, in patches
            return [_merge_raster(patches, height, 2**level) if level else patches for level in range(self.num_levels)]

    @torch.no_grad()
    def update_target(self, momentum: float, moved: Tensor | None = None) -> None:
        """target <- momentum * target + (1 - momentum) * context, buffers copied. Call after the optimiser's step.

        Args:
            momentum: in [0, 1].
            moved: 0-d float on the model's device: 1 where the optimiser stepped, 0 where it skipped, so that nothing
                changes here either, and nobody on the host has to know.
        """
        target, context = _shards(self.target_encoder.parameters()), _shards(self.context_encoder.parameters())
        buffers = zip(self.target_encoder.buffers(), self.context_encoder.buffers(), strict=True)
        if moved is None:
            torch._foreach_lerp_(target, context, 1.0 - momentum)
            for mine, theirs in buffers:
                mine.copy_(theirs)
            return
        # Fused SGD is the one kernel that asks the device whether to act. Ascending along the context weights with a
        # decay of 1, a target weight moves by lr * (context - target), in one pass and without a copy of the model.
        torch._fused_sgd_(
            target,
            context,
            [],
            weight_decay=1.0,
            momentum=0.0,
            lr=1.0 - momentum,
            dampening=0.0,
            nesterov=False,
            maximize=True,
            is_first_step=False,
            found_inf=1.0 - moved,
        )
        for mine, theirs in buffers:
            mine.lerp_(theirs, moved)  # exactly the one or the other


def _shards(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """What this rank holds of the parameters: both encoders are sharded alike, and the update is elementwise."""
    return [p.to_local() if hasattr(p, "to_local") else p for p in parameters]
