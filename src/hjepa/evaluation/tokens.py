"""Frozen tokens of labelled images: what the protocols that look at single cells judge."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from hjepa.config import EvaluationConfig
from hjepa.errors import FutileRetryError, UserError
from hjepa.evaluation.features import Batch, Features, joined, labels_of, to_device
from hjepa.models.hjepa import merge_cells

ALL = "all"


class TokenEncoder(Protocol):
    """The part of an exported encoder that gives tokens; an nn.Module has the last two methods."""

    num_levels: int

    def preprocess(self, images: Any, /) -> Tensor: ...  # uint8 -> float [B, C, S, S]

    def tokens(self, x: Tensor, /) -> Tensor: ...  # [B, N, D] of level 0, raster order

    def pool(self, tokens: Tensor, /) -> dict[str, Tensor]: ...  # level ("0", "1", ..., "all") -> [B, D_level]

    def to(self, device: torch.device) -> Any: ...

    def eval(self) -> Any: ...


class Tokens:
    """The tokens of one split, in the order of its batches, as often as they are asked for.

    They stay in memory where they fit, and are computed anew on every pass where not. One pass is made here.

    Attributes:
        labels: int64 [M].
        levels: The names of the levels: "0", "1", ..., then "all" where there is more than one.
        cached: Whether they fit.
        features: The pooled embeddings of the same images, from the same pass; None where they were not asked for.

    Args:
        batches: Is called for every pass and must give the same images in the same order.
        cache_gb: Largest size to keep, in 1e9 bytes.
        pooled: Whether ``features`` are asked for.

    Raises:
        UserError: when there are no images.
        FutileRetryError: for tokens that are not finite.
    """

    def __init__(
        self,
        encoder: TokenEncoder,
        batches: Callable[[], Iterable[Batch]],
        *,
        device: torch.device | str,
        cache_gb: float,
        pooled: bool = False,
    ):
        self._encoder, self._batches, self._device = encoder, batches, torch.device(device)
        encoder.to(self._device)
        encoder.eval()
        self._cache: list[Tensor] | None = []
        self.mean: dict[str, Tensor] = {}  # level -> [D], over all cells of all images
        self.inverse_std: dict[str, Tensor] = {}  # level -> [D], 0 where nothing varies
        self.features: Features | None = None
        self.labels = self._survey(cache_gb * 1e9, pooled)

    @property
    def cached(self) -> bool:
        return self._cache is not None

    @property
    def levels(self) -> list[str]:
        return [*self.mean, *([ALL] if len(self.mean) > 1 else [])]

    def __iter__(self) -> Iterator[Tensor]:
        """Tokens of level 0, float32 [B, N, D], on the device."""
        if self._cache is not None:
            for tokens in self._cache:
                yield tokens.to(self._device)
        else:
            for tokens, _ in self._computed():
                yield tokens

    def select(self, indices: Tensor) -> Tensor:
        """The tokens of some images, float32 [len(indices), N, D], on the device.

        Args:
            indices: int64, ascending.
        """
        parts, start = [], 0
        for tokens in self:
            inside = indices[(indices >= start) & (indices < start + len(tokens))] - start
            parts.append(tokens[inside.to(tokens.device)])
            start += len(tokens)
        return torch.cat(parts)

    def _computed(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self._batches():
            with torch.no_grad():  # not inference mode: these tokens enter a probe that is trained
                tokens = self._encoder.tokens(self._encoder.preprocess(to_device(images, self._device))).float()
            yield tokens, labels_of(labels, len(images))

    def _survey(self, cache_bytes: float, pooled: bool) -> Tensor:
        labels: list[Tensor] = []
        parts: dict[str, list[Tensor]] = {}
        size = broken = 0
        sums: dict[str, Tensor] = {}
        squares: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        for tokens, batch_labels in self._computed():
            labels.append(batch_labels)
            broken += int((~tokens.isfinite().flatten(1).all(dim=1)).sum())
            for level, merged in by_level(tokens, map(str, range(self._encoder.num_levels))).items():
                rows = merged.flatten(0, 1).double()
                sums[level] = sums.get(level, 0) + rows.sum(dim=0)
                squares[level] = squares.get(level, 0) + rows.square().sum(dim=0)
                counts[level] = counts.get(level, 0) + len(rows)
            for level, embedded in self._encoder.pool(tokens).items() if pooled else ():
                parts.setdefault(level, []).append(embedded.cpu())
            size += tokens.numel() * tokens.element_size()
            if self._cache is not None:
                self._cache = [*self._cache, tokens.cpu()] if size <= cache_bytes else None
        if not labels:
            raise UserError("no images to evaluate: the split is empty. Prepare the data set with images in it")
        if broken:
            raise FutileRetryError(
                f"the tokens of {broken} of {sum(map(len, labels))} images are not finite: the weights or the "
                "preprocessing statistics are damaged. Export an earlier checkpoint and evaluate that"
            )
        for level, total in sums.items():
            mean = total / counts[level]
            variance = squares[level] / counts[level] - mean.square()
            self.mean[level] = mean.float()
            self.inverse_std[level] = torch.where(variance > 1e-12, variance.clamp(min=1e-12).rsqrt(), 0).float()
        if pooled:
            self.features = joined(parts, labels)
        return torch.cat(labels)


def read_tokens(
    encoder: TokenEncoder,
    batches: Callable[[], Iterable[Batch]],
    *,
    config: EvaluationConfig,
    device: torch.device | str,
) -> Tokens:
    """The tokens of one split, kept in memory where ``evaluation.token_cache_gb`` has room for them, and its features.

    One forward pass gives both.
    """
    return Tokens(encoder, batches, device=device, cache_gb=config.token_cache_gb, pooled=True)


def by_level(tokens: Tensor, levels: Iterable[str]) -> dict[str, Tensor]:
    """Level-0 tokens [B, N, D] as the cells [B, N / 4^l, D] of every level l but "all"."""
    # As a matrix product: on a CPU several times faster than the mean over two axes.
    patches = torch.eye(tokens.shape[1], device=tokens.device)[None]  # [1, N, N]
    return {
        level: tokens if level == "0" else merge_cells(patches, int(level))[0] @ tokens
        for level in levels
        if level != ALL
    }
