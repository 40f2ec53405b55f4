"""Two plain training steps that hjepa's step is compared with, on the same weights, images and masks.

``PlainModel`` is I-JEPA written down from the paper (Assran et al. 2023, section 3) and the ViT's (Dosovitskiy et al.
2021): the encoder projects every patch and then gathers the visible ones, the target encoder computes every token in
every block, and the predictor reads, for each of the M target blocks, a copy of the whole context in every one of its
blocks. With more levels, a level's targets are averages of the whole grid. ``DenseModel`` masks by multiplying with
zero: every token goes through everything.

Nothing of hjepa's model is used here but its parameter names, so that weights can be copied, and the fixed positions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hjepa.config import Config
from hjepa.models.vit import grid_coordinates, sincos_positions


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int, fused: bool):
        super().__init__()
        self.num_heads, self.fused = num_heads, fused
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:  # (B, n, D)
        b, n, dim = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, dim // self.num_heads).permute(2, 0, 3, 1, 4)
        if self.fused:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            x = (q @ k.transpose(-2, -1) * (dim // self.num_heads) ** -0.5).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).reshape(b, n, dim))


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, fused: bool):
        super().__init__()
        hidden = round(dim * mlp_ratio)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, fused)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` (B, n) of ``x`` (B, N, D)."""
    return torch.gather(x, 1, index.unsqueeze(-1).repeat(1, 1, x.shape[-1]))


