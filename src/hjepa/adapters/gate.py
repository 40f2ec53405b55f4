"""Which version becomes the champion: a decision from numbers alone, so that it can be read, tested and repeated.

A version must be healthy (no collapse, no failed export check), better than the champion by more than the margin, and
better beyond the noise: the interval of the difference, by a paired bootstrap over the same test items (Efron and
Tibshirani 1993, section 13.3), must lie above zero. No torch here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hjepa.config import sha256_json
from hjepa.errors import HjepaError, UserError
from hjepa.utils.bootstrap import paired_difference

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

CHAMPION = "champion"
CHALLENGER = "challenger"

RESAMPLES = 2000
CONFIDENCE = 0.95

DATASET_TAG = "hjepa.dataset_digest"
SPLIT_TAG = "hjepa.split"
SETTINGS_TAG = "hjepa.evaluation_settings"
METRIC_TAG = "hjepa.primary_metric"
VALUE_TAG = "hjepa.primary_value"
INTERVAL_TAG = "hjepa.primary_interval"  # "low,high"; empty where the evaluation has none
COLLAPSE_TAG = "hjepa.collapse"  # the diagnosis; empty for a healthy encoder
CHECKS_TAG = "hjepa.checks"  # the export checks as JSON; empty where none were made
OUTCOMES_TAG = "hjepa.outcomes"  # sha256 of the outcomes stored with the version; empty where there are none
GATE_TAGS = tuple(
    f"hjepa.gate.{name}"
    for name in ("against", "difference", "low", "high", "margin", "resamples", "test_items", "best_of")
)


@dataclass(frozen=True)
class Score:
    """What the gate compares, and what must be equal for the comparison to mean anything."""

    metric: str
    value: float
    dataset_digest: str
    split: str  # "train/test" sample counts of the evaluation
    settings: str = ""  # digest of the evaluation's settings; empty where none were recorded

    @classmethod
    def of_evaluation(cls, evaluation: Mapping[str, Any], primary_metric: str) -> Score:
        metrics = evaluation["metrics"]
        if primary_metric not in metrics:
            raise UserError(
                f"evaluation.primary_metric is {primary_metric!r}, which the evaluation did not measure; "
                f"choose one of {', '.join(sorted(metrics))}"
            )
        split = evaluation["split"]
        return cls(
            metric=primary_metric,
            value=float(metrics[primary_metric]),
            dataset_digest=str(split["dataset_digest"]),
            split=f"{split['train']}/{split.get('test', 0)}",
            settings=sha256_json(evaluation["settings"])[:16] if "settings" in evaluation else "",
        )

    @classmethod
    def of_version(cls, version: ModelVersion) -> Score | None:
        """None for a version that something else registered."""
        tags = version.tags
        try:
            return cls(
                metric=tags[METRIC_TAG],
                value=float(tags[VALUE_TAG]),
                dataset_digest=tags[DATASET_TAG],
                split=tags[SPLIT_TAG],
                settings=tags.get(SETTINGS_TAG, ""),
            )
        except (KeyError, ValueError):
            return None

    @property
    def tags(self) -> dict[str, str]:
        return {
            METRIC_TAG: self.metric,
            VALUE_TAG: repr(self.value),
            DATASET_TAG: self.dataset_digest,
            SPLIT_TAG: self.split,
            SETTINGS_TAG: self.settings,
        }

    def comparable(self, other: Score) -> bool:
        return replace(self, value=0.0) == replace(other, value=0.0)


@dataclass(frozen=True)
class Outcomes:
    """Which test items a model got right, in the order of the test split."""

    metric: str
    correct: NDArray[np.bool_]  # [M]

    @classmethod
    def of_json(cls, stored: Mapping[str, Any]) -> Outcomes:
        """Raises HjepaError if ``stored`` is not {"metric", "count", "correct": hex of packed bits}."""
        try:
            count = int(stored["count"])
            packed = np.frombuffer(bytes.fromhex(stored["correct"]), dtype=np.uint8)
            if len(packed) != (count + 7) // 8 or count < 1:
                raise ValueError(f"{len(packed)} bytes for {count} test items")
            return cls(str(stored["metric"]), np.unpackbits(packed, count=count).astype(bool))
        except (KeyError, TypeError, ValueError) as error:
            raise HjepaError(f"the outcomes of an evaluation are damaged ({error}); evaluate the model again") from None

    @property
    def text(self) -> str:
        """JSON that ``of_json`` reads, the same bytes for the same outcomes."""
        packed = np.packbits(self.correct).tobytes().hex()
        stored = {"metric": self.metric, "count": len(self.correct), "correct": packed}
        return json.dumps(stored, sort_keys=True) + "\n"


@dataclass(frozen=True)
class Candidate:
    """All that the gate knows of a version."""

    score: Score
    outcomes: Outcomes | None = None
    collapse: str = ""  # the diagnosis; empty for a healthy encoder
    checks: Mapping[str, Any] = field(default_factory=dict)  # by format: max_abs_difference, tolerance, passed
    best_of: int = 1  # how many models it was chosen from by this very score

    @classmethod
    def of_manifests(cls, model: Mapping[str, Any], evaluation: Mapping[str, Any], primary_metric: str) -> Candidate:
        """From model.json and evaluation.json. Raises UserError if the metric was not measured."""
        stored = evaluation.get("outcomes")
        return cls(
            score=Score.of_evaluation(evaluation, primary_metric),
            outcomes=Outcomes.of_json(stored) if stored else None,
            collapse=str(evaluation.get("collapse") or ""),
            checks=dict(model.get("checks") or {}),
            best_of=int(evaluation.get("best_of", 1)),
        )

    @property
    def tags(self) -> dict[str, str]:
        """Without the outcomes, which are too long for a tag."""
        checks = json.dumps(self.checks, sort_keys=True) if self.checks else ""
        return {**self.score.tags, COLLAPSE_TAG: self.collapse[:1000], CHECKS_TAG: checks}

    @property
    def obstacle(self) -> str:
        """Why this can be no champion, whatever the others reach; empty if it can."""
        if not math.isfinite(self.score.value):
            return f"{self.score.metric} is not a number"
        if self.collapse:
            return f"{self._measured}, but the representation has collapsed: {self.collapse}"
        failed = [describe_check(name, check) for name, check in self.checks.items() if not check.get("passed")]
        return f"{self._measured}, but an export check failed: {'; '.join(failed)}" if failed else ""

    @property
    def _measured(self) -> str:
        return f"{self.score.metric} {self.score.value:.4f}"


def describe_check(name: str, check: Mapping[str, Any]) -> str:
    """One export check in words, such as "onnx differs by 2.1e-06 of the 0.0001 allowed: passed"."""
    verdict = "passed" if check.get("passed") else "failed"
    if "max_abs_difference" not in check:
        return f"{name}: {verdict}"
    allowed = f" of the {check['tolerance']:g} allowed" if "tolerance" in check else ""
    return f"{name} differs by {check['max_abs_difference']:.1e}{allowed}: {verdict}"


@dataclass(frozen=True)
class Verdict:
    alias: str  # "champion" or "challenger"
    reason: str
    numbers: Mapping[str, str] = field(default_factory=dict)  # what it was decided by: a part of GATE_TAGS


@dataclass(frozen=True)
class Noise:
    """The interval of a difference between two models on the same test items."""

    low: float
    high: float
    items: int
    best_of: int = 1

    @property
    def text(self) -> str:
        corrected = f", corrected for the best of {self.best_of}" if self.best_of > 1 else ""
        share = f"{100 * confidence_of(self.best_of):.4g} %" if self.best_of > 1 else f"{CONFIDENCE:.0%}"
        return (
            f"between {self.low:+.4f} and {self.high:+.4f} in {share} of {resamples_of(self.best_of)} resamples "
            f"of {self.items:,} test items{corrected}"
        )


def confidence_of(best_of: int) -> float:
    """Of the interval for a model that is the best of that many on the same test items (Bonferroni).

    The best of several is partly the luckiest: with 20 equal models, one of them lies above a 95 % interval.
    """
    return 1 - (1 - CONFIDENCE) / best_of


def resamples_of(best_of: int) -> int:
    """Thinner tails need more resamples."""
    return RESAMPLES * min(best_of, 10)


def paired_noise(new: Candidate, rival: Candidate) -> Noise | str:
    """The interval of ``new - rival``, or why there is none."""
    for who, candidate in (("this version", new), ("the other", rival)):
        if candidate.outcomes is None:
            return f"the outcomes of {who} per test item are not stored"
        if candidate.outcomes.metric != candidate.score.metric:
            return f"the outcomes of {who} are those of {candidate.outcomes.metric}"
    assert new.outcomes is not None
    assert rival.outcomes is not None
    a, b = new.outcomes.correct, rival.outcomes.correct
    if len(a) != len(b):
        return f"the outcomes are of {len(a)} and of {len(b)} test items"
    _, low, high = paired_difference(
        a, b, resamples=resamples_of(new.best_of), confidence=confidence_of(new.best_of), seed=0
    )
    return Noise(low, high, len(a), new.best_of)


def decide(new: Candidate, champion: Candidate | None, *, champion_version: int | None, margin: float) -> Verdict:
    """What a version becomes, given the present champion (version None: there is none)."""
    margin_tag = {"hjepa.gate.margin": repr(margin)}
    if new.obstacle:
        return Verdict(CHALLENGER, new.obstacle, margin_tag)
    score = new.score
    measured = f"{score.metric} {score.value:.4f}"
    if champion_version is None:
        return Verdict(CHAMPION, f"{measured}; the first version", margin_tag)
    numbers = {**margin_tag, "hjepa.gate.against": str(champion_version)}
    rival = f"version {champion_version}"
    if champion is None:
        reason = f"{measured}; {rival} is the champion and carries no hjepa scores to compare with"
        return Verdict(CHALLENGER, reason, numbers)
    if not champion.score.comparable(score):
        return Verdict(CHALLENGER, _incomparable(score, champion.score, rival), numbers)
    difference = score.value - champion.score.value
    change = f"{measured}: {difference:+.4f} against {champion.score.value:.4f} of {rival}"
    numbers["hjepa.gate.difference"] = repr(difference)
    if not math.isfinite(champion.score.value):
        return Verdict(CHAMPION, f"{change}, which is not a number and so more than the margin of {margin:g}", numbers)
    enough = score.value > champion.score.value + margin
    by_margin = f"{'more' if enough else 'not more'} than the margin of {margin:g}"
    noise = paired_noise(new, champion)
    if isinstance(noise, str):
        alias = CHAMPION if enough else CHALLENGER
        return Verdict(alias, f"{change}, {by_margin}; the margin alone decided, as {noise}", numbers)
    numbers |= {
        "hjepa.gate.low": repr(noise.low),
        "hjepa.gate.high": repr(noise.high),
        "hjepa.gate.resamples": str(resamples_of(noise.best_of)),
        "hjepa.gate.test_items": str(noise.items),
        "hjepa.gate.best_of": str(noise.best_of),
    }
    clear = noise.low > 0
    by_noise = f"{'outside' if clear else 'within'} the noise ({noise.text})"
    joint = "and" if enough == clear else "but"
    return Verdict(CHAMPION if enough and clear else CHALLENGER, f"{change}, {by_margin} {joint} {by_noise}", numbers)


def _incomparable(new: Score, champion: Score, rival: str) -> str:
    measured = f"{new.metric} {new.value:.4f}"
    if champion.metric != new.metric:
        return f"{measured}; the champion ({rival}) was chosen by {champion.metric}, which is not comparable"
    if champion.dataset_digest != new.dataset_digest:
        return (
            f"{measured} on dataset {new.dataset_digest[:12]}; the champion ({rival}) was measured on dataset "
            f"{champion.dataset_digest[:12]}, so the two are not comparable"
        )
    if champion.split != new.split:
        return (
            f"{measured} on {new.split} train/test images; the champion ({rival}) was measured on {champion.split}, "
            "so the two are not comparable"
        )
    return (
        f"{measured} with evaluation settings {new.settings or 'unknown'}; the champion ({rival}) was measured "
        f"with {champion.settings or 'unknown'} ones, so the two are not comparable"
    )


def interval_tag(evaluation: Mapping[str, Any], metric: str) -> str:
    """The 95 % interval of the primary metric, "low,high", from the table; empty where it has none."""
    *level, name = metric.removeprefix("eval/").split("/")
    wanted = level[0].removeprefix("level_") if level else "all"
    for row in evaluation["table"]:
        judged = row.get("encoder") == "trained" and str(row.get("level")) == wanted
        if judged and row.get(f"{name}_low") is not None:
            return f"{row[f'{name}_low']:.6g},{row[f'{name}_high']:.6g}"
    return ""
