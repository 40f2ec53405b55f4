"""Checkpoints that survive a kill at any moment, stop training for one memory copy, and execute nothing when loaded.

A save copies the tensors into host memory that the next save uses again; a background thread hashes that memory and
writes it to a temporary name (container.py says in which form), fsyncs and renames. ``checkpoint_latest.pth`` and
``checkpoint_best.pth`` are hard links to the file of an epoch, so they cost no bytes.
"""

from __future__ import annotations

import mmap
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hjepa.errors import HjepaError, UserError
from hjepa.files import sync
from hjepa.utils.container import (
    SCHEMA,
    DamagedCheckpointError,
    Entry,
    encode_header,
    flat,
    layout,
    pack,
    read_checkpoint,
    read_header,
    unpack,
    view_of,
    write_checkpoint,
    write_file,
)

__all__ = [
    "BEST",
    "LATEST",
    "SCHEMA",
    "CheckpointManager",
    "DamagedCheckpointError",
    "SavedCheckpoint",
    "good_checkpoints",
    "pack",
    "read_checkpoint",
    "read_header",
    "unpack",
    "unwrap",
    "write_checkpoint",
]

LATEST, BEST = "checkpoint_latest.pth", "checkpoint_best.pth"
_PIECE = 64 << 20  # bytes; a power of two, because torch rounds pinned memory up to one
_SHARE = 16 << 20  # bytes that a copying thread takes at a time, about
_COPIERS = 4  # threads; more do not make memory faster


class HasState(Protocol):
    def state_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class SavedCheckpoint:
    """What a finished write left on disk."""

    path: Path
    epoch: int
    step: int
    metrics: dict[str, float]
    is_best: bool
    ranking: tuple[int, ...]  # steps of the ranked checkpoints, best first
    sha256: str = ""  # of the file, computed while it was written; "" where the file was found and not written


def _link(source: Path, name: Path) -> None:
    """Atomically make ``name`` another name of ``source``."""
    temporary = name.with_name(f".{name.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    os.link(source, temporary)
    os.replace(temporary, name)
    # rename() leaves the temporary name when both already are the same file.
    temporary.unlink(missing_ok=True)


_Copies = list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]  # (to, from), each (n,)


def _copy(work: _Copies) -> None:
    """In NumPy, which lets the other threads run. torch would split every single copy and wait for the slowest thread
    a thousand times, which on a busy machine costs more than it gains."""
    for target, source in work:
        np.copyto(target, source)


def _places(entry: Entry) -> Iterator[tuple[int, int, int, int]]:
    """(piece, byte in the piece, byte in the tensor, bytes) of each part of a tensor."""
    position = entry.start
    while position < entry.stop:
        piece, at = divmod(position, _PIECE)
        length = min(entry.stop - position, _PIECE - at)
        yield piece, at, position - entry.start, length
        position += length


