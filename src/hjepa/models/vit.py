"""A vision transformer without a class token, whose encoder can be fed any subset of the patches.

Shapes: B images, C channels, S pixels along a side, p pixels along a patch, G = S/p patches along a side, N = G*G
patches, n <= N patches that are kept, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GRAPHS = 32  # that the blocks may be compiled to


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention over ``(B, heads, n, d)``."""
    if _plain_attention(q):
        b, h, n, d = q.shape
        q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
        scores = torch.baddbmm(q.new_empty(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=d**-0.5)
        return torch.bmm(scores.softmax(-1), v).view(b, h, n, d)
    return F.scaled_dot_product_attention(q, k, v)


def _plain_attention(x: Tensor) -> bool:
    """In bfloat16 the fused CPU kernel is several times slower than two plain matrix products."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16


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

    def forward(self, x: Tensor, queries: Tensor | None = None) -> Tensor:
        """Self-attention of ``x`` (B, n, D), or what ``queries`` (B, m, D), some of its tokens, read from it."""
        if queries is None:
            return self.attend(self.qkv(x))
        dim = x.shape[-1]
        weights, biases = (
            self.qkv.weight.split_with_sizes((dim, 2 * dim)),
            self.qkv.bias.split_with_sizes((dim, 2 * dim)),
        )
        (q,) = self._split(F.linear(queries, weights[0], biases[0]), 1)
        k, v = self._split(F.linear(x, weights[1], biases[1]), 2)
        return self._merge(attention(q, k, v))

    def attend(self, qkv: Tensor, start: int = 0) -> Tensor:
        """The outputs (B, n - start, D) of the tokens from ``start`` on, given the projections (B, n, 3*D) of all."""
        q, k, v = self._split(qkv, 3)
        return self._merge(attention(q[:, :, start:], k, v))

    def _split(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """(B, n, parts*D) -> parts x (B, heads, n, D/heads)."""
        b, n, _ = x.shape
        x = x.view(b, n, parts, self.num_heads, -1)
        if _plain_attention(x):  # matrix products would copy each part
            return x.permute(2, 0, 3, 1, 4).contiguous().unbind(0)
        return tuple(part.transpose(1, 2) for part in x.unbind(2))  # whose gradient is put together in one copy

    def _merge(self, x: Tensor) -> Tensor:
        b, h, n, d = x.shape
        return self.proj(x.transpose(1, 2).reshape(b, n, h * d))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Pre-norm transformer block.

    Its variants leave out work whose result nobody reads. They are arguments of ``forward``, because sharding and
    compilation hook into the call.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        hidden = round(dim * mlp_ratio)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(
        self,
        x: Tensor,
        *,
        wanted: Tensor | None = None,
        start: int = 0,
        table: Tensor | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        """The block's outputs.

        Args:
            x: (B, n, D).
            wanted: (B, m) tokens whose outputs are needed; all tokens stay keys and values.
            start: likewise, the tokens from ``start`` on.
            table: (S, D) distinct tokens to continue the sequences with, see ``index``.
            index: (B, M, k) rows of ``table``: M sequences per image, each of the image's own n tokens and k of the
                table's. Equals calling the block on those sequences, but norm and projection run once per distinct
                token, not once per copy.

        Returns:
            (B, n, D), or (B, m, D), or (B, n - start, D); with ``index``, (B*M, n + k - start, D).
        """
        if table is not None and index is not None:
            qkv = self.attn.qkv(self.norm1(x)), self.attn.qkv(self.norm1(table))
            x = _sequences(x, table, index)[:, start:]
            x = x + self.attn.attend(_sequences(*qkv, index), start)
        elif wanted is not None:
            h = self.norm1(x)
            x = gather_tokens(x, wanted) + self.attn(h, gather_tokens(h, wanted))
        elif start:
            h = self.norm1(x)
            x = x[:, start:] + self.attn(h, h[:, start:])
        else:
            x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


def _sequences(shared: Tensor, table: Tensor, index: Tensor) -> Tensor:
    """(B, n, D), (S, D), (B, M, k) -> (B*M, n + k, D): each image's tokens, M times, and rows of the table."""
    copies = shared.unsqueeze(1).expand(-1, index.shape[1], -1, -1)
    # The gradient of an embedding is summed in order and, on a GPU, in float32; that of indexing need not be.
    return torch.cat([copies, F.embedding(index, table)], 2).flatten(0, 1)


def compile_each(blocks: Iterable[nn.Module]) -> None:
    """torch.compile each block by itself: one graph per kind of call serves all blocks and all sequence lengths."""
    # Training makes 6 kinds of calls, validation and probes a few more; beyond the limit torch runs uncompiled.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    for block in blocks:
        block.compile(dynamic=True)


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
        self.image_shape = (channels, image_size, image_size)
        self.embed_dim = embed_dim
        fan_in = channels * patch_size**2
        self.patch_embed = nn.Linear(fan_in, embed_dim)
        nn.init.normal_(self.patch_embed.weight, std=1 / math.sqrt(fan_in))
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        positions = sincos_positions(grid_coordinates(self.grid), embed_dim)
        self.register_buffer("positions", positions, persistent=False)
        self.positions: Tensor

    def compile_blocks(self) -> None:
        compile_each(self.blocks)

    def patchify(self, images: Tensor) -> Tensor:
        """(B, C, S, S) -> (B, N, C*p*p), patches in raster order."""
        if images.shape[1:] != self.image_shape:
            raise ValueError(
                f"images: expected (B, {', '.join(map(str, self.image_shape))}), got {tuple(images.shape)}. "
                "embed_images of an exported encoder takes raw images of any size"
            )
        b, c, _, _ = images.shape
        p, g = self.patch_size, self.grid
        return images.view(b, c, g, p, g, p).permute(0, 2, 4, 1, 3, 5).reshape(b, g * g, c * p * p)

    def forward(self, images: Tensor, keep: Tensor | None = None, wanted: Tensor | None = None) -> Tensor:
        """Tokens of all patches, or of the patches ``keep`` alone.

        Args:
            images: (B, C, S, S).
            keep: (B, n) patch indices. The others are dropped before the projection, so they cost nothing and
                cannot leak.
            wanted: (B, m) tokens to return, of those that are kept: the last block computes no others.

        Returns:
            (B, n, D) or (B, m, D), after the final LayerNorm.
        """
        patches = self.patchify(images)
        if keep is None:
            x = self.patch_embed(patches) + self.positions
        else:
            x = self.patch_embed(gather_tokens(patches, keep)) + self.positions[keep]
        for block in self.blocks[:-1]:
            x = block(x)
        return self.norm(self.blocks[-1](x, wanted=wanted))  # type: ignore[no-any-return]
