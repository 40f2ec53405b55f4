"""Protocols against scikit-learn on real digits, against chance, and against what must not change their answer."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

from hjepa.config import EvaluationConfig
from hjepa.errors import FutileRetryError, UserError
from hjepa.evaluation import PROTOCOLS, Features, Outcome, evaluate_features, extract, knn, linear, raw_pixels
from hjepa.evaluation.features import UNLABELLED

CONFIG = EvaluationConfig()
CLASSES = 10
TRAIN = 1200  # of the 1797 digits


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small are slower on several threads, and much slower where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """8x8 handwritten digits: float32 [1797, 64] in 0..16, int64 [1797]."""
    images, labels = load_digits(return_X_y=True)
    return torch.from_numpy(images).float(), torch.from_numpy(labels).long()


def halves(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x[:TRAIN], y[:TRAIN], x[TRAIN:], y[TRAIN:]


def split(x: Tensor, y: Tensor) -> tuple[Features, Features]:
    return Features({"0": x[:TRAIN]}, y[:TRAIN]), Features({"0": x[TRAIN:]}, y[TRAIN:])


def values(name: str, train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> dict[str, float]:
    found = PROTOCOLS[name](train_x, train_y, test_x, test_y, CONFIG, CLASSES)
    return {metric: outcome.value for metric, outcome in found.items()}


def nearest(train_x: Tensor, train_y: Tensor, test_x: Tensor, *, k: int = 20, **options: int) -> Tensor:
    return knn.predict(train_x, train_y, test_x, num_classes=CLASSES, k=k, temperature=0.07, **options)


# -- every protocol --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROTOCOLS)
def test_protocol__perfect_features_give_100_percent(name: str, digits: tuple[Tensor, Tensor]) -> None:
    _, y = digits
    one_hot = nn.functional.one_hot(y, CLASSES).float()
    assert set(values(name, *halves(one_hot, y)).values()) == {1.0}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_protocol__shuffled_labels_give_chance(name: str, digits: tuple[Tensor, Tensor]) -> None:
    x, y = digits
    y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))]
    tests = len(y) - TRAIN
    # Each answer is right with probability 1/10 whatever the features are: four binomial standard deviations.
    tolerance = 4 * math.sqrt(0.1 * 0.9 / tests)
    for value in values(name, *halves(x, y)).values():
        assert value == pytest.approx(0.1, abs=tolerance)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_protocol__one_class_is_always_right(name: str, digits: tuple[Tensor, Tensor]) -> None:
    x, y = digits
    found = PROTOCOLS[name](*halves(x, torch.zeros_like(y)), CONFIG, 1)
    assert {outcome.value for outcome in found.values()} == {1.0}


@pytest.mark.parametrize("name", ["knn", "linear"])
def test_protocol__class_absent_from_training_is_never_predicted(name: str, digits: tuple[Tensor, Tensor]) -> None:
    x, y = digits
    train_x, train_y, test_x, test_y = halves(x, y)
    seen = train_y != 7
    value = values(name, train_x[seen], train_y[seen], test_x, test_y)[f"{name}_top1"]
    assert 0.7 < value <= (test_y != 7).double().mean().item()


@pytest.mark.parametrize("name", ["knn", "linear"])
def test_protocol__identical_features_are_no_better_than_the_commonest_class(name: str) -> None:
    train_x, test_x = torch.full((100, 8), 0.1), torch.full((50, 8), 0.1)
    train_y = torch.tensor([3] * 60 + [5] * 40)
    test_y = torch.tensor([3] * 20 + [5] * 30)
    config = EvaluationConfig(knn_k=100, knn_ks=(100,))
    found = PROTOCOLS[name](train_x, train_y, test_x, test_y, config, CLASSES)
    assert {outcome.value for outcome in found.values()} == {0.4}


# -- k-NN ------------------------------------------------------------------------------------------------------------


def test_knn__predicts_what_scikit_learn_predicts(digits: tuple[Tensor, Tensor]) -> None:
    train_x, train_y, test_x, _ = halves(*digits)
    reference = KNeighborsClassifier(20, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07))
    mean = train_x.double().mean(dim=0)
    reference.fit((train_x - mean).numpy(), train_y.numpy())
    expected = reference.predict((test_x - mean).numpy())
    assert (nearest(train_x, train_y, test_x).numpy() == expected).all()


def test_knn__common_shift_changes_nothing(digits: tuple[Tensor, Tensor]) -> None:
    train_x, train_y, test_x, _ = halves(*digits)
    shift = torch.linspace(-50, 50, train_x.shape[1])
    assert nearest(train_x + shift, train_y, test_x + shift).equal(nearest(train_x, train_y, test_x))


def test_knn__rotation_and_scale_change_nothing(digits: tuple[Tensor, Tensor]) -> None:
    train_x, train_y, test_x, _ = halves(*digits)
    rotation = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0))).Q
    rotated = nearest(3 * train_x @ rotation, train_y, 3 * test_x @ rotation)
    assert rotated.equal(nearest(train_x, train_y, test_x))


@pytest.mark.parametrize(("train_chunk", "test_chunk"), [(1, 597), (7, 100), (TRAIN - 1, 1), (TRAIN, 10_000)])
def test_knn__chunk_sizes_change_nothing(digits: tuple[Tensor, Tensor], train_chunk: int, test_chunk: int) -> None:
    train_x, train_y, test_x, _ = halves(*digits)
    chunked = nearest(train_x, train_y, test_x, train_chunk=train_chunk, test_chunk=test_chunk)
    assert chunked.equal(nearest(train_x, train_y, test_x))


def test_knn__more_neighbours_than_images_lets_all_vote(digits: tuple[Tensor, Tensor]) -> None:
    train_x, train_y, test_x, _ = halves(*digits)
    few_x, few_y = train_x[:30], train_y[:30]
    everyone = nearest(few_x, few_y, test_x, k=30)
    assert nearest(few_x, few_y, test_x, k=1_000_000, train_chunk=8).equal(everyone)
    assert not everyone.equal(nearest(few_x, few_y, test_x, k=1))


def test_knn__tiny_temperature_is_the_nearest_neighbour(digits: tuple[Tensor, Tensor]) -> None:
    train_x, train_y, test_x, _ = halves(*digits)
    cold = knn.predict(train_x, train_y, test_x, num_classes=CLASSES, k=20, temperature=1e-6)
    assert cold.equal(nearest(train_x, train_y, test_x, k=1))


def test_knn__every_k_of_one_search_is_what_its_own_search_finds(digits: tuple[Tensor, Tensor]) -> None:
    train_x, train_y, test_x, test_y = halves(*digits)
    found = knn.judge(train_x, train_y, test_x, test_y, CONFIG, CLASSES)
    for k in (10, 20, 100, 200):
        assert found[f"knn{k}_top1"].predicted.equal(nearest(train_x, train_y, test_x, k=k))  # type: ignore[union-attr]
    cheap = knn.evaluate(train_x, train_y, test_x, test_y, CONFIG, CLASSES)
    assert cheap == {"knn_top1": found["knn20_top1"].value}


# -- linear probe ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 5e-4), (torch.float32, 1e-2)])
def test_linear__converges_to_scikit_learn(digits: tuple[Tensor, Tensor], dtype: torch.dtype, tolerance: float) -> None:
    train_x, train_y, test_x, test_y = halves(digits[0].to(dtype), digits[1])
    l2 = 1e-3
    probe = linear.fit(train_x, train_y, num_classes=CLASSES, l2=l2, iterations=1000)
    standardised = ((train_x - probe.mean) * probe.inverse_std).double().numpy()
    # scikit-learn minimises C * sum(cross-entropy) + sum(weight^2) / 2.
    reference = LogisticRegression(C=1 / (2 * l2 * TRAIN), solver="newton-cholesky", tol=1e-10).fit(
        standardised, train_y.numpy()
    )
    np.testing.assert_allclose(probe.weight.numpy(), reference.coef_, atol=tolerance)
    shift = probe.bias.numpy() - reference.intercept_  # a common shift of all biases changes no probability
    np.testing.assert_allclose(shift, shift.mean(), atol=tolerance)
    accuracy = (probe.logits(test_x).argmax(dim=1) == test_y).double().mean().item()
    expected = reference.score(((test_x - probe.mean) * probe.inverse_std).double().numpy(), test_y.numpy())
    assert accuracy == pytest.approx(expected, abs=1e-3)


def test_linear__same_input_gives_the_same_bits(digits: tuple[Tensor, Tensor]) -> None:
    train_x, train_y, _, _ = halves(*digits)
    first, second = (linear.fit(train_x, train_y, num_classes=CLASSES, l2=1e-4, iterations=20) for _ in range(2))
    assert first.weight.equal(second.weight)
    assert first.bias.equal(second.bias)


def test_linear__chunk_size_changes_nothing_but_rounding(digits: tuple[Tensor, Tensor]) -> None:
    train_x, train_y, _, _ = halves(*digits)
    whole, chunked = (
        linear.fit(train_x, train_y, num_classes=CLASSES, l2=1e-3, iterations=300, chunk_rows=rows)
        for rows in (TRAIN, 7)
    )
    torch.testing.assert_close(whole.weight, chunked.weight, atol=1e-3, rtol=0)


def test_linear__scale_and_shift_of_each_feature_change_nothing(digits: tuple[Tensor, Tensor]) -> None:
    x, y = digits
    scale, shift = torch.linspace(0.1, 100, 64), torch.linspace(-5, 5, 64)
    moved = values("linear", *halves(x * scale + shift, y))
    plain = values("linear", *halves(x, y))
    assert moved["linear_top1"] == pytest.approx(plain["linear_top1"], abs=2 / (len(y) - TRAIN))


def test_linear__feature_constant_in_training_is_ignored(digits: tuple[Tensor, Tensor]) -> None:
    train_x, train_y, test_x, _ = halves(*digits)
    plain = linear.fit(train_x, train_y, num_classes=CLASSES, l2=1e-4, iterations=20)
    constant = torch.full((TRAIN, 1), 0.1)  # not exact in binary: its computed spread is rounding, not zero
    probe = linear.fit(torch.cat([train_x, constant], 1), train_y, num_classes=CLASSES, l2=1e-4, iterations=20)
    surprise = torch.full((len(test_x), 1), 1e6)
    torch.testing.assert_close(probe.logits(torch.cat([test_x, surprise], 1)), plain.logits(test_x), atol=1e-2, rtol=0)


def test_linear__stronger_penalty_gives_smaller_weights(digits: tuple[Tensor, Tensor]) -> None:
    train_x, train_y, _, _ = halves(*digits)
    norms = [
        linear.fit(train_x, train_y, num_classes=CLASSES, l2=l2, iterations=200).weight.norm()
        for l2 in (1e-4, 1e-2, 1.0)
    ]
    assert norms[0] > norms[1] > norms[2]


# -- features --------------------------------------------------------------------------------------------------------


class QuadrantEncoder(nn.Module):
    """Brightness of each quadrant (level 0) and of the image (level 1) of a square picture."""

    def preprocess(self, images: Tensor | list[Tensor]) -> Tensor:
        return torch.stack(list(images)).float() / 255

    def embed(self, x: Tensor) -> dict[str, Tensor]:
        fine = nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
        coarse = x.mean(dim=(2, 3))
        return {"0": fine, "1": coarse, "all": torch.cat([fine, coarse], dim=1)}


def pictures(count: int, size: int = 8) -> Tensor:
    return torch.randint(0, 256, (count, 1, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_extract__batching_changes_nothing() -> None:
    images, labels = pictures(10), torch.arange(10)
    whole = extract(QuadrantEncoder(), [(images, labels)], "cpu")
    ragged = extract(QuadrantEncoder(), zip(images.split(4), labels.split(4), strict=True), "cpu")
    assert list(whole.tables) == ["0", "1", "all"]
    assert whole.labels.equal(ragged.labels)
    for level, table in whole.tables.items():
        assert table.dtype == torch.float32
        torch.testing.assert_close(table, ragged.tables[level])
    expected = images.float().mean(dim=(2, 3)) / 255
    torch.testing.assert_close(whole.tables["1"], expected)


def test_extract__keeps_the_levels_asked_for() -> None:
    assert list(extract(QuadrantEncoder(), [(pictures(2), None)], "cpu", ["1"]).tables) == ["1"]
    with pytest.raises(UserError, match="no level '2'; choose from 0, 1, all"):
        extract(QuadrantEncoder(), [(pictures(2), None)], "cpu", ["2"])


def test_extract__nan_features_stop_for_good() -> None:
    class Broken(QuadrantEncoder):
        def preprocess(self, images: Tensor | list[Tensor]) -> Tensor:
            return super().preprocess(images).index_fill(0, torch.tensor([1]), torch.nan)

    with pytest.raises(FutileRetryError, match="1 of 3 images are not finite"):
        extract(Broken(), [(pictures(3), None)], "cpu")


def test_extract__no_images_is_a_clear_error() -> None:
    with pytest.raises(UserError, match="split is empty"):
        extract(QuadrantEncoder(), [], "cpu")


def test_raw_pixels__native_size_is_the_pixels() -> None:
    images, labels = pictures(5), torch.arange(5)
    features = raw_pixels(zip(images.split(2), labels.split(2), strict=True), 8)
    assert features.tables["-"].equal(images.flatten(1) / 255)
    assert features.labels.equal(labels)


def test_raw_pixels__images_of_different_sizes_are_scaled_and_centred() -> None:
    wide = torch.zeros(3, 20, 60, dtype=torch.uint8)
    wide[:, :, 20:40] = 255  # what the centre crop keeps
    features = raw_pixels([([wide, torch.full((3, 31, 17), 255, dtype=torch.uint8)], None)], 10)
    pixels = features.tables["-"].view(2, 3, 10, 10)
    torch.testing.assert_close(pixels[:, :, :, 1:-1], torch.ones(2, 3, 10, 8))  # the border blends with the black
    assert not features.labelled


# -- the table -------------------------------------------------------------------------------------------------------


def test_table__one_row_per_level_with_every_metric(digits: tuple[Tensor, Tensor]) -> None:
    x, y = digits
    train = Features({"0": x[:TRAIN], "all": x[:TRAIN, :8]}, y[:TRAIN])
    test = Features({"0": x[TRAIN:], "all": x[TRAIN:, :8]}, y[TRAIN:])
    judged = evaluate_features("trained", train, test, config=CONFIG, num_classes=CLASSES)
    rows = judged.rows
    assert [(row["encoder"], row["level"]) for row in rows] == [("trained", "0"), ("trained", "all")]
    several_seeds = {"low_shot_1pct_top1", "low_shot_10pct_top1"}
    metrics = {"knn_top1", "knn10_top1", "knn20_top1", "knn100_top1", "knn200_top1", "linear_top1", *several_seeds}
    metrics |= {"retrieval_map", "retrieval_recall1"}
    columns = {f"{metric}{end}" for metric in metrics for end in ("", "_low", "_high")}
    columns |= {f"{metric}_std" for metric in several_seeds}
    assert all(row.keys() == {"encoder", "level"} | columns for row in rows)
    assert rows[0]["knn_top1"] > rows[1]["knn_top1"] > 0.1  # type: ignore[operator]
    assert all(row[f"{m}_low"] <= row[m] <= row[f"{m}_high"] for row in rows for m in metrics)  # type: ignore[operator]
    assert judged.outcomes.keys() == {(level, metric) for level in ("0", "all") for metric in metrics}
    for (level, metric), per_item in judged.outcomes.items():
        row = rows[level == "all"]
        assert per_item.shape == (len(y) - TRAIN,)
        assert per_item.nanmean().item() == pytest.approx(row[metric], abs=1e-6)
    correct = judged.predictions["all", "linear_top1"] == test.labels
    assert correct.equal(judged.outcomes["all", "linear_top1"].bool())
    assert judged.notes == []


def test_table__classes_missing_in_a_split_are_told(digits: tuple[Tensor, Tensor]) -> None:
    train, test = split(*digits)
    kept = test.labels < 8
    few = Features({"0": test.tables["0"][kept]}, test.labels[kept])
    judged = evaluate_features("trained", train, few, config=CONFIG, num_classes=CLASSES)
    assert judged.notes == ["2 of 10 classes have no test image: the figures are about the other 8"]
    assert judged.rows[0]["linear_top1"] > 0.8  # type: ignore[operator]
    same = Features({"0": train.tables["0"]}, torch.zeros_like(train.labels))
    notes = evaluate_features("trained", same, same, config=CONFIG, num_classes=1).notes
    assert notes == ["all training images have one class: an accuracy says nothing about the features"]


def test_table__what_other_protocols_found_gets_intervals_too(digits: tuple[Tensor, Tensor]) -> None:
    train, test = split(*digits)
    extra = {"0": {"other": Outcome(0.5, (torch.arange(597) % 2).float(), std=0.1)}}
    row = evaluate_features("trained", train, test, config=CONFIG, num_classes=CLASSES, extra=extra).rows[0]
    assert row["other"] == 0.5
    assert row["other_std"] == 0.1
    assert 0.45 < row["other_low"] < 0.5 < row["other_high"] < 0.55  # type: ignore[operator]


def test_table__unlabelled_images_name_the_remedy(digits: tuple[Tensor, Tensor]) -> None:
    x, y = digits
    train, test = split(x, y)
    test.labels[:5] = UNLABELLED
    with pytest.raises(UserError, match=r"5 of 597 images in the test split have no label.*one sub-folder per class"):
        evaluate_features("trained", train, test, config=CONFIG, num_classes=CLASSES)


def test_table__label_beyond_the_classes_is_refused(digits: tuple[Tensor, Tensor]) -> None:
    train, test = split(*digits)
    with pytest.raises(UserError, match="train split has a label 9, but the data set names 9 classes"):
        evaluate_features("trained", train, test, config=CONFIG, num_classes=9)


def test_table__empty_split_is_refused(digits: tuple[Tensor, Tensor]) -> None:
    train, test = split(*digits)
    empty = Features({"0": test.tables["0"][:0]}, test.labels[:0])
    with pytest.raises(UserError, match="test split has no images"):
        evaluate_features("trained", train, empty, config=CONFIG, num_classes=CLASSES)
