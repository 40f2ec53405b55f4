"""The image each step runs in: ``hjepa-<name>:<version>``, without a registry.

``hjepa pipeline upload --registry HOST/NAMESPACE`` puts the registry in front of them.
"""

import tomllib
from pathlib import Path

_PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
VERSION: str = tomllib.loads(_PYPROJECT.read_text("utf-8"))["project"]["version"]


def _image(name: str) -> str:
    return f"hjepa-{name}:{VERSION}"


PREPARE_DATA = _image("prepare-data")  # torch, with which torchvision reads its data sets
TRAIN = _image("train")  # torch with CUDA, which runs on CPUs too
EVALUATE = _image("evaluate")  # torch: exports, probes
TOOLS = _image("tools")  # S3, MLflow and the Kubernetes API only
