"""Sweeps: what sets may be, how branches are planned, which one is the best and by how much."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hjepa import sweep
from hjepa.adapters.gate import Candidate, decide
from hjepa.config import Config, load_config
from hjepa.errors import HjepaError, UserError
from hjepa.steps import check_run_name, plan_sweep

METRIC = "eval/linear_top1"


def planned(*sets: Any, overrides: Sequence[str] = (), run: str = "s") -> list[sweep.Branch]:
    return plan_sweep(run, "demo", list(overrides), {}, list(sets))


# -- sets ------------------------------------------------------------------------------------------------------------


def test_plan__every_form_of_a_set_comes_out_alike() -> None:
    found = planned("training.lr=2e-3", ["training.lr=3e-3", "seed=1"], {"name": "x", "set": ["seed=2"]}, [])
    assert [branch.name for branch in found] == ["lr-2e-3", "lr-3e-3-seed-1", "x", "base"]
    assert [list(branch.overrides) for branch in found] == [
        ["training.lr=2e-3"], ["training.lr=3e-3", "seed=1"], ["seed=2"], [],
    ]  # fmt: skip


def test_plan__settings_that_are_called_alike_get_different_names() -> None:
    depths = [["model.depth=2"], ["model.predictor.depth=2"], ["model.depth=2", "seed=1"]]
    assert [branch.name for branch in planned(*depths)] == ["depth-2", "depth-2-2", "depth-2-seed-1"]


def test_read_sets__a_mapping_names_them(tmp_path: Path) -> None:
    path = tmp_path / "sets.yaml"
    path.write_text("low: [training.lr=1e-4]\nhigh: training.lr=1e-2\n", "utf-8")
    assert sweep.read_sets(path) == [
        {"name": "low", "set": ["training.lr=1e-4"]},
        {"name": "high", "set": "training.lr=1e-2"},
    ]


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        ([], r"got none; expected a list of sets.*such as \[\[training.lr"),
        ([["seed=1"]], "got 1 set, expected 2 to 100"),
        ([["seed=1"], [1]], r"set 2: expected a list of section.key=value, got \[1\]"),
        ([["seed=1"], {"name": "Bad name", "set": []}], "lower-case"),
        ([{"name": "a", "set": []}, {"name": "a", "set": ["seed=1"]}], "two of this name"),
        ([{"name": "a", "sets": []}, ["seed=1"]], "expected the keys name and set"),
    ],
)
def test_plan__mistakes_in_the_form_of_sets(sets: list[Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        planned(*sets)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a: [", "are not valid YAML"),
        (b"training.lr=1", "expected a list of sets.*got 'training.lr=1'"),
        (b"", "expected a list of sets.*got nothing"),
        (b"\xff\xfe\x00", "it is no text"),
        (None, "cannot read the sets in .*sets.yaml: No such file"),
    ],
)
def test_read_sets__mistakes_name_the_file(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "sets.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        sweep.read_sets(path)
    assert str(path) in str(error.value)


def test_read_sets__folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read the sets in .*: Is a directory"):
        sweep.read_sets(tmp_path)


# -- branches --------------------------------------------------------------------------------------------------------


def test_plan__runs_are_named_after_the_sweep_and_settings_tell_them_apart() -> None:
    branches = planned(["training.lr=1e-4"], ["model.num_levels=1"], overrides=["seed=7"], run="try")
    assert [branch.run for branch in branches] == ["try-lr-1e-4", "try-num-levels-1"]
    assert [dict(branch.settings) for branch in branches] == [
        {"model.num_levels": "2", "training.lr": "0.0001"},
        {"model.num_levels": "1", "training.lr": "0.001"},
    ]
    assert all(branch.config.seed == 7 for branch in branches)


def test_plan__every_mistake_of_every_set_at_once() -> None:
    with pytest.raises(UserError) as error:
        planned(
            ["training.lr=-1"], ["storage.uri=s3://other"], ["evaluation.knn_k=5"], ["data.channels=3"], [], [], [7]
        )
    text = str(error.value)
    assert text.startswith("sets: 6 mistakes\n")
    for words in ("training.lr", "storage.uri", "evaluation.knn_k", "data.channels", "same configuration", "got [7]"):
        assert words in text


@pytest.mark.parametrize("setting", ["data.image_size=56", "data.horizontal_flip=true", "data.num_workers=2"])
def test_plan__what_a_model_sees_may_differ(setting: str) -> None:
    assert len(planned([], [setting])) == 2


def test_plan__a_set_with_several_mistakes_has_all_of_them_told() -> None:
    with pytest.raises(UserError) as error:
        planned(["tracking.uri=http://x", "nokey"], ["seed=1", "seed=2"])
    for words in ("'nokey'", "changes tracking.uri", "it sets seed more than once"):
        assert words in str(error.value)


def test_plan__name_that_is_too_long_for_a_run() -> None:
    with pytest.raises(UserError, match=r"set base: its run is named after the sweep and the set.*at most 63"):
        planned([], ["seed=1"], run="r" * 60)


def test_plan__is_what_the_stored_configuration_gives_again() -> None:
    from hjepa.config import validate

    (_, branch) = planned([], ["training.lr=2e-3"])
    assert validate(branch.to_json()["config"]).digest == branch.config.digest


# -- comparison ------------------------------------------------------------------------------------------------------


def manifests(correct: np.ndarray[Any, Any], *, collapse: str = "", digest: str = "d") -> tuple[Any, Any]:
    value = float(correct.mean())
    packed = np.packbits(correct).tobytes().hex()
    model = {"uri": "s3://m", "checkpoint": {"step": 10, "images_seen": 100}, "checks": {}}
    evaluation = {
        "primary_metric": {"name": METRIC, "value": value},
        "metrics": {METRIC: value},
        "table": [
            {
                "encoder": "trained",
                "level": "all",
                "linear_top1": value,
                "linear_top1_low": value - 0.1,
                "linear_top1_high": value + 0.1,
            }
        ],
        "outcomes": {"metric": METRIC, "count": len(correct), "correct": packed},
        "collapse": collapse,
        "split": {"dataset_digest": digest, "train": 100, "test": len(correct)},
        "settings": {},
        "report": "s3://r",
    }
    return model, evaluation


def items(share: float, count: int = 1000) -> np.ndarray[Any, Any]:
    return np.arange(count) < share * count


BRANCHES = [{"name": name, "run": f"s-{name}", "settings": {"seed": name}} for name in ("a", "b", "c")]


def test_compare__best_and_the_distance_of_the_others() -> None:
    result = sweep.compare(
        BRANCHES, {"a": manifests(items(0.5)), "b": manifests(items(0.7)), "c": manifests(items(0.69))}
    )
    rows = {row["name"]: row for row in result["branches"]}
    assert result["best"] == "b"
    assert result["confidence"] == pytest.approx(1 - 0.05 / 3)
    assert "difference" not in rows["b"]
    assert rows["a"]["difference"] == pytest.approx(0.2)
    # Paired: 200 of 1000 items differ, standard error sqrt(.2 * .8 / 1000); 2.39 of them on either side at 98.3 %.
    half = 2.394 * math.sqrt(0.2 * 0.8 / 1000)
    assert rows["a"]["difference_low"] == pytest.approx(0.2 - half, abs=0.004)
    assert rows["a"]["difference_high"] == pytest.approx(0.2 + half, abs=0.004)
    assert "outside the noise" in sweep.in_words(result)
    assert "**b**" in sweep.table(result)


def test_compare__equal_branches_are_within_the_noise() -> None:
    shifted = np.roll(items(0.5), 250)
    result = sweep.compare(BRANCHES[:2], {"a": manifests(items(0.5)), "b": manifests(shifted | items(0.001))})
    assert "within the noise" in sweep.in_words(result)


def test_compare__a_collapsed_branch_is_not_the_best_whatever_it_scores() -> None:
    found = {"a": manifests(items(0.9), collapse="std is 0"), "b": manifests(items(0.3))}
    result = sweep.compare(BRANCHES[:2], found)
    assert result["best"] == "b"
    assert "collapsed" in result["branches"][0]["obstacle"]


def test_compare__no_healthy_branch() -> None:
    found = {name: manifests(items(share), collapse="std is 0") for name, share in (("a", 0.4), ("b", 0.3))}
    result = sweep.compare(BRANCHES[:2], found)
    assert result["best"] == "a"
    assert sweep.in_words(result).startswith("No branch can be a champion")


def test_compare__a_score_that_is_no_number_is_last() -> None:
    broken = manifests(items(0.9))
    broken[1]["metrics"][METRIC] = math.nan
    result = sweep.compare(BRANCHES[:2], {"a": broken, "b": manifests(items(0.2))})
    assert result["best"] == "b"
    assert sweep.in_words(result) == f"b is the best of 2: {METRIC} 0.2000; no other branch has a score."


def test_compare__without_outcomes_there_is_no_interval() -> None:
    found = {"a": manifests(items(0.9)), "b": manifests(items(0.2))}
    del found["b"][1]["outcomes"]
    result = sweep.compare(BRANCHES[:2], found)
    assert "difference_low" not in result["branches"][1]
    assert "cannot be said" in sweep.in_words(result)


def test_compare__other_images_are_no_comparison() -> None:
    found = {"a": manifests(items(0.9)), "b": manifests(items(0.2), digest="other")}
    with pytest.raises(HjepaError, match="cannot be compared"):
        sweep.compare(BRANCHES[:2], found)


# -- the gate --------------------------------------------------------------------------------------------------------


def test_gate__asks_more_of_the_best_of_many() -> None:
    """The same two models: clear of the noise as one against one, within it as the best of 20."""
    rng = np.random.default_rng(0)
    champion = rng.random(1000) < 0.5
    better = champion.copy()
    flipped = rng.permutation(np.flatnonzero(~champion))[:60], rng.permutation(np.flatnonzero(champion))[:36]
    better[flipped[0]], better[flipped[1]] = True, False
    model, evaluation = manifests(better)
    old = Candidate.of_manifests(*manifests(champion), METRIC)
    alone = decide(Candidate.of_manifests(model, evaluation, METRIC), old, champion_version=1, margin=0.0)
    chosen = Candidate.of_manifests(model, {**evaluation, "best_of": 20}, METRIC)
    of_many = decide(chosen, old, champion_version=1, margin=0.0)
    assert alone.alias == "champion"
    assert of_many.alias == "challenger"
    assert "corrected for the best of 20" in of_many.reason
    assert of_many.numbers["hjepa.gate.best_of"] == "20"


def test_check_run_name_and_config_are_those_of_a_plain_run() -> None:
    base: Config = load_config("demo")
    (first, _) = sweep.plan("s", base, [[], ["seed=1"]], lambda more: load_config("demo", more), check_run_name)
    assert first.config.digest == base.digest
