"""The gate of the registry: better by the margin, outside the noise, healthy; against a real MLflow server."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import requests

from hjepa.adapters.gate import Candidate, Outcomes, Score, decide
from hjepa.adapters.registry import Registration, champion_of, fetch_export, model_id_of
from hjepa.adapters.tracking import TrackingError
from hjepa.errors import HjepaError
from tests.test_registry import DIGEST, MARGIN, METRIC, Overtaken, Shelf, evaluation, shelf

__all__ = ["shelf"]  # a fixture

ITEMS = 2000


def right(count: int, *, of: int = ITEMS, first: int = 0) -> np.ndarray:
    """Outcomes [of]: the ``count`` items from ``first`` on, around the end, are right."""
    correct = np.zeros(of, dtype=bool)
    correct[(first + np.arange(count)) % of] = True
    return correct


def judged(correct: np.ndarray, **changes: Any) -> dict[str, Any]:
    """An evaluation with outcomes; its value is their mean."""
    packed = np.packbits(correct).tobytes().hex()
    outcomes = {"metric": METRIC, "count": len(correct), "correct": packed}
    return evaluation(float(correct.mean()), test=len(correct)) | {"outcomes": outcomes} | changes


def candidate(correct: np.ndarray, **changes: Any) -> Candidate:
    score = Score(METRIC, float(correct.mean()), DIGEST, f"9/{len(correct)}")
    return Candidate(score, Outcomes(METRIC, correct), **changes)


PASSED = {"torch.export": {"max_abs_difference": 2e-6, "tolerance": 1e-4, "passed": True}}
FAILED = {**PASSED, "onnx": {"max_abs_difference": 0.03, "tolerance": 1e-4, "passed": False}}


# -- the decision ------------------------------------------------------------------------------------------------------


def test_decide__same_gain_is_signal_on_the_same_items_and_noise_on_others() -> None:
    old = candidate(right(1000))
    superset = candidate(right(1030))  # right wherever the old one is, and on 30 more
    shifted = candidate(right(1030, first=700))  # as many right, mostly other ones
    clear = decide(superset, old, champion_version=1, margin=MARGIN)
    lucky = decide(shifted, old, champion_version=1, margin=MARGIN)
    assert (clear.alias, lucky.alias) == ("champion", "challenger")
    assert "outside the noise" in clear.reason
    assert "more than the margin of 0.005 but within the noise (between -0.0" in lucky.reason
    # 30 of 2000 items are +1, the others 0: mean 0.015, standard error sqrt(0.015 * 0.985 / 2000) = 0.00272.
    assert float(clear.numbers["hjepa.gate.difference"]) == pytest.approx(0.015)
    assert float(clear.numbers["hjepa.gate.low"]) == pytest.approx(0.015 - 1.96 * 0.00272, abs=6e-4)
    assert float(clear.numbers["hjepa.gate.high"]) == pytest.approx(0.015 + 1.96 * 0.00272, abs=6e-4)
    assert float(lucky.numbers["hjepa.gate.low"]) < 0 < float(lucky.numbers["hjepa.gate.high"])


def test_decide__significant_but_below_the_margin_is_no_champion() -> None:
    verdict = decide(candidate(right(1009)), candidate(right(1000)), champion_version=1, margin=MARGIN)
    assert verdict.alias == "challenger"
    assert "not more than the margin of 0.005 but outside the noise" in verdict.reason


@pytest.mark.parametrize(
    ("new", "old", "why"),
    [
        (None, right(1000), "outcomes of this version per test item are not stored"),
        (right(1100), None, "outcomes of the other per test item are not stored"),
        (right(1100), right(500, of=1000), "of 2000 and of 1000 test items"),
    ],
)
def test_decide__without_paired_outcomes_the_margin_alone_decides_and_says_so(
    new: np.ndarray | None, old: np.ndarray | None, why: str
) -> None:
    def of(correct: np.ndarray | None, value: float) -> Candidate:
        outcomes = None if correct is None else Outcomes(METRIC, correct)
        return Candidate(Score(METRIC, value, DIGEST, "9/9"), outcomes)

    verdict = decide(of(new, 0.55), of(old, 0.50), champion_version=1, margin=MARGIN)
    assert verdict.alias == "champion"
    assert f"the margin alone decided, as the {why}" in verdict.reason.replace("as the outcomes are", "as the")
    assert decide(of(new, 0.504), of(old, 0.50), champion_version=1, margin=MARGIN).alias == "challenger"


def test_decide__outcomes_of_another_metric_are_not_compared() -> None:
    other = Candidate(Score(METRIC, 0.6, DIGEST, "9/2000"), Outcomes("eval/knn_top1", right(1200)))
    verdict = decide(other, candidate(right(1000)), champion_version=1, margin=MARGIN)
    assert "the margin alone decided, as the outcomes of this version are those of eval/knn_top1" in verdict.reason


@pytest.mark.parametrize("champion_version", [None, 1])
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"collapse": "dimensional: 2 of 16"}, "the representation has collapsed: dimensional: 2 of 16"),
        ({"checks": FAILED}, r"an export check failed: onnx differs by 3.0e-02 of the 0.0001 allowed: failed"),
    ],
)
def test_decide__unhealthy_version_is_no_champion_not_even_the_first(
    champion_version: int | None, changes: Mapping[str, Any], reason: str
) -> None:
    old = candidate(right(1000)) if champion_version else None
    verdict = decide(candidate(right(1900), **changes), old, champion_version=champion_version, margin=MARGIN)
    assert verdict.alias == "challenger"
    assert reason in verdict.reason
    healthy = candidate(right(1900), checks=PASSED)
    assert decide(healthy, old, champion_version=champion_version, margin=MARGIN).alias == "champion"


@pytest.mark.parametrize("count", [1, 7, 8, 9, 2000])
def test_outcomes__survive_packing(count: int) -> None:
    correct = np.random.default_rng(count).random(count) < 0.5
    again = Outcomes.of_json(json.loads(Outcomes(METRIC, correct).text))
    assert (again.metric, again.correct.tolist()) == (METRIC, correct.tolist())


@pytest.mark.parametrize(
    "damage", [{"count": 17}, {"count": 0}, {"correct": "zz"}, {"correct": None}, {"count": "many"}]
)
def test_outcomes__damaged_ones_are_refused(damage: Mapping[str, Any]) -> None:
    stored = {"metric": METRIC, "count": 16, "correct": "ff00"}
    assert Outcomes.of_json(stored).correct.sum() == 8
    with pytest.raises(HjepaError, match="outcomes of an evaluation are damaged"):
        Outcomes.of_json(stored | damage)


def test_registry__decides_without_torch() -> None:
    code = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "import hjepa.adapters.registry, hjepa.adapters.champions, hjepa.cli_models\n"
        "from hjepa.adapters.gate import *\n"
        "import numpy as np\n"
        "old, new = (Candidate(Score('m', v, 'd', '1/1'), Outcomes('m', np.arange(100) < 100 * v)) for v in (.5, .7))\n"
        "print(decide(new, old, champion_version=1, margin=0.1).alias)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.stdout.strip() == "champion", ran.stderr


# -- on the server -----------------------------------------------------------------------------------------------------


def test_register__gate_and_its_numbers_are_on_the_version(shelf: Shelf) -> None:
    model = shelf.model | {"checks": PASSED}
    table = [
        {"encoder": "trained", "level": "all", "linear_top1": 0.5, "linear_top1_low": 0.48, "linear_top1_high": 0.52}
    ]
    shelf.register("1", judged(right(1000), table=table), model=model)
    lucky = shelf.register("2", judged(right(1030, first=700)), model=model)
    clear = shelf.register("3", judged(right(1030)), model=model)
    assert (lucky.alias, clear.alias, shelf.champion()) == ("challenger", "champion", 3)
    client = mlflow.MlflowClient()
    first, _, third = (client.get_model_version(shelf.name, number) for number in ("1", "2", "3"))
    assert first.tags["hjepa.primary_interval"] == "0.48,0.52"
    assert "0.5000 [0.4800, 0.5200]" in first.description
    assert "linear_top1_low" not in first.description
    tags = third.tags
    assert float(tags["hjepa.gate.difference"]) == pytest.approx(0.015)
    assert 0 < float(tags["hjepa.gate.low"]) < 0.015 < float(tags["hjepa.gate.high"])
    gate = [tags[f"hjepa.gate.{name}"] for name in ("against", "margin", "resamples", "test_items")]
    assert gate == ["1", "0.005", "2000", "2000"]
    assert (tags["hjepa.collapse"], json.loads(tags["hjepa.checks"])) == ("", PASSED)
    assert tags["hjepa.previous_champion"] == "1"
    assert f"**champion: {clear.reason}**" in third.description
    assert "Collapse: no sign. Export checks: torch.export differs by 2.0e-06 of the 0.0001 allowed: passed." in (
        third.description
    )


def test_register__first_version_that_collapsed_leaves_the_place_free(shelf: Shelf) -> None:
    first = shelf.register("1", judged(right(1900), collapse="complete"))
    assert (first.alias, first.champion_version) == ("challenger", None)
    assert champion_of(mlflow.MlflowClient(), shelf.name) is None
    assert shelf.register("2", judged(right(1000))).alias == "champion"
    # Looked at again and found healthy, it is decided anew.
    assert shelf.register("1", judged(right(1900))).alias == "champion"


def test_register__score_that_is_not_a_number_is_registered_and_no_champion(shelf: Shelf) -> None:
    nothing = shelf.register("1", evaluation(math.nan))
    assert (nothing.alias, nothing.reason) == ("challenger", f"{METRIC} is not a number")
    assert shelf.register("2", judged(right(100))).alias == "champion"


def test_register__outcomes_that_are_lost_or_changed_leave_the_margin(shelf: Shelf, tmp_path: Path) -> None:
    shelf.register("1", judged(right(1000)))
    client = mlflow.MlflowClient()
    (tmp_path / "outcomes.json").write_text(Outcomes(METRIC, right(1000, first=900)).text)
    model_id = model_id_of(client.get_model_version(shelf.name, "1"))
    client.log_model_artifact(model_id, str(tmp_path / "outcomes.json"))
    done = shelf.register("2", judged(right(1030, first=700)))
    assert done.alias == "champion"
    assert "the margin alone decided, as the outcomes of the other per test item are not stored" in done.reason


def test_register__evaluated_again_replaces_the_outcomes(shelf: Shelf) -> None:
    shelf.register("1", judged(right(1000)))
    again = shelf.register("1", judged(right(1000, first=700)))
    assert "in another evaluation" in again.reason
    done = shelf.register("2", judged(right(1030, first=700)))
    assert done.alias == "champion"
    assert "outside the noise" in done.reason


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(
    "other",
    [
        pytest.param(judged(right(1900), collapse="complete"), id="collapsed"),
        pytest.param(judged(right(1050, first=950)), id="noise"),
    ],
)
def test_register__at_the_same_time_one_that_failed_the_gate_claims_nothing(
    shelf: Shelf, other: Mapping[str, Any], before: bool
) -> None:
    shelf.register("1", judged(right(1000)))
    client = Overtaken(lambda: shelf.register("other", other), before=before)
    mine = shelf.register("own", judged(right(1030)), client=client)
    [its] = client.others
    assert (mine.alias, its.alias) == ("champion", "challenger")
    assert shelf.champion() == mine.version


@pytest.mark.parametrize("before", [True, False])
def test_register__of_two_at_the_same_time_the_loser_was_never_champion(shelf: Shelf, before: bool) -> None:
    shelf.register("1", judged(right(1000)))
    client = Overtaken(lambda: shelf.register("other", judged(right(1060))), before=before)
    shelf.register("own", judged(right(1030)), client=client)
    champion = champion_of(mlflow.MlflowClient(), shelf.name)
    assert champion is not None
    assert int(champion.version) == client.others[0].version
    assert champion.tags["hjepa.previous_champion"] == "1"


class Dying(mlflow.MlflowClient):
    """A client whose connection breaks for good at the call of one method; ``partly`` does some of its work first."""

    def __init__(self, method: str, partly: Callable[..., None] | None = None):
        super().__init__()

        def broken(*arguments: Any, **named: Any) -> None:
            if partly:
                partly(*arguments)
            raise requests.ConnectionError("the connection broke")

        setattr(self, method, broken)


def upload_one_file(model_id: str, folder: str) -> None:
    mlflow.MlflowClient().log_model_artifact(model_id, str(Path(folder) / "MLmodel"))


@pytest.mark.parametrize(
    ("method", "partly"),
    [
        ("log_model_artifacts", upload_one_file),
        ("finalize_logged_model", None),
        ("log_model_artifact", None),
        ("create_model_version", None),
        ("update_model_version", None),
    ],
)
def test_register__killed_at_any_place_is_completed_by_the_retry(
    shelf: Shelf, method: str, partly: Callable[..., None] | None
) -> None:
    result = judged(right(1000))
    with pytest.raises(TrackingError, match="the connection broke"):
        shelf.register("1", result, client=Dying(method, partly))
    client = mlflow.MlflowClient()
    versions = client.search_model_versions(f"name = '{shelf.name}'")
    assert len(versions) == (1 if method == "update_model_version" else 0)  # which has all but its description
    done: Registration = shelf.register("1", result)
    assert (done.version, done.alias) == (1, "champion")
    version = client.get_model_version(shelf.name, "1")
    run = client.get_run(version.run_id)
    assert [item.model_id for item in run.outputs.model_outputs] == [model_id_of(version)]
    logged = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run.info.run_id}'")
    assert [(item.model_id, str(item.status)) for item in logged] == [(model_id_of(version), "READY")]
    assert fetch_export(f"models:/{shelf.name}@champion").is_dir()
    assert "outside the noise" in shelf.register("2", judged(right(1030))).reason
