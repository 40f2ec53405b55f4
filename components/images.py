"""The image each step runs in: ``hjepa-<name>:<version>``, without a registry.

``hjepa pipeline upload --registry HOST/NAMESPACE`` puts the registry in front of them.
"""

import tomllib
from pathlib import Path

_PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
VERSION: str = tomllib.loads(_PYPROJECT.read_text("utf-8"))["project"]["version"]


def _image(name: str) -> str:
    return f"hjepa-{name}:{VERSION}"


PREPARE_DATA = _image("prepare-data")  # decodes and shards; no torch training stack needed
TRAIN = _image("train")  # torch with CUDA
EVALUATE = _image("evaluate")  # torch, and the probes
TOOLS = _image("tools")  # S3 and MLflow only
