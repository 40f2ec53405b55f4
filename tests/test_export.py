"""An export: the same numbers from safetensors and JSON, nothing to unpickle."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from hjepa.config import load_config
from hjepa.errors import HjepaError, UserError
from hjepa.export import (
    _largest_difference,
    encoder_of_checkpoint,
    load_export,
    max_abs_difference,
    save_export,
    untrained_encoder,
)
from hjepa.models import HJEPAModel
from hjepa.utils.checkpoint import write_checkpoint

CONFIG = """
data: {image_size: 32, channels: 3}
model: {patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2, num_levels: 2,
        predictor: {embed_dim: 16, depth: 1, num_heads: 2}}
"""
STATISTICS = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]}


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    config = load_config(CONFIG)
    torch.manual_seed(5)
    write_checkpoint(tmp_path / "c.pth", {"model": HJEPAModel(config).state_dict()})
    encoder = encoder_of_checkpoint(tmp_path / "c.pth", config, **STATISTICS)
    save_export(encoder, tmp_path / "export", config=config, provenance={"run": "test"})
    return tmp_path


def test_export__embeds_as_the_checkpoint_does(exported: Path) -> None:
    config = load_config(CONFIG)
    original = encoder_of_checkpoint(exported / "c.pth", config, **STATISTICS)
    images = torch.randint(0, 256, (5, 3, 40, 50), dtype=torch.uint8)
    assert max_abs_difference(original, load_export(exported / "export"), images) == 0.0
    assert sorted(path.name for path in (exported / "export").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]


def test_export__weights_are_those_that_the_configuration_names(exported: Path) -> None:
    config = load_config(CONFIG)
    model = HJEPAModel(config)
    with torch.no_grad():
        for parameter in model.context_encoder.parameters():
            parameter.add_(1.0)
    write_checkpoint(exported / "c.pth", {"model": model.state_dict()})
    for name, encoder in (("target", model.target_encoder), ("context", model.context_encoder)):
        chosen = encoder_of_checkpoint(
            exported / "c.pth", load_config(CONFIG, [f"export.weights={name}"]), **STATISTICS
        )
        assert torch.equal(chosen.vit.patch_embed.weight, encoder.patch_embed.weight)


def test_embed_images__takes_images_of_any_size_and_grey_ones(exported: Path) -> None:
    encoder = load_export(exported / "export")
    images = [
        torch.randint(0, 256, (3, 50, 40), dtype=torch.uint8),
        torch.randint(0, 256, (1, 32, 64), dtype=torch.uint8),
    ]
    together = encoder.embed_images(images)
    assert together.shape == (2, encoder.embedding_dim())
    torch.testing.assert_close(together[1], encoder.embed_images(images[1:])[0])


def test_untrained_encoder__is_what_training_starts_from() -> None:
    config = load_config(CONFIG)
    torch.manual_seed(config.seed)
    started = HJEPAModel(config).context_encoder.state_dict()
    untrained = untrained_encoder(config, **STATISTICS).vit.state_dict()
    assert all(torch.equal(untrained[name], started[name]) for name in started)


def test_load__says_what_is_wrong_with_the_folder(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not an exported encoder"):
        load_export(tmp_path)
    description = exported / "export" / "config.json"
    content = json.loads(description.read_text())
    description.write_text(json.dumps({**content, "schema": 99}))
    with pytest.raises(UserError, match="newer hjepa"):
        load_export(exported / "export")
    description.write_text(json.dumps({**content, "encoder": {**content["encoder"], "width": 3}}))
    with pytest.raises(HjepaError, match=r"describes no encoder.*'width'"):
        load_export(exported / "export")
    description.write_text('{"schema": 1')
    with pytest.raises(HjepaError, match="not valid JSON"):
        load_export(exported / "export")
    description.write_text(json.dumps(content))
    (exported / "export" / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(HjepaError, match="cannot be loaded"):
        load_export(exported / "export")


@pytest.mark.parametrize(
    ("change", "problems"),
    [
        (
            {"embed_dim": 64},
            [
                "patch_embed.weight: expected shape (64, 192), found (32, 192); patch_embed.bias: expected shape (64,)",
                "blocks.0.norm1.weight: expected shape (64,), found (32,); and 25 more. Both must be of one export",
            ],
        ),
        ({"depth": 3}, ["blocks.2.norm1.weight: expected shape (32,), found no such tensor", "and 9 more"]),
        ({"depth": 1}, ["blocks.1.attn.proj.bias: expected no such tensor, found shape (32,)", "and 9 more"]),
    ],
)
def test_load__names_the_first_tensors_that_do_not_fit(
    exported: Path, change: dict[str, int], problems: list[str]
) -> None:
    description = exported / "export" / "config.json"
    content = json.loads(description.read_text())
    description.write_text(json.dumps({**content, "encoder": {**content["encoder"], **change}}))
    with pytest.raises(HjepaError) as caught:
        load_export(exported / "export")
    assert "model.safetensors does not fit config.json" in str(caught.value)
    assert all(problem in str(caught.value) for problem in problems), str(caught.value)


def test_difference__is_nan_if_one_level_is() -> None:
    ours = {"mean": torch.zeros(2, 3), "level_0": torch.full((2, 3), torch.nan), "all": torch.zeros(2, 6)}
    assert math.isnan(_largest_difference(ours, {name: torch.zeros_like(value) for name, value in ours.items()}))
    assert _largest_difference(ours, {"mean": ours["mean"]}) == math.inf
