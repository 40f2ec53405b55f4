"""Steps whose loss or gradient was not finite: what they were made of, and how to play them again.

An incident is a folder: ``model.pth`` and, for every rank, ``batch_rank<r>.pth``. Both are checkpoint containers, so
reading them executes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hjepa import distributed
from hjepa.config import Config, dump_yaml, load_config
from hjepa.distributed import World
from hjepa.errors import UserError
from hjepa.losses import HierarchicalLoss
from hjepa.models import HJEPAModel, MaskTensors
from hjepa.trainers.step import move
from hjepa.utils.checkpoint import read_checkpoint, write_checkpoint

MOST = 3  # incidents that one process writes down: a diverged run would fill the disk with them
MODEL = "model.pth"


def folder_of(incidents: Path, step: int) -> Path:
    return incidents / f"step_{step:08d}"


def write_model(folder: Path, config: Config, weights: Mapping[str, Any], *, step: int) -> None:
    """The model that met the incident. ``step`` is how many steps these weights have taken."""
    folder.mkdir(parents=True, exist_ok=True)
    write_checkpoint(folder / MODEL, {"config": dump_yaml(config), "model": weights, "step": step})


def write_batch(
    folder: Path,
    rank: int,
    *,
    images: Tensor,
    masks: MaskTensors,
    samples: Any,
    step: int,
    amp_dtype: torch.dtype | None,
) -> None:
    """One rank's share of the batch: normalised images (b, C, S, S), as the model was given them."""
    folder.mkdir(parents=True, exist_ok=True)
    write_checkpoint(
        folder / f"batch_rank{rank}.pth",
        {
            "step": step,
            "images": images,
            "masks": masks._asdict(),
            "samples": samples,
            "amp_dtype": None if amp_dtype is None else str(amp_dtype).removeprefix("torch."),
            "rng": torch.get_rng_state(),
        },
    )


def replay(folder: Path, device: str = "auto") -> list[str]:
    """Take the forward and backward pass of an incident again and say where numbers stopped being finite.

    Returns:
        Lines for a person.

    Raises:
        UserError: the folder holds no incident.
    """
    batches = sorted(folder.glob("batch_rank*.pth"))
    if not batches or not (folder / MODEL).exists():
        raise UserError(
            f"{folder} holds no incident: expected {MODEL} and batch_rank0.pth; "
            "training prints the folder's name when it skips a step"
        )
    place = distributed.pick_device(device, World())
    content = read_checkpoint(folder / MODEL)
    config = load_config(content["config"])
    model = HJEPAModel(config)
    model.load_state_dict(content["model"])
    model.to(place)
    lines = [f"weights after {content['step']} steps, on {place}"]
    bad = [name for name, tensor in content["model"].items() if not tensor.isfinite().all()]
    if bad:
        lines.append(f"{len(bad)} weights are not finite, the first is {bad[0]}")
    for path in batches:
        lines += _replay_batch(path, model, config, place)
    return lines


def _replay_batch(path: Path, model: HJEPAModel, config: Config, device: torch.device) -> list[str]:
    batch = read_checkpoint(path)
    images = batch["images"].to(device)
    lines = [f"{path.name}: step {batch['step']}, {len(images)} images, {batch['amp_dtype'] or 'float32'}"]
    broken = (~images.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
    if broken:
        numbers = [int(batch["samples"][i]) for i in broken]
        lines.append(f"  {len(broken)} images are not finite themselves, samples {_few(numbers)}")
    torch.set_rng_state(batch["rng"])
    model.zero_grad()
    loss_fn = HierarchicalLoss(config).to(device)
    amp = getattr(torch, batch["amp_dtype"]) if batch["amp_dtype"] else None
    with _first_not_finite(model) as first, torch.autocast(device.type, amp, enabled=amp is not None):
        out = model(images, move(MaskTensors(**batch["masks"]), device))
    loss, parts = loss_fn(out.predictions, out.targets, out.embeddings, step=batch["step"])
    loss.backward()
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    shown = "  ".join(f"{name} {value.item():g}" for name, value in parts.items())
    lines.append(f"  loss {loss.item():g} ({shown}), gradient norm {norm.item():g}")
    if first:
        lines.append(f"  the first module whose output is not finite: {first[0]}")
    elif loss.isfinite() and norm.isfinite():
        lines.append("  all finite here: the incident does not come from this batch and these weights alone")
    else:
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        names = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
        where = _few(names) if names else "its norm alone: the sum of its squares is too large"
        lines.append(f"  every output is finite; the gradient is not, in {where}")
    return lines


@contextmanager
def _first_not_finite(model: nn.Module) -> Iterator[list[str]]:
    """Collects the names of the modules whose outputs are not finite, in the order in which they ran."""
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not output.isfinite().all():
                found.append(name)

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _few(items: list[Any], most: int = 5) -> str:
    rest = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(map(str, items[:most])) + rest
