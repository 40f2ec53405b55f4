"""Does the hierarchy pay? I-JEPA against H-JEPA with 2 and 3 levels at equal compute, on Fashion-MNIST.

    python -m benchmarks.quality [--budget 150] [--seeds 3] [--processes 1] [--set KEY=VALUE ...] [--smoke]

Every setting is trained without and with the regulariser, from each seed, for the same CPU seconds of training steps
(forward, backward, clip, optimiser, EMA; one thread; making batches and masks, and evaluation, do not count). Seconds
per step are measured first, with all settings taking turns; they and the budget fix each setting's number of steps, and
the schedules end with the last one. The base is the demo configuration on an 8x8 grid of patches: on its own 4x4 grid a
third level would be one single cell.

The target encoders are read frozen, all in the same way whatever they were trained on, beside the encoder before
training: ``mean``, the levels ``0``, ``1``, ``2``, and ``all k``, which is ``mean`` and the first k levels side by
side. ``all k`` of k trained levels is what the pipeline calls ``all``. More levels make it wider, so settings are also
compared at equal width. Seeds are paired: a seed's settings share initial weights and the order of images.

Finished runs are kept, one line each, and are not repeated by a later call with the same settings.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.checkpoint import machine
from hjepa.config import Config, flatten, load_config, sha256_json
from hjepa.data import create_dataloaders
from hjepa.data.loader import Batch, ShardDataset, TrainLoader
from hjepa.evaluation import Features, Outcome, extract, knn, linear
from hjepa.export import ExportedEncoder
from hjepa.models import MaskTensors
from hjepa.trainers import HJEPATrainer
from hjepa.trainers.optim import set_hyperparameters
from hjepa.trainers.step import SKIPPED
from hjepa.training import build_trainer, eval_batches
from hjepa.utils.bootstrap import paired_difference
from hjepa.utils.collapse import effective_rank
from hjepa.utils.logging import MetricsLogger, append_json_line

RESULTS = Path(__file__).parent / "results"
RUNS = Path(".hjepa") / "bench-quality.jsonl"
GRID = ["data.image_size=32", "model.patch_size=4"]  # 8x8 patches, 4x4 and 2x2 cells above them
# The demo warms up for 0.2 of 4 epochs; here all steps are one epoch.
COMMON = [
    "training.epochs=1",
    "training.warmup_epochs=0.05",
    "training.device=cpu",
    "logging.tensorboard.enabled=false",
]
SMOKE = [
    *("data.image_size=16", "model.patch_size=2", "model.embed_dim=16", "model.depth=1", "model.num_heads=2"),
    "model.predictor={embed_dim: 8, depth: 1, num_heads: 2}",
    *("loss.regularizer.projector_dim=8", "loss.regularizer.num_slices=8", "training.batch_size=16"),
    *("evaluation.train_samples=200", "evaluation.test_samples=100", "evaluation.linear_l2=0.01"),
]
RANDOM = "random init"
METRICS = {"linear_top1": "linear probe", "knn_top1": "k-NN"}
PRIMARY = "linear_top1"
# 97.5 % quantile of Student's t by degrees of freedom, from 1.
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
RANK_IMAGES = 2000
BETTER, WORSE, EVEN = "better", "worse", "not told apart"
Record = dict[str, Any]


class Setting(NamedTuple):
    levels: int
    regularizer: str  # "none", or loss.regularizer.name

    @property
    def name(self) -> str:
        method = "I-JEPA" if self.levels == 1 else f"H-JEPA, {self.levels} levels"
        return method if self.regularizer == "none" else f"{method}, {self.regularizer}"

    @property
    def overrides(self) -> list[str]:
        return [f"model.num_levels={self.levels}", f"loss.regularizer.name={self.regularizer}"]


@dataclass(frozen=True)
class Plan:
    """What is trained, and for how long."""

    overrides: tuple[str, ...]  # of the demo configuration, the same for all settings
    levels: tuple[int, ...]
    regularizer: str
    budget: float  # CPU seconds of steps per run
    seeds: int
    rounds: int  # of the measurement of seconds per step
    round_steps: int

    @property
    def settings(self) -> list[Setting]:
        return [Setting(levels, name) for levels, name in product(self.levels, ("none", self.regularizer))]

    @property
    def readouts(self) -> list[str]:
        top = max(self.levels)
        return ["mean", *map(str, range(top)), *(all_of(k) for k in range(1, top + 1))]

    def config(self, setting: Setting | None, *, seed: int = 0, folder: str = ".") -> Config:
        """Of a setting, or with None of the encoder before training."""
        own = (setting or self.settings[0]).overrides
        paths = [f"checkpoint.checkpoint_dir={folder}/checkpoints", f"logging.log_dir={folder}/logs"]
        return load_config("demo", [*COMMON, *self.overrides, *own, f"seed={seed}", *paths])

    @property
    def key(self) -> str:
        """Of the runs that belong together; more seeds are more runs of the same kind."""
        settings = [flatten(self.config(setting)) for setting in self.settings]
        return sha256_json([settings, self.budget, self.rounds, self.round_steps, machine()])[:16]


def all_of(levels: int) -> str:
    return f"all {levels}"


# -- training --------------------------------------------------------------------------------------------------------


class Span:
    """A loader whose only epoch is the whole run, so that the schedules end with its last step."""

    def __init__(self, loader: TrainLoader, steps: int):
        self.loader, self.batch_size = loader, loader.batch_size
        self.num_samples = steps * loader.batch_size

    def normalize(self, images: Tensor) -> Tensor:
        return self.loader.normalize(images)

    def batches(self, start_step: int, stop_step: int, masking_fn: Any = None) -> Iterator[Batch]:
        return self.loader.batches(start_step, stop_step, masking_fn)


def make_trainer(config: Config, loader: TrainLoader, steps: int) -> HJEPATrainer:
    logger = MetricsLogger("quality", config.logging.log_dir, use_tensorboard=False)
    return build_trainer(config, Span(loader, steps), device="cpu", resume=None, logger=logger)


class Spent(NamedTuple):
    cpu: float  # seconds within steps
    wall: float
    skipped: int  # steps that were not finite


def advance(trainer: HJEPATrainer, start: int, stop: int) -> Spent:
    """Take the steps ``start`` to ``stop - 1``."""
    cpu = wall = skipped = 0.0
    trainer.model.train()
    for batch in trainer.train_loader.batches(start, stop, trainer.masking_fn):
        now = trainer.schedules(batch.step)
        masks = MaskTensors(*batch.masks)
        cpu_start, wall_start = time.process_time(), time.perf_counter()
        set_hyperparameters(trainer.optimizer, lr=now.lr, weight_decay=now.weight_decay)
        measured = trainer.train_step(batch.images, masks, now.momentum, number=batch.step)
        cpu += time.process_time() - cpu_start
        wall += time.perf_counter() - wall_start
        skipped += measured[SKIPPED].item()
    return Spent(cpu, wall, int(skipped))


def seconds_per_step(plan: Plan) -> dict[str, float]:
    """Mean CPU seconds of a step of each setting.

    Block sizes differ from step to step, so all settings take the same steps, and many of them; they take turns, so
    that what else the machine does hits all alike. The first round is not counted: it makes the optimiser's state.
    """
    found = {setting.name: 0.0 for setting in plan.settings}
    with tempfile.TemporaryDirectory(prefix="hjepa-bench-") as folder:
        loader, _ = create_dataloaders(plan.config(None, folder=folder))
        steps = plan.rounds * plan.round_steps
        trainers = {s.name: make_trainer(plan.config(s, folder=folder), loader, steps) for s in plan.settings}
        for turn in range(plan.rounds):
            # Whoever comes first in one round comes last in the next.
            for name in list(found)[:: 1 if turn % 2 == 0 else -1]:
                spent = advance(trainers[name], turn * plan.round_steps, (turn + 1) * plan.round_steps)
                found[name] += spent.cpu if turn else 0.0
    return {name: seconds / (plan.rounds - 1) / plan.round_steps for name, seconds in found.items()}


def run(plan: Plan, setting: Setting | None, seed: int, steps: int) -> Record:
    """Train one encoder for ``steps`` steps and judge it; None is the encoder before training."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="hjepa-bench-") as folder:
        config = plan.config(setting, seed=seed, folder=folder)
        train, test = create_dataloaders(config)
        if test is None:
            raise SystemExit("the data set has no test images")
        trainer = make_trainer(config, train, max(steps, 1))
        spent = advance(trainer, 0, steps)
        judged = judge(plan, config, trainer, train.dataset, test.dataset)
    return {
        "setting": setting.name if setting else RANDOM,
        "seed": seed,
        "steps": steps,
        "images_seen": steps * config.training.batch_size,
        "step_seconds": spent.cpu,
        "step_wall_seconds": spent.wall,
        "skipped_steps": spent.skipped,
        "precision": str(trainer.amp_dtype or torch.float32).removeprefix("torch."),
        **judged,
    }


