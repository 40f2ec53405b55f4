"""Retrieval: does a test image find the training images of its class?

``retrieval_*`` compares pooled features, ``dense_*`` compares cell by cell. Mean average precision over the whole
ranking of the gallery (Manning et al. 2008, section 8.4), and recall at 1: the share of queries whose first find has
their class. Features are centred on the training mean, as for k-NN.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hjepa.config import EvaluationConfig
from hjepa.evaluation.outcome import Outcome, sample
from hjepa.evaluation.tokens import ALL, Tokens, by_level

BLOCK = 2**25  # cosines of cells held at once: 128 MiB


@torch.inference_mode()
def judge(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, config: EvaluationConfig, num_classes: int
) -> dict[str, Outcome]:
    """``retrieval_map`` and ``retrieval_recall1`` of a random choice of the test and training images."""
    queries = sample(len(test_x), config.retrieval_queries, seed=config.seeds[0])
    gallery = sample(len(train_x), config.retrieval_gallery, seed=config.seeds[0])
    mean = train_x.mean(dim=0)
    similarity = F.normalize(test_x[queries] - mean, dim=1) @ F.normalize(train_x[gallery] - mean, dim=1).T
    return _outcomes("retrieval", similarity, queries, test_y, train_y[gallery])


@torch.no_grad()
def dense(train: Tokens, test: Tokens, *, config: EvaluationConfig) -> dict[str, dict[str, Outcome]]:
    """``dense_map`` and ``dense_recall1`` of each level.

    Two images are as similar as, on average over the cells of the query, each cell is to the most similar cell of the
    other image. For "all" it is the mean over the levels.
    """
    queries = sample(len(test.labels), config.dense_retrieval_queries, seed=config.seeds[0])
    gallery = sample(len(train.labels), config.dense_retrieval_gallery, seed=config.seeds[0])
    asked, offered = (
        by_level(source.select(indices), train.levels) for source, indices in ((test, queries), (train, gallery))
    )
    similarity = {
        level: dense_similarity(cells - train.mean[level], offered[level] - train.mean[level]).cpu()
        for level, cells in asked.items()
    }
    if ALL in train.levels:
        similarity[ALL] = torch.stack(list(similarity.values())).mean(dim=0)
    return {
        level: _outcomes("dense", found, queries, test.labels, train.labels[gallery])
        for level, found in similarity.items()
    }


def dense_similarity(queries: Tensor, gallery: Tensor) -> Tensor:
    """[Q, G], the mean over the cells of [Q, n, D] of the largest cosine with a cell of [G, m, D]."""
    images, cells = gallery.shape[:2]
    keys = F.normalize(gallery, dim=2).flatten(0, 1).T  # [D, G * m]
    at_once = max(1, BLOCK // (queries.shape[1] * images * cells))
    rows = [
        (chunk @ keys).view(*chunk.shape[:2], images, cells).amax(dim=3).mean(dim=1)
        for chunk in torch.split(F.normalize(queries, dim=2), at_once)
    ]
    return torch.cat(rows)


def average_precision(similarity: Tensor, relevant: Tensor) -> Tensor:
    """[Q] of similarities and bool [Q, G]; NaN for a query without anything relevant."""
    order = similarity.argsort(dim=1, descending=True, stable=True)
    hits = relevant.gather(1, order).float()
    ranks = torch.arange(1, hits.shape[1] + 1, device=hits.device)
    precision = hits.cumsum(dim=1) / ranks
    return (precision * hits).sum(dim=1) / hits.sum(dim=1)


def _outcomes(name: str, similarity: Tensor, queries: Tensor, test_y: Tensor, gallery_y: Tensor) -> dict[str, Outcome]:
    relevant = test_y[queries][:, None] == gallery_y  # [Q, G]
    precision = average_precision(similarity, relevant)
    first = relevant.gather(1, similarity.argmax(dim=1, keepdim=True)).flatten().float()
    found = {}
    for metric, scores in (("map", precision), ("recall1", first)):
        per_item = torch.full((len(test_y),), torch.nan)
        per_item[queries] = scores
        found[f"{name}_{metric}"] = Outcome(scores.nanmean().item(), per_item)
    return found
