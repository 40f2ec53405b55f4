"""The logger against real backends, whole and broken; the pictures against known pixels; the progress line."""

from __future__ import annotations

import logging
import os
import pty
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from numpy.typing import NDArray
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hjepa.config import load_config
from hjepa.errors import UserError
from hjepa.masks import MultiBlockMasking
from hjepa.utils import MetricsLogger, ProgressTracker, setup_logging
from hjepa.utils.histograms import BINS, _describe, histograms, total_norm
from hjepa.utils.logging import format_seconds
from hjepa.utils.pictures import (
    GAP,
    HIDDEN,
    as_picture,
    compare,
    image_grid,
    mask_picture,
    nearest_neighbours,
    neighbour_picture,
)


class Recorder:
    """A sink that takes everything."""

    def __init__(self) -> None:
        self.metrics: list[tuple[int, dict[str, float]]] = []
        self.images: dict[str, NDArray[np.uint8]] = {}
        self.histograms: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]] = {}

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.metrics.append((step, dict(metrics)))

    def log_image(self, name: str, image: NDArray[np.uint8], step: int) -> None:
        self.images[name] = image

    def log_histogram(self, name: str, counts: NDArray[np.float64], edges: NDArray[np.float64], step: int) -> None:
        self.histograms[name] = (counts, edges)

    @property
    def last(self) -> dict[str, float]:
        return self.metrics[-1][1]


class FullDisk:
    """A sink whose disk is full."""

    calls = 0

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.calls += 1
        raise OSError(28, "No space left on device")


def to_sinks(folder: Path, *sinks: Any) -> MetricsLogger:
    return MetricsLogger("run", folder, use_tensorboard=False, sinks=sinks)


def events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0, "images": 0, "histograms": 0})
    found.Reload()
    return found


# -- scalars ---------------------------------------------------------------------------------------------------------


def test_log_metrics__takes_numbers_and_tensors(tmp_path: Path) -> None:
    recorder = Recorder()
    values = {"a": 1, "b": torch.tensor(0.1), "c": torch.tensor(2**40 + 1), "d": float("nan"), "e": torch.tensor([0.5])}
    to_sinks(tmp_path, recorder).log_metrics(values, step=7, prefix="train/")
    step, found = recorder.metrics[0]
    assert step == 7
    assert list(found) == ["train/a", "train/b", "train/c", "train/d", "train/e"]
    assert found["train/b"] == torch.tensor(0.1).item()
    assert found["train/c"] == 2**40 + 1
    assert found["train/d"] != found["train/d"]
    assert found["train/e"] == 0.5


def test_log_metrics__names_the_metric_that_is_no_number(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"metric b: expected one number, got a tensor of shape \(2,\)"):
        to_sinks(tmp_path, Recorder()).log_metrics({"a": 1.0, "b": torch.zeros(2)}, step=0)


def test_accumulated_metrics__are_weighted_means_and_start_over(tmp_path: Path) -> None:
    recorder = Recorder()
    logger = to_sinks(tmp_path, recorder)
    logger.accumulate_metrics({"loss": torch.tensor(1.0), "top1": 0.5}, weight=3)
    logger.accumulate_metrics({"loss": torch.tensor(5.0)}, weight=1)
    assert logger.log_accumulated_metrics(2, "val/") == {"loss": 2.0, "top1": 0.5}
    assert recorder.metrics == [(2, {"val/loss": 2.0, "val/top1": 0.5})]
    logger.accumulate_metrics({"loss": 4.0})
    assert logger.log_accumulated_metrics(3) == {"loss": 4.0}
    assert logger.log_accumulated_metrics(4) == {}
    assert len(recorder.metrics) == 2


def test_hierarchical_losses__are_named_by_level(tmp_path: Path) -> None:
    recorder = Recorder()
    logger = to_sinks(tmp_path, recorder)
    logger.log_hierarchical_losses([torch.tensor(0.5), 0.25], 1)
    assert recorder.last == {"train/loss_level_0": 0.5, "train/loss_level_1": 0.25}
    logger.log_hierarchical_losses({0: 0.5, "level_1": 0.25, "regularizer": 2.0}, 1, prefix="val/")
    assert recorder.last == {"val/level_0": 0.5, "val/level_1": 0.25, "val/regularizer": 2.0}