def judge(plan: Plan, config: Config, trainer: HJEPATrainer, train: ShardDataset, test: ShardDataset) -> Record:
    """k-NN and linear probe of every readout, on the target encoder's frozen features."""
    manifest, top = train.manifest, max(plan.levels)
    encoder = ExportedEncoder(
        trainer.core.target_encoder,
        num_levels=top,
        image_size=config.data.image_size,
        channels=config.data.channels,
        mean=manifest["statistics"]["mean"],
        std=manifest["statistics"]["std"],
    )
    limits = config.evaluation.train_samples, config.evaluation.test_samples
    known, asked = (
        widened(extract(encoder, eval_batches(config, images, limit), "cpu"), top)
        for images, limit in zip((train, test), limits, strict=True)
    )
    outcomes: dict[str, dict[str, Outcome]] = {}
    for readout in plan.readouts:
        features = known.tables[readout], known.labels, asked.tables[readout], asked.labels
        rest = config.evaluation, len(manifest["classes"])
        outcomes[readout] = knn.judge(*features, *rest) | linear.judge(*features, *rest)
    return {
        "train_images": len(known.labels),
        "test_images": len(asked.labels),
        "dataset_digest": manifest["digest"],
        "rankme": effective_rank(asked.tables["mean"][:RANK_IMAGES]),
        "correct": {
            readout: {metric: packed(found[metric]) for metric in METRICS} for readout, found in outcomes.items()
        },
    }


