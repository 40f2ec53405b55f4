"""Runs a compiled pipeline with kfp.local's DockerRunner: ``python tests/docker_pipeline.py REQUEST.json``.

A process of its own, since kfp.local keeps its settings for as long as a process lives. The containers get what a
restricted pod gets: a user id that no image knows, a read-only root, no capabilities, and /tmp.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import docker
from kfp import components, local

USER = 23456
HARDENED = {
    "user": f"{USER}:0",
    "read_only": True,
    "tmpfs": {"/tmp": "rw,exec,mode=1777"},
    "shm_size": "1g",
    "cap_drop": ["ALL"],
    "security_opt": ["no-new-privileges"],
    "network_mode": "host",
}


def main(request: Path) -> None:
    asked = json.loads(request.read_text())
    # KFP expects "python" in an image's name, and says for each step what a laptop cannot give it.
    warnings.filterwarnings("ignore", message="You may be attemping to run a task")
    warnings.filterwarnings("ignore", message="Task '.*': settings .* have no effect")
    mounts = [docker.types.Mount(there, here, "bind", True) for here, there in asked["read_only"].items()]
    runner = local.DockerRunner(environment=asked["environment"], mounts=mounts, **HARDENED)
    local.init(runner, pipeline_root=asked["root"], raise_on_error=True)
    components.load_component_from_file(asked["pipeline"])(**asked["arguments"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
