"""``hjepa train`` on two real ranks against one: the same losses, checkpoints that fit everywhere, every way to end.

A launch costs 18 s of CPU, most of it imports, so two ranks take many trainings after one another (``together``),
through the command's own entry point. Only what is about processes gets a launch of its own.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from hjepa import distributed
from hjepa.cli import main
from hjepa.config import Config, load_config
from hjepa.data import create_dataloaders
from hjepa.errors import FutileRetryError, PreemptedError
from hjepa.models import HJEPAModel
from hjepa.trainers import parallel
from hjepa.trainers.incidents import replay
from hjepa.training import build_trainer, choose_metric, make_probe, train_alone
from hjepa.utils.checkpoint import LATEST, read_checkpoint, read_header
from hjepa.utils.logging import MetricsLogger
from tests import ranks, test_train_alone
from tests.test_train_alone import equal

pytestmark = pytest.mark.timeout(600)  # of the first test, which waits for all trainings; they share two cores
images = test_train_alone.images
MODES = ["ddp", "fsdp"]
STEPS = 16  # ceil(3 * 64 / 12)
SETTINGS = (
    "training.epochs=3",
    "training.use_amp=false",
    "model.ema.momentum=0.9",
    "logging.log_frequency=1",
    "logging.picture_frequency=0",  # pictures show the main rank's images; ``interrupt`` draws them
)
COLLAPSE = ("collapse.action=stop", "collapse.min_rank=16", "collapse.patience=1", "collapse.frequency=1")
EPOCH_1 = "checkpoint_epoch_0001.pth"  # of step 6, in the middle of everything: an epoch is 5.33 steps
# Two ranks sum the same float32 numbers in another order. Adam, which divides by gradients that may be almost 0, lets
# the difference grow. Measured after 16 steps: 2e-7 of what is logged, 3e-4 of the way that the weights have gone.
TOLERANCE = 5e-6
WAY_TOLERANCE = 5e-3


class Place:
    """The configuration file of a folder, and where each run in it puts its files."""

    def __init__(self, folder: Path):
        self.folder, self.config = folder, folder / "config.yaml"

    def settings(self, run: str, *more: str) -> list[str]:
        folder = self.folder / run
        files = (f"checkpoint.checkpoint_dir={folder / 'checkpoints'}", f"logging.log_dir={folder / 'logs'}")
        return [*SETTINGS, *files, *more]

    def load(self, run: str, *more: str) -> Config:
        return load_config(str(self.config), self.settings(run, *more))

    def arguments(self, run: str, *more: str, resume: Path | str = "auto") -> list[str]:
        sets = [part for setting in self.settings(run, *more) for part in ("--set", setting)]
        home = ["--home", str(self.folder / "home")]
        return ["train", "--config", str(self.config), "--resume", str(resume), *home, *sets]

    def checkpoint(self, run: str, name: str = LATEST) -> Path:
        return self.folder / run / "checkpoints" / name

    def journal(self, run: str) -> dict[tuple[int, str], float]:
        return test_train_alone.journal(self.folder / run)


@pytest.fixture(scope="module")
def place(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("ranks")
    path = folder / "config.yaml"
    path.write_text(test_train_alone.CONFIG.format(folder=folder, root=images))
    return Place(folder)


# -- two ranks, many trainings ---------------------------------------------------------------------------------------


class Poisoned:
    """The real loader, but for images of one rank that are not numbers at some steps."""

    def __init__(self, loader: Any, *, rank: int, steps: set[int]):
        self.loader, self.here, self.steps = loader, loader.rank == rank, steps

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def normalize(self, images: Tensor) -> Tensor:
        return self.loader.normalize(images) if images.dtype == torch.uint8 else images

    def batches(self, *arguments: Any) -> Iterator[Any]:
        for batch in self.loader.batches(*arguments):
            if self.here and batch.step in self.steps:
                views = self.normalize(batch.images)
                views[-1, 0, 3, 3] = torch.nan
                yield replace(batch, images=views)
            else:
                yield batch


def diverge(config: Config, rank: int) -> dict[str, Any]:
    """One bad step, then three in a row that come again after the rewind."""
    loader = Poisoned(create_dataloaders(config)[0], rank=rank, steps={2, 8, 9, 10})
    trainer = build_trainer(config, loader, device="cpu", resume=None)
    with pytest.raises(FutileRetryError) as raised:
        trainer.train()
    weights, _ = parallel.gather_state(trainer.model)
    found = {"said": str(raised.value), "step": trainer.step, "weights": weights}
    distributed.close()
    return found


class Stopping:
    """The real loader; this process gets SIGTERM together with the batch of one step."""

    def __init__(self, loader: Any, step: int | None):
        self.loader, self.step = loader, step

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def batches(self, start: int, *arguments: Any) -> Iterator[Any]:
        for step, batch in enumerate(self.loader.batches(start, *arguments), start):
            if step == self.step:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch


class Seen:
    """Everything but scalars that is logged: what, and how many values a histogram has, by (images seen, name)."""

    def __init__(self) -> None:
        self.pictures: set[tuple[int, str]] = set()
        self.counts: dict[tuple[int, str], int] = {}

    def log(self, metrics: Any, step: int) -> None: ...

    def log_image(self, name: str, picture: Any, step: int) -> None:
        self.pictures.add((step, name))

    def log_histogram(self, name: str, counts: Any, edges: Any, step: int) -> None:
        self.counts[step, name] = int(sum(counts))


def interrupt(config: Config, rank: int) -> dict[str, Any]:
    """A training with pictures of which this rank gets SIGTERM in the last step of an epoch, then in the middle of the
    next one, and which is resumed each time."""
    main_rank = distributed.World.from_environment().is_main
    stops, seen = [], Seen()
    for step in (5, 7, None):
        loader, val_loader = create_dataloaders(config)
        images = loader.dataset
        trainer = build_trainer(
            choose_metric(config, labelled=True),
            Stopping(loader, step if loader.rank == rank else None),
            val_loader,
            device="cpu",
            resume="auto",
            logger=MetricsLogger("stopped", config.logging.log_dir, config, sinks=[seen] if main_rank else []),
            probe=make_probe(config, images, images.manifest, True),
        )
        with contextlib.suppress(PreemptedError):
            trainer.train()
        distributed.close()
        stops.append(trainer.step)
    return {"stops": stops, "pictures": seen.pictures, "counts": seen.counts}


def visits(config: Config) -> list[tuple[int, int]]:
    """(epoch, sample) of every image that this rank's loader gives in three epochs."""
    loader, _ = create_dataloaders(config)
    batches = list(loader.batches(0, STEPS))
    return [pair for batch in batches for pair in zip(batch.epochs.tolist(), batch.samples.tolist(), strict=True)]


