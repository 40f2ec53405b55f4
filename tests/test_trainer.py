"""The training loop: accumulation, skipped steps, exact resume."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hjepa.config import Config, load_config
from hjepa.errors import FutileRetryError, UserError
from hjepa.losses import HierarchicalLoss
from hjepa.masks import MultiBlockMasking
from hjepa.models import HJEPAModel
from hjepa.trainers import HJEPATrainer, TrainingResult, create_optimizer
from hjepa.utils import MetricsLogger
from hjepa.utils.checkpoint import LATEST, read_checkpoint

CONFIG = """
data: {image_size: 16, channels: 1}
model: {patch_size: 4, embed_dim: 16, depth: 2, num_heads: 2, num_levels: 2, ema: {momentum: 0.9},
        predictor: {embed_dim: 8, depth: 1, num_heads: 2}}
masking: {num_targets: 2}
training: {batch_size: 12, epochs: 3, warmup_epochs: 0.5, device: cpu}
checkpoint: {save_frequency: 1}
logging: {log_frequency: 1, tensorboard: {enabled: false}}
"""


@dataclass
class Images:
    """Batches of random images whose order is a function of the step, as the real loader's is."""

    count: int = 64
    batch_size: int = 12
    poison: frozenset[int] = frozenset()

    @dataclass(frozen=True)
    class Batch:
        step: int
        epoch: int
        images: Tensor
        global_samples: NDArray[np.int64]

    @property
    def num_samples(self) -> int:
        return self.count

    def normalize(self, images: Tensor) -> Tensor:
        return images.float() / 255 - 0.5 if images.dtype == torch.uint8 else images

    def batches(self, start_step: int, stop_step: int) -> Iterator[Images.Batch]:
        pixels = torch.randint(0, 256, (self.count, 1, 16, 16), generator=torch.Generator().manual_seed(1))
        for step in range(start_step, stop_step):
            epoch, samples = (
                step * self.batch_size // self.count,
                np.arange(step * self.batch_size, (step + 1) * self.batch_size),
            )
            images = pixels[samples % self.count].to(torch.uint8)
            if step in self.poison:
                images = torch.full(images.shape, float("nan"))
            yield self.Batch(step, epoch, images, samples % self.count)


class Recorder:
    def __init__(self) -> None:
        self.records: list[tuple[int, dict[str, float]]] = []

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.records.append((step, {k: v for k, v in metrics.items() if not k.startswith("perf/")}))


def build(
    folder: Path,
    *overrides: str,
    loader: Images | None = None,
    val_loader: Images | None = None,
    **keywords: object,
) -> tuple[HJEPATrainer, Recorder]:
    config: Config = load_config(CONFIG, [*overrides, f"checkpoint.checkpoint_dir={folder}"])
    torch.manual_seed(config.seed)
    model = HJEPAModel(config)
    recorder = Recorder()
    trainer = HJEPATrainer(
        model,
        loader or Images(),
        val_loader,
        create_optimizer(model, config),
        HierarchicalLoss(config),
        MultiBlockMasking(config),
        config,
        "cpu",
        logger=MetricsLogger("test", folder, use_tensorboard=False, sinks=[recorder]),
        **keywords,  # type: ignore[arg-type]
    )
    return trainer, recorder


def weights(path: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = read_checkpoint(path)["model"]
    return state


def test_train__takes_every_step_once_and_ends_with_a_checkpoint(tmp_path: Path) -> None:
    trainer, recorder = build(tmp_path)
    result = trainer.train()
    assert isinstance(result, TrainingResult)
    assert result.step == 16 == trainer.total_steps  # ceil(3 * 64 / 12)
    assert [step for step, _ in recorder.records] == [12 * k for k in range(1, 17)]
    assert read_checkpoint(result.checkpoint)["step"] == 16
    lr = [record["optim/lr"] for _, record in recorder.records]
    assert lr[0] == 0.0
    assert max(lr) == pytest.approx(1e-3)
    assert lr[-1] == pytest.approx(1e-6)


def test_target__after_one_step_is_the_mean_with_the_post_step_student(tmp_path: Path) -> None:
    trainer, _ = build(tmp_path, "training.warmup_epochs=0")
    before = [p.clone() for p in trainer.core.target_encoder.parameters()]
    batch = next(iter(trainer.train_loader.batches(0, 1)))
    for group in trainer.optimizer.param_groups:
        group["lr"] = 0.01
    trainer._train_step(batch, 0.9)
    moved = False
    for old, new, student in zip(
        before, trainer.core.target_encoder.parameters(), trainer.core.context_encoder.parameters(), strict=True
    ):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * student)
        moved |= not torch.equal(old, student)
    assert moved


