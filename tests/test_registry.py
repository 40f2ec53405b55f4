"""Registration, the champion's gate, and loading, against real MLflow and S3 servers."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch

from hjepa.adapters.gate import Candidate, Score, decide
from hjepa.adapters.registry import Registration, fetch_export, register
from hjepa.adapters.s3 import S3Store
from hjepa.adapters.tracking import Tracker, TrackingError
from hjepa.config import TrackingConfig, load_config
from hjepa.errors import HjepaError, UserError
from hjepa.export import load_export, save_export, untrained_encoder
from hjepa.files import file_sha256

METRIC = "eval/linear_top1"
MARGIN = 0.005
DIGEST, OTHER_DIGEST = "a" * 64, "b" * 64


def make_export(folder: Path, *, channels: int = 1, seed: int = 0) -> dict[str, Any]:
    """An untrained encoder of 32-pixel images with two levels, and its model.json."""
    tiny = ["image_size=32", f"channels={channels}"]
    overrides = [f"data.{item}" for item in tiny]
    overrides += [f"model.{item}" for item in ("patch_size=8", "embed_dim=16", "depth=1", "num_heads=2")]
    config = load_config("", [*overrides, f"seed={seed}", "masking.min_context=1"])
    encoder = untrained_encoder(config, mean=[0.5] * channels, std=[0.25] * channels)
    part = save_export(encoder, folder, config=config, provenance={"seed": seed})
    return {
        "schema": 1,
        "uri": f"s3://hjepa/models/demo/{part['digest'][:16]}",
        **part,
        "checkpoint": {"step": 100, "epoch": 2, "images_seen": 12_800},
        "max_abs_difference": 0.0,
    }


def evaluation(value: float, digest: str = DIGEST, *, test: int = 10_000) -> dict[str, Any]:
    return {
        "schema": 1,
        "primary_metric": {"name": METRIC, "value": value},
        "metrics": {METRIC: value, "eval/knn_top1": value - 0.02},
        "table": [
            {"encoder": "trained", "level": "all", "knn_top1": value - 0.02, "linear_top1": value, "rankme": 40.0},
            {"encoder": "raw pixels", "level": "-", "knn_top1": 0.79, "linear_top1": 0.809},
        ],
        "split": {"train": 10_000, "test": test, "dataset_digest": digest},
    }


def open_run(name: str) -> Tracker:
    return Tracker.create_or_resume(TrackingConfig(), experiment="registry", run_name=name, tags={}, params={})


class Shelf:
    """One registered model, and a way to put versions on it."""

    def __init__(self, folder: Path):
        self.name = f"model-{uuid.uuid4().hex[:8]}"
        self.folder = folder
        self.model = make_export(folder)

    def register(
        self, run: str, result: Mapping[str, Any], client: mlflow.MlflowClient | None = None, **changes: Any
    ) -> Registration:
        settings = {"export_dir": self.folder, "model": self.model, "margin": MARGIN, "primary_metric": METRIC}
        tracker = open_run(f"{self.name}-{run}")
        tracker.client = client or tracker.client
        return register(tracker, name=self.name, evaluation=result, **(settings | changes))

    def champion(self) -> int:
        return int(mlflow.MlflowClient().get_model_version_by_alias(self.name, "champion").version)


@pytest.fixture
def shelf(stack_environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shelf:
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Shelf(tmp_path / "made")


def images(channels: int = 1) -> np.ndarray:
    shape = (3, 40, 36) if channels == 1 else (3, 40, 36, channels)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def expected(folder: Path, pictures: np.ndarray, level: int | str) -> np.ndarray:
    last = pictures if pictures.ndim == 4 else pictures[..., None]
    return load_export(folder).embed_images(torch.tensor(last).permute(0, 3, 1, 2), level).numpy()


# -- the gate ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("new", "champion", "alias", "reason"),
    [
        (Score(METRIC, 0.80, DIGEST, "9/9"), None, "challenger", "carries no hjepa scores"),
        (Score(METRIC, 0.804, DIGEST, "9/9"), 0.80, "challenger", r"0\.8040: \+0\.0040 against 0\.8000 of version 4"),
        (Score(METRIC, 0.805, DIGEST, "9/9"), 0.80, "challenger", r"not more than the margin of 0\.005"),
        (Score(METRIC, 0.806, DIGEST, "9/9"), 0.80, "champion", r"\+0\.0060 .* more than the margin of 0\.005"),
        (Score(METRIC, 0.70, DIGEST, "9/9"), 0.80, "challenger", r"-0\.1000"),
        (Score(METRIC, 0.90, OTHER_DIGEST, "9/9"), 0.80, "challenger", "dataset b{12}; .* dataset a{12}"),
        (Score(METRIC, 0.90, DIGEST, "9/8"), 0.80, "challenger", r"9/8 train/test images; .* on 9/9"),
        (Score(METRIC, 0.90, DIGEST, "9/9", "c" * 16), 0.80, "challenger", r"settings c{16}; .* with unknown ones"),
        (Score("eval/knn_top1", 0.90, DIGEST, "9/9"), 0.80, "challenger", "chosen by eval/linear_top1"),
        (Score(METRIC, math.nan, DIGEST, "9/9"), 0.80, "challenger", "not a number"),
        (Score(METRIC, 0.10, DIGEST, "9/9"), math.nan, "champion", "more than the margin"),
    ],
)
def test_decide__champion_only_if_clearly_better_on_the_same_data(
    new: Score, champion: float | None, alias: str, reason: str
) -> None:
    rival = None if champion is None else Score(METRIC, champion, DIGEST, "9/9")
    got = decide(Candidate(new), rival and Candidate(rival), champion_version=4, margin=MARGIN)
    assert got.alias == alias
    assert re.search(reason, got.reason), got.reason


def test_register__four_runs_pass_the_gate_one_after_another(shelf: Shelf) -> None:
    first = shelf.register("1", evaluation(0.800))
    assert (first.version, first.alias, first.champion_version) == (1, "champion", 1)
    slightly_better = shelf.register("2", evaluation(0.804))
    assert (slightly_better.version, slightly_better.alias, slightly_better.champion_version) == (2, "challenger", 1)
    assert "0.8040" in slightly_better.reason
    assert "0.8000" in slightly_better.reason
    assert shelf.champion() == 1
    better = shelf.register("3", evaluation(0.806))
    assert (better.version, better.alias, better.champion_version) == (3, "champion", 3)
    assert shelf.champion() == 3
    elsewhere = shelf.register("4", evaluation(0.99, OTHER_DIGEST))
    assert (elsewhere.version, elsewhere.alias, elsewhere.champion_version) == (4, "challenger", 3)
    assert "not comparable" in elsewhere.reason
    assert shelf.champion() == 3
    client = mlflow.MlflowClient()
    assert int(client.get_model_version_by_alias(shelf.name, "challenger").version) == 4

    # Everything above once more, as after a kill: nothing is added, nothing moves.
    assert shelf.register("1", evaluation(0.800)).alias == "champion"
    assert shelf.register("2", evaluation(0.804)) == slightly_better.__class__(
        **{**slightly_better.__dict__, "champion_version": 3}
    )
    assert shelf.register("3", evaluation(0.806)) == better
    assert len(client.search_model_versions(f"name = '{shelf.name}'")) == 4
    assert shelf.champion() == 3


def test_register__killed_before_the_decision_decides_when_run_again(shelf: Shelf) -> None:
    first = shelf.register("1", evaluation(0.8))
    client = mlflow.MlflowClient()
    client.delete_model_version_tag(shelf.name, "1", "hjepa.decision")
    again = shelf.register("1", evaluation(0.8))
    assert again == first
    client.delete_registered_model_alias(shelf.name, "champion")
    client.delete_model_version_tag(shelf.name, "1", "hjepa.decision")
    assert shelf.register("1", evaluation(0.8)).alias == "champion"
    assert shelf.champion() == 1


def test_register__other_evaluation_settings_are_not_comparable(shelf: Shelf) -> None:
    usual, longer = {"knn_k": 20, "linear_iterations": 60}, {"knn_k": 20, "linear_iterations": 600}
    assert shelf.register("1", evaluation(0.80) | {"settings": usual}).alias == "champion"
    other = shelf.register("2", evaluation(0.90) | {"settings": longer})
    assert (other.alias, other.champion_version) == ("challenger", 1)
    assert re.search(r"evaluation settings [0-9a-f]{16}; .* not comparable", other.reason)
    assert shelf.register("3", evaluation(0.81) | {"settings": usual}).alias == "champion"


def test_register__evaluated_again_is_decided_by_the_new_score(shelf: Shelf) -> None:
    shelf.register("1", evaluation(0.80))
    assert shelf.register("2", evaluation(0.70)).alias == "challenger"
    better = shelf.register("2", evaluation(0.85))
    assert (better.version, better.alias, better.champion_version) == (2, "champion", 2)
    version = mlflow.MlflowClient().get_model_version(shelf.name, "2")
    assert float(version.tags["hjepa.primary_value"]) == 0.85
    assert "0.8500" in version.description
    assert shelf.register("2", evaluation(0.85)) == better

    # A champion stays one, but the next is compared with what it is known to reach now.
    worse = shelf.register("2", evaluation(0.75))
    assert worse.alias == "champion"
    assert "0.7500 in another evaluation" in worse.reason
    assert shelf.register("3", evaluation(0.78)).alias == "champion"


class Overtaken(mlflow.MlflowClient):
    """A client that is slow to move the champion: another registration begins and ends before, or after, it does."""

    def __init__(self, other: Callable[[], Registration], *, before: bool):
        super().__init__()
        self.other = other
        self.before = before
        self.others: list[Registration] = []

    def set_registered_model_alias(self, name: str, alias: str, version: str) -> None:
        if self.others or alias != "champion":
            super().set_registered_model_alias(name, alias, version)
        elif self.before:
            self.others.append(self.other())
            super().set_registered_model_alias(name, alias, version)
        else:
            super().set_registered_model_alias(name, alias, version)
            self.others.append(self.other())


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(("own", "others"), [(0.85, 0.90), (0.90, 0.85)])
def test_register__of_two_at_the_same_time_the_better_is_champion(
    shelf: Shelf, own: float, others: float, before: bool
) -> None:
    shelf.register("1", evaluation(0.80))
    client = Overtaken(lambda: shelf.register("other", evaluation(others)), before=before)
    mine = shelf.register("own", evaluation(own), client=client)
    [other] = client.others
    better, worse = (mine, other) if own > others else (other, mine)
    assert shelf.champion() == better.version
    assert better.alias == "champion"
    assert worse.alias == "challenger"
    assert f"{min(own, others):.4f}" in worse.reason
    assert f"{max(own, others):.4f} " in worse.reason
    assert f"version {better.version}" in worse.reason
    assert mine.champion_version == better.version
    tags = mlflow.MlflowClient().get_model_version(shelf.name, str(worse.version)).tags
    assert (tags["hjepa.decision"], tags["hjepa.reason"]) == ("challenger", worse.reason)


def test_register__champion_that_a_person_chose_is_the_one_to_beat(shelf: Shelf) -> None:
    shelf.register("1", evaluation(0.80))
    shelf.register("2", evaluation(0.90))
    mlflow.MlflowClient().set_registered_model_alias(shelf.name, "champion", "1")
    assert shelf.register("3", evaluation(0.85)).alias == "champion"
    assert shelf.champion() == 3


def test_register__data_without_labels_has_no_test_split(shelf: Shelf) -> None:
    unlabelled = evaluation(0.8) | {
        "metrics": {"eval/rankme": 12.5},
        "table": [{"encoder": "trained", "level": "all", "rankme": 12.5}],
        "split": {"train": 500, "dataset_digest": DIGEST},
    }
    done = shelf.register("1", unlabelled, primary_metric="eval/rankme")
    assert (done.alias, done.version) == ("champion", 1)
    assert "12.5000" in mlflow.MlflowClient().get_model_version(shelf.name, "1").description


def test_register__same_run_with_another_export_is_another_version(shelf: Shelf, tmp_path: Path) -> None:
    shelf.register("1", evaluation(0.8))
    model = make_export(tmp_path / "second", seed=1)
    assert shelf.register("1", evaluation(0.9), model=model, export_dir=tmp_path / "second").version == 2


# -- what a version is -------------------------------------------------------------------------------------------------


def test_register__version_says_where_it_comes_from(shelf: Shelf, tmp_path: Path) -> None:
    done = shelf.register("1", evaluation(0.8123))
    client = mlflow.MlflowClient()
    version = client.get_model_version(shelf.name, str(done.version))
    assert version.tags["hjepa.run"] == f"{shelf.name}-1"
    assert version.tags["hjepa.dataset_digest"] == DIGEST
    assert version.tags["hjepa.export_digest"] == shelf.model["digest"]
    assert float(version.tags["hjepa.primary_value"]) == 0.8123
    assert version.tags["hjepa.decision"] == "champion"
    assert version.tags["hjepa.reason"] == done.reason
    for text in (
        "0.8123",
        "12,800 images",
        "Level 0: 4x4 cells, 16 numbers; level 1: 2x2 cells",
        "| raw pixels | - | 0.7900 | 0.8090 | - |",
    ):
        assert text in version.description
    assert f"#/models/{shelf.name}/versions/1?workflowType=machine_learning" in done.url
    [output] = client.get_run(version.run_id).outputs.model_outputs
    assert version.source == f"models:/{output.model_id}"
    logged = client.get_logged_model(output.model_id)
    assert logged.status == "READY"
    assert {item.key: item.value for item in logged.metrics}[METRIC] == 0.8123

    files = Path(mlflow.artifacts.download_artifacts(f"models:/{shelf.name}/1", dst_path=str(tmp_path / "files")))
    names = {path.name for path in files.rglob("*") if path.is_file()}
    assert {"model.safetensors", "config.json", "model.json", "pyfunc.py", "input_example.json"} <= names
    assert not {name for name in names if name.endswith((".pkl", ".pickle", ".pt", ".pth", ".bin"))}
    requirements = (files / "requirements.txt").read_text()
    assert "hjepa==" in requirements
    assert "torch==" in requirements


def test_register__loads_in_a_fresh_process_without_pickle(shelf: Shelf, tmp_path: Path) -> None:
    shelf.register("1", evaluation(0.8))
    np.save(tmp_path / "images.npy", images())
    code = (
        "import sys, numpy as np, mlflow\n"
        "model = mlflow.pyfunc.load_model(sys.argv[1])\n"
        "pictures = np.load('images.npy')\n"
        "np.save('all.npy', model.predict(pictures))\n"
        "np.save('1.npy', model.predict(pictures, params={'level': '1'}))\n"
    )
    environment = {**os.environ, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    command = [sys.executable, "-c", code, f"models:/{shelf.name}@champion"]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "WARNING" not in ran.stderr
    for level in ("all", 1):
        got = np.load(tmp_path / f"{level}.npy")
        want = expected(shelf.folder, images(), level)
        assert (got.dtype, got.shape) == (np.float32, want.shape)
        assert np.abs(got - want).max() < 1e-5


def test_pyfunc__colour_images_of_any_size_and_wrong_input(shelf: Shelf, tmp_path: Path) -> None:
    model = make_export(tmp_path / "colour", channels=3)
    shelf.register("1", evaluation(0.8), model=model, export_dir=tmp_path / "colour")
    loaded = mlflow.pyfunc.load_model(f"models:/{shelf.name}/1")
    pictures = images(channels=3)
    whole = loaded.predict(pictures)
    assert np.abs(whole - expected(tmp_path / "colour", pictures, "all")).max() < 1e-5

    ragged = np.empty(2, dtype=object)
    ragged[0], ragged[1] = pictures[0], pictures[1, :33]
    got = loaded.predict(ragged, params={"level": "0"})
    assert np.abs(got[:1] - expected(tmp_path / "colour", pictures[:1], 0)).max() < 1e-5
    assert np.abs(got[1:] - expected(tmp_path / "colour", pictures[1:2, :33], 0)).max() < 1e-5

    with pytest.raises(mlflow.MlflowException, match="no level '7': expected one of all, mean, 0, 1, every"):
        loaded.predict(pictures, params={"level": "7"})
    with pytest.raises(mlflow.MlflowException, match="uint8"):
        loaded.predict(pictures.astype(np.float32))


# -- refusing ----------------------------------------------------------------------------------------------------------


def test_register__damaged_export_is_refused_before_anything_is_stored(shelf: Shelf) -> None:
    weights = shelf.folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(HjepaError, match=r"model\.safetensors is damaged"):
        shelf.register("1", evaluation(0.8))
    assert not mlflow.MlflowClient().search_registered_models(f"name = '{shelf.name}'")


def test_register__metric_that_was_not_measured_names_those_that_were(shelf: Shelf) -> None:
    with pytest.raises(UserError, match=r"'eval/x', which .* choose one of eval/knn_top1, eval/linear_top1"):
        shelf.register("1", evaluation(0.8), primary_metric="eval/x")


def test_register__name_that_mlflow_cannot_address_is_refused(shelf: Shelf) -> None:
    shelf.name = "team/model"
    with pytest.raises(UserError, match=r"tracking\.registered_model"):
        shelf.register("1", evaluation(0.8))


def test_register__server_down_fails_loudly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    model = make_export(tmp_path)
    tracker = Tracker.attach("http://127.0.0.1:9", "0" * 32)
    with pytest.raises(TrackingError, match=r"could not register the encoder as 'm': connection refused"):
        register(
            tracker,
            name="m",
            export_dir=tmp_path,
            model=model,
            evaluation=evaluation(0.8),
            margin=MARGIN,
            primary_metric=METRIC,
        )


# -- fetching ----------------------------------------------------------------------------------------------------------


def test_fetch_export__every_way_of_naming_a_version(shelf: Shelf) -> None:
    shelf.register("1", evaluation(0.8))
    version = mlflow.MlflowClient().get_model_version(shelf.name, "1")
    found = {
        fetch_export(uri)
        for uri in (
            f"models:/{shelf.name}@champion",
            f"models:/{shelf.name}/1",
            version.source,
            f"runs:/{version.run_id}/encoder",
        )
    }
    assert len(found) == 1  # all from one place in the cache
    [folder] = found
    assert file_sha256(folder / "model.safetensors") == shelf.model["files"]["model.safetensors"]["sha256"]
    assert load_export(folder).levels == [0, 1]


def test_fetch_export__run_without_an_encoder_says_so(shelf: Shelf) -> None:
    run = open_run(f"{shelf.name}-without")
    with pytest.raises(UserError, match="no encoder that hjepa registered"):
        fetch_export(f"runs:/{run.run_id}/encoder")


def test_fetch_export__s3_is_kept_in_the_cache_and_mended_if_damaged(shelf: Shelf, store: S3Store) -> None:
    for name, file in shelf.model["files"].items():
        store.put_file(f"m/{name}", shelf.folder / name, sha256=file["sha256"])
    with pytest.raises(UserError, match=r"model\.json is missing"):
        fetch_export(store.uri("m"))
    store.put_json("m/model.json", shelf.model)
    folder = fetch_export(store.uri("m"))
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert fetch_export(store.uri("m")) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp

    (folder / "config.json").write_text("{}")
    assert fetch_export(store.uri("m")) == folder
    assert json.loads((folder / "config.json").read_text())["schema"] == 1
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]  # nothing half fetched is left


def test_fetch_export__manifest_cannot_name_files_outside(shelf: Shelf, store: S3Store) -> None:
    store.put_json("m/model.json", {"files": {"../../escape": {"bytes": 1, "sha256": "0" * 64}}})
    with pytest.raises(HjepaError, match="not a plain file name"):
        fetch_export(store.uri("m"))


def test_fetch_export__local_folder_is_verified_if_it_has_a_manifest(tmp_path: Path) -> None:
    model = make_export(tmp_path / "made")
    assert fetch_export(str(tmp_path / "made")) == tmp_path / "made"
    (tmp_path / "made" / "model.json").write_text(json.dumps(model))
    assert fetch_export(str(tmp_path / "made")) == tmp_path / "made"
    shutil.copyfile(tmp_path / "made" / "config.json", tmp_path / "made" / "model.safetensors")
    with pytest.raises(HjepaError, match=r"model\.safetensors is damaged"):
        fetch_export(str(tmp_path / "made"))


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("models:/no-such-model@champion", "has no models:/no-such-model@champion"),
        ("models:/no-such-model/1", "has no models:/no-such-model/1"),
        ("models:/m-0123", "has no models:/m-0123"),
        ("runs:/0123/encoder", "has no runs:/0123/encoder"),
        ("models:/name", "expected models:/name@alias"),
        ("https://example.com/model", "expected models:/name@alias"),
        ("no/such/folder", "no exported encoder in no/such/folder"),
    ],
)
def test_fetch_export__nothing_there_says_what_was_expected(
    uri: str, message: str, stack_environment: dict[str, str]
) -> None:
    with pytest.raises(UserError, match=message):
        fetch_export(uri)
