"""The predictor: from visible tokens to the target encoder's cells, at every level of the hierarchy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hjepa.models.vit import Block, compile_each, grid_coordinates, sincos_positions


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

    def compile_blocks(self) -> None:
        compile_each(self.blocks)

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
        x = self.embed(context) + self.get_buffer("positions_0")[context_index]  # (B, n, d)
        table, index = self._queries(targets)
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            start = n if i == last else 0  # after the last block only the queries are read
            x = block(x, start=start, table=table, index=index) if i == 0 else block(x, start=start)
        x = self.norm(x).unflatten(0, (b, blocks))  # (B, M, sum m_l, d)
        parts = x.split([cells.shape[2] for cells in targets], dim=2)
        return [head(part) for head, part in zip(self.heads, parts, strict=True)]

    def _queries(self, targets: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The queries that exist, one per cell and level (sum N_l, d), and which are asked (B, M, sum m_l)."""
        table = [mask_token + self.get_buffer(f"positions_{i}") for i, mask_token in enumerate(self.mask_tokens)]
        index, first = [], 0
        for cells, rows in zip(targets, table, strict=True):
            index.append(cells + first if first else cells)
            first += len(rows)
        return torch.cat(table), torch.cat(index, 2)