class _HostMemory:
    """Memory that one snapshot after another is copied into; it grows to the largest and stays, pinned for CUDA."""

    def __init__(self) -> None:
        # uint8 (_PIECE,), at the start of a memory page each; together they hold the tensors of a file without gaps.
        self._pieces: list[Tensor] = []

    def take(self, tensors: Mapping[str, Tensor], entries: list[Entry]) -> list[torch.cuda.Event]:
        """Copy ``tensors`` in; the memory may be read once the events have happened.

        Copies from a CUDA device are queued on its current stream, so that they come after the steps before and no
        later step can overtake them, without the host waiting for either.
        """
        devices = {tensor.device for tensor in tensors.values() if tensor.is_cuda}
        if devices and not all(piece.is_pinned() for piece in self._pieces):
            self._pieces.clear()
        self.grow(entries[-1].stop if entries else 0, pinned=bool(devices))
        arrays = [piece.numpy() for piece in self._pieces]
        work: list[_Copies] = [[]]
        pending = 0  # bytes in the last share
        for entry in entries:
            source = flat(tensors[entry.name])
            array = source.numpy() if source.is_cpu else None
            for piece, at, start, length in _places(entry):
                if array is None:
                    target = self._pieces[piece][at : at + length]
                    target.copy_(source[start : start + length], non_blocking=source.is_cuda)
                    continue
                work[-1].append((arrays[piece][at : at + length], array[start : start + length]))
                pending += length
                if pending >= _SHARE:
                    work.append([])
                    pending = 0
        with ThreadPoolExecutor(min(_COPIERS, torch.get_num_threads())) as threads:
            list(threads.map(_copy, work))
        events = []
        for device in devices:
            events.append(torch.cuda.Event(blocking=True))  # type: ignore[no-untyped-call]
            events[-1].record(torch.cuda.current_stream(device))
        return events

    def grow(self, size: int, *, pinned: bool) -> None:
        """Have at least ``size`` bytes."""
        while len(self._pieces) * _PIECE < size:
            if pinned:
                self._pieces.append(torch.empty(_PIECE, dtype=torch.uint8, pin_memory=True))
            else:
                pages = mmap.mmap(-1, _PIECE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                self._pieces.append(torch.frombuffer(pages, dtype=torch.uint8))

    def touch(self) -> None:
        """Write to all of it. The system finds a page of memory when it is first written to, which takes longer than
        the copy itself."""
        for piece in self._pieces:
            piece.numpy().fill(0)

    def views(self, size: int) -> Iterator[memoryview]:
        for piece, start in zip(self._pieces, range(0, size, _PIECE), strict=False):
            yield view_of(piece[: size - start])


# -- states of live objects ------------------------------------------------------------------------------------------


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DataParallel, DistributedDataParallel and torch.compile, in any order."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _plain(name: str) -> str:
    """A parameter's name without the parts that torch.compile puts in, of the whole model or of a block."""
    return name.replace("_orig_mod.", "")


def _state_of(thing: Mapping[str, Any] | HasState | None) -> dict[str, Any] | None:
    if thing is None:
        return None
    return dict(thing) if isinstance(thing, Mapping) else thing.state_dict()


def _shape(value: Any) -> str:
    return "x".join(map(str, value.shape)) or "a number" if isinstance(value, Tensor) else type(value).__name__


def misfits_of_model(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """In words, where the tensors of a file differ from a model's by name or shape; empty where they fit."""
    lists = {
        "only in the model": [name for name in ours if name not in theirs],
        "only in the file": [name for name in theirs if name not in ours],
        "of another shape": [
            f"{name} ({_shape(theirs[name])} in the file, {_shape(ours[name])} in the model)"
            for name in ours
            if name in theirs and _shape(ours[name]) != _shape(theirs[name])
        ],
    }
    return [
        f"{what}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for what, names in lists.items()
        if names
    ]


def _misfit_of_optimizer(ours: torch.optim.Optimizer, theirs: Mapping[str, Any]) -> str | None:
    """What ``Optimizer.load_state_dict`` would refuse or, worse, would not."""
    sizes = [len(group["params"]) for group in ours.param_groups]
    their_sizes = [len(group["params"]) for group in theirs["param_groups"]]
    if sizes != their_sizes:
        return f"its groups have {their_sizes} parameters, those of this optimiser {sizes}"
    for group, other in zip(ours.param_groups, theirs["param_groups"], strict=True):
        mine, yours = set(group) - set(other), set(other) - set(group)
        if mine and yours:  # one side alone: another version of torch
            kind = type(ours).__name__
            return f"it has the settings {', '.join(sorted(yours))}, this {kind} has {', '.join(sorted(mine))}"
        for name, parameter in zip(other["params"], group["params"], strict=True):
            for key, value in theirs["state"].get(name, {}).items():
                same_rank = isinstance(value, Tensor) and 0 < value.dim() == parameter.dim()
                if same_rank and value.shape != parameter.shape:
                    return f"{key} of parameter {name} is {_shape(value)}, the parameter {_shape(parameter)}"
    return None


# -- life cycle ------------------------------------------------------------------------------------------------------


class CheckpointManager:
    """Saves, finds, prunes and loads the checkpoints of one run.

    Its first save allocates host memory of the size of the state, which later saves use again, unless ``reserve`` has
    done so in the background.

    Args:
        checkpoint_dir: Folder, made if missing.
        keep_best_n: Epoch files kept besides the latest, by metric.
        save_frequency: Epochs between periodic saves.
        metric_name: Key in ``metrics`` that ranks checkpoints; those without it are never best.
        mode: Whether a smaller or a larger metric is better.
        on_saved: Called on the writer's thread after each write, to upload the file for instance.
    """

    def __init__(
        self,
        checkpoint_dir: str | Path,
        keep_best_n: int = 3,
        save_frequency: int = 10,
        metric_name: str = "val_loss",
        mode: Literal["min", "max"] = "min",
        on_saved: Callable[[SavedCheckpoint], None] | None = None,
    ):
        if keep_best_n < 0 or save_frequency < 1 or mode not in ("min", "max"):
            raise UserError(
                f"keep_best_n {keep_best_n}, save_frequency {save_frequency}, mode {mode!r}: "
                "expected at least 0, at least 1, 'min' or 'max'"
            )
        self.checkpoint_dir = Path(checkpoint_dir)
        self.checkpoint_dir.mkdir(parents=True, exist_ok=True)
        for left_behind in self.checkpoint_dir.glob(".checkpoint_*.tmp"):  # by a writer that was killed
            left_behind.unlink(missing_ok=True)
        self.keep_best_n = keep_best_n
        self.save_frequency = save_frequency
        self.metric_name = metric_name
        self.mode = mode
        self.on_saved = on_saved
        self.ranking: list[tuple[float, str, int]] = []  # (metric, file name, step), best first; part of the state
        self._memory = _HostMemory()
        self._reserving: threading.Thread | None = None
        self._writer: threading.Thread | None = None
        self._failure: BaseException | None = None

    def reserve(self, size: int, *, pinned: bool = False) -> None:
        """Make room for states of about ``size`` bytes, in the background, so that the first save blocks no longer
        than the others.

        Args:
            pinned: For states on a CUDA device.
        """

        def work() -> None:
            self._memory.grow(size, pinned=pinned)
            if not pinned:  # pinning has done it
                self._memory.touch()

        # No daemon: Python would end that within torch at the end of the process, which aborts it.
        self._reserving = threading.Thread(target=work, name="checkpoint-memory")
        self._reserving.start()

    def should_save(self, epoch: int) -> bool:
        """Whether the end of ``epoch`` (counted from 0) is due for a periodic save."""
        return (epoch + 1) % self.save_frequency == 0

    def is_better(self, metrics: Mapping[str, float]) -> bool:
        value = metrics.get(self.metric_name)
        if value is None or value != value:
            return False
        return not self.ranking or self._key(value) < self._key(self.ranking[0][0])

    def _key(self, value: float) -> float:
        return -value if self.mode == "max" else value

    def save_checkpoint(
        self,
        epoch: int,
        model: nn.Module | Mapping[str, Any],
        optimizer: torch.optim.Optimizer | Mapping[str, Any] | None = None,
        scheduler: Mapping[str, Any] | HasState | None = None,
        scaler: torch.amp.GradScaler | None = None,
        metrics: Mapping[str, float] | None = None,
        is_best: bool | None = None,
        *,
        step: int = 0,
        state: Mapping[str, Any] | None = None,
        wait: bool = False,
    ) -> Path:
        """Snapshot everything now and write it in the background.

        Training may go on at once: what a later step changes does not reach the snapshot, on the CPU because it has
        been copied, on CUDA because the copy is queued on the current stream before that step. Work on other streams
        has to wait for that one.

        Args:
            model: A module, wrapped or not, or the full tensors by name that were gathered from a sharded one.
            optimizer: Likewise, an optimiser or its ``state_dict()``.
            scheduler: State of schedules that have one; ours are pure functions of the step.
            is_best: Overrides the ranking by ``metric_name``.
            step: Optimiser steps taken.
            state: Whatever else the caller needs to go on.
            wait: Return only after the file is durable.

        Returns:
            The path of the epoch's file, whole once the write has ended.

        Raises:
            HjepaError: the previous write failed, with its cause.
            TypeError: something in the state could only be pickled.
        """
        self.wait()
        metrics = {name: float(value) for name, value in (metrics or {}).items()}
        best = self.is_better(metrics) if is_best is None else is_best
        path = self.checkpoint_dir / f"checkpoint_epoch_{epoch:04d}.pth"
        if any(name == path.name and ranked != step for _, name, ranked in self.ranking):
            # Stopped within the next epoch: the file of the epoch's end may be one of the best.
            path = path.with_stem(f"{path.stem}_step_{step:08d}")
        before, value = self.ranking, metrics.get(self.metric_name)
        ranking = before
        if value is not None and value == value:
            others = [item for item in before if item[1] != path.name]
            ranking = sorted([*others, (value, path.name, step)], key=lambda item: self._key(item[0]))
        weights = model if isinstance(model, Mapping) else unwrap(model).state_dict()
        content = {
            "epoch": epoch,
            "step": step,
            "model": {_plain(name): tensor for name, tensor in weights.items()},
            "optimizer": _state_of(optimizer),
            "scheduler": _state_of(scheduler),
            "scaler": _state_of(scaler),
            "metrics": metrics,
            "ranking": ranking,
            "state": dict(state or {}),
        }
        tensors: dict[str, Tensor] = {}
        tree = pack(content, tensors)
        entries = layout(tensors)
        if self._reserving:
            self._reserving.join()
            self._reserving = None
        copied = self._memory.take(tensors, entries)
        self.ranking = ranking
        saved = SavedCheckpoint(
            path=path,
            epoch=epoch,
            step=step,
            metrics=metrics,
            is_best=best,
            ranking=tuple(item[2] for item in ranking),
        )
        self._writer = threading.Thread(
            target=self._write, args=(saved, tree, entries, copied, before), name="checkpoint-writer"
        )
        self._writer.start()
        if wait:
            self.wait()
        return path

    def _write(
        self,
        saved: SavedCheckpoint,
        tree: Any,
        entries: list[Entry],
        copied: list[torch.cuda.Event],
        ranking_before: list[tuple[float, str, int]],
    ) -> None:
        try:
            try:
                for event in copied:
                    event.synchronize()
                size = entries[-1].stop if entries else 0
                sha256 = write_file(saved.path, encode_header(tree, entries), self._memory.views(size), direct=True)
                _link(saved.path, self.checkpoint_dir / LATEST)
                if saved.is_best:
                    _link(saved.path, self.checkpoint_dir / BEST)
                sync(self.checkpoint_dir)
            except OSError as error:
                self.ranking = ranking_before
                raise HjepaError(
                    f"cannot write a checkpoint to {self.checkpoint_dir}: {error}; the previous one is whole"
                ) from None
            if self.on_saved:
                self.on_saved(replace(saved, sha256=sha256))
            self.cleanup_old_checkpoints()
        except BaseException as error:  # noqa: BLE001 - raised again by wait(), on the training thread
            self._failure = error

    def wait(self) -> None:
        """Until the write in flight is durable; raises what it raised."""
        if self._writer:
            self._writer.join()
            self._writer = None
        failure, self._failure = self._failure, None
        if failure:
            raise failure

    def cleanup_old_checkpoints(self, keep_last_n: int = 2) -> None:
        """Remove epoch files other than the newest ``keep_last_n`` and the best ``keep_best_n``.

        Two are kept by default because the newest may turn out damaged. What ``checkpoint_latest.pth`` and
        ``checkpoint_best.pth`` name always stays.
        """
        if keep_last_n < 0:
            raise UserError(f"keep_last_n is {keep_last_n}; expected at least 0")
        kept = {name for _, name, _ in self.ranking[: self.keep_best_n]}
        for path in _epoch_files(self.checkpoint_dir)[keep_last_n:]:
            if path.name not in kept:
                path.unlink(missing_ok=True)

    def set_aside(self, after_step: int, report: Callable[[str], None]) -> None:
        """Move checkpoints of later steps to a folder of their own: another run left them, which this one replaces.

        Without this they would pass for the newest of this run. Nothing is deleted.

        Args:
            after_step: The step from which training goes on; -1 moves all of them.
        """
        later = []
        for path in [*_epoch_files(self.checkpoint_dir), self.checkpoint_dir / LATEST, self.checkpoint_dir / BEST]:
            try:
                if path.exists() and read_header(path)["step"] > after_step:
                    later.append(path)
            except DamagedCheckpointError:
                later.append(path)
        if not later:
            return
        number = 1
        while (folder := self.checkpoint_dir / f"superseded-{number}").exists():
            number += 1
        folder.mkdir()
        for path in later:
            path.rename(folder / path.name)
        report(f"{len(later)} checkpoints of an earlier run are set aside in {folder}")

    def get_best_checkpoint(self) -> Path | None:
        path = self.checkpoint_dir / BEST
        return path if path.exists() else None

    def get_latest_checkpoint(self) -> Path | None:
        path = self.checkpoint_dir / LATEST
        return path if path.exists() else None

    def load_checkpoint(
        self,
        checkpoint_path: str | Path,
        model: nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> dict[str, Any]:
        """Restore into the objects given and return the rest: epoch, step, metrics, scheduler, state.

        Nothing is changed unless all of it fits. The state of a scaler is left alone where the file has none, because
        the run before had none.

        Raises:
            UserError: no such file, or it belongs to a model or an optimiser of another shape.
            DamagedCheckpointError: checksum or format.
        """
        self.wait()
        wanted = [key for key, item in (("model", model), ("optimizer", optimizer)) if item is not None]
        content = read_checkpoint(Path(checkpoint_path), ["state", "scheduler", *wanted])
        missing = [key for key in wanted if content.get(key) is None]
        if missing or "epoch" not in content:
            raise UserError(
                f"{checkpoint_path} holds no {' and no '.join(missing) or 'training state'}: "
                "give a checkpoint that was saved with it, or load without it"
            )
        if model is not None:
            target = unwrap(model)
            names = {_plain(name): name for name in target.state_dict()}
            weights = {names.get(name, name): value for name, value in content["model"].items()}
            misfits = misfits_of_model(target.state_dict(), weights)
            if misfits:
                raise UserError(
                    f"{checkpoint_path} does not fit this model; {'; '.join(misfits)}.\nUse the configuration it was "
                    "trained with, or train from scratch in another checkpoint.checkpoint_dir."
                )
        if optimizer is not None:
            misfit = _misfit_of_optimizer(optimizer, content["optimizer"])
            if misfit:
                raise UserError(
                    f"the optimiser state in {checkpoint_path} does not fit: {misfit}.\nUse the training.optimizer and "
                    "the model it was saved with, or load the model alone."
                )
            optimizer.load_state_dict(content["optimizer"])
        if model is not None:
            target.load_state_dict(weights)
        if scaler is not None and content["scaler"]:
            scaler.load_state_dict(content["scaler"])
        self.ranking = [tuple(item) for item in content["ranking"]]
        return {key: content[key] for key in ("epoch", "step", "metrics", "scheduler", "state")}

    def find_resumable(self, report: Callable[[str], None]) -> Path | None:
        """The newest checkpoint whose checksum holds; says aloud which ones had to be passed over."""
        return next((path for path, _ in good_checkpoints(self.checkpoint_dir, report)), None)


def _epoch_files(folder: Path) -> list[Path]:
    """Newest first, by (epoch, step within it): from epoch 10,000 on the names do not sort."""
    found = []
    for path in folder.glob("checkpoint_epoch_*.pth"):
        if numbers := re.fullmatch(r"checkpoint_epoch_(\d+)(?:_step_(\d+))?", path.stem):
            found.append((int(numbers[1]), int(numbers[2] or 0), path))
    return [path for *_, path in sorted(found, reverse=True)]


def good_checkpoints(folder: Path, report: Callable[[str], None]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """(path, content) of the checkpoints of a folder whose checksums hold, newest first; the others are reported.

    Every byte is read, none is kept: the tensors in the content are on the meta device.
    """
    seen = set()
    for path in [folder / LATEST, *_epoch_files(folder)]:
        if not path.exists():
            continue
        status = path.stat()
        if (status.st_dev, status.st_ino) in seen:  # two names of one file
            continue
        seen.add((status.st_dev, status.st_ino))
        try:
            content = read_checkpoint(path, ())
        except DamagedCheckpointError as error:
            report(f"{error}; trying the one before")
        else:
            yield path, content
