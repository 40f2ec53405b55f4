"""The formats beside safetensors, held against PyTorch, and the model card."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import hjepa
from hjepa import export
from hjepa.adapters.registry import fetch_export
from hjepa.config import Config, ConfigError, load_config
from hjepa.errors import HjepaError, UserError
from hjepa.export import ExportedEncoder, load_export, save_export, untrained_encoder, write_formats
from hjepa.files import file_sha256
from hjepa.model_card import model_card

CONFIG = """
data: {image_size: 32, channels: 3}
model: {patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2, num_levels: 2,
        predictor: {embed_dim: 16, depth: 1, num_heads: 2}}
export: {license: Apache-2.0}
"""
STATISTICS = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]}
PROVENANCE = {"run": "first", "dataset": "shapes", "dataset_digest": "d" * 64, "step": 20, "images_seen": 1280}
OUTPUTS = {"mean": "mean", "level_0": 0, "level_1": 1, "all": "all"}
FILES = ["README.md", "config.json", "encoder.pt2", "model.onnx", "model.safetensors"]


def an_encoder(config: Config) -> ExportedEncoder:
    """With no parameter at its first value: exporters may merge weights that are equal."""
    encoder = untrained_encoder(config, **STATISTICS)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return encoder


def pictures(count: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, 40, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("formats") / "export"
    config = load_config(CONFIG)
    return folder, save_export(
        an_encoder(config), folder, config=config, provenance=PROVENANCE, sample=pictures(5), dataset=DATASET
    )


# -- formats ---------------------------------------------------------------------------------------------------------


def test_formats__are_listed_with_their_checks(made: tuple[Path, dict[str, Any]]) -> None:
    folder, part = made
    assert sorted(path.name for path in folder.iterdir()) == sorted(part["files"]) == FILES
    for name, facts in part["files"].items():
        assert facts == {"bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)}
    assert list(part["checks"]) == ["torch.export", "onnx"]
    for check in part["checks"].values():
        assert check["passed"] is True
        assert check["tolerance"] == 1e-4
        assert 0 <= check["max_abs_difference"] <= 1e-5
    assert json.loads(json.dumps(part)) == part


@pytest.mark.parametrize("count", [1, 2, 7])
def test_formats__have_each_level_by_name_at_any_batch_size(made: tuple[Path, dict[str, Any]], count: int) -> None:
    folder, _ = made
    encoder = load_export(folder)
    images = encoder.preprocess(pictures(count))
    program = torch.export.load(folder / "encoder.pt2").module()(images)
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    assert list(program) == [output.name for output in session.get_outputs()] == list(OUTPUTS)
    for name, level in OUTPUTS.items():
        expected = encoder.embed_images(pictures(count), level)
        (value,) = session.run([name], {"images": images.numpy()})
        torch.testing.assert_close(program[name], expected, atol=1e-5, rtol=0)
        np.testing.assert_allclose(value, expected, atol=1e-5, rtol=0)


def test_formats__same_weights_give_the_same_bytes(made: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, part = made
    config = load_config(CONFIG)
    again = save_export(load_export(folder), tmp_path, config=config, provenance=PROVENANCE, sample=pictures(3))
    for name in ("encoder.pt2", "model.onnx"):
        assert again["files"][name] == part["files"][name]
    without = save_export(load_export(folder), tmp_path / "plain", config=config, provenance=PROVENANCE)
    assert without["digest"] == again["digest"] == part["digest"]
    assert without["checks"] == {}
    assert "encoder.pt2" not in without["files"]


def test_formats__tell_neither_paths_nor_training_images(made: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = made
    with zipfile.ZipFile(folder / "encoder.pt2") as archive:
        parts = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    for content in (*parts.values(), (folder / "model.onnx").read_bytes()):
        for path in (Path(hjepa.__file__).parent, Path(torch.__file__).parent):
            assert str(path).encode() not in content
    # The one pickle, read without running any.
    ((example,), _) = torch.load(io.BytesIO(parts["data/sample_inputs/model.pt"]), weights_only=True)
    assert not example.any()
    for name in ("weights/model_weights_config.json", "constants/model_constants_config.json"):
        assert not any(entry["use_pickle"] for entry in json.loads(parts[f"data/{name}"])["config"].values())


def test_fetch_export__verifies_every_format(made: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, part = made
    for name in part["files"]:
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "model.json").write_text(json.dumps(part))
    assert fetch_export(str(tmp_path)) == tmp_path
    content = bytearray((tmp_path / "model.onnx").read_bytes())
    content[-1] ^= 1
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(HjepaError, match=r"model\.onnx is damaged"):
        fetch_export(str(tmp_path))


@pytest.mark.parametrize(
    ("formats", "expected"), [("[]", []), ("[onnx]", ["onnx"]), ("[torch.export]", ["torch.export"])]
)
def test_formats__are_those_of_the_configuration(tmp_path: Path, formats: str, expected: list[str]) -> None:
    config = load_config(CONFIG, [f"export.formats={formats}"])
    assert list(write_formats(an_encoder(config), tmp_path, config, pictures(2))) == expected
    assert [path.name for path in tmp_path.iterdir()] == [export.FORMATS[name].file for name in expected]


def test_formats__unknown_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="torchscript"):
        load_config(CONFIG, ["export.formats=[torchscript]"])


def test_formats__above_tolerance_fail_with_the_number(tmp_path: Path) -> None:
    config = load_config(CONFIG, ["export.formats=[onnx]", "export.format_tolerance=1e-12"])
    with pytest.raises(HjepaError, match=r"\(onnx\) differs from PyTorch by \d\.\d\de-\d\d, more than .*=1e-12"):
        write_formats(an_encoder(config), tmp_path, config, pictures(2))


def test_formats__encoder_that_gives_nan_fails(tmp_path: Path) -> None:
    config = load_config(CONFIG)
    encoder = an_encoder(config)
    encoder.vit.norm.bias[0] = torch.nan
    with pytest.raises(HjepaError, match="by nan"):
        write_formats(encoder, tmp_path, config, pictures(2))


class Branching(nn.Module):
    """An encoder whose computation depends on the values of the image, which no graph can hold."""

    def __init__(self, vit: nn.Module):
        super().__init__()
        self.vit = vit
        self.image_shape = vit.image_shape

    def forward(self, images: Tensor) -> Tensor:
        return self.vit(images if images.sum() > 0 else -images)  # type: ignore[no-any-return]


def test_formats__encoder_that_is_no_graph_fails_in_words(tmp_path: Path) -> None:
    config = load_config(CONFIG)
    encoder = an_encoder(config)
    encoder.vit = Branching(encoder.vit)
    with pytest.raises(HjepaError, match=r"cannot be exported as torch\.export: .*Take torch\.export out of"):
        write_formats(encoder, tmp_path, config, pictures(2))


def test_formats__need_an_image(tmp_path: Path) -> None:
    config = load_config(CONFIG)
    with pytest.raises(UserError, match="at least one, got none"):
        write_formats(an_encoder(config), tmp_path, config, pictures(0))


def test_formats__missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as Python marks a module that is not there
    config = load_config(CONFIG)
    with pytest.raises(
        UserError, match=r"needs the package onnxruntime: pip install 'hjepa\[onnx\]', or take onnx out"
    ):
        write_formats(an_encoder(config), tmp_path, config, pictures(2))
    assert list(tmp_path.iterdir()) == []  # told before any work
    config = load_config(CONFIG, ["export.formats=[torch.export]"])
    assert list(write_formats(an_encoder(config), tmp_path, config, pictures(2))) == ["torch.export"]


def test_formats__exporters_are_silent(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    recwarn: pytest.WarningsRecorder,
) -> None:
    config = load_config(CONFIG)
    level = logging.getLogger("onnxscript").level
    with caplog.at_level(logging.INFO):
        write_formats(an_encoder(config), tmp_path, config, pictures(2))
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")
    assert len(recwarn) == 0
    assert logging.getLogger("onnxscript").level == level


# -- the model card --------------------------------------------------------------------------------------------------

DATASET = {
    "name": "shapes",
    "digest": "d" * 64,
    "classes": ["round", "square"],
    "splits": {"train": {"samples": 60_000}, "test": {"samples": 1_000}},
    "quarantine": {"total": 3},
}
EVALUATION = {
    "primary_metric": {"name": "eval/linear_top1", "value": 0.9012},
    "split": {"train": 60_000, "test": 1_000},
    "collapse": "",
    "table": [
        {"encoder": "trained", "level": "all", "linear_top1": 0.9012, "linear_top1_low": 0.8834,
         "linear_top1_high": 0.9176, "knn_top1": 0.85, "rankme": 17.3},
        {"encoder": "trained", "level": "0", "low_shot_1pct_top1": 0.5, "low_shot_1pct_top1_std": 0.02},
        {"encoder": "raw pixels", "level": "-", "linear_top1": 0.8421, "knn_top1": float("nan")},
    ],
}  # fmt: skip


def test_card__at_export_says_what_is_known(made: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = made
    card = (folder / "README.md").read_text("utf-8")
    for text in (
        "- **license:** Apache-2.0",
        "- **name:** shapes",
        f"- **digest:** {'d' * 64}",
        "- **images in train:** 60,000",
        "- **images seen:** 1,280",
        "with 2 levels",
        "| 1 | level\\_1 | 2 x 2 cells, their maximum | 32 |",
        "| all | all | the rows above, one after the other | 96 |",
        "hjepa.load_encoder(",
        'session.run(["level_0"], {"images": batch})',
        "0.4000, 0.5000, 0.6000",
        "| onnx |",
        "Not evaluated",
        "decisions about people",
    ):
        assert text in card, text


def test_card__python_in_it_compiles(made: tuple[Path, dict[str, Any]]) -> None:
    blocks = (made[0] / "README.md").read_text("utf-8").split("```python\n")[1:]
    assert len(blocks) == 3
    for block in blocks:
        compile(block.partition("```")[0], "card", "exec")


def test_card__has_metrics_with_intervals(made: tuple[Path, dict[str, Any]]) -> None:
    card = model_card(made[1], DATASET, EVALUATION)
    assert "| encoder | level | linear probe | k-NN | 1 % of the labels | RankMe |" in card
    assert "| trained | all | 90.12 [88.34, 91.76] | 85.00 |  | 17.3 |" in card
    assert "| trained | 0 |  |  | 50.00 ± 2.00 |  |" in card
    assert "| raw pixels | - | 84.21 | not finite |  |  |" in card
    assert "`eval/linear_top1`: 90.12" in card
    assert "license:** not stated" in card
    assert "collapsed" not in card
    assert "collapsed:** rank 1.2" in model_card(made[1], DATASET, {**EVALUATION, "collapse": "rank 1.2"})


def test_card__text_from_outside_cannot_become_markup(made: tuple[Path, dict[str, Any]]) -> None:
    card = model_card(made[1], {**DATASET, "name": "<img src=x>\n# Owned | [a](b)"}, license="a\n## b")
    assert "<img" not in card.replace("\\<img", "")
    assert [line for line in card.splitlines() if line.startswith("# ")] == ["# H-JEPA encoder"]
    assert "- **license:** a ## b" in card


def test_card__needs_no_torch() -> None:
    code = "import sys, hjepa.model_card; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
