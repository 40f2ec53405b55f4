"""The collapse measures against clouds whose answer is known, and what the monitor makes of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hjepa.config import CollapseConfig
from hjepa.models import HierarchicalEncoder, VisionTransformer
from hjepa.utils.collapse import CollapseMonitor, collapse_metrics, collapse_of_levels, effective_rank

HEALTHY = {
    f"collapse/{where}{name}": value
    for where in ("", "level_0/", "level_1/")
    for name, value in (("std", 0.3), ("rankme", 40.0), ("cosine", 0.1), ("norm", 20.0))
}


def cloud(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def orthonormal(n: int, d: int) -> Tensor:
    """(n, d) with mean 0 and d equal singular values of 1."""
    z = cloud(n, d).double()
    q, _ = torch.linalg.qr(z - z.mean(0))
    return q


# -- the measures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "d"), [(64, 16), (17, 48)])
def test_rank__is_rankme_of_the_centred_cloud(n: int, d: int) -> None:
    z = cloud(n, d) * torch.linspace(0.1, 3, d) + 5
    singular = torch.linalg.svdvals((z - z.mean(0)).double())
    p = singular / singular.sum()
    expected = math.exp(-float((p * (p + 1e-300).log()).sum()))
    assert effective_rank(z) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("rank", [1, 2, 7])
def test_rank__of_equal_directions_is_their_number(rank: int) -> None:
    basis = orthonormal(32, rank)
    wide = basis @ torch.linalg.qr(cloud(24, rank).double())[0].T
    assert effective_rank(wide + 3) == pytest.approx(rank, rel=1e-4)
    assert effective_rank(1e-3 * wide) == pytest.approx(rank, rel=1e-4), "scale does not count"


def test_std_and_cosine__known_values() -> None:
    z = math.sqrt(32) * orthonormal(32, 8)
    found = collapse_metrics(z)
    assert found["std"] == pytest.approx(1)
    # Vectors that sum to 0: the squared length of their sum, 0, is n + the sum over pairs for unit vectors.
    opposite = torch.cat([torch.eye(4), -torch.eye(4)])
    assert collapse_metrics(opposite)["cosine"] == pytest.approx(-1 / 7)
    assert collapse_metrics(torch.rand(20, 1) + torch.arange(1, 6))["cosine"] > 0.9
    assert collapse_metrics(opposite + 100)["cosine"] == pytest.approx(1, abs=1e-3)


def test_measures__of_one_point_many_times() -> None:
    same = cloud(1, 96).expand(50, 96)
    assert collapse_metrics(same) == {
        "std": 0.0,
        "rankme": 0.0,
        "cosine": pytest.approx(1),
        "norm": pytest.approx(float(same[0].norm())),
    }
    # What rounding makes of equal images is no spread, though it points everywhere.
    noisy = (same.double() * (1 + 1e-7 * cloud(50, 96).double())).float()
    assert noisy.std(0).max() > 0
    assert collapse_metrics(noisy)["rankme"] == 0.0
    assert collapse_metrics(same + 1e-3 * cloud(50, 96))["rankme"] > 30, "a small spread is one"


def test_measures__are_nan_where_an_embedding_is_not_finite() -> None:
    z = cloud(8, 4)
    z[3, 2] = math.inf
    assert all(math.isnan(value) for value in collapse_metrics(z).values())


def test_measures__are_deterministic() -> None:
    z = cloud(200, 300)
    assert collapse_metrics(z) == collapse_metrics(z.clone())


@pytest.fixture
def encoder() -> HierarchicalEncoder:
    torch.manual_seed(0)
    vit = VisionTransformer(image_size=32, patch_size=8, channels=1, embed_dim=24, depth=2, num_heads=2)
    return HierarchicalEncoder(vit, num_levels=2).eval()


def measure(encoder: HierarchicalEncoder, images: Tensor) -> dict[str, float]:
    return collapse_of_levels(encoder.embed(images))


@torch.no_grad()
def test_measures__of_identical_images_are_collapsed_at_every_level(encoder: HierarchicalEncoder) -> None:
    images = cloud(1, 32 * 32).view(1, 1, 32, 32).expand(40, -1, -1, -1)
    # The cells of one image differ by position and content; that must not pass for spread between images.
    assert encoder.tokens(images)[0].std(0).mean() > 0.1
    found = measure(encoder, images)
    assert set(found) == set(HEALTHY)
    for key, value in found.items():
        if key.endswith("std"):
            assert value < 1e-6, key
        elif key.endswith("rankme"):
            assert value <= 1, key
        elif key.endswith("cosine"):
            assert value == pytest.approx(1), key
    diagnosis = CollapseMonitor(CollapseConfig()).update(found)
    assert diagnosis is not None
    assert "of level 0" in diagnosis
    assert "of level 1" in diagnosis


@torch.no_grad()
def test_measures__of_different_images_are_not(encoder: HierarchicalEncoder) -> None:
    images = cloud(60, 32 * 32).view(60, 1, 32, 32)
    found = measure(encoder, images)
    assert CollapseMonitor(CollapseConfig()).update(found) is None
    assert found["collapse/level_1/rankme"] > 5


# -- the monitor -----------------------------------------------------------------------------------------------------


def test_monitor__names_the_level_and_the_measure() -> None:
    monitor = CollapseMonitor(CollapseConfig(min_std=0.01, min_rank=2.0))
    assert monitor.update(HEALTHY) is None
    diagnosis = monitor.update(HEALTHY | {"collapse/level_1/rankme": 1.25})
    assert diagnosis == "collapse: of level 1 the effective rank is 1.25, below 2 (1 in a row)"
    both = {"collapse/std": 0.001, "collapse/rankme": 1.0, "collapse/cosine": 1.0}
    assert monitor.update(both) == (
        "collapse: of the whole embedding the standard deviation across images is 0.001, below 0.01 and the effective "
        "rank is 1.00, below 2 (2 in a row)"
    )
    assert monitor.diagnosis.endswith("(2 in a row)")


def test_monitor__counts_in_a_row_and_stops_as_configured() -> None:
    bad = HEALTHY | {"collapse/level_0/std": 0.0}
    monitor = CollapseMonitor(CollapseConfig(patience=2))
    for found, strikes, stop in ((bad, 1, False), (HEALTHY, 0, False), (bad, 1, False), (bad, 2, True)):
        monitor.update(found)
        assert (monitor.strikes, monitor.must_stop) == (strikes, stop)
    warning = CollapseMonitor(CollapseConfig(patience=1, action="warn"))
    assert warning.update(bad) is not None
    assert not warning.must_stop


def test_monitor__judges_what_is_there() -> None:
    monitor = CollapseMonitor(CollapseConfig(), strikes=1)
    for nothing in ({}, {"probe/knn_top1": 0.5}, {"collapse/cosine": 1.0}):
        assert monitor.update(nothing) is None
        assert monitor.strikes == 1, "no measurement is no sign of health"
    assert monitor.update({"collapse/level_1/std": 0.5}) is None
    assert monitor.strikes == 0
    assert "level 2" in str(monitor.update({"collapse/level_2/std": 0.0, "collapse/rankme": 9.0}))


def test_monitor__embeddings_that_are_not_finite_are_collapsed() -> None:
    assert "rank is nan" in str(CollapseMonitor(CollapseConfig()).update({"collapse/rankme": math.nan}))
