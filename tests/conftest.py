"""The real servers that integration tests share: started once per session, on free ports, in a temporary folder."""

from __future__ import annotations

import os

# Tiny models gain nothing from threads, and on a busy machine threads that wait for each other are many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hjepa.adapters.s3 import S3Store
from hjepa.adapters.stack import BUCKET, Stack

# kubectl of this environment goes before the machine's, whether the environment is activated or not.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A running S3 and MLflow server. Tests that stop or break servers start a stack of their own."""
    stack = Stack(tmp_path_factory.mktemp("stack"))
    try:
        stack.up()
        yield stack
    finally:
        stack.down()


@pytest.fixture(scope="session")
def stack_environment(stack: Stack) -> Iterator[dict[str, str]]:
    """The variables that point boto3, MLflow and hjepa at the stack, set in this process and so in its children."""
    variables = stack.environment()
    before = {key: os.environ.get(key) for key in variables}
    os.environ.update(variables)
    try:
        yield variables
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


@pytest.fixture
def store(stack_environment: dict[str, str]) -> S3Store:
    """An empty store: a prefix of its own in the stack's bucket."""
    return S3Store(f"s3://{BUCKET}/tests/{uuid.uuid4().hex}")


@pytest.fixture
def make_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Makes a file system in memory, of a size such as "1m"."""
    mounted: list[Path] = []

    def make(size: str) -> Path:
        folder = tmp_path / f"disk-{size}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True, check=False).returncode != 0:
            pytest.skip("only root can mount a small file system")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def small_disk(make_disk: Callable[[str], Path]) -> Path:
    return make_disk("1m")