def test_system_metrics__show_memory_and_the_wait_for_data(tmp_path: Path) -> None:
    recorder = Recorder()
    logger = to_sinks(tmp_path, recorder)
    logger.log_system_metrics(0)
    assert "system/data_wait_share" not in recorder.last
    end = time.monotonic() + 0.2
    while time.monotonic() < end:
        pass
    logger.add_data_wait(0.1)
    logger.log_system_metrics(1)
    expected = psutil.Process().memory_info().rss / 2**30
    assert recorder.last["system/process_memory_gib"] == pytest.approx(expected, rel=0.2)
    assert recorder.last["system/process_cpu_percent"] > 5
    assert 0 <= recorder.last["system/cpu_percent"] <= 100
    assert 0.05 < recorder.last["system/data_wait_share"] <= 0.5
    logger.log_system_metrics(2, data_wait=0.25)
    assert recorder.last["system/data_wait_share"] == 0.25


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch says of a GPU that is in use: 2 GiB in 3 reserved ones, 4 at the peak."""
    bytes_of = {"allocated_bytes.all.current": 2, "reserved_bytes.all.current": 3, "allocated_bytes.all.peak": 4}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: {name: gib * 2**30 for name, gib in bytes_of.items()})


MEMORY = {
    "system/gpu_memory_allocated_gib": 2.0,
    "system/gpu_memory_reserved_gib": 3.0,
    "system/gpu_memory_peak_gib": 4.0,
}


@pytest.mark.usefixtures("gpu")
def test_system_metrics__of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    utilization = iter([37, 38])
    monkeypatch.setattr(torch.cuda, "utilization", lambda: next(utilization))
    recorder = Recorder()
    logger = to_sinks(tmp_path, recorder)
    for expected in (37.0, 38.0):
        logger.log_system_metrics(0)
        shown = {name: value for name, value in recorder.last.items() if "gpu" in name}
        assert shown == MEMORY | {"system/gpu_percent": expected}


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("error", [RuntimeError("NVML: not supported"), ModuleNotFoundError("No module named pynvml")])
def test_system_metrics__of_a_gpu_that_refuses_to_tell_are_asked_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    asked: list[int] = []

    def utilization() -> int:
        asked.append(1)
        raise error

    monkeypatch.setattr(torch.cuda, "utilization", utilization)
    recorder = Recorder()
    logger = to_sinks(tmp_path, recorder)
    for step in range(3):
        logger.log_system_metrics(step)
        assert {name: value for name, value in recorder.last.items() if "gpu" in name} == MEMORY
        assert recorder.last.keys() >= {"system/cpu_percent", "system/process_memory_gib"}
    assert len(recorder.metrics) == 3
    assert len(asked) == 1
    assert capsys.readouterr().err == ""


def test_system_metrics__leave_a_gpu_that_is_not_in_use_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.delattr(torch.cuda, "memory_stats")
    monkeypatch.delattr(torch.cuda, "utilization")
    recorder = Recorder()
    to_sinks(tmp_path, recorder).log_system_metrics(0)
    assert not [name for name in recorder.last if "gpu" in name]


def test_a_logger_without_receivers__reads_no_tensor(tmp_path: Path) -> None:
    logger = MetricsLogger("run", tmp_path, use_tensorboard=False)
    logger.log_metrics({"loss": torch.zeros(3, device="meta")}, step=0)  # reading a meta tensor is an error
    logger.log_image("image", torch.zeros(3, 8, 8, device="meta"), step=0)
    logger.log_model_weights(nn.Linear(2, 2, device="meta"), step=0)
    assert not logger.listening


# -- histograms ------------------------------------------------------------------------------------------------------


def test_histogram__equals_numpys(tmp_path: Path) -> None:
    recorder = Recorder()
    values = torch.randint(-1000, 1000, (50, 40), generator=torch.Generator().manual_seed(0)).float() + 0.5
    to_sinks(tmp_path, recorder).log_histogram("values", values, step=0)
    counts, edges = recorder.histograms["values"]
    expected, expected_edges = np.histogram(values.double().numpy(), BINS)
    np.testing.assert_allclose(edges, expected_edges, rtol=1e-6)
    assert counts.sum() == values.numel()
    assert np.abs(counts - expected).sum() <= 4  # values that lie on an edge may fall to either side


def test_histogram__survives_constants_and_what_is_not_finite() -> None:
    tensors = {
        "constant": torch.full((5,), 3.0),
        "holes": torch.tensor([1.0, torch.nan, 2.0, torch.inf, -torch.inf]),
        "nothing": torch.full((4,), torch.nan),
        "empty": torch.zeros(0),
        "half": torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
        "scalar": torch.tensor(2),
    }
    found = histograms(tensors)
    assert list(found) == ["constant", "holes", "half", "scalar"]
    assert found["constant"].counts[0] == found["constant"].counts.sum() == 5
    holes = found["holes"]
    assert (holes.minimum, holes.maximum, holes.total, holes.squares) == (1.0, 2.0, 3.0, 5.0)
    assert holes.counts[0] == holes.counts[-1] == 1
    assert holes.counts.sum() == 2


class HostReads(TorchDispatchMode):
    """Counts the operators that make the host wait for a value."""

    names: list[str]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique"):
            self.names.append(name)
        return func(*args, **kwargs or {})


def test_describing_tensors__never_makes_the_host_wait() -> None:
    with HostReads() as reads:
        reads.names = []
        for tensor in (torch.randn(100), torch.full((5,), torch.nan), torch.ones(3, 3)):
            _describe(tensor)
        total_norm([torch.ones(3), torch.ones(4)])
        assert reads.names == []
        torch.ones(()).item()
        assert reads.names == ["_local_scalar_dense"]


def test_weights_and_gradients__histograms_and_norms(tmp_path: Path) -> None:
    recorder = Recorder()
    logger = to_sinks(tmp_path, recorder)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[1].requires_grad_(False)
    logger.log_model_gradients(model, 0)
    assert not recorder.metrics, "no gradients yet"
    model(torch.ones(5, 3)).sum().backward()
    wrapped = nn.DataParallel(model)
    logger.log_model_weights(wrapped, 1)
    logger.log_model_gradients(wrapped, 1)
    names = ["0.weight", "0.bias"]
    assert list(recorder.histograms) == [f"{kind}/{name}" for kind in ("weights", "gradients") for name in names]
    found = {name: value for _, metrics in recorder.metrics for name, value in metrics.items()}
    parameters = [model[0].weight, model[0].bias]
    norm = torch.cat([parameter.detach().flatten() for parameter in parameters]).norm().item()
    assert found["weights/norm"] == pytest.approx(norm)
    norm = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).norm().item()
    assert found["gradients/norm"] == pytest.approx(norm)


def test_watch_model__logs_at_every_nth_call(tmp_path: Path) -> None:
    recorder = Recorder()
    logger = to_sinks(tmp_path, recorder)
    logger.watch_model(nn.Linear(2, 2), frequency=3)
    for step in range(7):
        logger.log_metrics({"loss": 1.0}, step)
    assert [step for step, metrics in recorder.metrics if "weights/norm" in metrics] == [2, 5]


# -- backends, whole -------------------------------------------------------------------------------------------------


def test_tensorboard__reads_back_what_was_logged(tmp_path: Path) -> None:
    picture = torch.arange(3 * 4 * 5, dtype=torch.uint8).reshape(3, 4, 5)
    with MetricsLogger("run", tmp_path, load_config("demo")) as logger:
        for step in range(200):
            logger.log_metrics({"loss": 1 / (step + 1), "broken": float("nan")}, step, prefix="train/")
        logger.log_image("picture", picture, 3)
        logger.log_images("many", torch.zeros(4, 1, 28, 28), 3)
        logger.log_histogram("spread", torch.arange(100.0), 5)
        logger.log_embeddings("cells", torch.eye(6, 3), 5, labels=list("abcdef"), images=torch.zeros(6, 1, 8, 8))
    found = events(tmp_path / "run")
    scalars = found.Scalars("train/loss")
    assert [event.step for event in scalars] == list(range(200))
    np.testing.assert_allclose([event.value for event in scalars], 1 / np.arange(1, 201), rtol=1e-6)
    assert np.isnan(found.Scalars("train/broken")[0].value)
    image = found.Images("picture")[0]
    assert (image.step, image.height, image.width) == (3, 4, 5)
    spread = found.Histograms("spread")[0].histogram_value
    assert (spread.num, spread.min, spread.max, spread.sum) == (100, 0, 99, 4950)
    assert b"fashion-mnist" in found.Tensors("config/text_summary")[0].tensor_proto.string_val[0]
    assert len(list((tmp_path / "run").glob("*/cells/sprite.png"))) == 1
    labels = next((tmp_path / "run").glob("*/cells/metadata.tsv")).read_text("utf-8")
    assert labels.split() == list("abcdef")


def test_embeddings__refuse_labels_of_another_length(tmp_path: Path) -> None:
    with (
        MetricsLogger("run", tmp_path) as logger,
        pytest.raises(ValueError, match="6 vectors, but 2 labels"),
    ):
        logger.log_embeddings("cells", torch.eye(6), 0, labels=["a", "b"])


# -- backends, broken ------------------------------------------------------------------------------------------------


def test_a_sink_that_raises__is_reported_once_and_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken, recorder = FullDisk(), Recorder()
    logger = to_sinks(tmp_path, broken, recorder)
    for step in range(3):
        logger.log_metrics({"loss": 1.0}, step)
    assert broken.calls == 1
    assert len(recorder.metrics) == 3
    said = capsys.readouterr().err
    assert said.count("FullDisk is left out from here on (OSError: [Errno 28] No space left on device)") == 1
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("module", "name"), [("torch.utils.tensorboard", "TensorBoard"), ("wandb", "Weights & Biases")]
)
def test_a_backend_that_is_not_installed__is_said_once_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], module: str, name: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # importing it is a ModuleNotFoundError now
    recorder = Recorder()
    wanted = {"use_wandb": name != "TensorBoard", "use_tensorboard": name == "TensorBoard"}
    with MetricsLogger("run", tmp_path, sinks=[recorder], **wanted) as logger:
        for step in range(3):
            logger.log_metrics({"loss": 1.0}, step)
    assert recorder.metrics == [(step, {"loss": 1.0}) for step in range(3)]
    said = capsys.readouterr().err
    assert re.fullmatch(rf"warning: {name} is not installed \(.*{module}.*\); it is left out\n", said), said


def test_backends_that_are_not_installed__are_said_once_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("torch.utils.tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, module, None)
    with MetricsLogger("run", tmp_path, use_wandb=True) as logger:
        assert not logger.listening
    said = capsys.readouterr().err.splitlines()
    assert [line.split(" is not installed")[0] for line in said] == [
        "warning: TensorBoard",
        "warning: Weights & Biases",
    ]


def test_log_dir_is_a_file__tensorboard_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs").write_text("")
    recorder = Recorder()
    with MetricsLogger("run", tmp_path / "logs", sinks=[recorder]) as logger:
        logger.log_metrics({"loss": 1.0}, 0)
    assert recorder.last == {"loss": 1.0}
    said = capsys.readouterr().err
    assert re.fullmatch(
        r"warning: TensorBoard does not start \((NotADirectory|FileExists)Error: .*\); it is left out\n", said
    )


# TensorBoard's own writer thread dies with a traceback; what matters is that nothing else does.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_log_dir_is_removed__the_others_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorder = Recorder()
    with MetricsLogger("run", tmp_path / "logs", sinks=[recorder]) as logger:
        logger.log_metrics({"loss": 1.0}, 0)
        wait_until(lambda: any((tmp_path / "logs").rglob("events*")))
        shutil.rmtree(tmp_path / "logs")
        for step in range(1, 50):
            logger.log_metrics({"loss": 1.0}, step)
    assert len(recorder.metrics) == 50
    said = capsys.readouterr().err
    assert said.count("TensorBoard is left out from here on (FileNotFoundError") == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_full_disk__the_others_go_on(small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorder = Recorder()
    noise = np.random.default_rng(0).integers(0, 256, (3, 800, 800), np.uint8)
    with MetricsLogger("run", small_disk, sinks=[recorder]) as logger:
        logger.log_metrics({"loss": 1.0}, 0)
        logger.log_image("noise", noise, 0)
        for step in range(1, 20):
            logger.log_metrics({"loss": 1.0}, step)
    assert len(recorder.metrics) == 20
    said = capsys.readouterr().err
    assert said.count("TensorBoard is left out from here on (OSError: [Errno 28]") == 1


def wait_until(condition: Any, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    assert condition()


WANDB = """
import sys, time
from pathlib import Path
import psutil
from hjepa.utils import MetricsLogger

