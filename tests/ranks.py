"""Runs a function of a test module, or any command, under a real torchrun, and brings results and tracebacks back."""

from __future__ import annotations

import faulthandler
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import torch

HERE = Path(__file__).resolve().parent


class Torchrun:
    """A running torchrun. Every rank is a process of its own; ``output`` is what all of them printed."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path):
        self.process, self.log = process, log

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self, timeout: float) -> int:
        """torchrun's exit status; it is 0 or 1, whatever the ranks exit with."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"torchrun still runs after {timeout:g} s\n{self.output}") from None

    def wait_for(self, text: str, timeout: float = 60) -> None:
        """Until some rank has printed ``text``."""
        end = time.monotonic() + timeout
        while text not in self.output:
            if self.process.poll() is not None:
                raise AssertionError(f"torchrun ended ({self.process.returncode}) without {text!r}\n{self.output}")
            if time.monotonic() > end:
                raise AssertionError(f"no {text!r} within {timeout:g} s\n{self.output}")
            time.sleep(0.02)

    def rank(self, number: int) -> psutil.Process:
        """The process of a rank, to send it a signal."""
        for child in psutil.Process(self.process.pid).children():
            if child.environ().get("RANK") == str(number):
                return child
        raise AssertionError(f"rank {number} does not run\n{self.output}")


@contextmanager
def torchrun(
    arguments: list[str], *, ranks: int = 2, cwd: Path | None = None, env: dict[str, str] | None = None
) -> Iterator[Torchrun]:
    """``torchrun --standalone --nproc-per-node RANKS ARGUMENTS`` on the CPU; nothing of it is left afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "output"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
        inherited = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        variables = inherited | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path} | (env or {})
        with log.open("wb") as file:
            process = subprocess.Popen(
                [*launcher, *arguments], stdout=file, stderr=subprocess.STDOUT, cwd=cwd, env=variables
            )
        try:
            yield Torchrun(process, log)
        finally:
            # Ranks lead sessions of their own, so they are looked up before their parent goes.
            family = [process.pid, *(child.pid for child in _descendants(process.pid))]
            for pid in family:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def run(function: Callable[..., Any], *arguments: Any, ranks: int = 2, timeout: float = 120) -> list[Any]:
    """Call ``function(*arguments)`` of a test module on every rank; what each returned.

    Fails with the tracebacks of the ranks that raised, or with where each rank stood when time was up.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save((function.__module__, function.__name__, arguments, timeout), folder / "call")
        with torchrun([str(HERE / "ranks.py"), name], ranks=ranks) as job:
            code = job.wait(timeout + 30)
            errors = [path.read_text() for path in sorted(folder.glob("error.*"))]
            if code != 0 or errors:
                raise AssertionError("\n".join(errors) or job.output)
        return [torch.load(folder / f"result.{rank}", weights_only=False) for rank in range(ranks)]


def _main(folder: Path) -> None:
    rank = os.environ["RANK"]
    module, name, arguments, timeout = torch.load(folder / "call", weights_only=False)
    faulthandler.dump_traceback_later(timeout, exit=True)
    try:
        result = getattr(importlib.import_module(module), name)(*arguments)
    except BaseException:
        (folder / f"error.{rank}").write_text(f"rank {rank}: {traceback.format_exc()}")
        raise
    torch.save(result, folder / f"result.{rank}")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
