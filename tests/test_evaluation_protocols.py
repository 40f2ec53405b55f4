"""Tokens, label-free measures, retrieval, low-shot and intervals: against closed forms and scikit-learn."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.metrics import average_precision_score
from torch import Tensor, nn

from hjepa.config import EvaluationConfig, load_config
from hjepa.errors import FutileRetryError, UserError
from hjepa.evaluation import (
    Features,
    Tokens,
    attentive,
    evaluate_tokens,
    extract,
    label_free,
    linear,
    low_shot,
    pixel_pca,
    read_tokens,
    retrieval,
)
from hjepa.evaluation.outcome import stratified
from hjepa.export import untrained_encoder
from hjepa.models.hjepa import merge_cells
from hjepa.utils.bootstrap import intervals, paired_difference

TRAIN = 1200
CONFIG = EvaluationConfig(attentive_epochs=4, attentive_heads=2)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.from_numpy(images).float(), torch.from_numpy(labels).long()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class TokensAsImages(nn.Module):
    """An encoder whose images are already tokens [B, 16, 8], a 4x4 grid."""

    num_levels = 2

    def preprocess(self, images: Tensor) -> Tensor:
        return images

    def tokens(self, x: Tensor) -> Tensor:
        return x


def tokens_of(x: Tensor, y: Tensor | None, cache_gb: float = 1.0) -> Tokens:
    labels = [None] * len(x.split(100)) if y is None else list(y.split(100))
    return Tokens(
        TokensAsImages(),
        lambda: zip(x.split(100), labels, strict=True),  # type: ignore[arg-type]
        device="cpu",
        cache_gb=cache_gb,
    )


def one_cell_tells(count: int, seed: int, classes: int = 4) -> tuple[Tensor, Tensor]:
    """Tokens of noise; one cell, anywhere, has a mark in dimension 7 and its class in the first dimensions."""
    x = 0.5 * noise(count, 16, 8, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (count,), generator=generator)
    cell = torch.randint(16, (count,), generator=generator)
    x[torch.arange(count), cell, y] += 4
    x[torch.arange(count), cell, 7] += 4
    return x, y


# -- attentive probe -------------------------------------------------------------------------------------------------


def test_attentive__finds_the_cell_that_tells_the_class() -> None:
    train, test = tokens_of(*one_cell_tells(1500, 0)), tokens_of(*one_cell_tells(500, 1))
    found = attentive.evaluate(train, test, config=EvaluationConfig(attentive_lr=(0.02,)), num_classes=4)
    assert list(found) == ["0", "1", "all"]
    outcome = found["0"]["attentive_top1"]
    assert outcome.value > 0.97
    assert outcome.std is not None
    assert outcome.std < 0.03
    assert outcome.per_item is not None
    assert outcome.per_item.mean().item() == pytest.approx(outcome.value, abs=1e-6)


def test_attentive__shuffled_labels_give_chance() -> None:
    (x, y), (test_x, test_y) = one_cell_tells(800, 0), one_cell_tells(500, 1)
    # Both, for tokens of one class get one answer: with the true test labels all of them would be right or wrong.
    y, test_y = (
        labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(2))] for labels in (y, test_y)
    )
    found = attentive.evaluate(tokens_of(x, y), tokens_of(test_x, test_y), config=CONFIG, num_classes=4)
    for outcomes in found.values():
        assert outcomes["attentive_top1"].value == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 500) ** 0.5)


def test_attentive__folded_attention_is_cross_attention_written_out() -> None:
    heads = [attentive.Head(8, 2, 3, seed) for seed in range(2)]
    x = noise(5, 16, 8)
    logits = attentive.logits_of(heads, x)
    for head, found in zip(heads, logits, strict=True):
        parts = []
        for query, value in zip(head.query, head.value, strict=True):
            weights = (x @ query).softmax(dim=1)  # [B, n]
            parts.append((weights[:, :, None] * (x @ value)).sum(dim=1))
        torch.testing.assert_close(found, torch.cat(parts, dim=1) @ head.weight + head.bias)


def test_attentive__probes_trained_together_are_those_trained_alone() -> None:
    train = tokens_of(*one_cell_tells(300, 0))
    settings = [(1e-2, 0.1), (1e-3, 0.0)]
    used = torch.ones(300, dtype=torch.bool)
    together = [attentive.Head(8, 2, 4, seed) for seed in (0, 1)]
    attentive.fit(train, {"0": together}, {"0": settings}, used=used, epochs=1)
    for seed, setting in enumerate(settings):
        alone = attentive.Head(8, 2, 4, seed)
        attentive.fit(train, {"0": [alone]}, {"0": [setting]}, used=used, epochs=1)
        torch.testing.assert_close(alone.weight, together[seed].weight)
        torch.testing.assert_close(alone.query, together[seed].query)


def test_attentive__hopeless_settings_are_not_chosen() -> None:
    config = EvaluationConfig(attentive_lr=(1e-7, 0.02), attentive_weight_decay=(0.0,), attentive_heads=2)
    chosen = attentive.choose(tokens_of(*one_cell_tells(600, 0)), config=config, num_classes=4)
    assert chosen == dict.fromkeys(["0", "1", "all"], (0.02, 0.0))


def test_attentive__heads_must_divide_the_embedding() -> None:
    train = tokens_of(*one_cell_tells(100, 0))
    with pytest.raises(UserError, match=r"evaluation.attentive_heads=3 does not divide the tokens' 8 dimensions"):
        attentive.evaluate(train, train, config=EvaluationConfig(attentive_heads=3), num_classes=4)


# -- tokens ----------------------------------------------------------------------------------------------------------


def test_read_tokens__gives_the_features_that_extract_gives() -> None:
    config = load_config("demo", ["model.depth=1", "model.embed_dim=16", "model.num_heads=2"])
    encoder = untrained_encoder(config, mean=[0.3], std=[0.3])
    images = torch.randint(0, 256, (70, 1, 28, 28), generator=torch.Generator().manual_seed(0))
    batches = [(part.to(torch.uint8), torch.arange(len(part))) for part in images.split(32)]
    tokens = read_tokens(encoder, lambda: batches, config=EvaluationConfig(), device="cpu")
    expected = extract(encoder, batches, "cpu")
    assert tokens.features is not None
    assert list(tokens.features.tables) == list(expected.tables)
    for level, table in expected.tables.items():
        assert torch.equal(tokens.features.tables[level], table)
    assert torch.equal(tokens.features.labels, expected.labels)


def test_tokens__computed_anew_give_what_cached_ones_give() -> None:
    split, other = one_cell_tells(300, 0), one_cell_tells(100, 1)
    answers = []
    for gigabytes in (1.0, 0.0):
        train, test = tokens_of(*split, gigabytes), tokens_of(*other, gigabytes)
        assert train.cached == (gigabytes > 0)
        answers.append(evaluate_tokens(train, test, config=CONFIG, num_classes=4))
    for level, outcomes in answers[0].items():
        for metric, outcome in outcomes.items():
            assert outcome.value == answers[1][level][metric].value
            torch.testing.assert_close(outcome.per_item, answers[1][level][metric].per_item, equal_nan=True)


def test_tokens__know_their_levels_and_statistics() -> None:
    x, y = one_cell_tells(250, 0)
    tokens = tokens_of(x, y)
    assert tokens.labels.equal(y)
    assert torch.cat(list(tokens)).equal(x)
    assert tokens.select(torch.tensor([3, 120, 249])).equal(x[[3, 120, 249]])
    views = attentive.standardised(x, tokens)
    coarse = merge_cells(x, 1)
    torch.testing.assert_close(tokens.mean["1"], coarse.mean(dim=(0, 1)))
    torch.testing.assert_close(views["1"].std(dim=(0, 1), correction=0), torch.ones(8))
    assert views["all"].shape == (250, 16 + 4, 8)


def test_tokens__broken_or_missing_are_clear_errors() -> None:
    x, y = one_cell_tells(200, 0)
    x[150, 3, 2] = torch.nan
    with pytest.raises(FutileRetryError, match="tokens of 1 of 200 images are not finite"):
        tokens_of(x, y)
    with pytest.raises(UserError, match="split is empty"):
        Tokens(TokensAsImages(), list, device="cpu", cache_gb=1)
    unlabelled = tokens_of(noise(10, 16, 8), None)
    with pytest.raises(UserError, match="10 of 10 images in the train split have no label"):
        evaluate_tokens(unlabelled, unlabelled, config=CONFIG, num_classes=4)


# -- retrieval -------------------------------------------------------------------------------------------------------


def test_retrieval__average_precision_is_scikit_learns() -> None:
    similarity, relevant = noise(20, 50), noise(20, 50, seed=1) > 0.8
    relevant[0] = False
    found = retrieval.average_precision(similarity, relevant)
    assert found[0].isnan()
    expected = [average_precision_score(relevant[q].numpy(), similarity[q].numpy()) for q in range(1, 20)]
    np.testing.assert_allclose(found[1:].numpy(), expected, rtol=1e-5)


def test_retrieval__asks_so_many_and_leaves_the_rest_out(digits: tuple[Tensor, Tensor]) -> None:
    x, y = digits
    config = EvaluationConfig(retrieval_queries=100, retrieval_gallery=300)
    found = retrieval.judge(x[:TRAIN], y[:TRAIN], x[TRAIN:], y[TRAIN:], config, 10)
    per_item = found["retrieval_recall1"].per_item
    assert per_item is not None
    assert int(per_item.isfinite().sum()) == 100
    assert 0.85 < found["retrieval_recall1"].value < 1
    assert 0.4 < found["retrieval_map"].value < found["retrieval_recall1"].value


def test_dense_retrieval__is_the_mean_of_the_best_cosines() -> None:
    queries, gallery = noise(3, 4, 8), noise(5, 6, 8, seed=1)
    cosine = nn.functional.cosine_similarity(queries[:, None, :, None], gallery[None, :, None], dim=-1)  # [3, 5, 4, 6]
    torch.testing.assert_close(retrieval.dense_similarity(queries, gallery), cosine.amax(3).mean(2))


def test_dense_retrieval__finds_images_that_share_a_cell() -> None:
    found = retrieval.dense(tokens_of(*one_cell_tells(600, 0)), tokens_of(*one_cell_tells(200, 1)), config=CONFIG)
    assert list(found) == ["0", "1", "all"]
    assert all(0.25 < outcomes["dense_map"].value < 1 for outcomes in found.values())
    perfect = nn.functional.one_hot(torch.arange(40) % 4, 8).float()[:, None].expand(40, 16, 8)
    split = tokens_of(perfect, torch.arange(40) % 4)
    assert {outcome.value for outcomes in retrieval.dense(split, split, config=CONFIG).values()
            for outcome in outcomes.values()} == {1.0}  # fmt: skip


# -- low-shot and the penalty ----------------------------------------------------------------------------------------


def test_low_shot__more_images_are_better_and_seeds_spread(digits: tuple[Tensor, Tensor]) -> None:
    x, y = digits
    found = low_shot.judge(x[:TRAIN], y[:TRAIN], x[TRAIN:], y[TRAIN:], EvaluationConfig(), 10)
    few, more = found["low_shot_1pct_top1"], found["low_shot_10pct_top1"]
    assert 0.3 < few.value < more.value - 0.05 < 0.95
    assert few.std is not None
    assert 0 < few.std < 0.2
    one = low_shot.judge(x[:TRAIN], y[:TRAIN], x[TRAIN:], y[TRAIN:], EvaluationConfig(seeds=(0,)), 10)
    assert one["low_shot_1pct_top1"].std is None


def test_stratified__takes_its_share_of_each_class() -> None:
    y = torch.tensor([0] * 200 + [1] * 50 + [2] * 3)
    chosen = stratified(y, 0.1, seed=0)
    assert y[chosen].bincount(minlength=3).tolist() == [20, 5, 0]
    assert y[stratified(y, 0.01, seed=0, at_least=1)].bincount().tolist() == [2, 1, 1]
    assert not chosen.equal(stratified(y, 0.1, seed=1))


def test_choose_l2__noise_features_want_a_penalty() -> None:
    y = torch.arange(400) % 4
    x = nn.functional.one_hot(y, 4) + noise(400, 4)
    noisy = torch.cat([x, 2 * noise(400, 300, seed=1)], dim=1)
    grid = (1e-8, 0.1)
    l2, probe = linear.choose_l2(noisy, y, num_classes=4, grid=grid, iterations=60, seed=0)
    assert l2 == 0.1
    assert probe is not None
    assert linear.choose_l2(noisy, y, num_classes=4, grid=(1e-3,), iterations=60, seed=0) == (1e-3, None)
    # Three images of a class leave none to hold out.
    assert linear.choose_l2(x[:12], y[:12], num_classes=4, grid=(1, 2, 3), iterations=9, seed=0) == (2, None)


def test_fit__warm_start_ends_where_zeros_end(digits: tuple[Tensor, Tensor]) -> None:
    x, y = digits[0].double(), digits[1]
    start = linear.fit(x, y, num_classes=10, l2=1e-2, iterations=50)
    warm, cold = (linear.fit(x, y, num_classes=10, l2=1e-3, iterations=500, start=begin) for begin in (start, None))
    torch.testing.assert_close(warm.weight, cold.weight, atol=1e-4, rtol=0)


# -- without labels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_alpha_req__recovers_the_exponent(exponent: float) -> None:
    rotation = torch.linalg.qr(noise(32, 32).double()).Q
    # Orthonormal columns without a mean: the covariance's eigenvalues are exactly the squared scales over n.
    basis = torch.linalg.qr(torch.cat([torch.ones(200, 1), noise(200, 32, seed=1)], dim=1).double()).Q[:, 1:]
    scale = torch.arange(1, 33, dtype=torch.float64) ** (-exponent / 2)
    assert label_free.alpha_req(basis * scale @ rotation + 3) == pytest.approx(exponent, abs=1e-6)


def test_uniformity__closed_forms() -> None:
    assert label_free.uniformity(torch.ones(10, 4)) == pytest.approx(0)
    opposite = torch.tensor([[1.0, 0], [-2.0, 0]])  # distance 2 on the sphere
    assert label_free.uniformity(opposite) == pytest.approx(-8)
    sphere = noise(2000, 64)
    assert label_free.uniformity(sphere) == pytest.approx(-4 + 8 / 64, abs=0.01)  # cos ~ N(0, 1/64), nearly


def test_alignment__is_the_mean_squared_distance_of_views() -> None:
    views = noise(6, 3, 5)
    unit = nn.functional.normalize(views, dim=2)
    distances = torch.stack([(unit[:, a] - unit[:, b]).square().sum(1) for a, b in ((0, 1), (0, 2), (1, 2))])
    assert label_free.alignment(views) == pytest.approx(distances.mean().item(), rel=1e-5)
    assert label_free.alignment(views[:, :1].expand(6, 4, 5)) == pytest.approx(0, abs=1e-9)


def test_lidar__well_separated_images_have_the_rank_of_their_centres() -> None:
    centres = torch.cat([torch.eye(8), -torch.eye(8)])  # isotropic: 8 equal directions of 12
    views = nn.functional.pad(centres, (0, 4))[:, None] + 0.01 * noise(16, 200, 12)
    assert label_free.lidar(views) == pytest.approx(8, abs=0.05)
    assert label_free.lidar(torch.ones(5, 3, 4)) == 0


def test_measure__leaves_out_what_does_not_exist() -> None:
    found = label_free.measure(noise(500, 16), noise(30, 4, 16))
    assert found.keys() == {"rankme", "std", "alpha_req", "uniformity", "alignment", "lidar"}
    assert found["rankme"] == pytest.approx(16, abs=0.5)
    assert "alpha_req" not in label_free.measure(torch.ones(10, 4))


class Brightness(nn.Module):
    def preprocess(self, images: list[Tensor]) -> Tensor:
        return torch.stack([image.float().mean(dim=(1, 2)) for image in images])

    def embed(self, x: Tensor) -> dict[str, Tensor]:
        return {"0": x, "all": x.repeat(1, 2)}


def test_embed_views__are_seeded_crops_of_each_image() -> None:
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (3, 20 + i, 24), dtype=torch.uint8, generator=generator) for i in range(7)]
    images[2] = torch.full((3, 20, 24), 9, dtype=torch.uint8)

    def views(size: int, seed: int = 0) -> dict[str, Tensor]:
        batches = [(images[i : i + size], None) for i in range(0, 7, size)]
        config = EvaluationConfig(view_images=5, views=4, view_scale=(0.3, 0.6), seeds=(seed,))
        return label_free.embed_views(Brightness(), batches, config=config, device="cpu")

    found = views(3)
    assert found["0"].shape == (5, 4, 3)
    assert found["all"].shape == (5, 4, 6)
    assert found["0"].equal(views(2)["0"])
    assert not found["0"].equal(views(3, seed=1)["0"])
    assert found["0"][2].equal(torch.full((4, 3), 9.0))  # all views of the plain image are of that image
    assert found["0"][0].std(dim=0).min() > 0


def test_spearman__known_answers() -> None:
    def points(x: list[float], y: list[float]) -> list[dict[str, float]]:
        return [{"images_seen": i, "rankme": a, "knn_top1": b} for i, (a, b) in enumerate(zip(x, y, strict=True))]

    assert label_free.spearman(points([1, 2, 9], [0.1, 0.5, 0.6])) == pytest.approx(1)
    assert label_free.spearman(points([1, 2, 9], [3, 2, 1])) == pytest.approx(-1)
    assert label_free.spearman(points([1, 2, 3, 4, 5], [5, 6, 7, 8, 7])) == pytest.approx(0.8207826816681233)
    assert label_free.spearman(points([1, 2], [1, 2])) is None
    assert label_free.spearman(points([1, 2, 3], [1, 1, 1])) is None


def test_pixel_pca__spans_what_scikit_learns_spans(digits: tuple[Tensor, Tensor]) -> None:
    x, y = digits
    train, test = pixel_pca(Features({"-": x[:TRAIN]}, y[:TRAIN]), Features({"-": x[TRAIN:]}, y[TRAIN:]), components=8)
    expected = PCA(8).fit(x[:TRAIN].numpy()).transform(x[TRAIN:].numpy())
    np.testing.assert_allclose(np.abs(test.tables["-"].numpy()), np.abs(expected), atol=0.02)
    assert train.tables["-"].shape == (TRAIN, 8)
    assert pixel_pca(Features({"-": x[:5]}, y[:5]), test._replace(tables={"-": x[5:9]}))[1].tables["-"].shape == (4, 5)


# -- intervals -------------------------------------------------------------------------------------------------------


def test_intervals__of_an_accuracy_are_binomial() -> None:
    correct = np.arange(1000) < 730
    low, high = intervals(np.stack([correct, ~correct], axis=1), resamples=4000)
    half = 1.96 * (0.73 * 0.27 / 1000) ** 0.5
    assert low[0] == pytest.approx(0.73 - half, abs=0.003)
    assert high[0] == pytest.approx(0.73 + half, abs=0.003)
    # The same resamples for every column.
    np.testing.assert_allclose([low[1], high[1]], [1 - high[0], 1 - low[0]])


def test_intervals__cover_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        low, high = intervals(rng.random((150, 1)) < 0.6, resamples=300, seed=trial)
        covered += bool(low[0] <= 0.6 <= high[0])
    assert 0.89 < covered / 200 < 0.99  # 95 %, less what the percentile method lacks, four standard deviations wide


def test_intervals__items_not_asked_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).random((400, 2))
    values[100:, 1] = np.nan
    low, high = intervals(values)
    assert low[1] < np.nanmean(values[:, 1]) < high[1]
    assert 1.6 < (high[1] - low[1]) / (high[0] - low[0]) < 2.5  # a quarter of the items: twice as wide
    monkeypatch.setattr("hjepa.utils.bootstrap.CHUNK_ITEMS", 1000)
    np.testing.assert_allclose(intervals(values), (low, high), rtol=1e-12)
    assert np.isnan(intervals(np.full((5, 1), np.nan))).all()


def test_paired_difference__is_sharper_than_two_intervals() -> None:
    rng = np.random.default_rng(0)
    a = rng.random(2000) < 0.7
    b = a.copy()
    b[a.nonzero()[0][:40]] = False  # worse on 40 items, better on none
    difference, low, high = paired_difference(a, b)
    assert difference == pytest.approx(0.02)
    assert 0.01 < low < 0.02 < high < 0.03
    alone = intervals(np.stack([a, b], axis=1))
    assert alone[0][0] < alone[1][1]  # the intervals of the two overlap
    assert paired_difference(a, a) == (0, 0, 0)
    with pytest.raises(ValueError, match="expected two lists of as many items"):
        paired_difference(a, b[:5])


def test_bootstrap__does_without_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import hjepa.utils.bootstrap"
    subprocess.run([sys.executable, "-c", code], check=True)


# -- configuration ---------------------------------------------------------------------------------------------------


def test_linear_l2__one_number_is_a_grid_of_one() -> None:
    assert load_config("default", ["evaluation.linear_l2=1e-3"]).evaluation.linear_l2 == (1e-3,)
    assert load_config("default", ["evaluation.linear_l2=[0, 1e-3]"]).evaluation.linear_l2 == (0, 1e-3)
    with pytest.raises(UserError, match="linear_l2"):
        load_config("default", ["evaluation.linear_l2=true"])
