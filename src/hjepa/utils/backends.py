"""TensorBoard and Weights & Biases, each behind a thread, so that neither can slow, hang or end a training run."""

from __future__ import annotations

import contextlib
import json
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

CAPACITY = 1000  # records that may wait for a backend
INIT_SECONDS = 30.0  # for Weights & Biases to answer at the start of a run
ABANDON_SECONDS = 5.0


class Histogram(NamedTuple):
    """Values as counts between edges, with what TensorBoard wants to know besides. Values not finite are left out."""

    counts: NDArray[np.float64]  # (n,)
    edges: NDArray[np.float64]  # (n + 1,)
    minimum: float
    maximum: float
    total: float
    squares: float


class Backend(Protocol):
    """Where a ``Courier`` brings records to. Everything is called on the courier's thread, and may raise."""

    name: str

    def metrics(self, metrics: Mapping[str, float], step: int) -> None: ...

    def image(self, name: str, image: NDArray[np.uint8], step: int) -> None: ...

    def histograms(self, histograms: Mapping[str, Histogram], step: int) -> None: ...

    def embeddings(
        self,
        name: str,
        vectors: NDArray[np.float32],
        step: int,
        labels: Sequence[str] | None,
        images: NDArray[np.uint8] | None,
    ) -> None: ...

    def close(self) -> None: ...

    def abandon(self) -> str:
        """Let go of it after a failure, from any thread; returns what a person can do about what is lost."""
        ...


class Courier:
    """Hands records to one backend on a thread of its own.

    The first failure, or ``CAPACITY`` records that the backend does not take, ends the service: it is said once, and
    further records are dropped.
    """

    def __init__(self, backend: Backend, report: Callable[[str], None]):
        self._backend, self._report = backend, report
        self._inbox: queue.Queue[tuple[str, tuple[Any, ...]] | None] = queue.Queue(CAPACITY)
        self._lock = threading.Lock()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name=f"{backend.name} logger", daemon=True)
        self._thread.start()

    @property
    def open(self) -> bool:
        return not self._ended

    def send(self, method: str, *args: Any) -> None:
        """Queue one call of the backend; never waits."""
        if self._ended:
            return
        try:
            self._inbox.put_nowait((method, args))
        except queue.Full:
            self._fail(f"it has not taken the last {CAPACITY} records")

    def close_soon(self) -> None:
        """Ask the backend to finish after what is queued."""
        if self._ended:
            return
        try:
            self._inbox.put_nowait(None)
        except queue.Full:
            self._fail(f"it has not taken the last {CAPACITY} records")

    def join(self, deadline: float, allowed_seconds: float) -> None:
        """Wait until the backend has finished, at most until ``deadline`` (of ``time.monotonic``)."""
        if self._ended and not self._thread.is_alive():
            return
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._fail(f"it has not finished within {allowed_seconds:g} s")

    def _run(self) -> None:
        try:
            while (record := self._inbox.get()) is not None and not self._ended:
                method, args = record
                getattr(self._backend, method)(*args)
            if not self._ended:
                self._backend.close()
                self._ended = True
        except Exception as error:  # noqa: BLE001 - whatever a tracker raises, training goes on without it
            self._fail(f"{type(error).__name__}: {error}")

    def _fail(self, cause: str) -> None:
        with self._lock:
            if self._ended:
                return
            self._ended = True
        # The backend may hang in this too, and its thread may be the one that hangs.
        advice: list[str] = []
        helper = threading.Thread(target=lambda: advice.append(self._backend.abandon()), daemon=True)
        helper.start()
        helper.join(ABANDON_SECONDS)
        self._report(f"{self._backend.name} is left out from here on ({cause}){'. '.join(['', *filter(None, advice)])}")


