"""By hand what the gate does: look at the versions of a registered model, compare two, move the champion and back."""

from __future__ import annotations

import contextlib
import getpass
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from hjepa.adapters.gate import (
    CHALLENGER,
    CHAMPION,
    DATASET_TAG,
    INTERVAL_TAG,
    Candidate,
    Noise,
    Score,
    decide,
    paired_noise,
)
from hjepa.adapters.registry import MARGIN_TAG, PREVIOUS_TAG, candidate_of, champion_of, model_id_of, versions_of
from hjepa.adapters.tracking import RUN_TAG, http_patience, server_errors
from hjepa.config import TrackingConfig
from hjepa.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

PROMOTED_BY_TAG = "hjepa.promoted_by"
PROMOTED_AT_TAG = "hjepa.promoted_at"
PROMOTED_WHY_TAG = "hjepa.promoted_why"


@dataclass(frozen=True)
class Entry:
    """One version, as a list shows it. What hjepa did not register has no score."""

    version: int
    aliases: tuple[str, ...]
    score: Score | None
    interval: tuple[float, float] | None
    dataset_digest: str
    created: datetime
    run: str


@dataclass(frozen=True)
class Difference:
    """Two versions side by side; each pair is (of the first, of the second), None where one has no such entry."""

    name: str
    versions: tuple[int, int]
    params: Mapping[str, tuple[str | None, str | None]]  # those that differ
    metrics: Mapping[str, tuple[float | None, float | None]]  # all
    metric: str  # the primary one
    noise: Noise | str  # of second - first, or why there is none


@dataclass(frozen=True)
class Move:
    """What became of the champion."""

    name: str
    champion: int
    before: int | None
    reason: str


@contextlib.contextmanager
def _connected(server: str, action: str) -> Iterator[MlflowClient]:
    from mlflow import MlflowClient

    with http_patience(timeout_seconds=30, retries=2), server_errors(server, action):
        yield MlflowClient(tracking_uri=server, registry_uri=server)


def entries(server: str, name: str | None = None) -> dict[str, list[Entry]]:
    """Every version by registered model, the newest first; of one model if ``name`` is given.

    Raises:
        UserError: there is no such model.
        TrackingError: the server does not answer.
    """
    with _connected(server, "list the models") as client:
        names = [_known(client, name)] if name else _names(client)
        return {name: _entries(client, name) for name in names}


def _entries(client: MlflowClient, name: str) -> list[Entry]:
    aliases = client.get_registered_model(name).aliases
    found = [
        Entry(
            version=int(version.version),
            aliases=tuple(sorted(alias for alias, number in aliases.items() if str(number) == str(version.version))),
            score=Score.of_version(version),
            interval=_interval(version.tags.get(INTERVAL_TAG, "")),
            dataset_digest=version.tags.get(DATASET_TAG, ""),
            created=datetime.fromtimestamp(version.creation_timestamp / 1000, UTC),
            run=version.tags.get(RUN_TAG) or version.run_id or "",
        )
        for version in versions_of(client, name)
    ]
    return sorted(found, key=lambda entry: -entry.version)


def _interval(tag: str) -> tuple[float, float] | None:
    low, comma, high = tag.partition(",")
    return (float(low), float(high)) if comma else None


def compare(server: str, first: str, second: str, name: str | None = None) -> Difference:
    """Two versions of a model, each given by number or alias.

    Raises:
        UserError: there is no such model or version.
        TrackingError: the server does not answer.
    """
    with _connected(server, "compare two versions") as client:
        name = _known(client, name)
        a, b = _version(client, name, first), _version(client, name, second)
        params = [_params(client, version) for version in (a, b)]
        metrics = [_metrics(client, version) for version in (a, b)]
        old, new = candidate_of(client, server, a), candidate_of(client, server, b)
    sides = {key: (params[0].get(key), params[1].get(key)) for key in sorted({*params[0], *params[1]})}
    return Difference(
        name=name,
        versions=(int(a.version), int(b.version)),
        params={key: pair for key, pair in sides.items() if pair[0] != pair[1]},
        metrics={key: (metrics[0].get(key), metrics[1].get(key)) for key in sorted({*metrics[0], *metrics[1]})},
        metric=new.score.metric if new else "",
        noise=_noise(new, old),
    )


def _noise(new: Candidate | None, old: Candidate | None) -> Noise | str:
    if new is None or old is None:
        return "a version without hjepa scores cannot be compared"
    if not new.score.comparable(old.score):
        return "they were not measured by the same metric on the same test items with the same settings"
    return paired_noise(new, old)


def _params(client: MlflowClient, version: ModelVersion) -> dict[str, str]:
    return dict(client.get_run(version.run_id).data.params) if version.run_id else {}


def _metrics(client: MlflowClient, version: ModelVersion) -> dict[str, float]:
    """The newest value of each metric of the version's evaluation."""
    if not model_id_of(version).startswith("m-"):
        return {}
    rows = client.get_logged_model(model_id_of(version)).metrics or []
    return {row.key: float(row.value) for row in sorted(rows, key=lambda row: (row.timestamp, row.step))}


