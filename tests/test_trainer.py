"""The training loop: accumulation, skipped steps, exact resume."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.step import tensors
from hjepa.config import Config, load_config
from hjepa.errors import FutileRetryError, UserError
from hjepa.losses import HierarchicalLoss
from hjepa.masks import MultiBlockMasking
from hjepa.models import HJEPAModel
from hjepa.trainers import HJEPATrainer, TrainingResult, create_optimizer
from hjepa.trainers.incidents import replay
from hjepa.trainers.optim import set_hyperparameters
from hjepa.trainers.step import LOSS, NORM, SKIPPED
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
    identical: bool = False

    @dataclass(frozen=True)
    class Batch:
        step: int
        images: Tensor
        samples: NDArray[np.int64]
        masks: Any

    @property
    def num_samples(self) -> int:
        return self.count

    def normalize(self, images: Tensor) -> Tensor:
        return images.float() / 255 - 0.5 if images.dtype == torch.uint8 else images

    def batches(self, start_step: int, stop_step: int, masking_fn: Any = None) -> Iterator[Images.Batch]:
        pixels = torch.randint(0, 256, (self.count, 1, 16, 16), generator=torch.Generator().manual_seed(1))
        for step in range(start_step, stop_step):
            epochs, samples = np.divmod(np.arange(step * self.batch_size, (step + 1) * self.batch_size), self.count)
            images = pixels[samples].to(torch.uint8)
            if step in self.poison:
                images = images.float() / 255
                images[5, 0, 3, 3] = torch.nan
            masks = tensors(masking_fn(step=step, epochs=epochs, samples=samples)) if masking_fn else None
            yield self.Batch(step, images, samples, masks)


class Recorder:
    def __init__(self) -> None:
        self.records: list[tuple[int, dict[str, float]]] = []

    def log(self, metrics: dict[str, float], step: int) -> None:
        kept = {k: v for k, v in metrics.items() if k.startswith(("train/", "optim/", "val/", "collapse/"))}
        if kept:
            self.records.append((step, kept))


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


def one_step(trainer: HJEPATrainer, *, step: int = 0, lr: float = 1e-3, momentum: float = 0.9) -> Tensor:
    (batch,) = trainer.train_loader.batches(step, step + 1, trainer.masking_fn)
    set_hyperparameters(trainer.optimizer, lr=lr, weight_decay=0.05)
    return trainer.train_step(batch.images, batch.masks, momentum, number=step)


def weights(path: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = read_checkpoint(path)["model"]
    return state


def test_train__takes_every_step_once_and_ends_with_a_checkpoint(tmp_path: Path) -> None:
    trainer, recorder = build(tmp_path)
    result = trainer.train()
    assert isinstance(result, TrainingResult)
    assert result.step == 16 == trainer.total_steps  # ceil(3 * 64 / 12)
    lines = [(step, record) for step, record in recorder.records if "train/loss" in record]
    assert [step for step, _ in lines] == [12 * k for k in range(1, 17)]
    assert read_checkpoint(result.checkpoint)["step"] == 16
    lr = [record["optim/lr"] for _, record in lines]
    assert lr[0] == 0.0
    assert max(lr) == pytest.approx(1e-3)
    assert lr[-1] == pytest.approx(1e-6)


def test_target__after_one_step_is_the_mean_with_the_post_step_student(tmp_path: Path) -> None:
    trainer, _ = build(tmp_path, "training.warmup_epochs=0")
    before = [p.clone() for p in trainer.core.target_encoder.parameters()]
    one_step(trainer, lr=0.01)
    moved = False
    for old, new, student in zip(
        before, trainer.core.target_encoder.parameters(), trainer.core.context_encoder.parameters(), strict=True
    ):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * student)
        moved |= not torch.equal(old, student)
    assert moved


@pytest.mark.parametrize("accumulation", [2, 3, 5, 12])
def test_accumulation__gives_the_gradient_of_one_batch_with_a_ragged_tail_too(
    tmp_path: Path, accumulation: int
) -> None:
    gradients, measured = [], []
    settings = ["training.clip_grad=null", "training.use_amp=false"]  # an identity that bf16 would hide
    for steps in (1, accumulation):
        trainer, _ = build(tmp_path / str(steps), f"training.accumulation_steps={steps}", *settings)
        seen: list[Tensor] = []

        def note(optimizer: torch.optim.Optimizer, *_: object, seen: list[Tensor] = seen) -> None:
            seen += [p.grad.clone() for group in optimizer.param_groups for p in group["params"]]

        trainer.optimizer.register_step_pre_hook(note)
        measured.append(one_step(trainer))
        gradients.append(seen)
    torch.testing.assert_close(*measured, atol=1e-6, rtol=1e-5)
    assert len(gradients[0]) == len(gradients[1]) > 10
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_clip__bounds_the_gradient_and_reports_the_norm_before(tmp_path: Path) -> None:
    free, clipped = (
        build(tmp_path / name, f"training.clip_grad={name}", "training.optimizer=sgd", "training.betas=[0, 0]")[0]
        for name in ("null", "0.01")
    )
    before = [p.clone() for group in clipped.optimizer.param_groups for p in group["params"]]
    norms = [float(one_step(trainer, lr=1.0)[NORM]) for trainer in (free, clipped)]
    assert norms[0] == pytest.approx(norms[1])
    assert norms[0] > 0.1
    after = [p for group in clipped.optimizer.param_groups for p in group["params"]]
    decay = [group["weight_decay"] for group in clipped.optimizer.param_groups for _ in group["params"]]
    moved = [a - b + d * b for a, b, d in zip(after, before, decay, strict=True)]
    assert float(nn.utils.get_total_norm(moved)) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd", "lars"])
def test_non_finite_step__moves_nothing(tmp_path: Path, optimizer: str) -> None:
    setting = f"training.optimizer={optimizer}"
    trainer, _ = build(tmp_path, setting, loader=Images(poison=frozenset({1})))
    assert not one_step(trainer)[SKIPPED]
    before = {name: value.clone() for name, value in trainer.core.state_dict().items()}
    moments = copy.deepcopy(trainer.optimizer.state_dict()["state"])
    measured = one_step(trainer, step=1, momentum=0.5)
    assert measured[SKIPPED]
    assert measured[LOSS].isnan()
    for name, value in trainer.core.state_dict().items():
        assert torch.equal(value, before[name]), name
    for index, state in trainer.optimizer.state_dict()["state"].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(moments[index][name])), name
    assert not one_step(trainer, step=2)[SKIPPED]


def test_non_finite_step__is_skipped_written_down_and_can_be_replayed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer, recorder = build(tmp_path, "collapse.action=warn", loader=Images(poison=frozenset({4})))
    assert trainer.train().step == 16
    assert (
        sum("train/loss" in record for _, record in recorder.records) == 15
    )  # nothing to say about the step that was skipped
    folder = tmp_path / "incidents" / "step_00000004"
    assert f"hjepa replay {folder}" in capsys.readouterr().err
    report = "\n".join(replay(folder))
    assert "1 images are not finite themselves, samples 53" in report  # the sixth image of 48, 49, ...
    assert "first module whose output is not finite: target_encoder.patch_embed" in report  # it runs first


def test_replay__finds_the_weight_that_is_not_finite(tmp_path: Path) -> None:
    trainer, _ = build(tmp_path, "training.max_skipped=1")
    with torch.no_grad():
        trainer.core.predictor.heads[0].bias[3] = torch.inf
    with pytest.raises(FutileRetryError, match="no checkpoint to go back to"):
        trainer.train()
    report = "\n".join(replay(tmp_path / "incidents" / "step_00000000"))
    assert "1 weights are not finite, the first is predictor.heads.0.bias" in report


def test_replay__of_another_folder_is_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no incident"):
        replay(tmp_path)


def test_non_finite_steps__three_in_a_row_rewind_once_and_then_stop_with_13(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer, _ = build(tmp_path, loader=Images(poison=frozenset({8, 9, 10})))
    with pytest.raises(FutileRetryError, match=r"3 steps in a row .* up to step 10, after a rewind") as raised:
        trainer.train()
    assert raised.value.exit_code == 13
    said = capsys.readouterr()
    assert said.err.count("going back to") == 1
    assert said.out.count("at step 6 of 16") == 1  # where the first epoch ended
    assert said.err.count("the step is skipped") == 6
    assert len(list((tmp_path / "incidents").iterdir())) == 3


def test_rewind__after_a_passing_fault_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    class Faulty(Images):
        """The memory that held these batches was bad, once."""

        broken = True

        def batches(self, *arguments: Any) -> Iterator[Images.Batch]:
            for batch in super().batches(*arguments):
                if self.broken and batch.step in {8, 9, 10}:
                    self.broken = batch.step < 10
                    yield replace(batch, images=batch.images.float() * torch.nan)
                else:
                    yield batch

    def probe(_: nn.Module) -> dict[str, float]:
        return {}

    build(tmp_path / "a", probe=probe)[0].train()
    trainer, _ = build(tmp_path / "b", loader=Faulty(), probe=probe)
    trainer.train()
    a, b = weights(tmp_path / "a" / LATEST), weights(tmp_path / "b" / LATEST)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_amp__trains_close_to_float32(tmp_path: Path, dtype: str) -> None:
    losses = []
    for setting in ("training.use_amp=false", f"training.amp_dtype={dtype}"):
        trainer, recorder = build(tmp_path / setting, setting)
        trainer.train()
        losses.append([record["train/loss"] for _, record in recorder.records if "train/loss" in record])
        assert trainer.amp_dtype == (None if "use_amp" in setting else getattr(torch, dtype))
        assert all(p.dtype == torch.float32 for p in trainer.core.parameters())
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1] != losses[0]


def test_float16__an_overflow_skips_the_step_and_halves_the_scale(tmp_path: Path) -> None:
    trainer, _ = build(tmp_path, "training.amp_dtype=float16")
    scaler = trainer.train_step.scaler
    scaler.load_state_dict(scaler.state_dict() | {"scale": 2.0**40})
    before = {name: value.clone() for name, value in trainer.core.state_dict().items()}
    measured = one_step(trainer)
    assert measured[SKIPPED]
    assert measured[LOSS].isfinite()
    assert scaler.get_scale() == 2.0**39
    assert all(torch.equal(value, before[name]) for name, value in trainer.core.state_dict().items())


def test_float16__finds_its_scale_writes_no_incident_and_resumes_with_it(tmp_path: Path) -> None:
    trainer, _ = build(tmp_path, "training.amp_dtype=float16", "training.epochs=6")
    scaler = trainer.train_step.scaler
    scaler.load_state_dict(scaler.state_dict() | {"scale": 2.0**24})
    trainer.train()
    assert trainer.step == trainer.total_steps
    assert 1.0 < scaler.get_scale() < 2.0**24
    assert not (tmp_path / "incidents").exists()
    again, _ = build(tmp_path, "training.amp_dtype=float16", "training.epochs=6", resume_checkpoint="auto")
    again._restore("auto")
    assert again.train_step.scaler.get_scale() == scaler.get_scale()


def test_clip__comes_after_the_loss_scale_is_taken_out(tmp_path: Path) -> None:
    norms = []
    for scale in (2.0**8, 2.0**12):
        trainer, _ = build(tmp_path / str(scale), "training.amp_dtype=float16")
        scaler = trainer.train_step.scaler
        scaler.load_state_dict(scaler.state_dict() | {"scale": scale})
        norms.append(float(one_step(trainer)[NORM]))
    assert norms[0] == pytest.approx(norms[1], rel=0.02)
    assert 0.01 < norms[0] < 100


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
    """Stands for a kill between two steps; the SIGKILL of real processes is in test_train_alone.py."""


@pytest.mark.parametrize("stop_after", [1, 6, 11, 15])
def test_resume__equals_the_uninterrupted_run_bit_for_bit(tmp_path: Path, stop_after: int) -> None:
    probe_calls: list[int] = []

    def probe(encoder: nn.Module) -> dict[str, float]:
        probe_calls.append(1)
        return {"collapse/rankme": float(sum(p.abs().sum() for p in encoder.parameters())), "collapse/std": 1.0}

    straight, straight_records = build(tmp_path / "a", probe=probe)
    straight.train()

    class Stopping(Images):
        def batches(self, *arguments: Any) -> Iterator[Images.Batch]:
            for batch in super().batches(*arguments):
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
