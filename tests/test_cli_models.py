"""``hjepa models``: list, compare, promote and roll back, against a real MLflow server."""

from __future__ import annotations

import argparse
import getpass
import re
from pathlib import Path

import mlflow
import pytest

from hjepa import cli_models
from hjepa.adapters.stack import Stack
from hjepa.adapters.tracking import Tracker, TrackingError
from hjepa.config import TrackingConfig
from hjepa.errors import UserError
from tests.test_registry import DIGEST, OTHER_DIGEST, Shelf, evaluation, shelf
from tests.test_registry_gate import judged, right

__all__ = ["shelf"]  # a fixture


def models(*arguments: str) -> None:
    parser = argparse.ArgumentParser(prog="hjepa")
    cli_models.add_parser(parser.add_subparsers(required=True))
    options = parser.parse_args(["models", *arguments])
    options.command(options)


def lines(text: str, word: str) -> list[str]:
    return [line for line in text.splitlines() if re.search(rf"\b{word}\b", line)]


def champion(shelf: Shelf) -> mlflow.entities.model_registry.ModelVersion:
    return mlflow.MlflowClient().get_model_version(shelf.name, str(shelf.champion()))


# -- ls ----------------------------------------------------------------------------------------------------------------


def test_ls__shows_every_version_with_its_score_and_marks_the_champion(
    shelf: Shelf, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"encoder": "trained", "level": "all", "linear_top1": 0.5, "linear_top1_low": 0.48, "linear_top1_high": 0.52}
    shelf.register("1", judged(right(1000), table=[row]))
    shelf.register("2", evaluation(0.9, OTHER_DIGEST))
    capsys.readouterr()
    models("ls", "--name", shelf.name)
    shown = capsys.readouterr().out
    [first], [second] = lines(shown, f"{shelf.name}-1"), lines(shown, f"{shelf.name}-2")
    for text in ("champion", "eval/linear_top1", "0.5000", "0.4800 to 0.5200", DIGEST[:12]):
        assert text in first
    for text in ("challenger", "0.9000", OTHER_DIGEST[:12]):
        assert text in second
    assert shown.index(second) < shown.index(first)  # the newest first
    assert re.search(r"\b20\d\d-\d\d-\d\d \d\d:\d\d\b", first)
    models("ls")  # of every name
    assert shelf.name in capsys.readouterr().out


