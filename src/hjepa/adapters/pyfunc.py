"""The file that MLflow stores beside an exported encoder and runs to load it: code and safetensors, no pickle.

MLflow runs it when it saves the model too, in an image without torch: that is imported with the first use.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import numpy as np
from mlflow.pyfunc import PythonModel, PythonModelContext

if TYPE_CHECKING:
    import torch

_BATCH = 256  # images embedded at once, whatever the caller passes


class HJEPAEncoder(PythonModel):  # type: ignore[misc] # mlflow is not typed
    """Images in, embeddings out, through the preprocessing and the encoder of the export."""

    def load_context(self, context: PythonModelContext) -> None:
        from hjepa.export import load_export

        self.encoder = load_export(Path(context.artifacts["export"]))

    def predict(
        self, context: PythonModelContext, model_input: np.ndarray, params: dict[str, Any] | None = None
    ) -> np.ndarray:
        """Embeds images.

        Args:
            model_input: uint8 [N, H, W] or [N, H, W, C]; images of several sizes as an object array of N such images.
            params: ``level`` is "all" (the default), "mean", or the number of one level, such as "0".

        Returns:
            float32 [N, D].
        """
        name = str((params or {}).get("level", "all"))
        levels: dict[str, int | str] = {
            "all": "all",
            "mean": "mean",
            **{str(level): level for level in self.encoder.levels},
        }
        if name not in levels:
            raise ValueError(f"no level {name!r}: expected one of {', '.join(levels)}")
        level = levels[name]
        embeddings = np.empty((len(model_input), self.encoder.embedding_dim(level)), np.float32)
        for start in range(0, len(model_input), _BATCH):
            images = model_input[start : start + _BATCH]
            tensors = _to_tensor(images) if images.dtype != object else [_to_tensor(image[None])[0] for image in images]
            embeddings[start : start + _BATCH] = self.encoder.embed_images(tensors, level).float().cpu()
        return embeddings


def _to_tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 [N, H, W] or [N, H, W, C] -> [N, C, H, W]."""
    import torch

    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise ValueError(
            f"expected uint8 images [N, H, W] or [N, H, W, C], got {images.dtype} of shape {list(images.shape)}"
        )
    channels_last = torch.tensor(images if images.ndim == 4 else images[..., None])
    return channels_last.permute(0, 3, 1, 2)


mlflow.models.set_model(HJEPAEncoder())
