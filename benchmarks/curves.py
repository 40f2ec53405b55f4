"""What collapse looks like: a healthy and a deliberately collapsing run on Fashion-MNIST, drawn to docs/collapse.png.

    python -m benchmarks.curves [--parts 6] [--output docs/collapse.png]

Both runs have the demo configuration, seed and images. The collapsing one has no fixed target: the EMA momentum is 0
and gradients flow into the targets too (model.stop_gradient=false). A part is 3,200 images; after each one the
representation is measured, as training does after an epoch. Collapse does not stop the run here, so that the picture
shows what would come; the dashed line is where collapse.action=stop ends it.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hjepa.config import Config, load_config
from hjepa.data import create_dataloaders
from hjepa.data.loader import Batch, TrainLoader
from hjepa.training import build_trainer, make_probe
from hjepa.utils import CollapseMonitor, MetricsLogger

PICTURE = Path(__file__).parents[1] / "docs" / "collapse.png"
PART = 3_200  # images, a multiple of the batch
COLLAPSING = ["model.ema.momentum=0", "model.ema.momentum_end=0", "model.stop_gradient=false"]
INK, FAINT = "#1f2933", "#9aa5b1"
COLORS = {"healthy": "#0b6e99", "collapsing": "#c8553d"}


class Parts:
    """A loader whose epochs are parts of the data set."""

    def __init__(self, loader: TrainLoader, size: int):
        self.loader, self.num_samples, self.batch_size = loader, size, loader.batch_size

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        return self.loader.normalize(images)

    def batches(self, start_step: int, stop_step: int, masking_fn: Any = None) -> Iterator[Batch]:
        return self.loader.batches(start_step, stop_step, masking_fn)


@dataclass
class Curves:
    """Everything a run logged, by metric: (images seen, value)."""

    points: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    stop: int | None = None  # images seen when collapse.action=stop would have ended the run
    diagnosis: str = ""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self.points.setdefault(name, []).append((step, value))

    def at(self, name: str, images: int) -> float:
        """The last value logged up to that many images."""
        return [value for seen, value in self.points[name] if seen <= images][-1]


def follow(config: Config) -> Curves:
    """Train and keep what was logged."""
    loader, _ = create_dataloaders(config)
    curves = Curves()
    probe = make_probe(config, loader.dataset, loader.dataset.manifest, labelled=True)
    trainer = build_trainer(
        config,
        Parts(loader, PART),
        device="cpu",
        resume=None,
        probe=probe,
        logger=MetricsLogger("curves", config.logging.log_dir, use_tensorboard=False, sinks=[curves]),
    )
    with torch.no_grad():
        curves.log(probe(trainer.core.target_encoder.eval()), 0)
    trainer.train()
    monitor = CollapseMonitor(config.collapse.model_copy(update={"action": "stop"}))
    measures = [name for name in curves.points if name.startswith("collapse/")]
    for seen, _ in curves.points["collapse/std"]:
        monitor.update({name: curves.at(name, seen) for name in measures})
        if monitor.must_stop and curves.stop is None:
            curves.stop, curves.diagnosis = seen, monitor.diagnosis
    return curves


def compare(parts: int, overrides: list[str]) -> dict[str, Curves]:
    found = {}
    with tempfile.TemporaryDirectory(prefix="hjepa-curves-") as folder:
        common = [f"training.epochs={parts}", "training.device=cpu", "collapse.action=warn", "logging.log_frequency=10"]
        common += [
            "logging.picture_frequency=0",
            "collapse.probe_samples=512",
            f"checkpoint.save_frequency={parts}",
            *overrides,
        ]
        for name, settings in (("healthy", []), ("collapsing", COLLAPSING)):
            own = [f"checkpoint.checkpoint_dir={folder}/{name}", f"logging.log_dir={folder}/logs", *settings]
            found[name] = follow(load_config("demo", [*common, *own]))
    return found


def draw(runs: Mapping[str, Curves], config: Config, path: Path) -> None:
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    levels = range(config.model.num_levels)
    dashes = ["-", ":", "-."]

    def lines(measure: str) -> dict[str, str]:
        return {f"collapse/level_{level}/{measure}": dashes[level % 3] for level in levels}

    panels: list[tuple[str, dict[str, str], float | None]] = [
        ("loss: looks like progress", {"train/loss": "-"}, None),
        ("standard deviation across images", lines("std"), config.collapse.min_std),
        ("effective rank, which knows no scale", lines("rankme"), config.collapse.min_rank),
    ]
    style: Any = {
        "font.size": 9,
        "text.color": INK,
        "axes.edgecolor": FAINT,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
    }
    with rc_context(style):
        figure = Figure(figsize=(13, 4.3), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        for axes, (title, names, limit) in zip(figure.subplots(1, 3), panels, strict=True):
            for run, curves in runs.items():
                for name, line in names.items():
                    seen, values = zip(*curves.points[name], strict=True)
                    axes.plot(
                        [images / 1000 for images in seen],
                        values,
                        line,
                        marker="" if name == "train/loss" else "o",
                        markersize=3.5,
                        color=COLORS[run],
                        linewidth=1.6,
                        label=f"{run}, level {name.split('_')[1][0]}" if len(names) > 1 else run,
                    )
                if curves.stop is not None:
                    axes.axvline(curves.stop / 1000, color=COLORS[run], linestyle="--", linewidth=1)
                    axes.annotate(
                        "training stops",
                        (curves.stop / 1000, 0.5),
                        xycoords=("data", "axes fraction"),
                        xytext=(3, 0),
                        textcoords="offset points",
                        rotation=90,
                        va="center",
                        color=COLORS[run],
                    )
            if limit is not None:
                axes.axhline(limit, color=INK, linewidth=0.8)
                axes.annotate(
                    f"limit {limit:g}", (1, limit), xycoords=("axes fraction", "data"), ha="right", va="bottom"
                )
            axes.set_yscale("log")
            axes.set_title(title)
            axes.set_xlabel("thousand images seen")
            axes.set_xlim(left=0)
            axes.grid(axis="y", color=FAINT, alpha=0.25, linewidth=0.6)
        figure.axes[0].legend(frameon=False, loc="lower left")
        figure.axes[1].legend(frameon=False, fontsize=8, loc="upper right", bbox_to_anchor=(1, 0.8))
        figure.savefig(path, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw a healthy and a collapsing run.")
    parser.add_argument("--parts", type=int, default=6, help="of 3,200 images (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=PICTURE)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override of both runs")
    arguments = parser.parse_args()
    runs = compare(arguments.parts, arguments.set)
    config = load_config("demo", arguments.set)
    draw(runs, config, arguments.output)
    for name, curves in runs.items():
        end = curves.points["train/loss"][-1][0]
        said = f"stopped after {curves.stop:,} images: {curves.diagnosis}" if curves.stop else "not stopped"
        print(f"{name}: {said}")
        for images in dict.fromkeys([10 * config.training.batch_size, curves.stop or end, end]):
            print(f"  {images:>7,} images: loss {curves.at('train/loss', images):.3g}")
    print(arguments.output)


if __name__ == "__main__":
    main()