def command(arguments: list[str]) -> tuple[int, str]:
    """Exit code of ``hjepa ARGUMENTS`` on this rank, and what it said went wrong."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        code = main(arguments)
    return code, errors.getvalue()


def resumed(arguments: list[str]) -> str:
    """The line of the main rank that says what ``hjepa ARGUMENTS`` went on from; "" on the others."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert main(arguments) == 0
    return "\n".join(line for line in output.getvalue().splitlines() if "resumed from" in line)


def two_ranks(folder: Path) -> dict[str, Any]:
    place = Place(folder)
    found: dict[str, Any] = {}
    for mode in MODES:
        assert main(place.arguments(mode, f"training.parallel={mode}")) == 0
    for run, mode, other in (("ddp from fsdp", "ddp", "fsdp"), ("fsdp from ddp", "fsdp", "ddp")):
        settings = (f"training.parallel={mode}", "training.accumulation_steps=2", "data.num_workers=0")
        assert main(place.arguments(run, *settings, resume=place.checkpoint(other, EPOCH_1))) == 0
    found["resumed"] = [
        resumed(place.arguments("one then two", resume=place.checkpoint("one", EPOCH_1))),
        resumed(place.arguments("preempted")),
    ]
    for mode in MODES:
        settings = (f"training.parallel={mode}", "data.num_workers=0", "logging.picture_frequency=1")
        found[f"{mode} stopped"] = interrupt(place.load(f"{mode} stopped", *settings), rank=1)
    found["mistakes"] = [
        command(place.arguments("mistake", resume=folder / "none.pth")),
        command(place.arguments("mistake", "training.batch_size=13")),
        command(place.arguments("mistake", "training.accumulation_steps=7")),
        command(place.arguments("mistake", "training.paralel=fsdp")),
        command(place.arguments("mistake", "training.lr=0.5", resume=place.checkpoint("one"))),
    ]
    found["collapsed"] = command(place.arguments("collapsed", *COLLAPSE))
    for mode in MODES:
        found[f"{mode} diverged"] = diverge(place.load(f"{mode} diverged", f"training.parallel={mode}"), rank=1)
    found["visits"] = visits(place.load("visits"))
    return found