fate, folder = sys.argv[1:]

class Lines:
    def log(self, metrics, step):
        print("sink", step, flush=True)

logger = MetricsLogger("run", folder, {"a": 1}, use_wandb=True, use_tensorboard=False, sinks=[Lines()])
service = psutil.Process().children(recursive=True)
print("service", *(process.pid for process in service))
logger.log_metrics({"train/loss": 0.5, "nan": float("nan")}, 0)
if fate == "well":
    import torch
    logger.log_image("picture", torch.zeros(3, 8, 8), 0)
    logger.log_histogram("spread", torch.arange(10.0), 0)
    logger.log_embeddings("cells", torch.eye(4), 0, labels=[0, 1, 2, 3], images=torch.zeros(4, 3, 8, 8))
time.sleep(0.3)
for process in service:
    if fate == "killed":
        process.kill()
    if fate == "hanging":
        process.suspend()
start = time.monotonic()
for step in range(1, 100):
    logger.log_metrics({"train/loss": 0.5}, step)
print("logging took", time.monotonic() - start)
if fate == "killed":
    time.sleep(0.5)
start = time.monotonic()
logger.finish(timeout_seconds=20 if fate == "well" else 1.5)
print("finish took", time.monotonic() - start)
"""


@pytest.mark.parametrize("fate", ["well", "killed", "hanging"])
def test_wandb__never_ends_or_holds_up_a_run(tmp_path: Path, fate: str) -> None:
    pytest.importorskip("wandb")
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    command = [sys.executable, "-c", WANDB, fate, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    lines = [line.split() for line in ended.stdout.splitlines()]
    assert [int(line[1]) for line in lines if line[0] == "sink"] == list(range(100))
    took = {line[0]: float(line[2]) for line in lines if line[1] == "took"}
    assert took["logging"] < 1
    assert took["finish"] < 20 if fate == "well" else 7
    written = next(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    if fate == "well":
        assert "warning" not in ended.stderr
        assert b"train/loss" in written.read_bytes()
        assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/*/picture*"))) == 1
    else:
        assert ended.stderr.count("Weights & Biases is left out from here on") == 1
        assert f"wandb sync {written.parent}" in ended.stderr
        assert "Traceback" not in ended.stderr
    service = [int(pid) for line in lines if line[0] == "service" for pid in line[1:]]
    assert service
    wait_until(lambda: not any(alive(pid) for pid in service))


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_import__needs_no_torch() -> None:
    code = "import sys, hjepa.utils, hjepa.utils.logging; hjepa.utils.setup_logging(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# -- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "image",
    [
        torch.full((1, 4, 6), 0.5),
        torch.full((4, 6), 128, dtype=torch.uint8),
        torch.full((3, 4, 6), 0.5, dtype=torch.bfloat16),
        np.full((4, 6, 3), 0.5),
    ],
)
def test_as_picture__takes_what_images_come_as(image: Any) -> None:
    picture = as_picture(image)
    assert picture.shape == (4, 6, 3)
    assert picture.dtype == np.uint8
    assert (picture == 128).all()


def test_as_picture__refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"got \(2, 4, 6\)"):
        as_picture(np.zeros((2, 4, 6)))


def test_image_grid__keeps_every_pixel() -> None:
    images = torch.arange(3 * 28 * 28).reshape(3, 1, 28, 28).remainder(256).to(torch.uint8)
    grid = image_grid(images, columns=2)  # 28 pixels become 140
    assert grid.shape == (2 * (140 + GAP) + GAP, 2 * (140 + GAP) + GAP, 3)
    third = grid[140 + 2 * GAP :: 5, GAP::5][:28, :28, 0]
    np.testing.assert_array_equal(third, images[2, 0].numpy())


def test_mask_picture__shows_the_context_and_hides_the_rest() -> None:
    config = load_config("demo")
    masks = MultiBlockMasking(config)(step=0, epochs=0, samples=np.arange(2))
    images = torch.full((2, 1, 28, 28), 200, dtype=torch.uint8)
    picture = mask_picture(images, torch.from_numpy(masks.context), masks.targets, config.grid_size)
    top = picture.shape[0] - 2 * (140 + GAP) - GAP + GAP  # below the captions
    panel = picture[top : top + 140, 2 * GAP + 140 : 2 * GAP + 280]
    centres = panel[17::35, 17::35].reshape(16, 3)  # one pixel per patch of the 4 x 4 grid
    seen = np.zeros(16, bool)
    seen[masks.context[0]] = True
    assert (centres[seen] == 200).all()
    assert (centres[~seen] == HIDDEN).all()
    target = picture[top : top + 140, 3 * GAP + 280 : 3 * GAP + 420][10::35, 10::35].reshape(16, 3)
    inside = np.zeros(16, bool)
    inside[masks.targets[0][0].ravel()] = True
    assert (target[inside] == 200).all()
    assert (target[~inside] < 120).all()


def cells_of(images: NDArray[np.uint8], grid: int) -> NDArray[np.float32]:
    """(B, C, S, S) -> (B, grid^2, C * p * p)."""
    b, c, side, _ = images.shape
    split = images.reshape(b, c, grid, side // grid, grid, side // grid)
    return split.transpose(0, 2, 4, 1, 3, 5).reshape(b, grid * grid, -1).astype(np.float32)


def test_neighbours__perfect_predictions_give_the_images_back() -> None:
    config = load_config("demo")
    images = np.random.default_rng(0).integers(0, 256, (3, 1, 28, 28)).astype(np.uint8)
    masks = MultiBlockMasking(config)(step=0, epochs=0, samples=np.arange(3))
    neighbours = []
    for level, cells in enumerate(masks.targets):
        targets = np.stack([patches[own] for patches, own in zip(cells_of(images, 4 >> level), cells, strict=True)])
        found = nearest_neighbours(torch.from_numpy(targets) * 2, targets, cells)
        assert found.own_share == 1.0
        assert found.elsewhere is not None
        per_image = cells[0].size
        assert all((found.elsewhere[b] // per_image != b).all() for b in range(3))
        comparison = compare(targets * 2, targets)
        np.testing.assert_allclose(comparison.cosine, 1.0, atol=1e-5)
        assert comparison.error.mean() == pytest.approx(1.0)  # |2t - t|^2 = |t|^2
        neighbours.append(found)
    picture = neighbour_picture(images, masks.targets, neighbours, 4)
    top = picture.shape[0] - 3 * (140 + GAP)
    image, _, nearest = (picture[top : top + 140, GAP + k * (140 + GAP) :][:, :140] for k in range(3))
    changed = (image != nearest).any(-1)
    assert (nearest[changed] == nearest[changed][0]).all(), "only the outline differs"
    assert changed.mean() < 0.1


def test_prediction_comparison__numbers_and_pictures(tmp_path: Path) -> None:
    recorder = Recorder()
    config = load_config("demo")
    masks = MultiBlockMasking(config)(step=0, epochs=0, samples=np.arange(4))
    generator = torch.Generator().manual_seed(0)
    targets = [torch.randn(*cells.shape, 32, generator=generator) for cells in masks.targets]
    predictions = [targets[0], torch.zeros_like(targets[1])]
    images = torch.rand(4, 1, 28, 28)
    logger = to_sinks(tmp_path, recorder)
    logger.log_prediction_comparison(predictions, targets, 9)
    assert set(recorder.last) == {
        f"predictions/{name}_level_{level}" for name in ("cosine", "error") for level in (0, 1)
    }
    logger.log_prediction_comparison(predictions, targets, 9, images=images, cells=masks.targets, grid=4)
    assert recorder.last["predictions/cosine_level_0"] == pytest.approx(1.0)
    assert recorder.last["predictions/error_level_0"] == 0.0
    assert recorder.last["predictions/cosine_level_1"] == 0.0
    assert recorder.last["predictions/error_level_1"] == pytest.approx(1.0)
    assert recorder.last["predictions/nearest_is_own_level_0"] == 1.0
    assert set(recorder.images) == {"predictions/maps", "predictions/neighbours"}
    assert all(image.dtype == np.uint8 and image.shape[2] == 3 for image in recorder.images.values())


# -- progress --------------------------------------------------------------------------------------------------------


def test_progress_tracker__rate_and_eta_of_the_window() -> None:
    now = 100.0
    tracker = ProgressTracker(1000, 100, window_seconds=30, clock=lambda: now)
    assert tracker.get_eta() is None
    for step in range(110, 310, 10):  # 1 step per second
        now += 10
        tracker.step(step)
    assert tracker.get_eta() == pytest.approx(700)
    tracker.start_epoch(3)
    for step in range(350, 700, 50):  # then 5 per second
        now += 10
        tracker.step(step)
    assert tracker.steps_per_second() == pytest.approx(5)
    assert tracker.get_eta() == pytest.approx(350 / 5)
    assert tracker.get_elapsed_time() == pytest.approx(270)
    summary = tracker.epoch_summary(batch_size=8)
    assert summary == (3, 350, pytest.approx(70), pytest.approx(40))


@pytest.mark.parametrize(("seconds", "text"), [(None, "?"), (65, "1:05"), (3700, "1:01:40"), (59.6, "1:00")])
def test_format_seconds(seconds: float | None, text: str) -> None:
    assert format_seconds(seconds) == text


PROGRESS = """
import logging, time
from hjepa.utils import ProgressLine, setup_logging
from hjepa.utils.logging import say, warn
setup_logging()
with ProgressLine(1876, 100) as line:
    for step in range(101, 561):
        line.advance(step)
        if step % 280 == 0:
            line.show("epoch 1.20/4", f"step {step}/1876", "loss 0.1234 (L0 0.1 L1 0.2)", "lr 1.0e-3",
                      "812 images/s", "data wait 3%", "ETA 2:10")
            say("said in between")
            warn("careful")
            logging.getLogger("x").info("logged")
