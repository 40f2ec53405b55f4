"""Self-supervised image pretraining with a hierarchical joint-embedding predictive architecture."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from hjepa.export import ExportedEncoder

__version__ = "0.1.0"
__all__ = ["__version__", "load_encoder"]


def load_encoder(uri: str, device: str | torch.device = "cpu") -> ExportedEncoder:
    """A trained encoder as a frozen ``nn.Module``, from wherever it is kept.

    Args:
        uri: ``models:/<name>@champion``, ``models:/<name>/<version>``, ``s3://...`` or a local folder.

    Raises:
        UserError: there is no such model, or it is not an exported encoder.
    """
    # Imported here so that `import hjepa` costs neither torch nor mlflow.
    from hjepa.adapters.registry import fetch_export
    from hjepa.export import load_export

    return load_export(fetch_export(uri), device)