def promote(server: str, version: str, name: str | None = None, *, force: bool = False, why: str = "") -> Move:
    """Makes a version the champion if the gate lets it through, or in any case with ``force``.

    The margin is the one that the version was registered with.

    Raises:
        UserError: there is no such model or version, or the gate refuses; the message has its reason.
        TrackingError: the server does not answer.
    """
    with _connected(server, "promote a version") as client:
        name = _known(client, name)
        wanted = _version(client, name, version)
        present = champion_of(client, name)
        before = int(present.version) if present else None
        if before == int(wanted.version):
            return Move(name, before, before, "it is the champion already")
        passes, reason = _judged(client, server, wanted, present)
        if not passes and not force:
            raise UserError(
                f"version {wanted.version} of {name} is not promoted: {reason}. --force promotes it all the same"
            )
        reason = reason if passes else f"by force, against the gate: {reason}"
        if before is not None:
            client.set_model_version_tag(name, wanted.version, PREVIOUS_TAG, str(before))
        _move(client, wanted, why=f"{why}; {reason}" if why else reason)
    return Move(name, int(wanted.version), before, reason)


def _judged(client: MlflowClient, server: str, wanted: ModelVersion, present: ModelVersion | None) -> tuple[bool, str]:
    new = candidate_of(client, server, wanted)
    if new is None:
        return False, "it carries no hjepa scores"
    verdict = decide(
        new,
        candidate_of(client, server, present) if present else None,
        champion_version=int(present.version) if present else None,
        margin=float(wanted.tags.get(MARGIN_TAG, TrackingConfig().champion_margin)),
    )
    return verdict.alias == CHAMPION, verdict.reason


def rollback(server: str, name: str | None = None, *, why: str = "") -> Move:
    """Makes the version champion that was it before the present one. Each move can be taken back once.

    Raises:
        UserError: there is no champion, or none before it, or that version is gone.
        TrackingError: the server does not answer.
    """
    with _connected(server, "roll the champion back") as client:
        name = _known(client, name)
        present = champion_of(client, name)
        if present is None:
            raise UserError(f"{name} has no champion; make one with `hjepa models promote VERSION --name {name}`")
        number = present.tags.get(PREVIOUS_TAG)
        if number is None:
            raise UserError(
                f"no version of {name} was champion before version {present.version}, so there is nothing to go back to"
            )
        previous = _version(client, name, number)
        reason = f"rolled back from version {present.version}"
        _move(client, previous, why=f"{why}; {reason}" if why else reason)
        client.delete_model_version_tag(name, present.version, PREVIOUS_TAG)
    return Move(name, int(previous.version), int(present.version), reason)


def _move(client: MlflowClient, version: ModelVersion, *, why: str) -> None:
    """Who, when and why first: a kill must not leave a champion that nobody has made."""
    name, number, now = version.name, str(version.version), datetime.now(UTC).isoformat(timespec="seconds")
    by = _user()
    for tag, value in {PROMOTED_BY_TAG: by, PROMOTED_AT_TAG: now, PROMOTED_WHY_TAG: why[:5000]}.items():
        client.set_model_version_tag(name, number, tag, value)
    note = f"**Made champion by hand, by {by} at {now}: {why}**\n\n"
    client.update_model_version(name, number, description=note + (version.description or ""))
    client.set_registered_model_alias(name, CHAMPION, number)
    if str(client.get_registered_model(name).aliases.get(CHALLENGER)) == number:
        client.delete_registered_model_alias(name, CHALLENGER)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run as a user without a name
        return "unknown"


def _names(client: MlflowClient) -> list[str]:
    found: list[str] = []
    page = None
    while True:
        part = client.search_registered_models(page_token=page)
        found += [model.name for model in part]
        page = part.token
        if not page:
            return sorted(found)


def _known(client: MlflowClient, name: str | None) -> str:
    """The name that is meant: without one, that of the only model there is. Raises UserError with those there are."""
    names = _names(client)
    if name in names:
        return str(name)
    if name is None and len(names) == 1:
        return names[0]
    there = f"there are {', '.join(names)}" if names else "nothing is registered there yet"
    what = f"there is no registered model {name!r}" if name else "which model? Give --name"
    raise UserError(f"{what}; {there}")


def _version(client: MlflowClient, name: str, given: str) -> ModelVersion:
    aliases = client.get_registered_model(name).aliases
    number = str(aliases.get(given, given))
    numbers = sorted(int(version.version) for version in versions_of(client, name))
    if not number.isdecimal() or int(number) not in numbers:
        there = f"there are {', '.join(map(str, numbers))}" if numbers else "there are none yet"
        named = f" and the names {', '.join(sorted(aliases))}" if aliases else ""
        raise UserError(f"{name} has no version {given!r}; {there}{named}")
    return client.get_model_version(name, str(int(number)))