def preempt(place: Place, run: str, mode: str) -> tuple[str, dict[str, Any]]:
    """What two ranks printed of which one got SIGTERM after step 7, and the checkpoint that they left.

    An idle machine takes all steps before a test has read of the first. So one rank, which the other one waits for in
    every step, runs 5 ms at a time, until the signal is on its way. On a busy machine it may be many more before it is
    suspended; then the epoch is over, and all of it is done once more.
    """
    said, content = _preempt(place, run, mode)
    for _ in range(3):
        if content["step"] < 11:
            break
        shutil.rmtree(place.folder / run)
        said, content = _preempt(place, run, mode)
    return said, content


def _preempt(place: Place, run: str, mode: str) -> tuple[str, dict[str, Any]]:
    arguments = place.arguments(run, f"training.parallel={mode}")
    with ranks.torchrun(["-m", "hjepa", *arguments], cwd=place.folder) as job:
        job.wait_for(f"2 ranks ({mode})", 120)
        rank = job.rank(1)
        job.wait_for(f"step 1/{STEPS}", 120)
        end = time.monotonic() + 60
        while f"step 7/{STEPS}" not in job.output:
            assert time.monotonic() < end, job.output
            rank.resume()
            time.sleep(0.005)
            rank.suspend()
            time.sleep(0.015)
        rank.send_signal(signal.SIGTERM)
        rank.resume()
        assert job.wait(120) == 1  # torchrun's own
        said = job.output
    return said, read_checkpoint(place.checkpoint(run))


@pytest.fixture(scope="module")
def preempted(place: Place) -> tuple[str, dict[str, Any]]:
    """``preempt`` with ddp, before anything else: these ranks prepare the images."""
    return preempt(place, "preempted", "ddp")


@pytest.fixture(scope="module")
def alone(place: Place, preempted: object) -> dict[tuple[int, str], float]:
    """The journal of one rank."""
    train_alone(place.load("one"))
    return place.journal("one")


@pytest.fixture(scope="module")
def together(place: Place, alone: object) -> list[dict[str, Any]]:
    """What each rank found, after all trainings that ``two_ranks`` takes."""
    return ranks.run(two_ranks, place.folder, timeout=240)


def assert_same_course(run: dict[tuple[int, str], float], alone: dict[tuple[int, str], float], start: int = 0) -> None:
    """The journal from step ``start`` on: schedules exactly, everything that was computed to tolerance."""
    expected = {key: value for key, value in alone.items() if key[0] > 12 * start}
    assert run.keys() == expected.keys()
    steps = {step for step, name in run if name == "train/loss"}
    assert steps == {12 * step for step in range(start + 1, STEPS + 1)}
    for (step, name), value in run.items():
        if name in {"optim/lr", "optim/ema_momentum", "optim/weight_decay"}:
            assert value == expected[step, name], (step, name)
        else:
            assert value == pytest.approx(expected[step, name], rel=TOLERANCE), (step, name)


def assert_same_way(a: dict[str, Tensor], b: dict[str, Tensor], start: dict[str, Tensor]) -> None:
    """Two states have gone from ``start`` to the same place, the target encoder too."""
    assert list(a) == list(b)
    assert {name: value.shape for name, value in a.items()} == {name: value.shape for name, value in b.items()}
    for part in ("context_encoder.", "target_encoder.", "predictor."):
        ways = [
            torch.cat([(state[name] - start[name]).flatten() for name in state if name.startswith(part)])
            for state in (a, b)
        ]
        assert ways[0].norm() > 1e-3
        assert (ways[0] - ways[1]).norm() < WAY_TOLERANCE * ways[1].norm(), part


