"""The file that MLflow stores beside an exported encoder and runs to load it: code and safetensors, no pickle.

MLflow runs it when it saves the model too, in an image without torch: that is imported with the first use.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import numpy as np
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PythonModel, PythonModelContext

if TYPE_CHECKING:
    import torch

_BATCH = 256  # images embedded at once, whatever the caller passes
_MAX_PIXELS = 100_000_000  # of one encoded image; larger ones are taken for decompression bombs
_EVERY = "every"


class HJEPAEncoder(PythonModel):  # type: ignore[misc] # mlflow is not typed
    """Images in, embeddings out, through the preprocessing and the encoder of the export."""

    def load_context(self, context: PythonModelContext) -> None:
        from hjepa.export import load_export

        self.encoder = load_export(Path(context.artifacts["export"]))

    def predict(
        self, context: PythonModelContext, model_input: np.ndarray, params: dict[str, Any] | None = None
    ) -> np.ndarray | dict[str, np.ndarray]:
        """Embeds images.

        Args:
            model_input: One column ``image`` (a table, a mapping, or the array itself) of N images, each
                uint8 [H, W] or [H, W, C], or an image file as bytes or as base64 text, which is how JSON carries it.
                Arrays of one size may be one array [N, H, W] or [N, H, W, C]; others are an object array [N].
            params: ``level`` is "all" (the default), "mean", the number of one level, such as "0", or "every".

        Returns:
            float32 [N, D]; for "every" one such array for each level: {"0": [N, D0], "1": [N, D1], ...}.

        Raises:
            MlflowException: of a kind that a server answers with status 400, for a level that does not exist and for
                an image that is damaged or has another type.
        """
        column = _column(model_input)
        levels = self._levels(str((params or {}).get("level", "all")))
        found = {
            name: np.empty((len(column), self.encoder.embedding_dim(level)), np.float32)
            for name, level in levels.items()
        }
        for start in range(0, len(column), _BATCH):
            images = _tensors(column[start : start + _BATCH], first=start)
            for name, level in levels.items():
                found[name][start : start + _BATCH] = self.encoder.embed_images(images, level).float().cpu()
        return found if params and params.get("level") == _EVERY else next(iter(found.values()))

    def _levels(self, name: str) -> dict[str, int | str]:
        """Those to compute, by name."""
        single: dict[str, int | str] = {str(level): level for level in self.encoder.levels}
        if name == _EVERY:
            return single
        known: dict[str, int | str] = {"all": "all", "mean": "mean", **single}
        if name not in known:
            raise _bad(f"no level {name!r}: expected one of {', '.join([*known, _EVERY])}")
        return {name: known[name]}


def _bad(message: str) -> MlflowException:
    return MlflowException.invalid_parameter_value(message)


def _column(model_input: Any) -> np.ndarray:
    """The images [N, ...] of whatever a caller or a server passes on."""
    if isinstance(model_input, Mapping) or hasattr(model_input, "columns"):
        if "image" not in model_input:
            raise _bad(f"expected a column 'image', got {', '.join(map(str, model_input))}")
        model_input = model_input["image"]
    if isinstance(model_input, np.ndarray):
        return model_input
    column = np.empty(len(model_input), dtype=object)
    for index, image in enumerate(model_input):
        column[index] = image
    return column


def _tensors(images: np.ndarray, *, first: int) -> torch.Tensor | list[torch.Tensor]:
    """uint8 [N, C, H, W], or N images [C, H, W] of any sizes; ``first`` is the number of the first, for messages."""
    if images.dtype != object:
        return _channels_first(images)
    pixels = [_pixels(image, first + index) for index, image in enumerate(images)]
    return [_channels_first(image[None])[0] for image in pixels]


def _pixels(image: Any, index: int) -> np.ndarray:
    """uint8 [H, W] or [H, W, C] of one image, however it is written."""
    if isinstance(image, str):
        try:
            image = base64.b64decode("".join(image.split()), validate=True)
        except (binascii.Error, ValueError) as error:
            raise _bad(f"image {index} is text, but not an image file in base64: {error}") from None
    if isinstance(image, bytes | bytearray | memoryview):
        return _decoded(bytes(image), index)
    if isinstance(image, np.ndarray) and image.dtype != object:
        return image
    if isinstance(image, Sequence | np.ndarray):
        return _of_numbers(image, index)
    raise _bad(f"image {index} is of type {type(image).__name__}: expected bytes, base64 text or a uint8 array")


def _decoded(data: bytes, index: int) -> np.ndarray:
    """An image file, read as data preparation reads it."""
    from hjepa.data.images import RejectedError, decode

    try:
        return decode(data, max_pixels=_MAX_PIXELS).pixels
    except RejectedError as error:
        raise _bad(f"image {index} cannot be decoded ({len(data)} bytes): {error}") from None


def _of_numbers(image: Sequence[Any] | np.ndarray, index: int) -> np.ndarray:
    """Nested lists, as JSON brings them: whole numbers from 0 to 255."""
    try:
        wide = np.array(image.tolist() if isinstance(image, np.ndarray) else image)
    except ValueError as error:  # rows of different lengths
        raise _bad(f"image {index} is no rectangle of pixels: {error}") from None
    if wide.dtype.kind not in "iu" or wide.size == 0 or wide.min() < 0 or wide.max() > 255:
        raise _bad(f"image {index}: expected uint8 pixels, whole numbers from 0 to 255")
    return wide.astype(np.uint8)


def _channels_first(images: np.ndarray) -> torch.Tensor:
    """uint8 [N, H, W] or [N, H, W, C] -> [N, C, H, W]."""
    import torch

    if images.dtype != np.uint8 or images.ndim not in (3, 4) or 0 in images.shape[1:]:
        raise _bad(f"expected uint8 images [N, H, W] or [N, H, W, C], got {images.dtype} of shape {list(images.shape)}")
    if images.ndim == 4 and images.shape[3] not in (1, 3):
        raise _bad(f"expected images of 1 or 3 colour channels, the last dimension, got shape {list(images.shape)}")
    channels_last = torch.tensor(images if images.ndim == 4 else images[..., None])
    return channels_last.permute(0, 3, 1, 2)


mlflow.models.set_model(HJEPAEncoder())
