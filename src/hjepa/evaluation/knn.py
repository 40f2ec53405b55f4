"""Weighted k-nearest-neighbour classification of frozen features.

The protocol of Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination" (CVPR 2018,
arXiv:1805.01978, section 3.4): cosine similarity s, the k nearest training images vote with weight exp(s / T). One
thing is added: features are centred on the training mean first, because the features of an encoder that was not
trained against it share one large common direction, which cosine similarity would mostly measure.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hjepa.config import EvaluationConfig
from hjepa.evaluation.outcome import Outcome, accuracy


def evaluate(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, config: EvaluationConfig, num_classes: int
) -> dict[str, float]:
    """``knn_top1``: the share of test images whose class is predicted by ``evaluation.knn_k``, from 0 to 1."""
    predicted = predict(
        train_x, train_y, test_x, num_classes=num_classes, k=config.knn_k, temperature=config.knn_temperature
    )
    return {"knn_top1": (predicted == test_y).double().mean().item()}


def judge(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, config: EvaluationConfig, num_classes: int
) -> dict[str, Outcome]:
    """``knn_top1`` of ``evaluation.knn_k``, and ``knn<k>_top1`` of each k in ``evaluation.knn_ks``: one search."""
    similarities, classes = neighbours(train_x, train_y, test_x, k=max(config.knn_k, *config.knn_ks))
    by_k = {
        k: accuracy(
            vote(similarities[:, :k], classes[:, :k], num_classes=num_classes, temperature=config.knn_temperature),
            test_y,
        )
        for k in {config.knn_k, *config.knn_ks}
    }
    return {"knn_top1": by_k[config.knn_k]} | {f"knn{k}_top1": by_k[k] for k in config.knn_ks}


def predict(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    *,
    num_classes: int,
    k: int,
    temperature: float,
    train_chunk: int = 16384,
    test_chunk: int = 1024,
) -> Tensor:
    """The class [M] with the largest vote for each test row; see ``neighbours`` and ``vote``."""
    found = neighbours(train_x, train_y, test_x, k=k, train_chunk=train_chunk, test_chunk=test_chunk)
    return vote(*found, num_classes=num_classes, temperature=temperature)


@torch.inference_mode()
def neighbours(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, *, k: int, train_chunk: int = 16384, test_chunk: int = 1024
) -> tuple[Tensor, Tensor]:
    """Cosine similarity and class of the k nearest training rows of each test row, nearest first.

    Works where the features are. Beyond a normalised copy of ``test_x`` it needs memory for one chunk of training
    rows, one ``test_chunk x train_chunk`` block of similarities, and the k best per test row.

    Args:
        train_x: float [N, D].
        train_y: int64 [N].
        test_x: float [M, D].
        k: All of them where k > N.

    Returns:
        float [M, k] and int64 [M, k].
    """
    k = min(k, len(train_x))
    mean = train_x.mean(dim=0)
    queries = F.normalize(test_x - mean, dim=1)  # [M, D]
    nearest = queries.new_full((len(queries), k), -torch.inf)  # similarities of the best so far
    votes_for = train_y.new_zeros((len(queries), k))  # and their classes
    for chunk_x, chunk_y in zip(torch.split(train_x, train_chunk), torch.split(train_y, train_chunk), strict=True):
        keys = F.normalize(chunk_x - mean, dim=1).T  # [D, n]
        for start in range(0, len(queries), test_chunk):
            rows = slice(start, start + test_chunk)
            found, index = (queries[rows] @ keys).topk(min(k, len(chunk_x)), dim=1)
            nearest[rows], kept = torch.cat([nearest[rows], found], dim=1).topk(k, dim=1)
            votes_for[rows] = torch.cat([votes_for[rows], chunk_y[index]], dim=1).gather(1, kept)
    return nearest, votes_for


@torch.inference_mode()
def vote(
    similarities: Tensor, classes: Tensor, *, num_classes: int, temperature: float, chunk_rows: int = 16384
) -> Tensor:
    """The class [M] with the largest vote of the neighbours (both [M, k], nearest first); the lowest where equal."""
    # Relative to the nearest neighbour, which changes no vote's share, so that a small temperature cannot overflow.
    weights = ((similarities - similarities[:, :1]) / temperature).exp()
    winners = [
        weight.new_zeros((len(weight), num_classes)).scatter_add_(1, voted, weight).argmax(dim=1)
        for weight, voted in zip(torch.split(weights, chunk_rows), torch.split(classes, chunk_rows), strict=True)
    ]
    return torch.cat(winners)