def initial_weights(config: Config) -> dict[str, Tensor]:
    torch.manual_seed(config.seed)
    return HJEPAModel(config).state_dict()


@pytest.mark.parametrize("mode", MODES)
def test_train__on_two_ranks_takes_the_course_of_one(
    mode: str, place: Place, alone: dict[tuple[int, str], float], together: object
) -> None:
    assert_same_course(place.journal(mode), alone)
    one, two = (read_checkpoint(place.checkpoint(run)) for run in ("one", mode))
    assert two["state"]["world_size"] == 2
    assert_same_way(two["model"], one["model"], initial_weights(place.load("one")))


def test_target__moves_under_both_modes_and_is_not_the_student(place: Place, together: object) -> None:
    start = initial_weights(place.load("one"))
    for mode in MODES:
        state = read_checkpoint(place.checkpoint(mode))["model"]
        moved = {name for name in state if name.startswith("target_encoder.") and not equal(state[name], start[name])}
        assert len(moved) > 10
        assert not any(equal(state[name], state[name.replace("target_", "context_", 1)]) for name in moved)


def test_checkpoint__of_either_mode_has_the_same_names_shapes_and_dtypes(place: Place, together: object) -> None:
    def outline(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.shape, value.dtype
        if isinstance(value, dict):
            return {key: outline(item) for key, item in value.items() if key not in {"fused", "foreach"}}
        return [outline(item) for item in value] if isinstance(value, list) else type(value)

    found = [read_checkpoint(place.checkpoint(run)) for run in ("one", *MODES)]
    for part in ("model", "optimizer"):
        outlines = [outline(content[part]) for content in found]
        assert outlines[0] == outlines[1] == outlines[2]


@pytest.mark.parametrize("run", ["ddp from fsdp", "fsdp from ddp", "one then two"])
def test_resume__in_the_other_mode_with_two_micro_batches_or_from_one_rank_goes_on_the_same(
    run: str, place: Place, alone: dict[tuple[int, str], float], together: object
) -> None:
    assert_same_course(place.journal(run), alone, start=6)
    assert_same_way(
        *(read_checkpoint(place.checkpoint(name))["model"] for name in (run, "one")),
        initial_weights(place.load("one")),
    )


@pytest.mark.parametrize("mode", MODES)
def test_resume__of_two_ranks_by_one_goes_on_the_same(
    mode: str,
    place: Place,
    alone: dict[tuple[int, str], float],
    together: object,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = f"{mode} then one"
    train_alone(place.load(run), resume=place.checkpoint(mode, EPOCH_1))
    assert re.search(r"resumed from .*\(saved by 2 ranks\)", capsys.readouterr().out)
    assert_same_course(place.journal(run), alone, start=6)


def test_resume__says_by_how_many_ranks_it_was_saved_where_they_are_not_as_many(
    together: list[dict[str, Any]],
) -> None:
    (one_then_two, two_then_two), other_rank = (found["resumed"] for found in together)
    assert "at step 6 of 16" in one_then_two
    assert "(saved by 1 rank)" in one_then_two
    assert "resumed from" in two_then_two
    assert "saved by" not in two_then_two
    assert other_rank == ["", ""]


def test_sampler__gives_every_image_once_per_epoch_to_one_of_the_ranks(together: list[dict[str, Any]]) -> None:
    seen = [found["visits"] for found in together]
    assert [len(visits) for visits in seen] == [STEPS * 6] * 2
    both = sorted(seen[0] + seen[1])
    assert both == [(epoch, sample) for epoch in range(3) for sample in range(64)]


# -- how a training ends ---------------------------------------------------------------------------------------------


def exit_codes(said: str) -> list[int]:
    return [int(code) for code in re.findall(r"exitcode +: (-?\d+)", said)]


@pytest.mark.parametrize("mode", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_sigterm__to_one_rank_saves_one_checkpoint_and_all_exit_143(
    mode: str, place: Place, preempted: tuple[str, dict[str, Any]]
) -> None:
    said, content = preempted if mode == "ddp" else preempt(place, "preempted fsdp", mode)
    assert exit_codes(said) == [143, 143]
    told = re.findall(r"error: (.*) at step (\d+) of 16: the state is saved", said)
    assert sorted(told) == [("SIGTERM", str(content["step"])), ("another rank's signal", str(content["step"]))]
    assert 7 < content["step"] < 11  # in the middle of the second epoch, while one file is ranked
    assert content["state"]["world_size"] == 2


def assert_same_state(place: Place, run: str, straight: str) -> None:
    """Two runs have come to the same state bit for bit."""
    a, b = (read_checkpoint(place.checkpoint(name)) for name in (straight, run))
    for part in ("step", "model", "optimizer", "metrics"):
        assert equal(deterministic(a[part]), deterministic(b[part])), part


def assert_same_ranking(place: Place, run: str, straight: str) -> None:
    """The same files are ranked, and each holds the step that it is ranked for."""
    for name in (straight, run):
        ranked = read_header(place.checkpoint(name))["ranking"]
        assert sorted(step for _, _, step in ranked) == [6, 11, 16]
        assert ranked == read_header(place.checkpoint(straight))["ranking"]
        for _, file, step in ranked:
            assert read_header(place.checkpoint(name, file))["step"] == step, (name, file)


def deterministic(part: Any) -> Any:
    if not isinstance(part, dict):
        return part
    return {key: value for key, value in part.items() if not str(key).startswith("perf/")}


def test_resume__after_sigterm_equals_the_uninterrupted_run_bit_for_bit(
    place: Place, preempted: tuple[str, dict[str, Any]], together: object
) -> None:
    assert_same_state(place, "preempted", "ddp")
    assert_same_ranking(place, "preempted", "ddp")
    assert place.journal("preempted") == place.journal("ddp")


@pytest.mark.parametrize("mode", MODES)
def test_resume__after_sigterm_at_the_end_of_an_epoch_and_in_the_middle_with_pictures_changes_no_bit(
    mode: str, place: Place, together: list[dict[str, Any]]
) -> None:
    assert [found[f"{mode} stopped"]["stops"] for found in together] == [[6, 8, STEPS]] * 2
    assert_same_state(place, f"{mode} stopped", mode)


@pytest.mark.parametrize("mode", MODES)
def test_ranking__after_sigterm_at_the_end_of_an_epoch_and_in_the_middle_is_the_uninterrupted_runs(
    mode: str, place: Place, together: object
) -> None:
    assert_same_ranking(place, f"{mode} stopped", mode)


@pytest.mark.parametrize("mode", MODES)
def test_pictures__on_two_ranks_are_the_main_ranks_and_histograms_of_its_part(
    mode: str, place: Place, together: list[dict[str, Any]]
) -> None:
    main_rank, other = (found[f"{mode} stopped"] for found in together)
    assert (other["pictures"], other["counts"]) == (set(), {})
    drawn = {12 * 6, 12 * 11, 12 * STEPS}
    names = {"masks", "predictions/maps", "predictions/neighbours"} if mode == "ddp" else set()
    assert main_rank["pictures"] == {(step, name) for step in drawn for name in names}
    assert {step for step, _ in main_rank["counts"]} == drawn
    model = HJEPAModel(place.load(mode))
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    for step in drawn:
        for kind in ("weights", "gradients"):
            counts = {n: main_rank["counts"].get((step, f"{kind}/{n}")) for n in trained}
            for name, value in trained.items():
                # fully_shard deals out the rows, the first ranks get the larger part.
                rows = -(-len(value) // 2) if mode == "fsdp" else len(value)
                assert counts[name] == value.numel() // len(value) * rows, (step, kind, name)


@pytest.fixture(scope="module")
def diverged_alone(place: Place) -> dict[str, Any]:
    return diverge(place.load("diverged"), rank=0)


@pytest.mark.parametrize("mode", MODES)
def test_non_finite_images__of_one_rank_are_skipped_by_all_alike(
    mode: str, place: Place, diverged_alone: dict[str, Any], together: list[dict[str, Any]]
) -> None:
    for found in (found[f"{mode} diverged"] for found in together):
        assert found["said"] == diverged_alone["said"]
        assert "3 steps in a row" in found["said"]
        assert "up to step 10, after a rewind" in found["said"]
        assert found["step"] == diverged_alone["step"] == 11
    weights = [found[f"{mode} diverged"]["weights"] for found in together]
    assert_same_way(weights[0], diverged_alone["weights"], initial_weights(place.load("one")))
    assert weights[1] is None if mode == "fsdp" else equal(weights[0], weights[1])
    folder = place.checkpoint(f"{mode} diverged", "incidents") / "step_00000002"
    assert {path.name for path in folder.iterdir()} == {"model.pth", "batch_rank0.pth", "batch_rank1.pth"}
    report = replay(folder)
    assert sum("1 images are not finite themselves" in line for line in report) == 1
    assert sum("all finite here" in line for line in report) == 1


def test_collapse__stops_all_ranks_with_13(place: Place, together: list[dict[str, Any]]) -> None:
    assert [found["collapsed"][0] for found in together] == [13, 13]
    assert all("effective rank" in found["collapsed"][1] for found in together)
    assert read_checkpoint(place.checkpoint("collapsed"))["step"] == 6


def test_mistake__ends_all_ranks_with_2_and_a_sentence(together: list[dict[str, Any]]) -> None:
    for found in together:
        codes, said = zip(*found["mistakes"], strict=True)
        assert codes == (2,) * 5
        for text, expected in zip(
            said,
            (
                "no checkpoint at",
                "training.batch_size=13 does not divide into 2 ranks; use 12",
                "training.accumulation_steps=7",
                "training.paralel",
                "trained with other settings",
            ),
            strict=True,
        ):
            assert text.startswith("error: ")
            assert text.count("error: ") == 1
            assert expected in text
            assert "Traceback" not in text


@pytest.mark.slow
def test_mistake__shows_no_traceback_of_a_rank_under_torchrun(place: Place) -> None:
    with ranks.torchrun(["-m", "hjepa", *place.arguments("mistake", resume="none.pth")], cwd=place.folder) as job:
        assert job.wait(120) == 1
        said = job.output
    # torchrun terminates a rank that is not quite gone when the first one is; that one it names last.
    assert exit_codes(said)[-1] == 2
    assert set(exit_codes(said)) <= {2, 143, -signal.SIGTERM}
    assert "no checkpoint at none.pth" in said
    assert said.count("Traceback") == 1  # torchrun's own


@pytest.mark.parametrize("mode", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_sigkill__of_one_rank_ends_the_job_fast_and_leaves_no_process(
    mode: str, place: Place, together: object
) -> None:
    arguments = place.arguments(f"{mode} killed", "training.epochs=100", f"training.parallel={mode}")
    with ranks.torchrun(["-m", "hjepa", *arguments], cwd=place.folder) as job:
        job.wait_for("step 3/", 120)
        family = psutil.Process(job.process.pid).children(recursive=True)
        assert len(family) >= 4  # two ranks, and a loader's worker for each
        killed = time.monotonic()
        job.rank(0).kill()
        assert job.wait(60) == 1
        print(f"the job ended {time.monotonic() - killed:.1f} s after the kill")
        _, left = psutil.wait_procs(family, timeout=10)
        assert not left
        codes = exit_codes(job.output)
    assert len(codes) == 2
    assert -signal.SIGKILL in codes
    assert 0 not in codes


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_command__under_torchrun_equals_the_same_in_one_process_group_bit_for_bit(
    mode: str, place: Place, together: object
) -> None:
    run = f"{mode} command"
    settings = (f"training.parallel={mode}", "logging.tensorboard.enabled=true")
    with ranks.torchrun(["-m", "hjepa", *place.arguments(run, *settings)], cwd=place.folder) as job:
        assert job.wait(240) == 0, job.output
        assert job.output.count("done: step 16, 192 images seen") == 1
    here, there = (read_checkpoint(place.checkpoint(name)) for name in (mode, run))
    for part in ("model", "optimizer"):
        assert equal(here[part], there[part]), part
    assert place.journal(run).items() >= place.journal(mode).items()


@pytest.mark.slow
def test_collapse__under_torchrun_exits_13_on_all_ranks(place: Place) -> None:
    with ranks.torchrun(["-m", "hjepa", *place.arguments("collapsed command", *COLLAPSE)], cwd=place.folder) as job:
        assert job.wait(240) == 1
        assert exit_codes(job.output) == [13, 13]
