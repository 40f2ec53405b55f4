"""Checkpoints that survive a kill at any moment and load without executing anything.

A checkpoint is one safetensors file: tensors by name, everything else as JSON in its metadata, and a sha256 over both.
It is written by a background thread to a temporary name, fsynced and renamed. ``checkpoint_latest.pth`` and
``checkpoint_best.pth`` are hard links to the file of an epoch, so they cost no bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from hjepa.errors import HjepaError, UserError
from hjepa.utils.files import sync_folder

SCHEMA = 1
LATEST, BEST = "checkpoint_latest.pth", "checkpoint_best.pth"


class DamagedCheckpointError(HjepaError):
    """The file is not what was written: truncated, altered, or no checkpoint at all."""


@dataclass(frozen=True)
class SavedCheckpoint:
    """What a finished write left on disk."""

    path: Path
    epoch: int
    step: int
    metrics: dict[str, float]
    is_best: bool
    ranking: tuple[int, ...]  # steps of the ranked checkpoints, best first


# -- nested state <-> flat tensors + JSON ----------------------------------------------------------------------------


def pack(value: Any, tensors: dict[str, Tensor], name: str = "") -> Any:
    """A JSON twin of nested dicts, lists, tuples, numbers, arrays and tensors; tensors go to ``tensors`` by path."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach()
        return {"tensor": name}
    if isinstance(value, np.ndarray):
        tensors[name] = torch.from_numpy(value.astype(np.int64) if value.dtype == np.uint32 else value)
        return {"array": name, "dtype": str(value.dtype)}
    if isinstance(value, Mapping):
        return {
            "dict": [[key, pack(item, tensors, f"{name}.{key}" if name else str(key))] for key, item in value.items()]
        }
    if isinstance(value, (list, tuple)):
        items = [pack(item, tensors, f"{name}.{i}") for i, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{name}: a {type(value).__name__} cannot be stored in a checkpoint without pickling it")


def unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Inverse of ``pack``."""
    if isinstance(value, list):
        return [unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "array" in value:
        return tensors[value["array"]].numpy().astype(value["dtype"])
    if "tuple" in value:
        return tuple(unpack(item, tensors) for item in value["tuple"])
    return {key: unpack(item, tensors) for key, item in value["dict"]}


def _digest(state: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(state.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # A 0-d tensor cannot be viewed as bytes.
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write atomically: after a kill at any moment ``path`` is the old file or the new one, never a torn one."""
    tensors: dict[str, Tensor] = {}
    text = json.dumps(pack(state, tensors))
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"hjepa": text, "schema": str(SCHEMA), "sha256": _digest(text, tensors)}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(safetensors.torch.save(tensors, metadata))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The state that was written to ``path``, on the CPU.

    Raises:
        UserError: there is no such file.
        DamagedCheckpointError: its bytes are not those that were written.
    """
    if not path.is_file():
        raise UserError(
            f"no checkpoint at {path}: give the path of a checkpoint_*.pth file, or 'auto' for the latest one"
        )
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (safetensors.SafetensorError, OSError) as error:
        raise DamagedCheckpointError(f"{path} is damaged: {error}") from None
    if "hjepa" not in metadata:
        raise DamagedCheckpointError(f"{path} is a safetensors file, but not a checkpoint of hjepa")
    if int(metadata["schema"]) > SCHEMA:
        raise UserError(f"{path} was written by a newer hjepa (schema {metadata['schema']}); this one reads {SCHEMA}")
    if _digest(metadata["hjepa"], tensors) != metadata["sha256"]:
        raise DamagedCheckpointError(f"{path} is damaged: its checksum does not match its content")
    state: dict[str, Any] = unpack(json.loads(metadata["hjepa"]), tensors)
    return state


def _link(source: Path, name: Path) -> None:
    """Atomically make ``name`` another name of ``source``."""
    temporary = name.with_name(f".{name.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    os.link(source, temporary)
    os.replace(temporary, name)
    # rename() leaves the temporary name when both already are the same file.
    temporary.unlink(missing_ok=True)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DataParallel or DistributedDataParallel."""
    return model.module if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)) else model


# -- life cycle ------------------------------------------------------------------------------------------------------


