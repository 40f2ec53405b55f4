"""The predictor: from visible tokens to the target encoder's cells, at every level of the hierarchy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hjepa.models.vit import Block, grid_coordinates, sincos_positions


class Predictor(nn.Module):
    """A narrow transformer that reads the context and answers one query per masked cell and level.

    The M target blocks of an image are predicted independently of each other, as in I-JEPA (Assran et al. 2023,
    section 3): each gets its own sequence of all context tokens and the block's queries. A query is the learned mask
    token of its level plus the position of its cell; each level has its own output projection. With one level this
    is I-JEPA's predictor.
    """

    def __init__(
        self,
        *,
        grid: int,
        num_levels: int,
        encoder_dim: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
    ):
        super().__init__()
        self.embed = nn.Linear(encoder_dim, embed_dim)
        self.mask_tokens = nn.Parameter(torch.zeros(num_levels, embed_dim))
        nn.init.trunc_normal_(self.mask_tokens, std=0.02)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.heads = nn.ModuleList(nn.Linear(embed_dim, encoder_dim) for _ in range(num_levels))
        for level in range(num_levels):
            positions = sincos_positions(grid_coordinates(grid, 2**level), embed_dim)
            self.register_buffer(f"positions_{level}", positions, persistent=False)

    def forward(self, context: Tensor, context_index: Tensor, targets: Sequence[Tensor]) -> list[Tensor]:
        """Predict every target cell.

        Args:
            context: (B, n, D) tokens of the context encoder.
            context_index: (B, n) their patch indices.
            targets: per level l, (B, M, m_l) cell indices of the M target blocks.

        Returns:
            Per level, (B, M, m_l, D).
        """
        b, blocks, _ = targets[0].shape
        n = context.shape[1]
        tokens = self.embed(context) + self.get_buffer("positions_0")[context_index]  # (B, n, d)
        queries = torch.cat(
            [
                self.mask_tokens[level] + self.get_buffer(f"positions_{level}")[cells]
                for level, cells in enumerate(targets)
            ],
            dim=2,
        )  # (B, M, sum m_l, d)
        tokens = tokens.unsqueeze(1).expand(-1, blocks, -1, -1)
        x = torch.cat([tokens, queries.to(tokens.dtype)], dim=2).flatten(0, 1)  # (B*M, n + sum m_l, d)
        for block in self.blocks[:-1]:
            x = block(x)
        x = self.norm(self.blocks[-1].last_tokens(x, n)).unflatten(0, (b, blocks))  # type: ignore[operator]
        parts = x.split([cells.shape[2] for cells in targets], dim=2)
        return [head(part) for head, part in zip(self.heads, parts, strict=True)]
