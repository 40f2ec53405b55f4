"""Fashion-MNIST from the first source that answers: a folder of the user's, our cache, torchvision, Debian."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hjepa.config import DataConfig
from hjepa.data.sources import ArraySplit, Source
from hjepa.errors import HjepaError, UserError

CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
PREFIXES = {"train": "train", "test": "t10k"}
SAMPLES = {"train": 60_000, "test": 10_000}
FILES = tuple(f"{prefix}-{part}-ubyte.gz" for prefix in PREFIXES.values() for part in ("images-idx3", "labels-idx1"))
DEBIAN_PACKAGE = "dataset-fashion-mnist"
CONNECT_SECONDS = 5.0  # a machine without a network has to move on to the next source soon
TRANSFER_SECONDS = 300.0


class SourceError(HjepaError):
    """One source did not answer; the message is the cause."""


def open_fashion_mnist(data: DataConfig) -> Source:
    """
    Raises:
        UserError: if no source answers, with the cause of each.
    """
    folder, detail = _locate(data)
    try:
        splits = {
            split: ArraySplit(
                read_idx(folder / f"{prefix}-images-idx3-ubyte.gz", (SAMPLES[split], 28, 28)),
                read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", (SAMPLES[split],)),
            )
            for split, prefix in PREFIXES.items()
        }
    except SourceError as error:
        raise UserError(f"Fashion-MNIST from {detail}: {error}. Replace the file and run again.") from None
    # The published order is random already, and protocols speak of "the first 10,000".
    return Source(name="fashion-mnist", detail=detail, splits=splits, classes=CLASSES)


def check_fashion_mnist(data: DataConfig) -> list[str]:
    """Brings the files into the cache: nothing less can tell whether a source will answer."""
    _, detail = _locate(data)
    return [f"Fashion-MNIST from {detail}"]


def read_idx(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Unsigned bytes of a gzipped idx file.

    Raises:
        SourceError: if the file is missing, damaged, or of another shape.
    """
    try:
        raw = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise SourceError(f"cannot read {path}: {error}") from None
    header = bytes((0, 0, 8, len(shape))) + np.array(shape, dtype=">u4").tobytes()
    if not raw.startswith(header) or len(raw) != len(header) + int(np.prod(shape)):
        raise SourceError(f"{path} is not an idx file of {' x '.join(map(str, shape))} bytes")
    return np.frombuffer(raw, dtype=np.uint8, offset=len(header)).reshape(shape)


def _locate(data: DataConfig) -> tuple[Path, str]:
    """(folder with the four files, which source it is)."""
    if data.root is not None:
        folder = Path(data.root).expanduser()
        missing = [name for name in FILES if not (folder / name).is_file()]
        if missing:
            raise UserError(
                f"data.root={data.root}: expected the Fashion-MNIST files {', '.join(FILES)}, but "
                f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing. "
                "Put them there, or unset data.root to have them fetched."
            )
        return folder, f"folder {folder}"
    cache = Path(data.cache_dir).expanduser() / "fashion-mnist"
    failures = []
    try:
        return cache, f"cache {cache} (first taken from {_verify(cache)})"
    except SourceError as error:
        failures.append(("cache", str(error)))
    sources: dict[str, Callable[[Path], None]] = {
        "torchvision's download": _from_torchvision,
        f"Debian package {DEBIAN_PACKAGE}": _from_debian,
    }
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        for leftover in cache.parent.glob(".fashion-mnist-*"):  # of a killed process
            if time.time() - leftover.stat().st_mtime > 2 * TRANSFER_SECONDS:
                shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=cache.parent, prefix=".fashion-mnist-") as scratch:
            for name, fetch in sources.items():
                staged = Path(scratch) / "staged"
                staged.mkdir()
                try:
                    fetch(staged)
                    _install(staged, cache, source=name)
                except SourceError as error:
                    failures.append((name, str(error)))
                    shutil.rmtree(staged)
                    continue
                return cache, f"{name}, kept in {cache}"
    except OSError as error:
        raise UserError(f"data.cache_dir={data.cache_dir}: {error}. Choose a folder that can be written to.") from None
    attempts = "\n".join(f"  - {name}: {cause}" for name, cause in failures)
    raise UserError(
        f"no source of Fashion-MNIST answered:\n{attempts}\n"
        f"Connect to a network, or put {', '.join(FILES)} into a folder and set data.root to it."
    )


# -- cache -----------------------------------------------------------------------------------------------------------