def test_ls__finds_the_server_of_this_machine(
    shelf: Shelf, stack: Stack, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shelf.register("1", evaluation(0.5))
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    models("ls", "--home", str(stack.home))
    assert shelf.name in capsys.readouterr().out


def test_ls__version_that_something_else_registered_is_listed_too(
    shelf: Shelf, capsys: pytest.CaptureFixture[str]
) -> None:
    client = mlflow.MlflowClient()
    client.create_registered_model(shelf.name)
    client.create_model_version(shelf.name, source="s3://elsewhere/model")
    models("ls", "--name", shelf.name)
    assert re.search(r"│ 1 +│ +│ - +│ +- │ - +│ - ", capsys.readouterr().out)
    with pytest.raises(UserError, match="carries no hjepa scores"):
        models("promote", "1", "--name", shelf.name)
    models("diff", "1", "1", "--name", shelf.name)
    assert "cannot be compared" in capsys.readouterr().out


# -- diff --------------------------------------------------------------------------------------------------------------


def test_diff__settings_that_differ_metrics_and_noise(shelf: Shelf, capsys: pytest.CaptureFixture[str]) -> None:
    for run, settings in (("1", {"lr": 0.1, "scale": [0.15, 0.2], "same": 3}), ("2", {"lr": 0.2, "same": 3})):
        name, params = f"{shelf.name}-{run}", {"training": settings}
        Tracker.create_or_resume(TrackingConfig(), experiment="registry", run_name=name, tags={}, params=params)
    shelf.register("1", judged(right(1000)))
    shelf.register("2", judged(right(1030)))
    capsys.readouterr()
    models("diff", "1", "champion", "--name", shelf.name)
    shown = capsys.readouterr().out
    [changed], [absent] = lines(shown, r"training\.lr"), lines(shown, r"training\.scale")
    assert re.search(r"0\.1 +│ 0\.2 ", changed)
    assert re.search(r"\[0\.15, 0\.2\] +│ - ", absent)
    assert "training.same" not in shown
    assert re.search(r"eval/linear_top1 +│ 0\.5000 +│ 0\.5150 +│ +\+0\.0150", shown)
    assert "version 2 against 1 is outside the noise: between +0.0" in shown


def test_diff__after_another_evaluation_shows_its_metrics(shelf: Shelf, capsys: pytest.CaptureFixture[str]) -> None:
    shelf.register("1", evaluation(0.5))
    shelf.register("1", evaluation(0.6))
    shelf.register("2", evaluation(0.7, OTHER_DIGEST))
    capsys.readouterr()
    models("diff", "1", "2", "--name", shelf.name)
    shown = capsys.readouterr().out
    assert "the configurations of the two runs are the same" in shown
    assert re.search(r"eval/linear_top1 +│ 0\.6000 +│ 0\.7000 +│ +\+0\.1000", shown)
    assert "no paired comparison: they were not measured by the same metric on the same test items" in shown


# -- promote and rollback ----------------------------------------------------------------------------------------------


def test_promote__refuses_what_the_gate_refuses_unless_forced_and_rollback_takes_it_back(
    shelf: Shelf, capsys: pytest.CaptureFixture[str]
) -> None:
    shelf.register("1", judged(right(1000)))
    shelf.register("2", judged(right(1030, first=700)))
    with pytest.raises(UserError, match=r"version 2 .* is not promoted: .* within the noise .* --force"):
        models("promote", "2", "--name", shelf.name)
    assert shelf.champion() == 1
    models("promote", "challenger", "--name", shelf.name, "--force", "--why", "seen in production")
    assert "rollback" in capsys.readouterr().out
    tags, text = champion(shelf).tags, champion(shelf).description
    assert shelf.champion() == 2
    assert tags["hjepa.promoted_by"] == getpass.getuser()
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", tags["hjepa.promoted_at"])
    assert tags["hjepa.promoted_why"].startswith("seen in production; by force, against the gate: ")
    assert text.startswith("**Made champion by hand, by ")
    assert "challenger" not in mlflow.MlflowClient().get_registered_model(shelf.name).aliases

    models("rollback", "--name", shelf.name)
    assert shelf.champion() == 1
    assert champion(shelf).tags["hjepa.promoted_why"] == "rolled back from version 2"
    with pytest.raises(UserError, match=r"no version of .* was champion before version 1"):
        models("rollback", "--name", shelf.name)
    assert shelf.champion() == 1


def test_promote__what_passes_the_gate_needs_no_force(shelf: Shelf, capsys: pytest.CaptureFixture[str]) -> None:
    shelf.register("1", judged(right(1000)))
    shelf.register("2", judged(right(1030)))
    mlflow.MlflowClient().set_registered_model_alias(shelf.name, "champion", "1")
    models("promote", "2", "--name", shelf.name)
    assert "version 2 is champion: eval/linear_top1 0.5150: +0.0150 against 0.5000" in capsys.readouterr().out
    assert shelf.champion() == 2
    models("promote", "2", "--name", shelf.name)
    assert "it is the champion already" in capsys.readouterr().out
    assert champion(shelf).tags["hjepa.previous_champion"] == "1"


def test_promote__collapsed_version_is_refused(shelf: Shelf) -> None:
    shelf.register("1", judged(right(1900), collapse="complete"))
    with pytest.raises(UserError, match="the representation has collapsed: complete"):
        models("promote", "1", "--name", shelf.name)
    with pytest.raises(UserError, match="has no champion; make one with `hjepa models promote"):
        models("rollback", "--name", shelf.name)


def test_rollback__goes_back_over_what_the_gate_moved(shelf: Shelf) -> None:
    for run, count in (("1", 1000), ("2", 1030), ("3", 1060)):
        shelf.register(run, judged(right(count)))
    for left in (2, 1):
        models("rollback", "--name", shelf.name)
        assert shelf.champion() == left


def test_rollback__to_a_version_that_is_gone_says_what_there_is(shelf: Shelf) -> None:
    shelf.register("1", judged(right(1000)))
    shelf.register("2", judged(right(1030)))
    mlflow.MlflowClient().delete_model_version(shelf.name, "1")
    with pytest.raises(UserError, match=r"has no version '1'; there are 2 and the names champion"):
        models("rollback", "--name", shelf.name)
    assert shelf.champion() == 2


# -- mistakes ----------------------------------------------------------------------------------------------------------


def test_models__unknown_name_or_version_says_what_there_is(shelf: Shelf) -> None:
    shelf.register("1", judged(right(1000)))
    with pytest.raises(UserError, match=rf"no registered model 'nothing'; there are .*{shelf.name}"):
        models("ls", "--name", "nothing")
    for given in ("7", "best", "-1", "1.5"):
        with pytest.raises(UserError, match=r"has no version .*; there are 1 and the names champion"):
            models("promote", "--name", shelf.name, "--", given)


def test_models__server_down_or_not_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TrackingError, match="could not list the models: connection refused"):
        models("ls", "--uri", "http://127.0.0.1:9")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match=r"no MLflow server is named.*hjepa stack up"):
        models("ls", "--home", str(tmp_path))
