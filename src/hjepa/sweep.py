"""A sweep: one configuration, several sets of overrides, each a branch that is a run of its own.

Its branches are judged on the same data set by the same evaluation, so that their scores can be compared, and the best
of them goes to the gate. No torch here: a sweep is planned where there is none.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hjepa.adapters.gate import Candidate, Outcomes, confidence_of, interval_tag, resamples_of
from hjepa.config import Config, flatten, parse_yaml, prepares
from hjepa.errors import HjepaError, UserError
from hjepa.utils.bootstrap import paired_difference
from hjepa.words import counted

Json = dict[str, Any]

MOST_BRANCHES = 100
LONGEST_NAME = 24  # of a branch that is named after its settings
# What all branches share: else their scores would be of different things, or stored in different places.
SHARED = ("storage", "tracking", "evaluation", "logging.experiment_name")
FORM = (
    "expected a list of sets, each a list of section.key=value, such as [[training.lr=1e-3], [training.lr=2e-3]], or a "
    "mapping from names to such lists, such as {low: [training.lr=1e-3], high: [training.lr=2e-3]}"
)


@dataclass(frozen=True)
class Branch:
    name: str
    run: str
    overrides: tuple[str, ...]
    config: Config
    settings: Mapping[str, str]  # the keys in which the branches differ

    def to_json(self) -> Json:
        return {
            "name": self.name,
            "run": self.run,
            "set": list(self.overrides),
            "settings": dict(self.settings),
            "config": self.config.model_dump(mode="json"),
        }


# -- what is asked for -----------------------------------------------------------------------------------------------


def read_sets(source: str | Path) -> list[Any]:
    """The sets in a YAML file, as a pipeline takes them: what each of them says is for ``plan`` to check.

    Raises:
        UserError: it cannot be read, or is no list or mapping.
    """
    try:
        text = Path(source).expanduser().read_text("utf-8")
    except OSError as error:
        raise UserError(f"cannot read the sets in {source}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"cannot read the sets in {source}: it is no text; {FORM}") from None
    try:
        return as_list(parse_yaml(text), f"the sets in {source}")
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"the sets in {source} are not valid YAML: {error}") from None


def as_list(tree: object, where: str = "sets") -> list[Any]:
    """Sets as a list: of a mapping, items {"name": key, "set": value}.

    Args:
        where: What the user wrote them in, for the message.

    Raises:
        UserError: it is neither a list nor a mapping.
    """
    if isinstance(tree, Mapping):
        return [{"name": key, "set": value} for key, value in tree.items()]
    if not isinstance(tree, list | tuple):
        raise UserError(f"{where}: {FORM}; got {'nothing' if tree is None else repr(tree)}")
    return list(tree)


def _normal(sets: Sequence[object]) -> tuple[list[Json], list[str]]:
    """The sets in one form, {"name": text, "set": [...]}, each name a part of a run's name; and what is wrong.

    Args:
        sets: Items are [section.key=value, ...], one such text, or {"name": text, "set": [...]}.
    """
    problems: list[str] = []
    found: list[Json] = []
    used: set[str] = set()
    for number, item in enumerate(sets, 1):
        name, overrides = (item.get("name"), item.get("set")) if isinstance(item, dict) else (None, item)
        if isinstance(item, dict) and set(item) - {"name", "set"}:
            problems.append(f"set {number}: expected the keys name and set, got {', '.join(map(str, item))}")
            continue
        overrides = [overrides] if isinstance(overrides, str) else overrides
        if not isinstance(overrides, list | tuple) or not all(isinstance(text, str) for text in overrides):
            problems.append(f"set {name or number}: expected a list of section.key=value, got {overrides!r}")
            continue
        keys = [text.partition("=")[0].strip() for text in overrides]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            problems.append(f"set {name or number}: it sets {', '.join(twice)} more than once")
        if name is not None and not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", str(name)):
            problems.append(f"set {name!r}: a name takes lower-case letters, digits, '.', '_' and '-'")
            continue
        name = _unused(str(name) if name is not None else _named_after(overrides), used, given=name is not None)
        if name in used:
            problems.append(f"set {name}: there are two of this name")
            continue
        used.add(name)
        found.append({"name": name, "set": list(overrides)})
    if not 2 <= len(sets) <= MOST_BRANCHES:
        problems.append(f"got {counted(len(sets), 'set')}, expected 2 to {MOST_BRANCHES}; one alone is a plain run")
    return found, problems


def _named_after(overrides: Sequence[str]) -> str:
    """lr-0.001 for ["training.lr=0.001"]."""
    words = [text.partition("=")[0].rpartition(".")[2] + "-" + text.partition("=")[2] for text in overrides]
    name = re.sub(r"[^a-z0-9.]+", "-", "-".join(words).lower()).strip("-.")
    return name[:LONGEST_NAME].strip("-.") or "base"


def _unused(name: str, used: set[str], *, given: bool) -> str:
    number = 2
    stem = name
    while not given and name in used:
        name, number = f"{stem}-{number}", number + 1
    return name


def plan(
    sweep: str,
    base: Config,
    sets: Sequence[object],
    load: Callable[[Sequence[str]], Config],
    check_name: Callable[[str], str],
    where: str = "sets",
) -> list[Branch]:
    """The branches of a sweep, all of them checked.

    Args:
        sweep: Its name, which begins the names of its runs.
        base: The configuration without any set.
        sets: One per branch: [section.key=value, ...], one such text, or {"name": text, "set": [...]}.
        load: From more overrides to a configuration.
        check_name: Raises UserError for what can be no name of a run.
        where: What the user wrote the sets in, for the message.

    Raises:
        UserError: for every mistake in every set at once: no set, a bad setting, a setting that all must share, a set
            that changes nothing against another.
    """
    items, problems = _normal(sets)
    if not sets:
        problems = [f"got none; {FORM}"]
    configs: dict[str, Config] = {}
    for item in items:
        name = item["name"]
        try:
            check_name(f"{sweep}-{name}")
        except UserError as error:
            problems.append(f"set {name}: its run is named after the sweep and the set: {error}")
        config: Config | None = None
        try:
            config = load(item["set"])
        except UserError as error:
            problems.append(f"set {name}: {error}")
        keys = [text.partition("=")[0].strip() for text in item["set"]] if config is None else differing([base, config])
        if changed := [key for key in keys if _is_shared(key)]:
            problems.append(f"set {name} changes {', '.join(changed)}, which all branches of a sweep must share")
        if config is None:
            continue
        same = [other for other, known in configs.items() if known.digest == config.digest]
        if same:
            problems.append(f"set {name} is the same configuration as {same[0]}")
        configs[name] = config
    if problems:
        raise UserError("\n  ".join([f"{where}: {counted(len(problems), 'mistake')}", *problems]))
    keys = differing(list(configs.values()))
    return [
        Branch(
            name=item["name"],
            run=f"{sweep}-{item['name']}",
            overrides=tuple(item["set"]),
            config=configs[item["name"]],
            settings={key: _text(flatten(configs[item["name"]]).get(key)) for key in keys},
        )
        for item in items
    ]


def differing(configs: Sequence[Config]) -> list[str]:
    """The dotted keys that are not the same in all of them."""
    trees = [flatten(config) for config in configs]
    keys = dict.fromkeys(key for tree in trees for key in tree)
    return [key for key in keys if any(tree.get(key) != trees[0].get(key) for tree in trees)]


def _is_shared(key: str) -> bool:
    return prepares(key) or any(key == name or key.startswith(f"{name}.") for name in SHARED)


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


# -- what came of it -------------------------------------------------------------------------------------------------


def compare(branches: Sequence[Mapping[str, Any]], found: Mapping[str, tuple[Json, Json]]) -> Json:
    """Which branch is the best, and how far the others are behind it.

    The best is the one with the highest primary metric among those that have not collapsed and whose export checks
    passed; among all if there is no such. Differences are paired over the same test items, with intervals as strict as
    the gate's for the best of so many.

    Args:
        branches: ``Branch.to_json`` of each.
        found: Name of the branch -> (model.json, evaluation.json).

    Returns:
        {"best", "primary_metric", "best_of", "confidence", "branches": rows}.

    Raises:
        HjepaError: they were judged on different images or by different settings.
    """
    metric = next(iter(found.values()))[1]["primary_metric"]["name"]
    candidates = {
        name: Candidate.of_manifests(model, evaluation, metric) for name, (model, evaluation) in found.items()
    }
    first = next(iter(candidates.values()))
    for name, candidate in candidates.items():
        if not candidate.score.comparable(first.score):
            raise HjepaError(
                f"branch {name} was judged by {candidate.score.tags}, another one by {first.score.tags}: they cannot "
                "be compared. Start the sweep again under another name"
            )
    best = max(candidates, key=lambda name: _rank(candidates[name]))
    rows = []
    for branch in branches:
        name = branch["name"]
        model, evaluation = found[name]
        row: Json = {
            **{key: branch[key] for key in ("name", "run", "settings")},
            "value": candidates[name].score.value,
            **_interval(evaluation, metric),
            "obstacle": candidates[name].obstacle,
            "model": model["uri"],
            "report": evaluation["report"],
            "step": model["checkpoint"]["step"],
            "images_seen": model["checkpoint"]["images_seen"],
        }
        if name != best:
            row |= _difference(candidates[best].outcomes, candidates[name].outcomes, best_of=len(found))
            row["difference"] = candidates[best].score.value - candidates[name].score.value
        rows.append(row)
    return {
        "best": best,
        "primary_metric": metric,
        "best_of": len(found),
        "confidence": confidence_of(len(found)),
        "branches": rows,
    }


def _rank(candidate: Candidate) -> tuple[bool, float]:
    value = candidate.score.value
    return not candidate.obstacle, value if math.isfinite(value) else -math.inf


def _interval(evaluation: Mapping[str, Any], metric: str) -> Json:
    low, _, high = interval_tag(evaluation, metric).partition(",")
    return {"low": float(low), "high": float(high)} if low else {}


def _difference(best: Outcomes | None, other: Outcomes | None, *, best_of: int) -> Json:
    """The interval of ``best - other``; nothing where the metric has no outcome per item."""
    if best is None or other is None or len(best.correct) != len(other.correct):
        return {}
    _, low, high = paired_difference(
        best.correct, other.correct, resamples=resamples_of(best_of), confidence=confidence_of(best_of)
    )
    return {"difference_low": low, "difference_high": high}


def in_words(comparison: Mapping[str, Any]) -> str:
    """Which branch is the best and whether that is more than luck, as one or two sentences."""
    rows = {row["name"]: row for row in comparison["branches"]}
    best = rows[comparison["best"]]
    metric, count = comparison["primary_metric"], comparison["best_of"]
    text = f"{best['name']} is the best of {count}: {metric} {best['value']:.4f}"
    if best["obstacle"]:
        return f"No branch can be a champion; {text}, but {best['obstacle']}."
    others = [row for row in rows.values() if row is not best and math.isfinite(row["value"])]
    if not others:
        return f"{text}; no other branch has a score."
    second = max(others, key=lambda row: row["value"])
    text += f", {second['difference']:+.4f} against {second['name']}"
    if "difference_low" not in second:
        return f"{text}. How much of that is luck cannot be said: the metric is not counted per test image."
    clear = second["difference_low"] > 0
    span = f"{second['difference_low']:+.4f} to {second['difference_high']:+.4f}"
    return (
        f"{text}, {'outside' if clear else 'within'} the noise of the test images ({span}, "
        f"{100 * comparison['confidence']:.4g} %, corrected for {count} branches). One seed each: what another seed "
        "would give is not in this interval."
    )


def behind(row: Mapping[str, Any]) -> str:
    """What the best is better by than this branch, with its interval; empty for the best."""
    if "difference" not in row:
        return ""
    ends = f" ({row['difference_low']:+.4f} to {row['difference_high']:+.4f})" if "difference_low" in row else ""
    return f"{row['difference']:+.4f}{ends}"


def table(comparison: Mapping[str, Any]) -> str:
    """The branches as a Markdown table, in their order."""
    rows = comparison["branches"]
    keys = list(rows[0]["settings"])
    lines = [["branch", *keys, comparison["primary_metric"], "best - this", "note"]]
    lines.append(["---"] * len(lines[0]))
    for row in rows:
        value = f"{row['value']:.4f}" + (f" ({row['low']:.4f} to {row['high']:.4f})" if "low" in row else "")
        name = f"**{row['name']}**" if row["name"] == comparison["best"] else row["name"]
        lines.append([name, *row["settings"].values(), value, behind(row), row["obstacle"]])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
