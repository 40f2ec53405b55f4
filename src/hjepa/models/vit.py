"""A vision transformer without a class token, whose encoder can be fed any subset of the patches.

Shapes: B images, C channels, S pixels along a side, p pixels along a patch, G = S/p patches along a side, N = G*G
patches, n <= N patches that are kept, D width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention over ``(B, heads, n, d)``.

    The fused CPU kernel is several times slower than two plain matmuls in bfloat16, hence the dispatch.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        weights: Tensor = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1).to(v.dtype)
        return weights @ v
    return F.scaled_dot_product_attention(q, k, v)


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` (B, n) of ``x`` (B, N, D) -> (B, n, D)."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def sincos_positions(coordinates: Tensor, dim: int) -> Tensor:
    """Fixed 2-D sine-cosine positions (Vaswani et al. 2017, section 3.5, one half of the width per axis).

    Args:
        coordinates: (n, 2) row and column in units of patches; a merged cell stands at its centre.
        dim: width, a multiple of 4.

    Returns:
        (n, dim) in float32.
    """
    if dim % 4:
        raise ValueError(f"2-D sine-cosine positions need a width that is a multiple of 4, got {dim}")
    frequency = 10_000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angle = coordinates.double().unsqueeze(-1) * frequency  # (n, 2, dim/4)
    return torch.cat([angle.sin(), angle.cos()], -1).flatten(1).float()


def grid_coordinates(grid: int, cell: int = 1) -> Tensor:
    """Centres (row, column) of the cells that merge ``cell x cell`` patches of a ``grid x grid`` grid: (n, 2)."""
    centre = torch.arange(grid // cell, dtype=torch.float64) * cell + (cell - 1) / 2
    return torch.cartesian_prod(centre, centre)


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def _split(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """(B, n, parts*D) -> parts x (B, heads, n, D/heads)."""
        b, n, _ = x.shape
        return x.view(b, n, parts, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)

    def _merge(self, x: Tensor) -> Tensor:
        b, h, n, d = x.shape
        return self.proj(x.transpose(1, 2).reshape(b, n, h * d))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        return self._merge(attention(*self._split(self.qkv(x), 3)))

    def last_queries(self, x: Tensor, start: int) -> Tensor:
        """Outputs for the tokens from ``start`` on only; keys and values come from all."""
        dim = x.shape[-1]
        weight, bias = self.qkv.weight, self.qkv.bias
        (q,) = self._split(F.linear(x[:, start:], weight[:dim], bias[:dim]), 1)
        k, v = self._split(F.linear(x, weight[dim:], bias[dim:]), 2)
        return self._merge(attention(q, k, v))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        hidden = round(dim * mlp_ratio)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]

    def last_tokens(self, x: Tensor, start: int) -> Tensor:
        """``forward(x)[:, start:]`` without computing the tokens before ``start``."""
        y = x[:, start:] + self.attn.last_queries(self.norm1(x), start)
        return y + self.mlp(self.norm2(y))  # type: ignore[no-any-return]


class VisionTransformer(nn.Module):
    """Encoder: patches -> tokens, with fixed 2-D sine-cosine positions.

    Linear layers keep PyTorch's fan-in initialisation, whose standard deviation (3 fan_in)^-1/2 is the usual 0.02 at
    width 768 and grows for narrower models; a fixed 0.02 there lets positions drown the image.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        channels: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
    ):
        super().__init__()
        self.patch_size = patch_size
        self.grid = image_size // patch_size
        self.embed_dim = embed_dim
        fan_in = channels * patch_size**2
        self.patch_embed = nn.Linear(fan_in, embed_dim)
        nn.init.normal_(self.patch_embed.weight, std=1 / math.sqrt(fan_in))
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        positions = sincos_positions(grid_coordinates(self.grid), embed_dim)
        self.register_buffer("positions", positions, persistent=False)
        self.positions: Tensor

    def patchify(self, images: Tensor) -> Tensor:
        """(B, C, S, S) -> (B, N, C*p*p), patches in raster order."""
        b, c, _, _ = images.shape
        p, g = self.patch_size, self.grid
        return images.view(b, c, g, p, g, p).permute(0, 2, 4, 1, 3, 5).reshape(b, g * g, c * p * p)

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Tokens of all patches, or of the patches ``keep`` alone.

        Args:
            images: (B, C, S, S).
            keep: (B, n) patch indices. The others are dropped before the projection, so they cost nothing and
                cannot leak.

        Returns:
            (B, n, D), after the final LayerNorm.
        """
        patches = self.patchify(images)
        if keep is None:
            x = self.patch_embed(patches) + self.positions
        else:
            x = self.patch_embed(gather_tokens(patches, keep)) + self.positions[keep]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)  # type: ignore[no-any-return]
