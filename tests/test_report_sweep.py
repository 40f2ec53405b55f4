"""The page of a sweep: what won, by how much, and whether that is noise; for any number of branches in any state."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hjepa.report import Branch, Sweep, charts, render_sweep
from hjepa.report.page import _source
from hjepa.report.sweep import SECTIONS, ranking
from tests.test_report import HOSTILE, Page, curves, manifests, row

Floats = NDArray[np.float64]


def branch(name: str, score: float, *, settings: Mapping[str, str] | None = None, scale: float = 1.0) -> Branch:
    """A branch of labelled images whose linear probe reaches ``score`` and whose loss is scaled."""
    evaluation = manifests(["circle", "square"])["evaluation"]
    evaluation["primary_metric"]["value"] = score
    baselines = [r for r in evaluation["table"] if r["encoder"] != "trained"]
    trained = [row("trained", level, score + shift) for level, shift in (("0", -0.05), ("1", -0.1), ("all", 0.0))]
    evaluation |= {"table": [*trained, *baselines], "notes": ["2 of 9 classes have no test image"]}
    return Branch(
        name=name,
        settings=settings if settings is not None else {"training.lr": name},
        run=f"run-of-{name}",
        evaluation=evaluation,
        checkpoint={"step": 469, "images_seen": 60032, "uri": "s3://b/c", "sha256": "c" * 64},
        curves=[{key: v * scale if key == "train/loss" else v for key, v in line.items()} for line in curves()],
        links={"report": f"https://s3.example/{name}/report.html", "MLflow run": "s3://not-to-be-clicked"},
    )


def unlabelled(name: str, rankme: float) -> Branch:
    one = branch(name, 0.5)
    evaluation = {
        **one.evaluation,
        "primary_metric": {"name": "eval/rankme", "value": rankme},
        "table": [
            {"encoder": e, "level": "all", "rankme": rankme - i} for i, e in enumerate(("trained", "random init"))
        ],
        "split": {"train": 60},
    }
    return replace(one, evaluation=evaluation)


def sweep(branches: Sequence[Branch], best: str, comparisons: Mapping[str, Any] | None = None) -> Sweep:
    return Sweep(
        name="learning-rates",
        made_at="2026-11-28 08:00 UTC",
        dataset=manifests(["circle", "square"])["dataset"],
        branches=branches,
        best=best,
        comparisons=comparisons or {},
        config="training: {epochs: 4}",
        links={"KFP run": "https://kfp.example/run"},
        reproduce="hjepa sweep --config demo",
    )


@pytest.fixture
def three() -> Sweep:
    """Out of order; the second is within the noise, the third is not."""
    branches = [branch("3e-4", 0.74, scale=2), branch("1e-3", 0.8), branch("3e-3", 0.79, scale=4)]
    compared = {
        "3e-4": {"difference": 0.06, "low": 0.03, "high": 0.09},
        "3e-3": {"difference": 0.01, "low": -0.012, "high": 0.032},
        "1e-3": {},
    }
    return sweep(branches, "1e-3", compared)


def check(page: Page, document: str) -> None:
    """What holds for every page."""
    assert [section["id"] for section in page.all("section")] == list(SECTIONS)
    assert not page.all("script")
    assert not page.all("link")
    assert not re.search(r"url\(|@import|\bon\w+=|srcset|xlink", document)
    assert "nan" not in re.sub(r">[^<]*<", "><", document.partition("</style>")[2]).casefold()
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert all(svg.get("aria-label") or svg.get("aria-hidden") for svg in page.all("svg"))
    assert all(header["scope"] in {"row", "col"} for header in page.all("th"))
    assert len(document.encode()) < 3_000_000


# -- the document ----------------------------------------------------------------------------------------------------


def test_render__says_what_won_by_how_much_and_whether_that_is_noise(three: Sweep) -> None:
    document = render_sweep(three)
    page = Page(document)
    check(page, document)
    for words in (
        "1e-3 (training.lr = 1e-3) is the best of 3 branches: on 1,234 test images of shapes its linear probe is "
        "80.00 %, 1.00 points more than the second, 3e-3 (training.lr = 3e-3), with 79.00 %.",
        "The paired 95 % interval of this difference is −1.20 to +3.20: it is within the noise",
        "One branch is not told apart from the best by these images: 3e-3.",
        "The best of 3 on the same test images is an optimistic number",
        "the intervals of differences are the wider, the more branches were compared (95 % here)",
        "+6.00",
        "+3.00 to +9.00",
        "60,032",
        "All branches",
        "2 of 9 classes have no test image",
        "hjepa sweep --config demo",
    ):
        assert words in page.text, words
    outside = [a["href"] for a in page.all("a") if not a["href"].startswith("#")]
    assert outside == [
        "https://kfp.example/run",
        *(f"https://s3.example/{n}/report.html" for n in ("1e-3", "3e-3", "3e-4")),
    ]


def test_render__a_clear_winner_is_called_one(three: Sweep) -> None:
    clear = {"difference": 0.01, "low": 0.004, "high": 0.016}
    text = Page(render_sweep(replace(three, comparisons={**three.comparisons, "3e-3": clear}))).text
    assert "+0.40 to +1.60: it is outside the noise." in text
    assert "within the noise, and" not in text
    assert "not told apart from the best" not in text


@pytest.mark.parametrize("known", [False, True])
def test_render__without_a_paired_interval_nothing_is_claimed(three: Sweep, known: bool) -> None:
    comparisons = {"3e-3": {"difference": 0.01}} if known else {}
    text = Page(render_sweep(replace(three, comparisons=comparisons))).text
    assert ("+1.00" in text) == known
    assert "not compared image by image" in text
    assert "outside the noise." not in text


def test_render__every_branch_has_the_same_look_in_table_legend_and_charts(three: Sweep) -> None:
    lame = replace(three.branches[2], curves=())  # the second by rank
    document = render_sweep(replace(three, branches=[*three.branches[:2], lame]))
    lines = re.findall(r'<polyline class="line ([^"]+)"', document)
    assert set(lines) == {charts.many(0), charts.many(2)}
    assert "No curves of 3e-3" in Page(document).text
    swatches = re.findall(r'<svg class="swatch"[^>]*><line class="line ([^"]+)"', document)
    assert swatches == [charts.many(n) for n in range(3)] * 3


def test_render__the_best_lies_above_the_other_lines(three: Sweep) -> None:
    loss = re.search(r'aria-label="Loss[^"]*: 3 3e-4 .*?</svg>', render_sweep(three), re.S)
    assert loss
    assert re.findall(r'<polyline class="line (t\d)', loss[0]) == ["t2", "t1", "t0"]


def test_render__baselines_that_are_equal_stand_there_once(three: Sweep) -> None:
    page = Page(render_sweep(three))
    section = page.text.partition("What needs no training")[2].partition("Notes")[0]
    assert section.count("random init") == 1
    assert section.count("raw pixels") == 1
    other = branch("3e-3", 0.79)
    other.evaluation["table"][4] |= {"linear_top1": 0.5}
    assert other.evaluation["table"][4]["encoder"] == "random init"
    text = Page(render_sweep(replace(three, branches=[*three.branches[:2], other]))).text
    assert "random init, of 1e-3, 3e-4" in text
    assert "random init, of 3e-3" in text


def test_render__hostile_names_are_text(three: Sweep) -> None:
    long = "x" * 500
    one = replace(
        branch(HOSTILE, 0.7, settings={HOSTILE: HOSTILE, "training.lr": long}),
        run=HOSTILE,
        links={HOSTILE: "javascript:alert(1)", "b": f'https://a.example/"{HOSTILE}'},
    )
    one.evaluation["notes"], one.evaluation["collapse"] = [HOSTILE], HOSTILE
    two = [branch(long + end, 0.6, settings={"training.lr": long + end}) for end in "ab"]  # alike once they are cut
    hostile = replace(
        sweep([one, *two], HOSTILE),
        name=HOSTILE,
        links={HOSTILE: "javascript:alert(1)"},
        config=HOSTILE,
        reproduce=HOSTILE,
    )
    document = render_sweep(hostile)
    page = Page(document)
    check(page, document)
    assert "<script" not in document
    assert page.text.count(HOSTILE) >= 12
    assert all(not a["href"].startswith("javascript") for a in page.all("a"))
    assert len(re.findall("<polyline", document)) == 3 * 4


@pytest.mark.parametrize("count", [1, 2, 12, 40])
def test_render__any_number_of_branches(count: int) -> None:
    branches = [branch(f"b{i}", 0.8 - i / 100) for i in range(count)]
    compared = {
        f"b{i}": {"difference": i / 100, "low": i / 100 - 0.02, "high": i / 100 + 0.02} for i in range(1, count)
    }
    document = render_sweep(sweep(branches, "b0", compared))
    page = Page(document)
    check(page, document)
    assert len(re.findall(r'<polyline class="line', document)) == 4 * count
    assert ("b0 (training.lr = b0) is the only branch" in page.text) == (count == 1)
    assert ("Behind the best" in page.text) == ("optimistic number" in page.text) == (count > 1)


def test_render__a_branch_that_failed_is_shown_and_last(three: Sweep) -> None:
    lost, empty, null = branch("lost", math.nan), branch("empty", 0.5), branch("null", 0.5)
    lost = replace(lost, curves=[{"images_seen": 1, "train/loss": math.nan}, {"images_seen": 2, "train/loss": "NaN"}])
    empty = replace(empty, evaluation={}, checkpoint={}, curves=(), links={})
    null.evaluation["primary_metric"]["value"] = None
    behind = {**three.comparisons, "lost": {"difference": math.nan, "low": math.nan, "high": math.nan}}
    shown = replace(three, branches=[lost, empty, null, *three.branches], comparisons=behind)
    assert [item.branch.name for item in ranking(shown)] == ["1e-3", "3e-3", "3e-4", "lost", "empty", "null"]
    document = render_sweep(shown)
    page = Page(document)
    check(page, document)
    for words in ("not finite", "it has no evaluation", "No curves of lost, empty", "best of 6 branches"):
        assert words in page.text, words


def test_render__a_number_that_is_none_spoils_no_column(three: Sweep) -> None:
    for one in three.branches:
        read = one.evaluation["table"][2]
        read |= {"knn_top1_low": read["knn_top1"] - 0.02, "knn_top1_high": read["knn_top1"] + 0.02}
    three.branches[1].evaluation["table"][2] |= dict.fromkeys(("knn_top1", "knn_top1_low", "knn_top1_high"), math.nan)
    document = render_sweep(three)
    check(Page(document), document)
    assert '<td class="n best"><b>69.00</b>' in document  # of the second


def test_render__no_branch_measured_anything() -> None:
    bare = replace(branch("a", 0.5), evaluation={}, checkpoint={}, curves=(), links={}, settings={})
    document = render_sweep(replace(sweep([bare], "a"), config="", reproduce="", links={}))
    page = Page(document)
    check(page, document)
    for words in ("no finite primary metric", "No curves", "No baselines", "No command was recorded", "not at hand"):
        assert words in page.text, words


def test_render__without_labels_nothing_is_called_better() -> None:
    branches = [unlabelled("a", 12.0), unlabelled("b", 9.0)]
    document = render_sweep(sweep(branches, "a"))
    page = Page(document)
    check(page, document)
    assert (
        "on 60 training images of shapes its RankMe is 12, 3 more than the second, b (training.lr = b), with 9"
        in page.text
    )
    assert "a larger value is not known to be a better encoder" in page.text
    assert "No scores by level" in page.text


def test_render__a_higher_score_that_did_not_win_is_explained(three: Sweep) -> None:
    better = branch("collapsed", 0.95)
    better.evaluation["collapse"] = "collapse: of level 0 the effective rank is 1.20"
    page = Page(render_sweep(replace(three, branches=[*three.branches, better])))
    assert "measures more, 95.00 %, and did not win: it looks collapsed." in page.text
    assert "1.00 points more than the second, 3e-3" in page.text


@pytest.mark.parametrize(("keys", "columns"), [(1, 1), (4, 4), (5, 1)])
def test_render__many_settings_share_a_column(keys: int, columns: int) -> None:
    settings = {f"section.key{i}": str(i) for i in range(keys)}
    document = render_sweep(sweep([branch("a", 0.8, settings=settings), branch("b", 0.7, settings={})], "a"))
    assert len(re.findall(r'<td class="text wide">', document)) == 2 * columns


def test_ranking__an_unknown_winner_is_a_mistake(three: Sweep) -> None:
    with pytest.raises(ValueError, match="no branch is called nobody"):
        ranking(replace(three, best="nobody"))


# -- many series -----------------------------------------------------------------------------------------------------

# Linear RGB as seen without one kind of cone (Machado et al. 2009, severity 1).
EYES = {
    "all cones": np.eye(3),
    "no red cones": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "no green cones": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "no blue cones": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}


def linear_rgb(colour: str) -> Floats:
    value = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def oklab(rgb: Floats) -> Floats:
    """Perceptual coordinates of linear RGB (Ottosson 2020)."""
    cones = np.array(
        [[0.41222, 0.53633, 0.05145], [0.21190, 0.68070, 0.10740], [0.08830, 0.28172, 0.62998]]
    ) @ rgb.clip(0, 1)  # fmt: skip
    found: Floats = np.array(
        [[0.21045, 0.79362, -0.00407], [1.97800, -2.42859, 0.45059], [0.02590, 0.78277, -0.80868]]
    ) @ np.cbrt(cones)  # fmt: skip
    return found


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours__of_many_lines_stand_out_and_apart_for_every_eye(theme: str) -> None:
    light, _, rest = _source("report.css").partition("@media (prefers-color-scheme: dark)")
    style = light if theme == "light" else rest.partition("* {")[0]
    colours = [linear_rgb(value) for value in re.findall(r"--t\d: (#\w{6})", style)]
    page = re.search(r"--page: (#\w{6})", style)
    assert page
    assert len(colours) == charts.MANY

    def luminance(rgb: Floats) -> float:
        return float(rgb @ [0.2126, 0.7152, 0.0722]) + 0.05

    for colour in colours:
        low, high = sorted((luminance(colour), luminance(linear_rgb(page[1]))))
        assert high / low >= 3, "the contrast that WCAG 2.1 (1.4.11) asks of graphics"
    for name, eye in EYES.items():
        seen = [oklab(eye @ colour) for colour in colours]
        nearest = min(np.linalg.norm(a - b) for i, a in enumerate(seen) for b in seen[:i])
        assert nearest > 0.1, name


def test_many__28_series_differ_and_neighbours_in_both_ways() -> None:
    looks = [charts.many(n).split() for n in range(28)]
    assert len({tuple(look) for look in looks}) == 28
    assert all(a != c and b != d for (a, b), (c, d) in pairwise(looks))


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ([20.0, 100.0], [20.0, 100.0]),
        ([50.0, 50.0, 50.0], [50.0, 60.0, 70.0]),
        ([195.0, 199.0], [190.0, 200.0]),
        ([3.0], [10.0]),
        ([5.0] * 39, [10 + 5 * i for i in range(39)]),
        ([], []),
    ],
)
def test_spread__keeps_order_gap_and_bounds(places: list[float], expected: list[float]) -> None:
    assert charts.spread(places, 10, 10, 200) == pytest.approx(expected)