class TensorBoard:
    """Event files in ``folder``."""

    name = "TensorBoard"

    def __init__(self, folder: Path, config: Mapping[str, Any]):
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder))
        if config:
            self._writer.add_text("config", f"```json\n{json.dumps(config, indent=2, default=str)}\n```")

    def metrics(self, metrics: Mapping[str, float], step: int) -> None:
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()  # the writer has a thread too, whose errors only come out here

    def image(self, name: str, image: NDArray[np.uint8], step: int) -> None:
        self._writer.add_image(name, image, step, dataformats="HWC")
        self._writer.flush()

    def histograms(self, histograms: Mapping[str, Histogram], step: int) -> None:
        for name, histogram in histograms.items():
            self._writer.add_histogram_raw(
                name,
                min=histogram.minimum,
                max=histogram.maximum,
                num=int(histogram.counts.sum()),
                sum=histogram.total,
                sum_squares=histogram.squares,
                bucket_limits=histogram.edges[1:].tolist(),
                bucket_counts=histogram.counts.tolist(),
                global_step=step,
            )
        self._writer.flush()

    def embeddings(
        self,
        name: str,
        vectors: NDArray[np.float32],
        step: int,
        labels: Sequence[str] | None,
        images: NDArray[np.uint8] | None,
    ) -> None:
        import torch

        thumbnails: torch.Tensor | None = None
        if images is not None:
            thumbnails = torch.from_numpy(images.copy()).permute(0, 3, 1, 2).float() / 255
        self._writer.add_embedding(vectors, metadata=labels, label_img=thumbnails, global_step=step, tag=name)

    def close(self) -> None:
        self._writer.close()

    def abandon(self) -> str:
        return ""


class WeightsAndBiases:
    """One wandb run, its files below ``folder``/wandb.

    There is no ``wandb.watch`` here: its hooks read every gradient on the host in the middle of the backward pass. The
    same histograms come from ``MetricsLogger.watch_model``.
    """

    name = "Weights & Biases"

    def __init__(self, folder: Path, project: str, name: str, config: Mapping[str, Any]):
        import wandb

        self._wandb = wandb
        folder.mkdir(parents=True, exist_ok=True)
        # Without console="off" every print goes through wandb, and fails with it.
        settings = wandb.Settings(console="off", init_timeout=INIT_SECONDS)
        self._run: Any = wandb.init(project=project, name=name, config=dict(config), dir=str(folder), settings=settings)

    def metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def image(self, name: str, image: NDArray[np.uint8], step: int) -> None:
        self._run.log({name: self._wandb.Image(image)}, step=step)

    def histograms(self, histograms: Mapping[str, Histogram], step: int) -> None:
        wrapped = {
            name: self._wandb.Histogram(np_histogram=(histogram.counts, histogram.edges))
            for name, histogram in histograms.items()
        }
        self._run.log(wrapped, step=step)

    def embeddings(
        self,
        name: str,
        vectors: NDArray[np.float32],
        step: int,
        labels: Sequence[str] | None,
        images: NDArray[np.uint8] | None,
    ) -> None:
        extra: dict[str, Sequence[Any]] = {}
        if labels is not None:
            extra["label"] = labels
        if images is not None:
            extra["image"] = [self._wandb.Image(image) for image in images]
        columns = [*extra, *(f"d{i}" for i in range(vectors.shape[1]))]
        rows = [[*(column[i] for column in extra.values()), *vector] for i, vector in enumerate(vectors.tolist())]
        self._run.log({name: self._wandb.Table(columns=columns, data=rows)}, step=step)

    def close(self) -> None:
        self._run.finish()

    def abandon(self) -> str:
        # A service that is dead or hangs would hold up, or fail, the exit of this process in wandb's atexit hook.
        import psutil

        with contextlib.suppress(psutil.Error):
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if child.name().startswith("wandb-"):
                        child.kill()
        # SystemExit: teardown leaves with the exit code of the service.
        with contextlib.suppress(Exception, SystemExit):
            self._wandb.teardown()
        return f"Send what it has kept with: wandb sync {self._run.settings.sync_dir}"
