"""What the trainer promises at each step: schedules, progress, precision, state, late reading, refused resumes."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hjepa import cli, distributed
from hjepa.errors import FutileRetryError, UserError
from hjepa.trainers import HJEPATrainer
from hjepa.trainers.readout import Readout
from hjepa.trainers.trainer import Schedules
from hjepa.utils import MetricsLogger
from hjepa.utils.checkpoint import LATEST, read_checkpoint
from tests.test_trainer import Images, build

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ALL = 16  # steps of the run that ``build`` configures: ceil(3 epochs * 64 images / batches of 12)


class Everything:
    """A sink that keeps what is logged about training and its speed."""

    def __init__(self) -> None:
        self.records: list[dict[str, float]] = []

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if "train/loss" in metrics:
            self.records.append({"step": step, **metrics})


def listen(trainer: HJEPATrainer, folder: Path) -> list[dict[str, float]]:
    sink = Everything()
    trainer.logger = MetricsLogger("test", folder, use_tensorboard=False, sinks=[sink])
    return sink.records


# -- schedules -------------------------------------------------------------------------------------------------------


def test_schedules__reach_the_optimizer_the_target_and_the_loss_at_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, _ = build(
        tmp_path, "training.weight_decay_end=0.4", "training.warmup_epochs=0.75", "model.ema.momentum_end=1.0"
    )
    groups: list[list[tuple[float, float]]] = []
    momenta: list[float] = []
    numbers: list[int] = []
    update_target, loss_fn = trainer.core.update_target, trainer.train_step.loss_fn

    def note_groups(optimizer: torch.optim.Optimizer, *_: object) -> None:
        groups.append([(group["lr"], group["weight_decay"]) for group in optimizer.param_groups])

    def note_momentum(momentum: float, moved: Tensor | None = None) -> None:
        momenta.append(momentum)
        update_target(momentum, moved)

    def note_number(*arguments: Any, step: int) -> Any:
        numbers.append(step)
        return loss_fn(*arguments, step=step)

    trainer.optimizer.register_step_pre_hook(note_groups)
    monkeypatch.setattr(trainer.core, "update_target", note_momentum)
    monkeypatch.setattr(trainer.train_step, "loss_fn", note_number)
    trainer.train()

    expected = [trainer.schedules(k) for k in range(ALL)]
    assert groups == [[(now.lr, now.weight_decay), (now.lr, 0.0)] for now in expected]
    assert momenta == [now.momentum for now in expected]
    assert numbers == list(range(ALL))
    assert [group["decayed"] for group in trainer.optimizer.param_groups] == [True, False]
    # What a schedule that is off by a step, or another one's, would not give; 4 steps of warm-up.
    assert expected[0] == pytest.approx(Schedules(0.0, 0.05, 0.9))
    assert expected[2].lr == pytest.approx(5e-4)
    assert expected[-1] == pytest.approx(Schedules(1e-6, 0.4, 1.0))
    assert len({now.momentum for now in expected}) == len({now.weight_decay for now in expected}) == ALL


def test_warm_up__the_first_step_has_rate_zero_and_moves_no_weight(tmp_path: Path) -> None:
    trainer, _ = build(tmp_path, "training.epochs=1", "training.weight_decay_end=0.4")
    before = {name: p.detach().clone() for name, p in trainer.core.named_parameters() if p.requires_grad}
    moved: list[int] = []

    def count_moved(*_: object) -> None:
        now = dict(trainer.core.named_parameters())
        moved.append(sum(not torch.equal(now[name], old) for name, old in before.items()))

    trainer.optimizer.register_step_post_hook(count_moved)
    trainer.train()
    assert moved[0] == 0
    assert moved[1] == len(before) > 10


# -- what a person reads ---------------------------------------------------------------------------------------------

LINE = re.compile(
    r"epoch (?P<epoch>\d+\.\d\d)/3  step (?P<step>\d+)/16  loss (?P<loss>\d+\.\d{4}) "
    r"\(L0 (?P<l0>\d+\.\d{4}) L1 (?P<l1>\d+\.\d{4})\)  lr (?P<lr>\d\.\d\de[+-]\d\d)  (?P<rate>\d+) images/s  "
    r"data wait (?P<wait>\d+)%  ETA (?P<eta>\?|\d+:\d\d)"
)


def test_progress_line__says_what_is_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer, _ = build(tmp_path)
    records = listen(trainer, tmp_path)
    trainer.train()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    shown = [match.groupdict() for line in lines if (match := LINE.fullmatch(line))]
    assert len(lines) == len(shown) == len(records) == ALL
    for number, (line, record) in enumerate(zip(shown, records, strict=True), start=1):
        assert int(line["step"]) == number
        assert record["step"] == 12 * number
        assert float(line["epoch"]) == pytest.approx(min(number * 12 / 64, 3), abs=0.0051)
        for field, name in (("loss", "loss"), ("l0", "loss_level_0"), ("l1", "loss_level_1")):
            assert line[field] == f"{record[f'train/{name}']:.4f}"
        assert line["lr"] == f"{trainer.schedules(number - 1).lr:.2e}"
        assert int(line["rate"]) == round(record["perf/images_per_second"]) > 0
        assert int(line["wait"]) == round(100 * record["perf/data_wait_share"])
    assert shown[-1]["eta"] == "0:00"
    assert len({line["loss"] for line in shown}) > 1


def test_data_wait_and_rate__are_shares_of_the_time_that_passed(tmp_path: Path) -> None:
    spent: list[float] = []

    class Slow(Images):
        def batches(self, *arguments: Any) -> Iterator[Images.Batch]:
            inner = super().batches(*arguments)
            while True:
                started = time.monotonic()
                batch = next(inner, None)
                time.sleep(0.005)
                spent.append(time.monotonic() - started)
                if batch is None:
                    return
                yield batch

    # One line for the whole run, so that its share is the run's; what comes at the end of an epoch counts too.
    settings = ["logging.log_frequency=16", "collapse.frequency=100", "checkpoint.save_frequency=100"]
    trainer, _ = build(tmp_path, *settings, loader=Slow())
    records = listen(trainer, tmp_path)
    started = time.monotonic()
    trainer.train()
    elapsed = time.monotonic() - started
    (record,) = records
    took = ALL * 12 / record["perf/images_per_second"]
    assert sum(spent[:ALL]) < took < elapsed
    assert sum(spent[:ALL]) <= record["perf/data_wait_share"] * took < took


@pytest.mark.parametrize(
    ("setting", "precision"),
    [
        ("training.use_amp=false", "float32"),
        ("training.amp_dtype=bfloat16", "bfloat16"),
        ("training.amp_dtype=float16", "float16"),
    ],
)
def test_first_line__says_the_precision(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str, precision: str
) -> None:
    trainer, _ = build(tmp_path, "training.epochs=1", setting)
    trainer.train()
    first = capsys.readouterr().out.splitlines()[0]
    pattern = (
        rf"training 0\.\d\d M parameters on cpu in {precision}, 1 rank, \d+ threads?: 6 steps of 12 images, 2 levels"
    )
    assert re.fullmatch(pattern, first), first


# -- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("avx512", "amx", "expected"),
    [(False, False, None), (True, False, torch.bfloat16), (False, True, torch.bfloat16), (True, True, torch.bfloat16)],
)
def test_amp_dtype__auto_on_a_cpu_is_what_it_computes_in(
    monkeypatch: pytest.MonkeyPatch, avx512: bool, amx: bool, expected: torch.dtype | None
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert distributed.amp_dtype(CPU, "auto") == expected


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_amp_dtype__auto_on_a_gpu_does_not_count_emulation(
    monkeypatch: pytest.MonkeyPatch, native: bool, expected: torch.dtype
) -> None:
    def supported(including_emulation: bool = True) -> bool:
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert distributed.amp_dtype(CUDA, "auto") == expected


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("fast", [True, False])
def test_amp_dtype__a_named_one_is_honoured_on_any_hardware(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, fast: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: fast)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: fast)
    assert distributed.amp_dtype(device, "bfloat16") == torch.bfloat16
    assert distributed.amp_dtype(device, "float16") == torch.float16


@pytest.mark.parametrize("overflows", [49, 50])
def test_float16__fifty_overflows_in_a_row_end_the_run_and_forty_nine_do_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], overflows: int
) -> None:
    class Rescued(Images):
        """Where the scale falls to one before step ``overflows``."""

        def batches(self, *arguments: Any) -> Iterator[Images.Batch]:
            for batch in super().batches(*arguments):
                if batch.step == overflows:
                    scaler.load_state_dict(scaler.state_dict() | {"scale": 1.0})
                yield batch

    settings = ["training.epochs=10", "checkpoint.save_frequency=100", "collapse.frequency=100"]
    trainer, _ = build(tmp_path, "training.amp_dtype=float16", *settings, loader=Rescued())
    scaler = trainer.train_step.scaler
    scaler.load_state_dict(scaler.state_dict() | {"scale": 2.0**100})  # after 50 halvings still too large
    if overflows == 50:
        with pytest.raises(FutileRetryError, match=r"50 steps in a row .* up to step 49"):
            trainer.train()
        assert trainer.step == 50
    else:
        assert trainer.train().step == 54
    assert capsys.readouterr().err.count("float16's loss scale comes down") == overflows
    assert not (tmp_path / "incidents").exists()


# -- replay ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def overflow(tmp_path: Path) -> Path:
    """An incident whose only values that are not finite are the gradient of the patch embedding.

    Its weights are zero, so that pixels of 1e38 give finite outputs, and its gradient is pixels times the gradient of
    the outputs, which heads of 1e6 make large.
    """

    class Bright(Images):
        def batches(self, *arguments: Any) -> Iterator[Images.Batch]:
            for batch in super().batches(*arguments):
                yield replace(batch, images=batch.images.float() / 255 * 1e38)

    trainer, _ = build(tmp_path, "training.max_skipped=1", "training.use_amp=false", loader=Bright())
    with torch.no_grad():
        for encoder in (trainer.core.context_encoder, trainer.core.target_encoder):
            encoder.patch_embed.weight.zero_()
        for head in trainer.core.predictor.heads:
            head.weight.mul_(1e6)
    with pytest.raises(FutileRetryError):
        trainer.train()
    return tmp_path / "incidents" / "step_00000000"


def test_replay__names_the_gradient_that_is_not_finite_on_the_command_line(
    overflow: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    capsys.readouterr()
    try:
        assert cli.main(["replay", str(overflow), "--device", "cpu"]) == 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "weights after 1 steps, on cpu"
    assert lines[1] == "batch_rank0.pth: step 0, 12 images, float32"
    assert re.fullmatch(r"  loss \d\S* \(level_0 \d\S*  level_1 \d\S*\), gradient norm (inf|nan)", lines[2]), lines[2]
    assert lines[3] == "  every output is finite; the gradient is not, in context_encoder.patch_embed.weight"
    assert len(lines) == 4


# -- state -----------------------------------------------------------------------------------------------------------


def test_restore__brings_back_the_random_state(tmp_path: Path) -> None:
    trainer, _ = build(tmp_path, "training.epochs=1")
    torch.manual_seed(99)
    torch.rand(7)
    trainer.train()
    saved = torch.get_rng_state()
    assert torch.equal(read_checkpoint(tmp_path / LATEST)["state"]["rng"], saved)
    again, _ = build(tmp_path, "training.epochs=1")
    assert not torch.equal(torch.get_rng_state(), saved)
    again._restore("auto")
    assert torch.equal(torch.get_rng_state(), saved)


WINDOWS = "random in windows of 2 blocks of 8 MB"


def with_digest(digest: str, count: int = 64, order: str = "random") -> Images:
    loader = Images(count=count)
    loader.digest = digest  # type: ignore[attr-defined]
    loader.order = order  # type: ignore[attr-defined]
    return loader


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    build(folder, loader=with_digest("a1"))[0].train()
    return folder


@pytest.mark.parametrize(
    ("settings", "loader", "difference"),
    [
        (["data.horizontal_flip=true"], with_digest("a1"), "data.horizontal_flip: False there, True here"),
        (["data.crop_scale=[0.5, 1]"], with_digest("a1"), "data.crop_scale: "),
        ([], with_digest("b2"), "images' digest: a1 there, b2 here"),
        ([], with_digest("a1", count=63), "images: 64 there, 63 here"),
        (["training.weight_decay_end=0.4"], with_digest("a1"), "training.weight_decay_end: None there, 0.4 here"),
        (["model.ema.momentum=0.8"], with_digest("a1"), "model.ema.momentum: 0.9 there, 0.8 here"),
        (["masking.num_targets=3"], with_digest("a1"), "masking.num_targets: 2 there, 3 here"),
        (["seed=1"], with_digest("a1"), "seed: "),
        ([], with_digest("a1", order=WINDOWS), f"order of the images: random there, {WINDOWS} here"),
    ],
)
def test_resume__is_refused_where_the_next_step_would_be_another(
    trained: Path, settings: list[str], loader: Images, difference: str
) -> None:
    trainer, _ = build(trained, *settings, loader=loader, resume_checkpoint="auto")
    with pytest.raises(UserError) as raised:
        trainer.train()
    lines = str(raised.value).splitlines()
    assert "was trained with other settings" in lines[0]
    assert len(lines) == 2  # this key and no other
    assert lines[1].startswith(f"  {difference}")


@pytest.mark.parametrize(
    "settings",
    [
        ["training.device=auto"],
        ["training.accumulation_steps=3"],
        ["training.max_skipped=9"],
        ["training.use_amp=false"],
        ["training.amp_dtype=bfloat16"],
        ["training.parallel=fsdp"],
        ["data.cache_gb=1", "data.block_mb=4", "data.window_mb=100"],
        ["data.num_workers=0", "logging.log_frequency=7", "checkpoint.save_frequency=5", "checkpoint.keep_best_n=1"],
    ],
)
def test_resume__elsewhere_and_at_another_speed_is_accepted(trained: Path, tmp_path: Path, settings: list[str]) -> None:
    trainer, _ = build(tmp_path, *settings, loader=with_digest("a1"), resume_checkpoint=trained / LATEST)
    assert trainer.train().step == ALL


def test_resume__checkpoint_of_before_the_windows_has_random_order(tmp_path: Path) -> None:
    trainer, _ = build(tmp_path, loader=with_digest("a1"))
    past = {key: value for key, value in trainer.lineage.items() if key != "order of the images"}
    assert len(past) == len(trainer.lineage) - 1
    trainer._require_same_lineage(tmp_path, past)
    trainer, _ = build(tmp_path, loader=with_digest("a1", order=WINDOWS))
    with pytest.raises(UserError, match="order of the images: random there"):
        trainer._require_same_lineage(tmp_path, past)


# -- reading late ----------------------------------------------------------------------------------------------------


def test_readout__gives_values_one_step_late_in_order_with_their_context() -> None:
    readout: Readout[str] = Readout(CPU)
    readout.lag = 1
    assert list(readout.pop()) == []
    found = []
    for k, context in enumerate("abc"):
        readout.push(torch.tensor([k, k + 0.5]), context)
        found.append(list(readout.pop()))
    assert found == [[], [([0.0, 0.5], "a")], [([1.0, 1.5], "b")]]
    assert list(readout.pop()) == []
    readout.push(torch.tensor([3.0]), "d")
    assert list(readout.pop(all=True)) == [([2.0, 2.5], "c"), ([3.0], "d")]
    assert list(readout.pop(all=True)) == []


def test_readout__forgets_what_it_is_told_to_forget() -> None:
    readout: Readout[str] = Readout(CPU)
    readout.lag = 1
    for context in "ab":
        readout.push(torch.zeros(1), context)
    readout.clear()
    readout.push(torch.ones(1), "c")
    assert list(readout.pop()) == []
    assert list(readout.pop(all=True)) == [([1.0], "c")]


def test_readout__lags_on_a_gpu_only() -> None:
    assert [Readout(device).lag for device in (CPU, CUDA)] == [0, 1]


def test_lag__changes_neither_what_is_logged_nor_where_a_run_ends(tmp_path: Path) -> None:
    ends = []
    for lag in (0, 1):
        trainer, recorder = build(
            tmp_path / str(lag),
            "logging.log_frequency=5",
            loader=Images(poison=frozenset({4, 11})),
            probe=lambda encoder: {"collapse/rankme": 9.0},
        )
        trainer.readout.lag = lag
        trainer.train()
        weights = read_checkpoint(tmp_path / str(lag) / LATEST)["model"]
        ends.append((recorder.records, {name: value.tolist() for name, value in weights.items()}))
    assert ends[0] == ends[1]
