"""hjepa's step leaves out work, not mathematics: against a plain step written from the paper, benchmarks/plain.py."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu, step
from benchmarks.plain import DenseModel, PlainModel, PlainStep, plain_flops
from hjepa.config import Config, load_config
from hjepa.losses import HierarchicalLoss
from hjepa.masks import MultiBlockMasking
from hjepa.models import HJEPAModel, MaskTensors

NARROW = """
data: {channels: 3}
model: {embed_dim: 48, depth: 3, num_heads: 3, predictor: {embed_dim: 24, depth: 3, num_heads: 2}}
training: {batch_size: 4}
"""
GRIDS = {8: ["data.image_size=32", "model.patch_size=4"], 14: ["data.image_size=56", "model.patch_size=4"]}


def setting(grid: int, levels: int, *overrides: str) -> Config:
    return load_config(NARROW, [*GRIDS[grid], f"model.num_levels={levels}", *overrides])


def same_weights(config: Config, plain: type[PlainModel] = PlainModel) -> tuple[HJEPAModel, PlainModel]:
    """Both models with the same weights, the target encoder's unlike the context encoder's."""
    torch.manual_seed(0)
    ours = HJEPAModel(config)
    with torch.no_grad():
        for parameter in ours.target_encoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    written = plain(config)
    written.load_state_dict(ours.state_dict())
    return ours, written


def masked_batch(config: Config) -> tuple[Tensor, MaskTensors]:
    context, targets, union, place, rows = MultiBlockMasking(config)(step=1, epochs=0, samples=np.arange(4))
    size = config.data.image_size
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1))
    tensor = torch.from_numpy
    return images, MaskTensors(tensor(context), [tensor(t) for t in targets], tensor(union), tensor(place), rows)


def gradients(loss: Tensor, model: torch.nn.Module) -> dict[str, Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("grid", [8, 14])
@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("depth", [1, 3])
def test_step__equals_the_plain_one_in_loss_and_every_gradient(grid: int, levels: int, depth: int) -> None:
    config = setting(grid, levels, f"model.depth={depth}", f"model.predictor.depth={depth}")
    ours, plain = same_weights(config)
    images, masks = masked_batch(config)
    loss, _ = HierarchicalLoss(config)(*ours(images, masks))
    expected = plain(images, masks.context, masks.targets)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    found, written = gradients(loss, ours), gradients(expected, plain)
    assert found.keys() == written.keys()
    worst = {name: error(found[name], written[name]) for name in found}
    assert max(worst.values()) < 1e-5, max(worst, key=worst.__getitem__)


def test_step__in_bfloat16_is_as_close_to_float32_as_the_plain_one() -> None:
    config = setting(8, 2)
    ours, plain = same_weights(config)
    images, masks = masked_batch(config)
    exact = gradients(plain(images, masks.context, masks.targets), plain)
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = ours(images, masks), plain(images, masks.context, masks.targets)
    found, rounded = gradients(HierarchicalLoss(config)(*out)[0], ours), gradients(expected, plain)
    errors = [(error(found[name], exact[name]), error(rounded[name], exact[name])) for name in exact]
    mean_ours, mean_plain = np.mean(errors, axis=0)
    assert mean_ours < 1.1 * mean_plain
    assert mean_ours < 0.05


def test_plain_step__trains_and_moves_its_target() -> None:
    config = setting(8, 1, "training.lr=1e-3")
    _, plain = same_weights(config)
    images, masks = masked_batch(config)
    before = [parameter.clone() for parameter in plain.target_encoder.parameters()]
    step = PlainStep(plain, config, normalize=lambda x: x)
    losses = [step(images, (masks.context, masks.targets), 0.9).item() for _ in range(5)]
    assert losses[-1] < losses[0]
    teacher, student = list(plain.target_encoder.parameters()), list(plain.context_encoder.parameters())
    assert not torch.equal(teacher[0], before[0])
    assert (teacher[0] - student[0]).norm() < (before[0] - student[0]).norm()


def test_dense_model__hides_masked_pixels_from_the_context_too() -> None:
    config = setting(8, 1)
    _, dense = same_weights(config, DenseModel)
    images, masks = masked_batch(config)
    assert isinstance(dense, DenseModel)
    dense.target_encoder.forward = lambda images: torch.zeros(len(images), 64, 48)  # type: ignore[method-assign]
    visible = torch.zeros(4, 64).scatter_(1, masks.context, 1.0).view(4, 1, 8, 8)
    hidden = 1 - torch.nn.functional.interpolate(visible, scale_factor=4)
    arguments = masks.context, masks.union, masks.place
    loss = dense(images, *arguments)
    assert torch.equal(loss, dense(images + hidden * torch.randn_like(images), *arguments))
    assert not torch.equal(loss, dense(images + torch.randn_like(images), *arguments))


# -- the benchmarks run ----------------------------------------------------------------------------------------------


def test_plain_flops__are_those_that_torch_counts() -> None:
    config = setting(14, 1)
    _, plain = same_weights(config)
    images, masks = masked_batch(config)
    with FlopCounterMode(display=False) as counter:
        plain(images, masks.context, masks.targets).backward()
    expected = plain_flops(config, masks.context.shape[1], masks.targets[0].shape[2]) * len(images)
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-9)


def test_step_benchmark__writes_what_it_measured(tmp_path: Path) -> None:
    step.main(["--config", "smoke", "--rounds", "2", "--steps", "1", "--output", str(tmp_path / "step.json")])
    measured = json.loads((tmp_path / "step.json").read_text())["steps"]
    assert [found["masks"] for found in measured] == ["own", "published"]
    for found in measured:
        assert found["loss_relative_difference_to_plain"] < 1e-6
        assert found["largest_gradient_relative_difference_to_plain"] < 1e-5
        flops = {name: row["gflop_per_image"] for name, row in found["subjects"].items()}
        assert flops["hjepa"] < flops["plain"] < flops["dense"]


@pytest.mark.slow
def test_gpu_benchmark__runs_through(tmp_path: Path) -> None:
    gpu.main(["--device", "cpu", "--smoke", "--output", str(tmp_path / "gpu.json")])
    (found,) = json.loads((tmp_path / "gpu.json").read_text())["models"]
    assert found["compiled"]["images_per_second"] > 0
    assert found["eager"]["mfu_of_matmul_rate"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_benchmark__without_a_gpu_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        gpu.main([])
    assert left.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
