"""Write every job.yaml of the manifests from the config.yaml beside it: ``python manifests/regenerate.py``.

The text is that of ``hjepa job render``; the run's name is what kustomization.yaml gives to the ConfigMap.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import yaml

# A shell's own server, keys or run have no place in what is committed.
_FOREIGN = ("AWS_", "MLFLOW_", "KFP_", "HJEPA_")


def folders(root: Path) -> list[Path]:
    return sorted(path.parent for path in root.rglob("config.yaml"))


def run_name(folder: Path) -> str:
    described = yaml.safe_load((folder / "kustomization.yaml").read_text("utf-8"))
    literals = described["configMapGenerator"][0]["literals"]
    return dict(literal.split("=", 1) for literal in literals)["run"]


def job(folder: Path) -> str:
    """Raises CalledProcessError if the configuration is wrong; stderr has said why."""
    command = [sys.executable, "-m", "hjepa", "job", "render", "--config", str(folder / "config.yaml")]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(_FOREIGN)}
    done = subprocess.run(
        [*command, "--run", run_name(folder)], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


def main() -> int:
    for folder in folders(Path(__file__).parent):
        (folder / "job.yaml").write_text(job(folder), encoding="utf-8")
        print(folder / "job.yaml")
    return 0


if __name__ == "__main__":
    sys.exit(main())