def widened(features: Features, top: int) -> Features:
    """With ``all k`` for every k up to ``top``."""
    tables = {name: table for name, table in features.tables.items() if name != "all"}
    for k in range(1, top + 1):
        tables[all_of(k)] = torch.cat([tables["mean"], *(tables[str(level)] for level in range(k))], 1)
    return Features(tables, features.labels)


def packed(outcome: Outcome) -> str:
    """One bit per test image, whether its class was predicted, as hex."""
    assert outcome.per_item is not None
    return np.packbits(outcome.per_item.numpy() > 0.5).tobytes().hex()


def unpacked(text: str, count: int) -> NDArray[np.float64]:
    """[count], 1 where the class was predicted and 0 where not."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8), count=count).astype(np.float64)


# -- all runs --------------------------------------------------------------------------------------------------------


def read_runs(path: Path, key: str) -> list[Record]:
    """What earlier calls with the same settings have kept. A last line that a kill has cut is taken off the file."""
    if not path.exists():
        return []
    text = path.read_text("utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, "utf-8")
    return [record for record in map(json.loads, whole.splitlines()) if record["plan"] == key]


def measure(plan: Plan, path: Path, processes: int) -> tuple[dict[str, float], list[Record]]:
    """Seconds per step, and a record of every run: those kept in ``path``, and those still missing, kept there too."""
    key = plan.key
    kept = read_runs(path, key)
    seconds = next((record["seconds_per_step"] for record in kept if "seconds_per_step" in record), None)
    if seconds is None:
        seconds = seconds_per_step(plan)
        append_json_line(path, {"plan": key, "seconds_per_step": seconds})
    for name, value in seconds.items():
        print(f"{name}: {value:.4f} CPU s/step, {round(plan.budget / value)} steps", flush=True)
    runs = [record for record in kept if "setting" in record and record["seed"] < plan.seeds]
    done = {(record["setting"], record["seed"]) for record in runs}
    jobs = [
        (plan, setting, seed, max(1, round(plan.budget / seconds[setting.name])) if setting else 0)
        for setting, seed in product([*plan.settings, None], range(plan.seeds))
        if (setting.name if setting else RANDOM, seed) not in done
    ]
    random.Random(0).shuffle(jobs)  # so that a machine that gets slower or busier favours no setting
    for number, record in enumerate(results(jobs, processes), 1):
        append_json_line(path, {"plan": key, **record})
        runs.append(record)
        print(
            f"{number}/{len(jobs)} {record['setting']}, seed {record['seed']}: {record['steps']} steps in "
            f"{record['step_seconds']:.1f} CPU s ({record['step_wall_seconds']:.1f} s on the clock)",
            flush=True,
        )
    return seconds, runs


def results(jobs: Sequence[tuple[Plan, Setting | None, int, int]], processes: int) -> Iterator[Record]:
    if processes == 1:
        yield from (run(*job) for job in jobs)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from (future.result() for future in as_completed([pool.submit(run, *job) for job in jobs]))


# -- what the runs say -----------------------------------------------------------------------------------------------


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % t-interval; infinite for one value."""
    mean, n = statistics.fmean(values), len(values)
    return mean, T975[n - 2] * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.inf