class Encoder(nn.Module):
    def __init__(self, config: Config, fused: bool):
        super().__init__()
        model = config.model
        self.patch, self.grid = model.patch_size, config.grid_size
        self.patch_embed = nn.Linear(config.data.channels * model.patch_size**2, model.embed_dim)
        self.blocks = nn.ModuleList(
            Block(model.embed_dim, model.num_heads, model.mlp_ratio, fused) for _ in range(model.depth)
        )
        self.norm = nn.LayerNorm(model.embed_dim, eps=1e-6)
        positions = sincos_positions(grid_coordinates(self.grid), model.embed_dim)
        self.register_buffer("positions", positions, persistent=False)

    def embed(self, images: Tensor) -> Tensor:
        """(B, C, S, S) -> (B, N, D), all patches."""
        patches = F.unfold(images, self.patch, stride=self.patch).transpose(1, 2)
        return self.patch_embed(patches) + self.positions

    def forward(self, images: Tensor, context: Tensor | None = None) -> Tensor:
        """All tokens (B, N, D), or those of the patches ``context`` (B, n)."""
        x = self.embed(images)
        if context is not None:
            x = gather(x, context)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Predictor(nn.Module):
    def __init__(self, config: Config, fused: bool):
        super().__init__()
        predictor, levels = config.model.predictor, config.model.num_levels
        dim = predictor.embed_dim
        self.embed = nn.Linear(config.model.embed_dim, dim)
        self.mask_tokens = nn.Parameter(torch.zeros(levels, dim))
        self.blocks = nn.ModuleList(
            Block(dim, predictor.num_heads, config.model.mlp_ratio, fused) for _ in range(predictor.depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.heads = nn.ModuleList(nn.Linear(dim, config.model.embed_dim) for _ in range(levels))
        for level in range(levels):
            positions = sincos_positions(grid_coordinates(config.grid_size, 2**level), dim)
            self.register_buffer(f"positions_{level}", positions, persistent=False)

    def queries(self, cells: Tensor, level: int) -> Tensor:
        return self.mask_tokens[level] + self.get_buffer(f"positions_{level}")[cells]

    def forward(self, context: Tensor, index: Tensor, targets: Sequence[Tensor]) -> list[Tensor]:
        """Per level (B, M, m_l, D), from the context (B, n, D) at the patches ``index`` (B, n)."""
        b, m, _ = targets[0].shape
        x = (self.embed(context) + self.positions_0[index]).repeat_interleave(m, 0)  # (B*M, n, d)
        asked = [self.queries(cells.flatten(0, 1), level) for level, cells in enumerate(targets)]
        x = torch.cat([x, *asked], 1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)[:, index.shape[1] :]
        parts = x.split([cells.shape[2] for cells in targets], 1)
        return [head(part).unflatten(0, (b, m)) for head, part in zip(self.heads, parts, strict=True)]


class PlainModel(nn.Module):
    """Call it as the paper's step: (images, context, targets) -> loss ()."""

    def __init__(self, config: Config, *, fused_attention: bool = False):
        super().__init__()
        self.weights = config.loss.level_weights or (1.0,) * config.model.num_levels
        self.beta = config.loss.smooth_l1_beta
        self.context_encoder = Encoder(config, fused_attention)
        self.predictor = Predictor(config, fused_attention)
        self.target_encoder = copy.deepcopy(self.context_encoder).requires_grad_(False)

    def forward(self, images: Tensor, context: Tensor, targets: Sequence[Tensor]) -> Tensor:
        predictions = self.predictor(self.context_encoder(images, context), context, targets)
        losses = [
            F.smooth_l1_loss(prediction.float(), target, beta=self.beta)
            for prediction, target in zip(predictions, self.cells(images, targets), strict=True)
        ]
        total = sum(weight * loss for weight, loss in zip(self.weights, losses, strict=True))
        return total / sum(self.weights)

    @torch.no_grad()
    def cells(self, images: Tensor, targets: Sequence[Tensor]) -> list[Tensor]:
        h = self.target_encoder(images).float()
        h = F.layer_norm(h, h.shape[-1:])  # (B, N, D)
        grid = h.transpose(1, 2).unflatten(2, (self.target_encoder.grid, -1))  # (B, D, G, G)
        found = []
        for level, cells in enumerate(targets):
            merged = F.avg_pool2d(grid, 2**level).flatten(2).transpose(1, 2)
            found.append(gather(merged, cells.flatten(1)).view(*cells.shape, -1))
        return found


class DenseModel(PlainModel):
    """One level. The queries, one per patch of ``union``, stand behind all N tokens in a single sequence per image."""

    def forward(self, images: Tensor, context: Tensor, union: Tensor, place: Tensor) -> Tensor:
        encoder, predictor = self.context_encoder, self.predictor
        x = encoder.embed(images)
        x = x * torch.zeros_like(x[..., :1]).scatter_(1, context.unsqueeze(-1), 1.0)
        for block in encoder.blocks:
            x = block(x)
        x = predictor.embed(encoder.norm(x)) + predictor.positions_0
        n = x.shape[1]
        x = torch.cat([x, predictor.queries(union, 0)], 1)
        for block in predictor.blocks:
            x = block(x)
        answers = predictor.heads[0](predictor.norm(x)[:, n:])
        target = gather(self.cells(images, [torch.arange(n).expand(len(x), 1, n)])[0].squeeze(1), union)
        read = place.flatten(1)
        return F.smooth_l1_loss(gather(answers, read).float(), gather(target, read), beta=self.beta)


def plain_flops(config: Config, context: float, cells: float) -> float:
    """FLOPs per image of a one-level plain step, forward and backward: matrix products, 2 per multiply-add.

    Args:
        context: visible patches.
        cells: patches of one target block.
    """
    model, predictor, n = config.model, config.model.predictor, config.grid_size**2
    patch = 2 * n * config.data.channels * model.patch_size**2 * model.embed_dim

    def blocks(depth: int, tokens: float, dim: int) -> float:
        linear = 2 * tokens * (4 * dim**2 + 2 * dim * round(dim * model.mlp_ratio))
        return depth * (linear + 4 * tokens**2 * dim)

    target = patch + blocks(model.depth, n, model.embed_dim)
    encoder = blocks(model.depth, context, model.embed_dim)
    ends = 2 * (context + config.masking.num_targets * cells) * model.embed_dim * predictor.embed_dim
    answers = config.masking.num_targets * blocks(predictor.depth, context + cells, predictor.embed_dim)
    return target + 2 * patch + 3 * (encoder + ends + answers)  # nobody asks for the gradient of a pixel


class PlainStep:
    """Forward, backward, clip, AdamW without fused kernels, and the EMA parameter by parameter.

    Args:
        model: PlainModel or DenseModel.
        normalize: uint8 images -> float.
        amp_dtype: of autocast; None computes in float32.
    """

    def __init__(
        self,
        model: PlainModel,
        config: Config,
        *,
        normalize: Callable[[Tensor], Tensor],
        amp_dtype: torch.dtype | None = None,
    ):
        self.model, self.normalize, self.amp_dtype = model, normalize, amp_dtype
        self.clip_grad = config.training.clip_grad
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.trained = [parameter for _, parameter in named]
        plain = [parameter for name, parameter in named if parameter.ndim == 1 or name.endswith("mask_tokens")]
        decayed = [parameter for parameter in self.trained if all(parameter is not other for other in plain)]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": config.training.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=config.training.lr,
            betas=config.training.betas,
            foreach=False,
            fused=False,
        )

    def __call__(self, images: Tensor, masks: Sequence[Tensor | Sequence[Tensor]], momentum: float) -> Tensor:
        """One step on uint8 images with the arguments that the model takes behind them. Returns the loss ()."""
        with torch.autocast(images.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
            loss: Tensor = self.model(self.normalize(images), *masks)
        loss.backward()
        if self.clip_grad is not None:
            nn.utils.clip_grad_norm_(self.trained, self.clip_grad, foreach=False)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            pairs = zip(self.model.target_encoder.parameters(), self.model.context_encoder.parameters(), strict=True)
            for teacher, student in pairs:
                teacher.mul_(momentum).add_(student, alpha=1 - momentum)
        return loss.detach()
