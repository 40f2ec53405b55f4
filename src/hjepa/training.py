"""Training put together: what the pipeline's step and a training run on its own have in common, and the latter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hjepa.config import Config
from hjepa.data import create_dataloaders
from hjepa.data.loader import EvalLoader, ShardDataset
from hjepa.data.transforms import normalize
from hjepa.distributed import World, init, leave, on_main, pick_device
from hjepa.errors import FutileRetryError, HjepaError, PreemptedError, UserError
from hjepa.evaluation import knn
from hjepa.losses import HierarchicalLoss
from hjepa.masks import MultiBlockMasking
from hjepa.models import HierarchicalEncoder, HJEPAModel
from hjepa.trainers import HJEPATrainer, TrainingResult, create_optimizer
from hjepa.trainers.trainer import Loader, Probe
from hjepa.utils.checkpoint import SavedCheckpoint, misfits_of_model, read_checkpoint
from hjepa.utils.collapse import collapse_of_levels
from hjepa.utils.logging import MetricsLogger, append_json_line, say


def build_trainer(
    config: Config,
    train_loader: Loader,
    val_loader: Loader | None = None,
    *,
    device: str,
    resume: str | Path | None,
    logger: MetricsLogger | None = None,
    probe: Probe | None = None,
    on_saved: Callable[[SavedCheckpoint], None] | None = None,
) -> HJEPATrainer:
    """The trainer of a configuration, its weights drawn from ``config.seed``."""
    torch.manual_seed(config.seed)
    model = HJEPAModel(config)
    return HJEPATrainer(
        model,
        train_loader,
        val_loader,
        create_optimizer(model, config),
        HierarchicalLoss(config),
        MultiBlockMasking(config),
        config,
        device,
        resume,
        logger=logger,
        probe=probe,
        on_saved=on_saved,
    )


def model_of_checkpoint(path: Path, config: Config, *, name: str) -> HJEPAModel:
    """The whole model with the weights of a training checkpoint, on the CPU and for inference.

    Args:
        name: What messages call the checkpoint.

    Raises:
        HjepaError: the checkpoint is of a model of another shape, or damaged.
    """
    model = HJEPAModel(config)
    weights = read_checkpoint(path, parts=("model",))["model"]
    if misfits := misfits_of_model(model.state_dict(), weights):
        raise HjepaError(
            f"{name} does not fit the configuration of this run; {'; '.join(misfits)}.\n"
            "Use it with the configuration it was trained with."
        )
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)


def train_alone(config: Config, *, resume: str | Path | None = "auto", device: str | None = None) -> TrainingResult:
    """Train without S3, MLflow or a pipeline, on this process's device or as one of torchrun's ranks.

    The images are prepared once into ``data.cache_dir``; checkpoints go to ``checkpoint.checkpoint_dir``, curves to
    ``logging.log_dir``.

    Args:
        resume: A checkpoint's path, ``auto`` for the newest one in the folder if there is one, None to start anew.
        device: Instead of ``training.device``.

    Raises:
        UserError: no such device, no such checkpoint, or images that cannot be used.
    """
    device = device or config.training.device
    world = World.from_environment()
    chosen = pick_device(device, world)
    if resume not in (None, "auto"):  # said before any image is prepared; other ranks need not see the file
        init(world, chosen)
        try:
            on_main(lambda: _require_checkpoint(Path(resume), config), world)
        except UserError:
            leave()  # all ranks are here; a group that its first rank just walks out of may abort another one
            raise
    config = config.model_copy(update={"training": config.training.model_copy(update={"device": device})})
    train_loader, val_loader = create_dataloaders(config)
    images = train_loader.dataset
    labelled = images.manifest["splits"]["train"]["per_class"] is not None
    config = choose_metric(config, labelled=labelled)
    probe = make_probe(config, images, images.manifest, labelled)
    logs, main = config.logging, world.is_main
    logger = MetricsLogger(
        logs.experiment_name,
        logs.log_dir,
        config,
        use_wandb=logs.wandb.enabled and main,
        use_tensorboard=logs.tensorboard.enabled and main,
        wandb_project=logs.wandb.project,
        sinks=[JsonLines(Path(logs.log_dir) / logs.experiment_name / "metrics.jsonl")] if main else [],
    )
    trainer = build_trainer(config, train_loader, val_loader, device=device, resume=resume, probe=probe, logger=logger)
    try:
        result = trainer.train()
    except (PreemptedError, FutileRetryError, KeyboardInterrupt):
        leave()
        raise
    if main:
        say(f"done: step {result.step}, {result.images_seen:,} images seen, {result.checkpoint}")
    return result


def _require_checkpoint(path: Path, config: Config) -> None:
    if not path.is_file():
        raise UserError(
            f"--resume: no checkpoint at {path}. Expected the path of one, or auto for the newest one in "
            f"checkpoint.checkpoint_dir={config.checkpoint.checkpoint_dir}"
        )


class JsonLines:
    """Metrics as lines of JSON. After a kill the steps since the last checkpoint are there twice, with equal values."""

    def __init__(self, path: Path):
        self.path = path

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        append_json_line(self.path, {"images_seen": step, **metrics})


def choose_metric(config: Config, *, labelled: bool) -> Config:
    """Settle ``checkpoint.metric=auto``."""
    if config.checkpoint.metric != "auto":
        return config
    metric = "probe/knn_top1" if labelled else "collapse/rankme"
    return with_checkpoint(config, metric=metric, mode="max")


def with_checkpoint(config: Config, **update: str) -> Config:
    return config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update=update)})


# -- measuring a representation --------------------------------------------------------------------------------------


def eval_batches(config: Config, images: ShardDataset, limit: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Evaluation views uint8 (b, C, S, S) and labels (b,), -1 for none, of the first ``limit`` images."""
    loader = EvalLoader(
        images,
        batch_size=config.evaluation.batch_size,
        image_size=config.data.image_size,
        channels=config.data.channels,
        num_workers=config.data.num_workers,
        limit=limit,
    )
    for batch in loader:
        yield batch.images, torch.from_numpy(batch.labels)


def make_probe(config: Config, images: ShardDataset, dataset: Mapping[str, Any], labelled: bool) -> Probe:
    """Measures an encoder on a fixed set: the first images of the *training* split, never a test image.

    Collapse measures, of each level and of all of them together, on n = ``collapse.probe_samples`` images; where there
    are labels also a k-NN that classifies the next n/2 images by those n.
    """
    bank = min(config.collapse.probe_samples, len(images) * 2 // 3)
    count = bank + bank // 2
    mean, std = dataset["statistics"]["mean"], dataset["statistics"]["std"]
    pairs = list(eval_batches(config, images, count))  # small, and read once instead of every epoch
    labels = torch.cat([label for _, label in pairs]) if labelled else None

    def probe(vit: nn.Module) -> dict[str, float]:
        encoder = HierarchicalEncoder(vit, num_levels=config.model.num_levels)  # type: ignore[arg-type]
        device = next(vit.buffers()).device
        parts = [encoder.embed(normalize(batch.to(device), mean, std)) for batch, _ in pairs]
        tables = {level: torch.cat([part[level] for part in parts]).float().cpu() for level in parts[0]}
        found = collapse_of_levels({level: table[:bank] for level, table in tables.items()})
        if labels is not None and len(labels) > bank:
            scores = knn.evaluate(
                tables["all"][:bank],
                labels[:bank],
                tables["all"][bank:],
                labels[bank:],
                config.evaluation,
                len(dataset["classes"]),
            )
            found |= {f"probe/{name}": value for name, value in scores.items()}
        return found

    return probe
