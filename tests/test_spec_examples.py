"""The written specification: every usage example of it runs, and every name it lists is where it says.

The texts in capitals are the specification's, letter for letter. To run, ``src.`` becomes ``hjepa.``, and 'cuda'
becomes 'cpu' on a machine where no CUDA device is visible. What an example leaves open (model, config, ...) is given to
it.
"""

from __future__ import annotations

import ast
import json
import math
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hjepa.cli import main
from hjepa.config import Config, flatten, flatten_tree, load_config, parse_yaml
from hjepa.data import create_dataloaders
from hjepa.losses import HierarchicalLoss
from hjepa.masks import MultiBlockMasking
from hjepa.models import HJEPAModel
from hjepa.trainers import HJEPATrainer, create_optimizer
from hjepa.training import train_alone
from hjepa.utils.checkpoint import read_checkpoint

ROOT = Path(__file__).resolve().parents[1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

SCHEDULERS = """
from src.utils import create_lr_scheduler, create_ema_scheduler

lr_scheduler = create_lr_scheduler(
    optimizer_type='adamw',
    base_lr=1.5e-4,
    min_lr=1e-6,
    epochs=300,
    steps_per_epoch=1000,
    warmup_epochs=40,
    schedule_type='cosine',
)

ema_scheduler = create_ema_scheduler(
    base_momentum=0.996,
    final_momentum=1.0,
    epochs=300,
    steps_per_epoch=1000,
    warmup_epochs=30,
)
"""

CHECKPOINTS = """
from src.utils import CheckpointManager

ckpt_manager = CheckpointManager(
    checkpoint_dir='results/checkpoints',
    keep_best_n=3,
    save_frequency=10,
    metric_name='val_loss',
    mode='min',
)

# Save checkpoint
ckpt_manager.save_checkpoint(
    epoch=epoch,
    model=model,
    optimizer=optimizer,
    scheduler=scheduler_state,
    scaler=scaler,
    metrics={'val_loss': val_loss},
    is_best=is_best,
)

# Load checkpoint
metadata = ckpt_manager.load_checkpoint(
    checkpoint_path='results/checkpoints/checkpoint_best.pth',
    model=model,
    optimizer=optimizer,
    scaler=scaler,
)
"""

LOGGER = """
from src.utils import MetricsLogger

logger = MetricsLogger(
    experiment_name='hjepa_experiment',
    log_dir='results/logs',
    config=config,
    use_wandb=True,
    use_tensorboard=True,
    wandb_project='h-jepa',
)

# Log scalar metrics
logger.log_metrics({'loss': 0.5}, step=100, prefix='train/')

# Log images
logger.log_image('mask_viz', image_tensor, step=100)

# Log histograms
logger.log_histogram('gradients/encoder', grad_tensor, step=100)

# System metrics
logger.log_system_metrics(step=100)
"""

TRAINER = """
from src.trainers import HJEPATrainer, create_optimizer

# Create optimizer
optimizer = create_optimizer(model, config)

# Create trainer
trainer = HJEPATrainer(
    model=model,
    train_loader=train_loader,
    val_loader=val_loader,
    optimizer=optimizer,
    loss_fn=loss_fn,
    masking_fn=masking_fn,
    config=config,
    device='cuda',
)

# Start training
trainer.train()
"""

BASIC = """
from src.trainers import HJEPATrainer, create_optimizer

trainer = HJEPATrainer(
    model=model,
    train_loader=train_loader,
    val_loader=val_loader,
    optimizer=create_optimizer(model, config),
    loss_fn=loss_fn,
    masking_fn=masking_fn,
    config=config,
    device='cuda',
)

trainer.train()
"""

RESUME = """
trainer = HJEPATrainer(
    # ... same arguments ...
    resume_checkpoint='results/checkpoints/checkpoint_latest.pth',
)

trainer.train()  # Automatically resumes
"""

INTEGRATION = """
# In scripts/train.py
from src.models import HJEPAModel
from src.losses import HierarchicalLoss
from src.masks import MultiBlockMasking
from src.data import create_dataloaders
from src.trainers import HJEPATrainer, create_optimizer

# Initialize
model = HJEPAModel(config)
loss_fn = HierarchicalLoss(config)
masking_fn = MultiBlockMasking(config)
train_loader, val_loader = create_dataloaders(config)
optimizer = create_optimizer(model, config)

# Train
trainer = HJEPATrainer(
    model, train_loader, val_loader, optimizer,
    loss_fn, masking_fn, config, device='cuda'
)
trainer.train()
"""

COMMANDS = r"""
# Train from scratch
python scripts/train.py --config configs/default.yaml

# Resume training
python scripts/train.py --config configs/default.yaml \
    --resume results/checkpoints/checkpoint_latest.pth

# Custom device
python scripts/train.py --config configs/default.yaml --device cuda:1
"""

YAML = """
# Training
training:
  epochs: 300
  warmup_epochs: 40
  lr: 1.5e-4
  min_lr: 1.0e-6
  weight_decay: 0.05
  optimizer: "adamw"
  clip_grad: 3.0
  use_amp: true
  accumulation_steps: 1

# EMA
model:
  ema:
    momentum: 0.996
    momentum_end: 1.0
    momentum_warmup_epochs: 30

# Checkpointing
checkpoint:
  save_frequency: 10
  keep_best_n: 3
  checkpoint_dir: "results/checkpoints"

# Logging
logging:
  experiment_name: "hjepa_default"
  log_dir: "results/logs"
  log_frequency: 100
  wandb:
    enabled: true
    project: "h-jepa"
  tensorboard:
    enabled: true
"""

NAMES = {
    "hjepa.utils.scheduler": ["CosineScheduler", "LinearScheduler", "EMAScheduler", "HierarchicalScheduler"],
    "hjepa.utils.checkpoint": ["CheckpointManager"],
    "hjepa.utils.logging": ["MetricsLogger", "ProgressTracker", "setup_logging"],
    "hjepa.utils": [
        "CosineScheduler",
        "LinearScheduler",
        "EMAScheduler",
        "HierarchicalScheduler",
        "CheckpointManager",
        "MetricsLogger",
        "ProgressTracker",
        "create_lr_scheduler",
        "create_ema_scheduler",
        "setup_logging",
    ],
    "hjepa.trainers.trainer": ["HJEPATrainer"],
    "hjepa.trainers": ["HJEPATrainer", "create_optimizer"],
    "hjepa.models": ["HJEPAModel"],
    "hjepa.losses": ["HierarchicalLoss"],
    "hjepa.masks": ["MultiBlockMasking"],
    "hjepa.data": ["create_dataloaders"],
}

# The keys that the specification leaves open: small images, a small model, a folder.
SMALL = """
data: {{name: image-folder, root: {images}, image_size: 16, channels: 1, num_workers: 0, test_fraction: 0.2,
       cache_dir: {cache}}}
model: {{patch_size: 4, embed_dim: 16, depth: 2, num_heads: 2, num_levels: 2,
        predictor: {{embed_dim: 8, depth: 1, num_heads: 2}}}}
masking: {{num_targets: 2}}
training: {{batch_size: 8, epochs: 2, warmup_epochs: 0.5}}
checkpoint: {{save_frequency: 1}}
collapse: {{probe_samples: 16, action: warn}}
evaluation: {{knn_k: 3}}
"""
STEPS = 12  # two epochs of 48 images


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty grey images in two classes, of which 48 are for training."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(60):
        (folder / f"class{i % 2}").mkdir(exist_ok=True)
        pixels = rng.integers(0, 128, (20, 20), dtype=np.uint8)
        pixels[:, : 10 + i % 2 * 6] += 100
        Image.fromarray(pixels).save(folder / f"class{i % 2}" / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="module")
def small(images: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return SMALL.format(images=images, cache=tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The specification's paths are relative."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def signals() -> Iterator[None]:
    """The command line sets handlers, and leaves them to its process."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def adapted(text: str) -> str:
    return text.replace("src.", "hjepa.").replace("device='cuda'", f"device='{DEVICE}'")


def run(text: str, **names: Any) -> dict[str, Any]:
    """Run an example with the names that it leaves open; all names afterwards."""
    exec(compile(adapted(text), "the specification", "exec"), names)
    return names


def parts(config: Config) -> dict[str, Any]:
    """What the examples expect somebody to have made, from the configuration's seed."""
    torch.manual_seed(config.seed)
    train_loader, val_loader = create_dataloaders(config)
    return {
        "config": config,
        "model": HJEPAModel(config),
        "train_loader": train_loader,
        "val_loader": val_loader,
        "loss_fn": HierarchicalLoss(config),
        "masking_fn": MultiBlockMasking(config),
    }


def weights(path: str | Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = read_checkpoint(Path(path))["model"]
    return state


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Bit for bit on a CPU, which resume promises; a GPU adds in another order each time."""
    tolerance = 0.0 if DEVICE == "cpu" else 1e-3
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=tolerance, rtol=tolerance)


# -- schedules, checkpoints, logger ----------------------------------------------------------------------------------


def test_schedulers__take_the_specified_values() -> None:
    names = run(SCHEDULERS)
    lr, momentum = names["lr_scheduler"], names["ema_scheduler"]
    assert lr(0) == 0.0
    assert lr(1) == pytest.approx(1.5e-4 / 40_000)
    assert lr(40_000) == 1.5e-4
    progress = (150_000 - 40_000) / (299_999 - 40_000)
    assert lr(150_000) == pytest.approx(1e-6 + (1.5e-4 - 1e-6) * (1 + math.cos(math.pi * progress)) / 2)
    assert lr(299_999) == pytest.approx(1e-6)
    assert lr.get_epoch_value(20) == pytest.approx(0.75e-4)
    assert momentum(0) == momentum(30_000) == 0.996
    assert momentum(165_000) == pytest.approx(0.996 + 0.004 * (165_000 - 30_000) / (299_999 - 30_000))
    assert momentum(299_999) == 1.0
    assert momentum.get_epoch_value(30) == 0.996


def test_checkpoints__come_back_as_they_were_saved(small: str, folder: Path) -> None:
    config = load_config(small)
    model = HJEPAModel(config)
    optimizer = create_optimizer(model, config)
    torch.stack([p.square().sum() for p in model.parameters() if p.requires_grad]).sum().backward()
    optimizer.step()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moments = {i: state["exp_avg"].clone() for i, state in optimizer.state_dict()["state"].items()}
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    scaler.scale(torch.tensor(1.0))
    saving, comment, loading = CHECKPOINTS.partition("# Load checkpoint")
    given = {"model": model, "optimizer": optimizer, "scaler": scaler, "scheduler_state": {"lr": 1e-4}}
    names = run(saving, epoch=4, val_loss=0.25, is_best=True, **given)
    with torch.no_grad():
        for tensor in (*model.parameters(), *(state["exp_avg"] for state in optimizer.state.values())):
            tensor.add_(1.0)
    scaler.update(1.0)
    names = run(comment + loading, **names)
    assert names["metadata"]["epoch"] == 4
    assert names["metadata"]["metrics"] == {"val_loss": 0.25}
    assert names["metadata"]["scheduler"] == {"lr": 1e-4}
    assert scaler.get_scale() == 512.0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(state["exp_avg"], moments[i]) for i, state in optimizer.state_dict()["state"].items())
    written = {path.name for path in (folder / "results/checkpoints").iterdir()}
    assert written == {"checkpoint_epoch_0004.pth", "checkpoint_latest.pth", "checkpoint_best.pth"}
    assert names["ckpt_manager"].should_save(9)
    assert not names["ckpt_manager"].should_save(10)


def test_logger__writes_all_that_is_logged(folder: Path) -> None:
    """In a process of its own, for Weights & Biases leaves handlers behind."""
    before = """
import torch
from hjepa.config import load_config
config, image_tensor, grad_tensor = load_config("demo"), torch.rand(3, 8, 8), torch.randn(100)
"""
    variables = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    program = before + adapted(LOGGER) + "logger.finish()\n"
    done = subprocess.run(
        [sys.executable, "-c", program], env=variables, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "results/logs/hjepa_experiment")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(100, 0.5)]
    assert events.Images("mask_viz")[0].step == 100
    assert events.Histograms("gradients/encoder")[0].histogram_value.num == 100
    assert events.Scalars("system/process_memory_gib")[0].value > 0.01
    try:
        import wandb  # noqa: F401
    except ImportError:
        assert "Weights & Biases is not installed" in done.stderr
    else:
        assert list(folder.glob("results/logs/wandb/offline-run-*/*.wandb"))


# -- training --------------------------------------------------------------------------------------------------------


def test_training__takes_every_step_and_leaves_its_checkpoints(small: str, folder: Path) -> None:
    config = load_config(small)
    trainer = run(TRAINER, **parts(config))["trainer"]
    assert trainer.step == STEPS
    content = read_checkpoint(folder / "results/checkpoints/checkpoint_latest.pth")
    assert content["step"] == STEPS
    assert content["epoch"] == 2
    assert content["metrics"]["optim/lr"] == pytest.approx(config.training.min_lr)
    assert content["metrics"]["optim/ema_momentum"] == 1.0
    assert 0 < content["metrics"]["train/loss"] < 2
    assert content["metrics"]["val/loss"] > 0
    assert list(folder.glob("results/logs/hjepa/events.out.tfevents.*"))


def test_training__resumes_at_the_step_where_it_was(
    small: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(small)
    run(BASIC, **parts(config))
    results = folder / "results/checkpoints"
    through = weights(results / "checkpoint_latest.pth")
    (results / "checkpoint_latest.pth").unlink()
    shutil.copy(results / "checkpoint_epoch_0001.pth", results / "checkpoint_latest.pth")  # as after a kill
    same = BASIC[BASIC.index("    model=model") : BASIC.index(")\n\ntrainer.train()")]
    names = parts(config) | {"HJEPATrainer": HJEPATrainer, "create_optimizer": create_optimizer}
    capsys.readouterr()
    trainer = run(RESUME.replace("    # ... same arguments ...\n", same), **names)["trainer"]
    said = f"resumed from results/checkpoints/checkpoint_latest.pth at step {STEPS // 2} of {STEPS}"
    assert said in capsys.readouterr().out
    assert trainer.step == STEPS
    assert_same(weights(results / "checkpoint_latest.pth"), through)


def test_training__put_together_as_in_the_integration_example(small: str, folder: Path) -> None:
    trainer = run(INTEGRATION, config=load_config(small))["trainer"]
    assert trainer.step == STEPS
    assert (folder / "results/checkpoints/checkpoint_epoch_0002.pth").exists()


# -- configuration, command line, names ------------------------------------------------------------------------------


def test_yaml__is_a_configuration_with_the_values_it_says() -> None:
    written, config = flatten_tree(parse_yaml(YAML)), load_config(YAML)
    assert len(written) == 21
    assert written.items() <= flatten(config).items()
    assert config.training.lr == 1.5e-4
    assert config.training.optimizer == "adamw"
    assert config.model.ema.momentum_warmup_epochs == 30
    assert config.logging.wandb.enabled is True


def test_command_lines__train_resume_and_pick_a_device(
    small: str, folder: Path, capsys: pytest.CaptureFixture[str], signals: None
) -> None:
    (folder / "configs").mkdir()
    (folder / "configs/default.yaml").write_text(small)
    text = COMMANDS.replace("\\\n", " ").replace("python scripts/train.py", "train")
    text = text.replace("cuda:1", "cpu")  # of which there is one everywhere
    scratch, resume, device = (shlex.split(line) for line in text.splitlines() if line.startswith("train "))
    results = folder / "results/checkpoints"

    assert main([*scratch, "--set", f"training.device={DEVICE}"]) == 0
    assert f"done: step {STEPS}, {8 * STEPS} images seen" in capsys.readouterr().out
    through = weights(results / "checkpoint_latest.pth")
    assert read_checkpoint(results / "checkpoint_best.pth")["metrics"]["probe/knn_top1"] > 0

    (results / "checkpoint_latest.pth").unlink()
    shutil.copy(results / "checkpoint_epoch_0001.pth", results / "checkpoint_latest.pth")
    assert main([*resume, "--set", f"training.device={DEVICE}"]) == 0
    said = capsys.readouterr().out
    assert f"resumed from results/checkpoints/checkpoint_latest.pth at step {STEPS // 2} of {STEPS}" in said
    assert f"done: step {STEPS}," in said
    assert_same(weights(results / "checkpoint_latest.pth"), through)

    assert main(device) == 0
    assert " on cpu in " in capsys.readouterr().out


@pytest.mark.parametrize("module", NAMES)
def test_names__can_be_imported_from_where_they_are_listed(module: str) -> None:
    missing = [name for name in NAMES[module] if not callable(getattr(import_module(module), name, None))]
    assert missing == []


# -- docs/TRAINING.md ------------------------------------------------------------------------------------------------

GUIDE = (ROOT / "docs/TRAINING.md").read_text("utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("text", [SCHEDULERS, CHECKPOINTS, LOGGER, INTEGRATION])
def test_guide__shows_the_examples_as_they_are_run(text: str) -> None:
    """Quotes and line breaks are the formatter's."""
    shown = [ast.dump(ast.parse(block)) for block in BLOCKS]
    assert ast.dump(ast.parse(text.replace("src.", "hjepa."))) in shown


def test_guide__its_own_python_runs_and_its_metrics_are_those_that_are_logged(small: str, folder: Path) -> None:
    reading, embedding = (block for block in BLOCKS if "read_checkpoint" in block or "HierarchicalEncoder" in block)
    settings = ["training.weight_decay_end=0.1", "loss.regularizer.name=vicreg", f"training.device={DEVICE}"]
    config = load_config(small, settings)
    train_alone(config)
    found = run(reading)["content"]
    assert found["step"] == STEPS
    assert load_config(found["state"]["config"]).training == config.training
    loader, _ = create_dataloaders(config)
    run(embedding, model=HJEPAModel(config), config=config, train_loader=loader)

    table = GUIDE[GUIDE.index("## What is logged") : GUIDE.index("## Checkpoints")]
    named = {name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(.*?)`", row)}
    lines = (folder / "results/logs/hjepa/metrics.jsonl").read_text().splitlines()
    logged = set().union(*(json.loads(line) for line in lines)) - {"images_seen"}
    logged = {re.sub(r"level_\d", "level_0", name) for name in logged}
    assert logged <= named
    elsewhere = {name for name in named - logged if not name.startswith("system/gpu_")}
    assert elsewhere == {"optim/loss_scale"}  # of float16


# -- examples/training_example.py ------------------------------------------------------------------------------------


def example(images: Path, results: Path, *arguments: str) -> str:
    script = [sys.executable, str(ROOT / "examples/training_example.py")]
    small = ["data.image_size=16", "data.channels=1", "model.patch_size=4", "model.embed_dim=16", "model.depth=2"]
    small += ["model.num_heads=2", "model.predictor.embed_dim=8", "model.predictor.depth=1", "training.batch_size=8"]
    small += [
        "training.device=cpu",
        "data.test_fraction=0.2",
        "collapse.probe_samples=24",
        f"data.cache_dir={results / 'cache'}",
    ]
    options = ["--images", str(images), "--results", str(results), "--epochs", "2", *arguments]
    options += [word for setting in small for word in ("--set", setting)]
    done = subprocess.run([*script, *options], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_example_script__trains_and_goes_on_where_it_was(images: Path, folder: Path) -> None:
    first = example(images, folder)
    assert f"trained {STEPS} steps" in first
    assert "embeddings: 48 images, 48 numbers each" in first  # the mean and two levels, 16 wide
    rows = (folder / "losses.csv").read_text().splitlines()
    assert rows[0] == "images_seen,train/loss"
    assert rows[-1].startswith(f"{8 * STEPS},0.")
    second = example(images, folder)
    assert f"at step {STEPS} of {STEPS}" in second
    assert first.splitlines()[-1] == second.splitlines()[-1]


def test_example_script__its_two_commands_do_not_share_a_folder(folder: Path) -> None:
    """Another image set is another experiment: going on from its checkpoints would be refused."""
    script = runpy.run_path(str(ROOT / "examples/training_example.py"))
    read = script["read_arguments"]
    assert read([]).results == Path("results/example")
    assert read(["--images", "my/folder/"]).results == Path("results/example-folder")
    assert read(["--images", ".", "--results", "here"]).results == Path("here")
