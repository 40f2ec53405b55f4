"""The trained encoder as a folder that anyone can load: safetensors, a JSON description, nothing to unpickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from hjepa.config import Config
from hjepa.data.transforms import eval_view, normalize, to_channels
from hjepa.errors import HjepaError, UserError
from hjepa.models import HierarchicalEncoder, VisionTransformer, build_encoder
from hjepa.utils.checkpoint import read_checkpoint
from hjepa.utils.files import file_sha256

SCHEMA = 1
WEIGHTS, DESCRIPTION = "model.safetensors", "config.json"


class ExportedEncoder(HierarchicalEncoder):
    """A HierarchicalEncoder that also knows how its images were prepared."""

    def __init__(
        self,
        vit: VisionTransformer,
        *,
        num_levels: int,
        image_size: int,
        channels: int,
        mean: Sequence[float],
        std: Sequence[float],
    ):
        super().__init__(vit, num_levels=num_levels)
        self.image_size, self.channels = image_size, channels
        self.mean, self.std = tuple(mean), tuple(std)

    def preprocess(self, images: Tensor | Sequence[Tensor]) -> Tensor:
        """uint8 (B, C, H, W), or B images (C, H, W) of any sizes -> normalised (B, C, S, S).

        The short side is scaled to S and the centre kept.
        """
        batch = torch.stack([eval_view(to_channels(image, self.channels), self.image_size) for image in images])
        return normalize(batch, self.mean, self.std)

    def embed_images(self, images: Tensor | Sequence[Tensor], level: int | str = "all") -> Tensor:
        """Embeddings (B, embedding_dim(level)) of raw images, as ``preprocess`` takes them; no gradient."""
        with torch.inference_mode():
            device = self.vit.patch_embed.weight.device
            return self.forward(self.preprocess(images).to(device), level)


def untrained_encoder(config: Config, *, mean: Sequence[float], std: Sequence[float]) -> ExportedEncoder:
    """The encoder as training starts from it: same shape, same seed, same weights."""
    torch.manual_seed(config.seed)
    return _wrap(build_encoder(config), config, mean, std)


def _wrap(vit: VisionTransformer, config: Config, mean: Sequence[float], std: Sequence[float]) -> ExportedEncoder:
    encoder = ExportedEncoder(
        vit,
        num_levels=config.model.num_levels,
        image_size=config.data.image_size,
        channels=config.data.channels,
        mean=mean,
        std=std,
    )
    return encoder.eval().requires_grad_(False)


def encoder_of_checkpoint(
    path: Path, config: Config, *, mean: Sequence[float], std: Sequence[float]
) -> ExportedEncoder:
    """The encoder that ``export.weights`` names, with the weights of a training checkpoint."""
    prefix = f"{config.export.weights}_encoder."
    model = read_checkpoint(path, parts=("model",))["model"]
    vit = build_encoder(config)
    vit.load_state_dict({name.removeprefix(prefix): value for name, value in model.items() if name.startswith(prefix)})
    return _wrap(vit, config, mean, std)


def save_export(
    encoder: ExportedEncoder, folder: Path, *, config: Config, provenance: Mapping[str, Any]
) -> dict[str, Any]:
    """Write an export and return its part of ``model.json``: digest, files, levels, preprocessing."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.contiguous().cpu() for name, value in encoder.vit.state_dict().items()}
    preprocessing = {
        "image_size": encoder.image_size,
        "channels": encoder.channels,
        "mean": list(encoder.mean),
        "std": list(encoder.std),
        "resize": "short side, bilinear with antialiasing",
        "crop": "centre",
    }
    levels = [
        {"level": level, "grid": encoder.vit.grid // 2**level, "embedding_dim": encoder.embedding_dim(level)}
        for level in encoder.levels
    ]
    description = {
        "schema": SCHEMA,
        "architecture": "hjepa.models.HierarchicalEncoder",
        "encoder": {
            "image_size": config.data.image_size,
            "patch_size": config.model.patch_size,
            "channels": config.data.channels,
            "embed_dim": config.model.embed_dim,
            "depth": config.model.depth,
            "num_heads": config.model.num_heads,
            "mlp_ratio": config.model.mlp_ratio,
        },
        "num_levels": config.model.num_levels,
        "levels": levels,
        "embedding_dim": encoder.embedding_dim(),
        "preprocessing": preprocessing,
        "provenance": dict(provenance),
    }
    safetensors.torch.save_file(weights, folder / WEIGHTS)
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=1, sort_keys=True), "utf-8")
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)}
        for name in (WEIGHTS, DESCRIPTION)
    }
    digest = hashlib.sha256("".join(str(files[name]["sha256"]) for name in sorted(files)).encode()).hexdigest()
    return {"digest": digest, "files": files, "levels": levels, "preprocessing": preprocessing}


def load_export(folder: Path, device: str | torch.device = "cpu") -> ExportedEncoder:
    """The encoder of an export folder, frozen and in evaluation mode.

    Raises:
        UserError: the folder is no export, or a newer one than this code reads.
        HjepaError: its weights do not fit its description.
    """
    try:
        description = json.loads((folder / DESCRIPTION).read_text("utf-8"))
    except OSError as error:
        raise UserError(
            f"{folder} is not an exported encoder: expected {WEIGHTS} and {DESCRIPTION} in it ({error.strerror})"
        ) from None
    if description.get("schema", SCHEMA + 1) > SCHEMA:
        raise UserError(f"{folder} was exported by a newer hjepa (schema {description.get('schema')}); update this one")
    preprocessing = description["preprocessing"]
    encoder = ExportedEncoder(
        VisionTransformer(**description["encoder"]),
        num_levels=description["num_levels"],
        image_size=preprocessing["image_size"],
        channels=preprocessing["channels"],
        mean=preprocessing["mean"],
        std=preprocessing["std"],
    )
    try:
        encoder.vit.load_state_dict(safetensors.torch.load_file(folder / WEIGHTS))
    except (RuntimeError, OSError, safetensors.SafetensorError) as error:
        raise HjepaError(f"the weights in {folder} cannot be loaded: {error}") from None
    return encoder.to(device).eval().requires_grad_(False)


def max_abs_difference(a: ExportedEncoder, b: ExportedEncoder, images: Tensor) -> float:
    """Largest difference between the embeddings of two encoders for uint8 images (B, C, H, W), over all levels."""
    with torch.inference_mode():
        ours, theirs = a.embed(a.preprocess(images)), b.embed(b.preprocess(images))
    return max(float((ours[level] - theirs[level]).abs().max()) for level in ours)