print("after")
"""
FACTS = "epoch 1.20/4  step 560/1876  loss 0.1234 (L0 0.1 L1 0.2)  lr 1.0e-3  812 images/s  data wait 3%  ETA 2:10"


def test_progress_line__plain_lines_in_a_pod() -> None:
    ended = subprocess.run([sys.executable, "-c", PROGRESS], capture_output=True, text=True, check=True)
    lines = ended.stdout.splitlines()
    assert lines == [FACTS.replace("560/", "280/"), "said in between", FACTS, "said in between", "after"]
    assert re.sub(r"\d{4}-\d\d-\d\d [\d:]{8} ", "", ended.stderr) == "warning: careful\nINFO     logged\n" * 2


@pytest.mark.parametrize(("columns", "shown"), [(160, FACTS), (80, "epoch 1.20/4  step 560/1876  ETA 2:10")])
def test_progress_line__a_bar_on_a_terminal(columns: int, shown: str) -> None:
    screen = on_a_terminal(PROGRESS, columns)
    assert "\r 30% |███" in screen
    assert f"| {shown}" in screen
    cleared = [part.strip(" \n") for part in re.split("[\r\n]", screen)]
    for whole in ("said in between", "warning: careful"):
        assert cleared.count(whole) == 2, "a line of its own"
    assert [part for part in cleared if part][-1] == "after"


def on_a_terminal(code: str, columns: int) -> str:
    """What a program writes to a pseudo-terminal of that width."""
    import fcntl
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment | {"TERM": "xterm", "PYTHONIOENCODING": "utf-8"},
    )
    os.close(theirs)
    parts = []
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # Linux's way to say that the other end is closed
            break
        if not part:
            break
        parts.append(part)
    os.close(ours)
    assert process.wait() == 0
    return b"".join(parts).decode()


# -- Python's logging ------------------------------------------------------------------------------------------------


def test_setup_logging__twice_is_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        setup_logging("DEBUG", tmp_path / "old" / "run.log")
        setup_logging("info", tmp_path / "new" / "run.log")
        logging.getLogger("hjepa").info("hello")
        logging.getLogger("hjepa").debug("unheard")
        logging.getLogger("botocore.hooks").info("chatter")
        pattern = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d INFO     hello\n"
        assert re.fullmatch(pattern, capsys.readouterr().err)
        assert re.fullmatch(pattern, (tmp_path / "new" / "run.log").read_text("utf-8"))
        assert (tmp_path / "old" / "run.log").read_text("utf-8") == ""
        with pytest.raises(UserError, match="logging level 'loud'"):
            setup_logging("loud")
        with pytest.raises(UserError, match="cannot write the log file"):
            setup_logging(log_file=tmp_path / "new" / "run.log" / "below")
    finally:
        for handler in root.handlers[:]:
            if handler not in before:
                root.removeHandler(handler)
                handler.close()
        root.setLevel(level)
