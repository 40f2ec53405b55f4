"""Attentive probe: cross attention of one learned query per head to frozen tokens, then a linear classifier.

After Bardes et al., "Revisiting Feature Prediction for Learning Visual Representations from Video" (V-JEPA, 2024,
section 4.1), without its residual MLP. With a single query the projection of the keys folds into the query, and the
projection of the values can wait until the tokens are pooled, so that a probe costs little more than reading the
tokens. Probes of a whole grid of learning rates and weight decays, at all levels, are trained on the same pass.

Batches come in the order of the data set, which preparation has mixed; seeds decide how a probe begins.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hjepa.config import EvaluationConfig
from hjepa.errors import UserError
from hjepa.evaluation.linear import HELD_OUT
from hjepa.evaluation.outcome import Outcome, accuracy_over_seeds, stratified
from hjepa.evaluation.tokens import ALL, Tokens, by_level

METRIC = "attentive_top1"
BATCH = 128  # images per optimiser step

Setting = tuple[float, float]  # learning rate, weight decay


class Head(nn.Module):
    """The parameters of one probe. ``logits_of`` applies many of them at once."""

    def __init__(self, dim: int, num_heads: int, num_classes: int, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, std: float) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator) * std)

        self.query = normal(num_heads, dim, std=0.1 / math.sqrt(dim))
        self.value = normal(num_heads, dim, dim // num_heads, std=1 / math.sqrt(dim))
        self.weight = normal(dim, num_classes, std=0.01)
        self.bias = nn.Parameter(torch.zeros(num_classes))


def evaluate(
    train: Tokens, test: Tokens, *, config: EvaluationConfig, num_classes: int
) -> dict[str, dict[str, Outcome]]:
    """``attentive_top1`` of each level: mean and spread over the probes of ``evaluation.seeds``.

    Learning rate and weight decay are chosen per level on held-out training images; then probes of the chosen pair,
    one per seed, are trained on all training images and answer for the test images.

    Raises:
        UserError: the number of heads does not divide the width of the tokens.
    """
    settings = choose(train, config=config, num_classes=num_classes)
    heads = {level: [new_head(train, config, num_classes, seed) for seed in config.seeds] for level in train.levels}
    repeated = {level: [setting] * len(config.seeds) for level, setting in settings.items()}
    everything = torch.ones(len(train.labels), dtype=torch.bool)
    fit(train, heads, repeated, used=everything, epochs=config.attentive_epochs)
    answers = predict(test, heads, statistics=train)
    return {level: {METRIC: accuracy_over_seeds(list(found), test.labels)} for level, found in answers.items()}


def choose(train: Tokens, *, config: EvaluationConfig, num_classes: int) -> dict[str, Setting]:
    """For each level the learning rate and weight decay with the best accuracy on held-out training images.

    Of equals the first of the grid is taken; so it is where no class has enough images to hold one out.
    """
    grid = list(itertools.product(config.attentive_lr, config.attentive_weight_decay))
    held_out = stratified(train.labels, HELD_OUT, seed=config.seeds[0])
    if len(grid) == 1 or not held_out.any():
        return dict.fromkeys(train.levels, grid[0])
    heads = {level: [new_head(train, config, num_classes, config.seeds[0]) for _ in grid] for level in train.levels}
    fit(train, heads, dict.fromkeys(train.levels, grid), used=~held_out, epochs=config.attentive_epochs)
    answers = predict(train, heads, statistics=train, used=held_out)
    correct = {level: (found == train.labels[held_out]).sum(dim=1).tolist() for level, found in answers.items()}
    return {level: grid[counts.index(max(counts))] for level, counts in correct.items()}


def new_head(train: Tokens, config: EvaluationConfig, num_classes: int, seed: int) -> Head:
    dim, num_heads = len(train.mean["0"]), config.attentive_heads
    if dim % num_heads:
        raise UserError(
            f"evaluation.attentive_heads={num_heads} does not divide the tokens' {dim} dimensions; choose a divisor"
        )
    return Head(dim, num_heads, num_classes, seed).to(train.mean["0"].device)


def fit(
    train: Tokens,
    heads: Mapping[str, Sequence[Head]],
    settings: Mapping[str, Sequence[Setting]],
    *,
    used: Tensor,
    epochs: int,
) -> None:
    """Train all heads of all levels with AdamW, in place; the learning rate falls to 0 along half a cosine.

    Args:
        settings: Level -> one pair for each of its heads.
        used: bool [N], the images to train on.
    """
    groups = [
        {"params": list(head.parameters()), "lr": lr, "weight_decay": decay, "peak": lr}
        for level, members in heads.items()
        for head, (lr, decay) in zip(members, settings[level], strict=True)
    ]
    optimizer = torch.optim.AdamW(groups, fused=True)
    total, done = epochs * int(used.sum()), 0
    for _ in range(epochs):
        for tokens, labels in _steps(train, used):
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * 0.5 * (1 + math.cos(math.pi * done / total))
            views = standardised(tokens, train)
            optimizer.zero_grad()
            for level, members in heads.items():
                logits = logits_of(members, views[level])  # [G, B, C]
                # Summed over the heads, so that each has the gradient of its own loss.
                loss = F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(members))) * len(members)
                loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            done += len(labels)


@torch.no_grad()
def predict(
    source: Tokens, heads: Mapping[str, Sequence[Head]], *, statistics: Tokens, used: Tensor | None = None
) -> dict[str, Tensor]:
    """Level -> int64 [G, M], the class that each head gives each image.

    Args:
        statistics: The split whose mean and spread standardise the tokens.
        used: bool [N], the images to answer for, M of them; None: all.
    """
    answers: dict[str, list[Tensor]] = {level: [] for level in heads}
    used = torch.ones(len(source.labels), dtype=torch.bool) if used is None else used
    for tokens, _ in _steps(source, used):
        views = standardised(tokens, statistics)
        for level, members in heads.items():
            answers[level].append(logits_of(members, views[level]).argmax(dim=2).cpu())
    return {level: torch.cat(found, dim=1) for level, found in answers.items()}


def standardised(tokens: Tensor, statistics: Tokens) -> dict[str, Tensor]:
    """Level -> its cells [B, n, D]; "all" has the cells of all levels side by side."""
    views = {
        level: (cells - statistics.mean[level]) * statistics.inverse_std[level]
        for level, cells in by_level(tokens, statistics.levels).items()
    }
    return views | ({ALL: torch.cat(list(views.values()), dim=1)} if ALL in statistics.levels else {})


def logits_of(heads: Sequence[Head], tokens: Tensor) -> Tensor:
    """[G, B, C] of G heads that all read the tokens [B, n, D]."""
    query = torch.stack([head.query for head in heads])  # [G, H, D]
    value = torch.stack([head.value for head in heads])  # [G, H, D, D / H]
    groups, num_heads, dim = query.shape
    attention = (tokens @ query.flatten(0, 1).T).softmax(dim=1)  # [B, n, G * H], over the cells
    pooled = (attention.transpose(1, 2) @ tokens).permute(1, 0, 2)  # [G * H, B, D]
    read = torch.bmm(pooled, value.flatten(0, 1))  # [G * H, B, D / H]
    joined = read.view(groups, num_heads, len(tokens), -1).permute(0, 2, 1, 3).reshape(groups, len(tokens), dim)
    weight = torch.stack([head.weight for head in heads])  # [G, D, C]
    bias = torch.stack([head.bias for head in heads])[:, None]  # [G, 1, C]
    return torch.baddbmm(bias, joined, weight)


def _steps(train: Tokens, used: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The images that are used, at most ``BATCH`` at a time: tokens [B, N, D] and classes [B]."""
    start = 0
    for batch in train:
        for tokens in torch.split(batch, BATCH):
            rows = slice(start, start + len(tokens))
            start += len(tokens)
            kept = used[rows]
            if kept.any():
                yield tokens[kept.to(tokens.device)], train.labels[rows][kept].to(tokens.device)