class Outcomes:
    """Who got which test image right."""

    def __init__(self, runs: Iterable[Record]):
        self.found: dict[tuple[str, str, str], dict[int, NDArray[np.float64]]] = {}
        for record in runs:
            for readout, metrics in record["correct"].items():
                for metric, text in metrics.items():
                    seeds = self.found.setdefault((record["setting"], readout, metric), {})
                    seeds[record["seed"]] = unpacked(text, record["test_images"])

    def accuracies(self, setting: str, readout: str, metric: str) -> list[float]:
        """By seed."""
        return [float(correct.mean()) for _, correct in sorted(self.found[setting, readout, metric].items())]

    def difference(self, a: tuple[str, str, str], b: tuple[str, str, str]) -> Record:
        """a - b with two 95 % intervals: over seeds (t, paired) and over test images (bootstrap of the seeds' mean)."""
        mine, theirs = self.found[a], self.found[b]
        seeds = sorted(mine.keys() & theirs.keys())
        mean, half = interval([float((mine[seed] - theirs[seed]).mean()) for seed in seeds])
        of_mine, of_theirs = (np.mean([found[seed] for seed in seeds], axis=0) for found in (mine, theirs))
        _, low, high = paired_difference(of_mine, of_theirs)
        lows, highs = (mean - half, low), (mean + half, high)
        verdict = BETTER if min(lows) > 0 else WORSE if max(highs) < 0 else EVEN
        return {
            "difference": mean,
            # One seed has no spread, and JSON no infinity.
            "over_seeds": [mean - half, mean + half] if math.isfinite(half) else None,
            "over_test_images": [low, high],
            "verdict": verdict,
        }


def pairs(plan: Plan) -> list[tuple[Setting, Setting | None]]:
    """Which settings are compared: more levels with fewer, with a regulariser with without, trained with untrained."""
    found: list[tuple[Setting, Setting | None]] = []
    for a, b in product(plan.settings, plan.settings):
        more_levels = a.levels > b.levels and a.regularizer == b.regularizer
        regularised = a.levels == b.levels and a.regularizer != "none" == b.regularizer
        both = a.levels > b.levels == min(plan.levels) and a.regularizer != "none" == b.regularizer
        if more_levels or regularised or both:
            found.append((a, b))
    return found + [(setting, None) for setting in plan.settings]


