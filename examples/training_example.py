"""Train an H-JEPA by hand, out of its parts, and use the encoder that comes out.

    python examples/training_example.py                         Fashion-MNIST, some minutes on two CPU cores
    python examples/training_example.py --images my/folder      your own images, in any folders below it

Results go to results/example, or for my/folder to results/example-folder. Stop it with Ctrl-C whenever you like: the
same command goes on where it was. docs/TRAINING.md explains what is used here, and `hjepa train` does the same from the
command line.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from hjepa.config import Config, load_config
from hjepa.data import create_dataloaders
from hjepa.data.loader import TrainLoader
from hjepa.errors import HjepaError
from hjepa.losses import HierarchicalLoss
from hjepa.masks import MultiBlockMasking
from hjepa.models import HierarchicalEncoder, HJEPAModel
from hjepa.trainers import HJEPATrainer, create_optimizer
from hjepa.training import choose_metric, make_probe
from hjepa.utils import MetricsLogger


class LossTable:
    """A sink of your own: anything with log(metrics, step). This one keeps the training loss in a CSV file.

    A step on the x axis of every curve is a number of images seen, so runs with other batch sizes can be compared.
    """

    def __init__(self, path: Path):
        self.path = path
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("images_seen,train/loss\n")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if "train/loss" in metrics:
            with self.path.open("a") as file:
                file.write(f"{step},{metrics['train/loss']:.5f}\n")


def configure(arguments: argparse.Namespace) -> Config:
    """The demo's settings for a small machine, and what the command line says. Mistakes are reported all at once."""
    results: Path = arguments.results
    settings = [
        f"training.epochs={arguments.epochs}",
        f"checkpoint.checkpoint_dir={results / 'checkpoints'}",
        f"logging.log_dir={results / 'logs'}",
        "logging.log_frequency=1" if arguments.images else "logging.log_frequency=50",
    ]
    if arguments.images:
        settings += ["data.name=image-folder", f"data.root={arguments.images}", "data.channels=3"]
    return load_config(arguments.config, [*settings, *arguments.set])


def train(config: Config, results: Path) -> tuple[HJEPAModel, TrainLoader]:
    # The images are checked and packed once, into data.cache_dir; from then on they are read from there.
    train_loader, val_loader = create_dataloaders(config)
    labelled = bool((train_loader.dataset.labels() >= 0).all())
    config = choose_metric(config, labelled=labelled)  # what "the best checkpoint" means: k-NN accuracy, or rank

    torch.manual_seed(config.seed)  # everything else random is a function of the seed and the step
    model = HJEPAModel(config)
    trainer = HJEPATrainer(
        model=model,
        train_loader=train_loader,
        val_loader=val_loader,
        optimizer=create_optimizer(model, config),
        loss_fn=HierarchicalLoss(config),
        masking_fn=MultiBlockMasking(config),
        config=config,
        device=config.training.device,
        # A path, or "auto" for the newest checkpoint in checkpoint.checkpoint_dir if there is one. Weights, optimiser,
        # schedules, masks and the order of the images go on exactly where they were.
        resume_checkpoint="auto",
        # TensorBoard files go to logging.log_dir; sinks get the same numbers.
        logger=MetricsLogger(
            config.logging.experiment_name, config.logging.log_dir, config, sinks=[LossTable(results / "losses.csv")]
        ),
        # After each epoch: has the representation collapsed, which the loss cannot tell, and is it any good?
        probe=make_probe(config, train_loader.dataset, train_loader.dataset.manifest, labelled),
    )
    result = trainer.train()
    print(f"trained {result.step} steps on {result.images_seen:,} images; checkpoint {result.checkpoint}")
    return model, train_loader


@torch.inference_mode()
def use(config: Config, model: HJEPAModel, loader: TrainLoader) -> None:
    """Embed some images with the target encoder and see which ones it takes for alike."""
    encoder = HierarchicalEncoder(model.target_encoder, num_levels=config.model.num_levels).eval()
    batch = loader.batch(0)  # the first batch; views are uint8 (B, C, S, S)
    views = [batch.images]
    views += [loader.batch(step).images for step in range(1, min(20, loader.num_samples // loader.batch_size))]
    device = next(model.parameters()).device
    images = loader.normalize(torch.cat(views).to(device))
    embeddings = encoder(images)  # (n, D) of all levels side by side; encoder(images, level=0) of one of them
    print(f"embeddings: {len(embeddings)} images, {embeddings.shape[1]} numbers each")

    unit = F.normalize(embeddings - embeddings.mean(0), dim=1)
    alike = unit @ unit.T
    alike.fill_diagonal_(-1)
    score, nearest = alike[0].max(0)
    print(f"the first image is most like number {int(nearest)}, with a cosine of {score:.2f}")


def read_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train an H-JEPA by hand, out of its parts.")
    parser.add_argument("--config", default="demo", help="a packaged configuration or a file (default: %(default)s)")
    parser.add_argument("--images", type=Path, help="folder of images; the default is Fashion-MNIST")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--results", type=Path, help="folder; the default is one for Fashion-MNIST or these images")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override; repeatable")
    arguments = parser.parse_args(words)
    if arguments.results is None:  # other images are another experiment, which must not go on with this one's state
        name = f"example-{arguments.images.resolve().name}" if arguments.images else "example"
        arguments.results = Path("results") / name
    return arguments


def main() -> int:
    arguments = read_arguments()
    try:
        config = configure(arguments)
        model, loader = train(config, arguments.results)
    except HjepaError as error:  # its message is written for you
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    use(config, model, loader)
    return 0


if __name__ == "__main__":
    sys.exit(main())