def _digest(path: Path) -> dict[str, object]:
    content = path.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _verify(cache: Path) -> str:
    """The source that the cached files once came from; SourceError if there are none, or damaged ones."""
    record = cache / "source.json"
    try:
        recorded = json.loads(record.read_text("utf-8"))
        for name, expected in recorded["files"].items():
            if _digest(cache / name) != expected:
                raise SourceError(f"{cache / name} is damaged (size or sha256 differ from {record})")
        if set(recorded["files"]) != set(FILES):
            raise SourceError(f"{record} does not list the four files")
        return str(recorded["source"])
    except FileNotFoundError as error:
        raise SourceError(f"no {error.filename}") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise SourceError(f"cannot read {record}: {error}") from None


def _install(staged: Path, cache: Path, *, source: str) -> None:
    """Move verified files into the cache; a kill at any moment leaves the old state or the new one."""
    for split, prefix in PREFIXES.items():
        read_idx(staged / f"{prefix}-images-idx3-ubyte.gz", (SAMPLES[split], 28, 28))
        read_idx(staged / f"{prefix}-labels-idx1-ubyte.gz", (SAMPLES[split],))
    record = {"source": source, "files": {name: _digest(staged / name) for name in FILES}}
    (staged / "source.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    for path in staged.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    with contextlib.suppress(SourceError):
        _verify(cache)
        return  # another process was faster
    with contextlib.suppress(FileNotFoundError):
        cache.rename(staged.parent / "replaced")
    try:
        staged.rename(cache)
    except OSError:
        _verify(cache)


# -- sources ---------------------------------------------------------------------------------------------------------


def _from_torchvision(folder: Path) -> None:
    from torchvision.datasets import FashionMNIST  # seconds of import that a cached set does not need

    _probe(FashionMNIST.mirrors[0] + FashionMNIST.resources[0][0])
    with _socket_timeout(CONNECT_SECONDS):
        try:
            dataset = FashionMNIST(folder / "download", download=True)
        except (RuntimeError, OSError) as error:
            raise SourceError(str(error)) from None
    for name in FILES:
        shutil.move(Path(dataset.raw_folder) / name, folder / name)
    shutil.rmtree(folder / "download")


def _probe(url: str) -> None:
    """Ask for a header in a thread, because no timeout covers a name server that does not answer."""
    outcome: list[str] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=CONNECT_SECONDS):
                outcome.append("")
        except (OSError, ValueError) as error:
            outcome.append(str(error))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS + 1)
    cause = outcome[0] if outcome else f"no answer within {CONNECT_SECONDS:g} s"
    if cause:
        raise SourceError(f"{url}: {cause}")


@contextlib.contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _from_debian(folder: Path) -> None:
    """Fetch and unpack the package with tools that need no root."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise SourceError(f"this system has no {tool}")
    work = folder / "debian"
    (work / "state" / "lists" / "partial").mkdir(parents=True)
    (work / "cache" / "archives" / "partial").mkdir(parents=True)
    options = [
        "-o", f"Acquire::http::Timeout={CONNECT_SECONDS:g}",
        "-o", f"Acquire::https::Timeout={CONNECT_SECONDS:g}",
        "-o", "Acquire::Retries=1",
        "-o", "APT::Sandbox::User=",
    ]  # fmt: skip
    # An image without package lists, or a user who may not refresh them, gets lists of its own.
    private = [
        "-o", f"Dir::State={work / 'state'}",
        "-o", "Dir::State::status=/var/lib/dpkg/status",
        "-o", f"Dir::Cache={work / 'cache'}",
    ]  # fmt: skip
    download = ["apt-get", *options, "download", DEBIAN_PACKAGE]
    try:
        _command(download, cwd=work)
    except SourceError:
        _command(["apt-get", *options, *private, "update"], cwd=work)
        _command([*download[:-2], *private, *download[-2:]], cwd=work)
    packages = list(work.glob("*.deb"))
    if not packages:
        raise SourceError("apt-get download reported success but left no package")
    _command(["dpkg-deb", "-x", str(packages[0]), str(work / "root")], cwd=work)
    for name in FILES:
        found = list((work / "root").rglob(name))
        if not found:
            raise SourceError(f"{packages[0].name} holds no {name}")
        shutil.move(found[0], folder / name)
    shutil.rmtree(work)


def _command(command: list[str], *, cwd: Path) -> None:
    with subprocess.Popen(
        command,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "LC_ALL": "C"},
        start_new_session=True,  # apt-get works through children, which must end with it
    ) as process:
        try:
            _, errors = process.communicate(timeout=TRANSFER_SECONDS)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise SourceError(f"{command[0]} did not finish within {TRANSFER_SECONDS:g} s") from None
            raise
    if process.returncode != 0:
        said = [line for line in errors.splitlines() if line.startswith("E:")] or errors.splitlines() or ["no message"]
        raise SourceError(f"{command[0]} ended with code {process.returncode}: {' '.join(said[:3])}")