def compare(plan: Plan, outcomes: Outcomes) -> list[Record]:
    """Every pair by its own ``all``, by readouts of equal width, and by the mean."""
    widest = all_of(max(plan.levels))
    rows = []
    for a, b in pairs(plan):
        own = all_of(a.levels), all_of((b or a).levels)
        readouts = dict.fromkeys([own, (widest, widest), ("mean", "mean")])  # without repeats, in order
        for (mine, theirs), metric in product(readouts, METRICS):
            other = b.name if b else RANDOM
            found = outcomes.difference((a.name, mine, metric), (other, theirs, metric))
            rows.append({"a": a.name, "b": other, "readout_a": mine, "readout_b": theirs, "metric": metric, **found})
    return rows


def summarise(plan: Plan, seconds: Mapping[str, float], runs: Sequence[Record]) -> Record:
    outcomes = Outcomes(runs)
    table = []
    for name in [*(setting.name for setting in plan.settings), RANDOM]:
        own = [record for record in runs if record["setting"] == name]
        accuracy: Record = {}
        for readout, metric in product(plan.readouts, METRICS):
            values = outcomes.accuracies(name, readout, metric)
            mean, half = interval(values)
            spread = half if math.isfinite(half) else None
            accuracy.setdefault(readout, {})[metric] = {"mean": mean, "half_width": spread, "by_seed": values}
        row: Record = {
            key: statistics.fmean(record[key] for record in own) for key in ("steps", "images_seen", "rankme")
        }
        row |= {
            "setting": name,
            "seconds_per_step": seconds.get(name),
            "step_seconds": [record["step_seconds"] for record in own],
            "step_wall_seconds": [record["step_wall_seconds"] for record in own],
            "skipped_steps": sum(record["skipped_steps"] for record in own),
        }
        table.append({**row, "accuracy": accuracy})
    first = runs[0]
    result = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
        "budget_cpu_seconds": plan.budget,
        "seeds": plan.seeds,
        "base": "demo",
        "overrides": [*COMMON, *plan.overrides],
        "regularizer": {
            "name": plan.regularizer,
            "weight": plan.config(plan.settings[0]).loss.regularizer.weight,
        },
        "precision": first["precision"],
        "split": {key: first[key] for key in ("train_images", "test_images", "dataset_digest")},
        "table": table,
        "comparisons": compare(plan, outcomes),
    }
    return {**result, "findings": findings(plan, result)}


def rounded(value: Any) -> Any:
    """Five digits: an accuracy on 10,000 images has four."""
    return json.loads(json.dumps(value), parse_float=lambda text: float(f"{float(text):.5g}"))


# -- in words --------------------------------------------------------------------------------------------------------


def points(ends: Sequence[float] | None) -> str:
    return "unknown" if ends is None else f"{ends[0] * 100:+.2f} to {ends[1] * 100:+.2f}"


def readouts(row: Record) -> str:
    return ", ".join(dict.fromkeys([row["readout_a"], row["readout_b"]]))


def sentence(row: Record) -> str:
    return (
        f"{row['a']} against {row['b']} ({METRICS[row['metric']]}, `{readouts(row)}`): "
        f"{row['difference'] * 100:+.2f} points, {points(row['over_seeds'])} over seeds, "
        f"{points(row['over_test_images'])} over test images: **{row['verdict']}**."
    )


def chosen(rows: Sequence[Record], a: Setting, b: Setting | None, *, equal: str | None = None) -> Record:
    """The comparison by the primary metric, on each setting's own ``all`` or on the same readout of both."""
    mine, theirs = (equal, equal) if equal else (all_of(a.levels), all_of((b or a).levels))
    wanted = (a.name, b.name if b else RANDOM, mine, theirs, PRIMARY)
    return next(
        row for row in rows if (row["a"], row["b"], row["readout_a"], row["readout_b"], row["metric"]) == wanted
    )


def best(plan: Plan, rows: Sequence[Record]) -> Setting:
    """The simplest setting that the best one does not beat outside the noise, each read by its own ``all``.

    The best is that with the largest difference to the simplest of all, which it is itself where none beats it.
    """
    simplest, *others = plan.settings
    compared = [(setting, chosen(rows, setting, simplest)) for setting in others]
    winners = [(row["difference"], setting) for setting, row in compared if row["verdict"] == BETTER]
    if not winners:
        return simplest
    _, winner = max(winners)
    good = [setting for _, setting in winners if setting == winner or not _beats(rows, winner, setting)]
    return min(good, key=lambda setting: (setting.regularizer != "none", setting.levels))