class CheckpointManager:
    """Saves, finds, prunes and loads the checkpoints of one run.

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
        self._writer: threading.Thread | None = None
        self._failure: BaseException | None = None

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
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: Mapping[str, Any] | None = None,
        scaler: torch.amp.GradScaler | None = None,
        metrics: Mapping[str, float] | None = None,
        is_best: bool | None = None,
        *,
        step: int = 0,
        state: Mapping[str, Any] | None = None,
        wait: bool = False,
    ) -> Path:
        """Snapshot everything now and write it in the background.

        Args:
            scheduler: State of schedules that have one; ours are pure functions of the step.
            is_best: Overrides the ranking by ``metric_name``.
            step: Optimiser steps taken.
            state: Whatever else the caller needs to go on.
            wait: Return only after the file is durable.

        Returns:
            The path of the epoch's file, whole once the write has ended.

        Raises:
            HjepaError: the previous write failed, with its cause.
        """
        self.wait()
        metrics = dict(metrics or {})
        best = self.is_better(metrics) if is_best is None else is_best
        path = self.checkpoint_dir / f"checkpoint_epoch_{epoch:04d}.pth"
        value = metrics.get(self.metric_name)
        if value is not None and value == value:
            others = [item for item in self.ranking if item[1] != path.name]
            self.ranking = sorted([*others, (value, path.name, step)], key=lambda item: self._key(item[0]))
        content = {
            "epoch": epoch,
            "step": step,
            "model": unwrap(model).state_dict(),
            "optimizer": optimizer.state_dict() if optimizer else None,
            "scheduler": dict(scheduler) if scheduler else None,
            "scaler": scaler.state_dict() if scaler else None,
            "metrics": metrics,
            "ranking": self.ranking,
            "state": dict(state or {}),
        }
        snapshot = _clone(content)
        saved = SavedCheckpoint(
            path=path,
            epoch=epoch,
            step=step,
            metrics=metrics,
            is_best=best,
            ranking=tuple(item[2] for item in self.ranking),
        )
        self._writer = threading.Thread(target=self._write, args=(saved, snapshot), name="checkpoint-writer")
        self._writer.start()
        if wait:
            self.wait()
        return path

    def _write(self, saved: SavedCheckpoint, snapshot: dict[str, Any]) -> None:
        try:
            write_checkpoint(saved.path, snapshot)
            _link(saved.path, self.checkpoint_dir / LATEST)
            if saved.is_best:
                _link(saved.path, self.checkpoint_dir / BEST)
            if self.on_saved:
                self.on_saved(saved)
            self.cleanup_old_checkpoints(self.keep_best_n)
        except BaseException as error:  # noqa: BLE001 - raised again by wait(), on the training thread
            self._failure = error

    def wait(self) -> None:
        """Until the write in flight is durable; raises what it raised."""
        if self._writer:
            self._writer.join()
            self._writer = None
        failure, self._failure = self._failure, None
        if isinstance(failure, OSError):
            raise HjepaError(
                f"cannot write a checkpoint to {self.checkpoint_dir}: {failure}; the previous one is whole"
            )
        if failure:
            raise failure

    def cleanup_old_checkpoints(self, keep_last_n: int) -> None:
        """Remove epoch files other than the ``keep_last_n`` best and the newest two: one may turn out damaged."""
        files = sorted(self.checkpoint_dir.glob("checkpoint_epoch_*.pth"))
        kept = {name for _, name, _ in self.ranking[:keep_last_n]}
        for path in files[:-2]:
            if path.name not in kept:
                path.unlink(missing_ok=True)

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

        Raises:
            UserError: no such file, or it belongs to a model of another shape.
            DamagedCheckpointError: checksum or format.
        """
        content = read_checkpoint(Path(checkpoint_path))
        if model is not None:
            try:
                unwrap(model).load_state_dict(content["model"])
            except RuntimeError as error:
                raise UserError(
                    f"{checkpoint_path} does not fit this model: {error}\nUse the configuration it was trained with, "
                    "or train from scratch in another checkpoint.checkpoint_dir."
                ) from None
        if optimizer is not None and content["optimizer"] is not None:
            optimizer.load_state_dict(content["optimizer"])
        if scaler is not None and content["scaler"] is not None:
            scaler.load_state_dict(content["scaler"])
        self.ranking = [tuple(item) for item in content["ranking"]]
        return {key: content[key] for key in ("epoch", "step", "metrics", "scheduler", "state")}

    def find_resumable(self, report: Callable[[str], None]) -> Path | None:
        """The newest checkpoint whose checksum holds; says aloud which ones had to be passed over."""
        return next((path for path, _ in good_checkpoints(self.checkpoint_dir, report)), None)


def good_checkpoints(folder: Path, report: Callable[[str], None]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """(path, content) of the checkpoints of a folder whose checksums hold, newest first; the others are reported."""
    for path in [folder / LATEST, *sorted(folder.glob("checkpoint_epoch_*.pth"), reverse=True)]:
        if not path.exists():
            continue
        try:
            content = read_checkpoint(path)
        except DamagedCheckpointError as error:
            report(f"{error}; trying the one before")
        else:
            yield path, content


def _clone(value: Any) -> Any:
    """A copy whose tensors no later step can change."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _clone(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_clone(item) for item in value)
    return value