@pytest.mark.parametrize("accumulation", [2, 3, 6])
def test_accumulation__gives_the_gradient_of_one_batch(tmp_path: Path, accumulation: int) -> None:
    gradients = []
    for steps in (1, accumulation):
        trainer, _ = build(tmp_path / str(steps), f"training.accumulation_steps={steps}", "training.clip_grad=null")
        seen: list[Tensor] = []

        def note(optimizer: torch.optim.Optimizer, *_: object, seen: list[Tensor] = seen) -> None:
            seen += [p.grad.clone() for group in optimizer.param_groups for p in group["params"]]

        trainer.optimizer.register_step_pre_hook(note)
        trainer._train_step(next(iter(trainer.train_loader.batches(0, 1))), 0.9)
        gradients.append(seen)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_non_finite_step__moves_nothing(tmp_path: Path) -> None:
    trainer, _ = build(tmp_path, loader=Images(poison=frozenset({0})))
    before = {name: value.clone() for name, value in trainer.core.state_dict().items()}
    assert trainer._train_step(next(iter(trainer.train_loader.batches(0, 1))), 0.5) is None
    for name, value in trainer.core.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not trainer.optimizer.state


def test_non_finite_steps__in_a_row_end_with_13(tmp_path: Path) -> None:
    trainer, _ = build(tmp_path, loader=Images(poison=frozenset(range(3, 16))))
    with pytest.raises(FutileRetryError, match="not finite") as raised:
        trainer.train()
    assert raised.value.exit_code == 13


def test_collapse__stops_with_a_diagnosis_and_a_saved_state(tmp_path: Path) -> None:
    def collapsed(_: nn.Module) -> dict[str, float]:
        return {"collapse/std": 0.0, "collapse/rankme": 1.0, "collapse/cosine": 1.0}

    trainer, _ = build(tmp_path, "collapse.patience=2", probe=collapsed)
    with pytest.raises(FutileRetryError, match=r"effective rank is 1\.00"):
        trainer.train()
    assert read_checkpoint(tmp_path / LATEST)["epoch"] == 2


def test_validation__is_the_loss_on_the_same_masks_each_time(tmp_path: Path) -> None:
    trainer, recorder = build(tmp_path, "training.lr=1e-12", "training.min_lr=0", val_loader=Images(count=24))
    trainer.train()
    values = [record["val/loss"] for _, record in recorder.records if "val/loss" in record]
    assert len(values) == 3
    assert values == pytest.approx([values[0]] * 3, rel=1e-6)
    assert trainer.model.training


class KilledError(BaseException):
    """Stands for a kill between two steps; the SIGKILL of a real process is in test_end_to_end.py."""


@pytest.mark.parametrize("stop_after", [1, 6, 11, 15])
def test_resume__equals_the_uninterrupted_run_bit_for_bit(tmp_path: Path, stop_after: int) -> None:
    probe_calls: list[int] = []

    def probe(encoder: nn.Module) -> dict[str, float]:
        probe_calls.append(1)
        return {"collapse/rankme": float(sum(p.abs().sum() for p in encoder.parameters())), "collapse/std": 1.0}

    straight, straight_records = build(tmp_path / "a", probe=probe)
    straight.train()

    class Stopping(Images):
        def batches(self, start_step: int, stop_step: int) -> Iterator[Images.Batch]:
            for batch in super().batches(start_step, stop_step):
                if batch.step == stop_after:
                    raise KilledError
                yield batch

    first, _ = build(tmp_path / "b", probe=probe, loader=Stopping())
    with pytest.raises(KilledError):
        first.train()
    first.checkpoints.wait()
    second, records = build(tmp_path / "b", probe=probe, resume_checkpoint="auto")
    second.train()
    resumed_at = records.records[0][0]
    assert resumed_at <= 12 * (stop_after + 1)
    expected = [record for record in straight_records.records if record[0] >= resumed_at]
    assert records.records == expected
    a, b = weights(tmp_path / "a" / LATEST), weights(tmp_path / "b" / LATEST)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_resume__with_another_batch_size_is_refused(tmp_path: Path) -> None:
    build(tmp_path)[0].train()
    trainer, _ = build(
        tmp_path, "training.batch_size=16", loader=Images(batch_size=16), resume_checkpoint=tmp_path / LATEST
    )
    with pytest.raises(UserError, match=r"training\.batch_size: 12 there, 16 here"):
        trainer.train()


def test_optimizer__decays_matrices_only_and_holds_no_frozen_parameter() -> None:
    config = load_config(CONFIG)
    model = HJEPAModel(config)
    decayed, plain = create_optimizer(model, config).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)].rsplit(".", 1)[-1] for p in decayed["params"]} == {"weight"}
    assert {names[id(p)] for p in plain["params"]} >= {"predictor.mask_tokens", "context_encoder.norm.weight"}
    assert decayed["weight_decay"] == 0.05
    assert plain["weight_decay"] == 0.0
    held = {id(p) for group in (decayed, plain) for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