def _beats(rows: Sequence[Record], a: Setting, b: Setting) -> bool:
    """Whether ``a`` was compared with ``b`` and is better outside the noise."""
    names = {(row["a"], row["b"]) for row in rows}
    return (a.name, b.name) in names and chosen(rows, a, b)["verdict"] == BETTER


def findings(plan: Plan, result: Record) -> list[str]:
    rows, found = result["comparisons"], []
    widest = all_of(max(plan.levels))
    simplest = plan.settings[0]

    failed = [s.name for s in plan.settings if chosen(rows, s, None)["verdict"] != BETTER]
    if failed:
        found.append(
            f"After {plan.budget:g} CPU seconds these are not better than the same encoder before training, by the "
            f"linear probe on `all`: {'; '.join(failed)}. What is said about them below is about the start of training."
        )
    else:
        found.append("Every trained encoder is better than the same encoder before training, by the linear probe.")

    for b in (Setting(simplest.levels, name) for name in ("none", plan.regularizer)):
        for levels in plan.levels[1:]:
            a = Setting(levels, b.regularizer)
            own, equal = chosen(rows, a, b), chosen(rows, a, b, equal=widest)
            found.append(sentence(own))
            if own["verdict"] == equal["verdict"]:
                found.append(f"Read alike, with `{widest}` of both, it is the same: {sentence(equal)}")
            elif own["verdict"] == BETTER:
                found.append(f"That is the wider readout, not the training. Read alike: {sentence(equal)}")
            else:
                found.append(f"Read alike, with `{widest}` of both, it is not the same: {sentence(equal)}")
    found += [sentence(chosen(rows, Setting(k, plan.regularizer), Setting(k, "none"))) for k in plan.levels]

    hierarchy = [chosen(rows, Setting(k, "none"), simplest, equal=widest)["verdict"] for k in plan.levels[1:]]
    if BETTER in hierarchy:
        paying = [str(k) for k, verdict in zip(plan.levels[1:], hierarchy, strict=True) if verdict == BETTER]
        found.append(f"Training on the hierarchy pays at this budget with {' and '.join(paying)} levels.")
    elif hierarchy:
        costs = [str(k) for k, verdict in zip(plan.levels[1:], hierarchy, strict=True) if verdict == WORSE]
        worse = f"; with {' and '.join(costs)} levels it costs accuracy" if costs else ""
        found.append(
            f"Training on the hierarchy does not pay at this budget: read alike, no gain outside the noise{worse}."
        )
    default = best(plan, rows)
    found.append(
        f"By the linear probe on `all` this table supports `model.num_levels: {default.levels}` and "
        f"`loss.regularizer.name: {default.regularizer}`"
        + (
            ", the simplest setting, for none is better outside the noise."
            if default == simplest
            else ": the simplest setting that is better than the plainest one and not worse than the best, both "
            "outside the noise."
        )
    )
    return found


def markdown(plan: Plan, result: Record) -> str:
    own = {setting.name: all_of(setting.levels) for setting in plan.settings}
    about, precision = result["machine"], result["precision"]
    split, regularizer = result["split"], result["regularizer"]
    lines = [
        "# The hierarchy at equal compute",
        "",
        f"`python -m benchmarks.quality`, {result['date']}: Fashion-MNIST, the demo configuration with "
        f"{', '.join(f'`{text}`' for text in plan.overrides)}, so on a grid of "
        f"{plan.config(None).grid_size}x{plan.config(None).grid_size} patches; {plan.seeds} seeds, "
        f"{plan.budget:g} CPU seconds of training steps per run on one thread in {precision} ({about['cpu']}, torch "
        f"{about['torch']}). The regulariser is {regularizer['name']} with weight {regularizer['weight']:g}. Probes "
        f"learn from the first {split['train_images']:,} training images and are judged on {split['test_images']:,} "
        f"test images.",
        "",
        "`mean` is the average over patches, `0`, `1`, ... are the levels, `all k` is `mean` and the first k levels "
        "side by side; bold is what the pipeline calls `all`. `±` is half the 95 % t-interval over seeds. All encoders "
        "are read alike, also at levels that they were not trained on.",
    ]
    for metric, title in METRICS.items():
        lines += ["", f"## {title[0].upper()}{title[1:]}, % of test images", ""]
        lines += header(["setting", *plan.readouts])
        for row in result["table"]:
            cells = [
                cell(row["accuracy"][readout][metric], bold=own.get(row["setting"]) == readout)
                for readout in plan.readouts
            ]
            lines.append(f"| {' | '.join([row['setting'], *cells])} |")
    lines += ["", "## Compute", ""]
    lines += header(["setting", "CPU ms/step", "steps", "images seen", "step-seconds", "RankMe of `mean`"])
    for row in result["table"]:
        spent = row["step_seconds"]
        milliseconds = "" if row["seconds_per_step"] is None else f"{row['seconds_per_step'] * 1000:.1f}"
        cells = [milliseconds, f"{row['steps']:.0f}", f"{row['images_seen']:,.0f}"]
        cells += [f"{min(spent):.1f} to {max(spent):.1f}", f"{row['rankme']:.1f}"]
        lines.append(f"| {' | '.join([row['setting'], *cells])} |")
    lines += [
        "",
        "## What it shows",
        "",
        "A difference counts where both of its 95 % intervals leave out 0: the paired t-interval over seeds, and the "
        "bootstrap interval over test images of the seeds' mean. Intervals are not corrected for their number.",
        "",
        *(f"- {text}" for text in result["findings"]),
        "",
        "## All comparisons, in points",
        "",
        *header(["a", "b", "readouts", "metric", "a - b", "over seeds", "over test images", "a is"]),
    ]
    for row in result["comparisons"]:
        cells = [row["a"], row["b"], readouts(row)]
        cells += [METRICS[row["metric"]], f"{row['difference'] * 100:+.2f}", points(row["over_seeds"])]
        cells += [points(row["over_test_images"]), row["verdict"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def header(names: Sequence[str]) -> list[str]:
    return [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]


def cell(found: Record, *, bold: bool) -> str:
    text = f"{found['mean'] * 100:.2f}"
    if found["half_width"] is not None:
        text += f" ± {found['half_width'] * 100:.2f}"
    return f"**{text}**" if bold else text


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compare I-JEPA with H-JEPA at equal compute.")
    parser.add_argument("--budget", type=float, help="CPU seconds of training steps per run; default: 150")
    parser.add_argument("--seeds", type=int, choices=range(1, len(T975) + 2), help="default: 3", metavar="1..10")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--levels", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--regularizer", choices=["vicreg", "sigreg"], default="sigreg")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="of all settings' configuration"
    )
    parser.add_argument("--runs", type=Path, default=RUNS, help="finished runs, which are not repeated")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of quality.json and quality.md")
    parser.add_argument("--smoke", action="store_true", help="tiny models, hardly trained: does it run?")
    options = parser.parse_args(arguments)
    if options.budget is not None and options.budget <= 0:
        parser.error(f"--budget: expected CPU seconds above 0, got {options.budget:g}")
    if options.processes < 1:
        parser.error(f"--processes: expected at least 1, got {options.processes}")
    torch.set_num_threads(1)
    smoke = options.smoke
    plan = Plan(
        overrides=(*(SMOKE if smoke else GRID), *options.set),
        levels=tuple(sorted(set(options.levels))),
        regularizer=options.regularizer,
        budget=options.budget or (0.1 if smoke else 150.0),
        seeds=options.seeds or (2 if smoke else 3),
        rounds=2 if smoke else 7,
        round_steps=2 if smoke else 12,
    )
    seconds, runs = measure(plan, options.runs, options.processes)
    result = summarise(plan, seconds, runs)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "quality.json").write_text(json.dumps(rounded(result), indent=2) + "\n")
    (options.output / "quality.md").write_text(markdown(plan, result), "utf-8")
    print("\n".join(result["findings"]))


if __name__ == "__main__":
    main()
