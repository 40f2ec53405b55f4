"""Checkpoints: what comes back, what is refused, what is kept."""

from __future__ import annotations

import copy
import gc
import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from hjepa.errors import HjepaError, UserError
from hjepa.files import file_sha256
from hjepa.utils import container
from hjepa.utils.checkpoint import (
    BEST,
    LATEST,
    CheckpointManager,
    DamagedCheckpointError,
    SavedCheckpoint,
    good_checkpoints,
    pack,
    read_checkpoint,
    read_header,
    unpack,
    write_checkpoint,
)


def trained(steps: int = 3) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def save(manager: CheckpointManager, epoch: int, score: float | None = None) -> Path:
    model, optimizer = trained()
    metrics = {} if score is None else {"score": score}
    return manager.save_checkpoint(epoch, model, optimizer, metrics=metrics, step=epoch * 10, wait=True)


def test_pack__nested_state_comes_back_equal() -> None:
    state = {"a": [1, 2.5, None, True], 3: (torch.arange(4), {"x": "y"}), "n": np.arange(3, dtype=np.uint32)}
    tensors: dict[str, torch.Tensor] = {}
    back = unpack(pack(state, tensors), tensors)
    assert back["a"] == state["a"]
    assert back[3][1] == {"x": "y"}
    assert torch.equal(back[3][0], torch.arange(4))
    assert back["n"].dtype == np.uint32
    with pytest.raises(TypeError, match="without pickling"):
        pack({"f": print}, {})


def test_save_and_load__model_and_optimizer_come_back_bit_for_bit(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, metric_name="score", mode="max")
    model, optimizer = trained()
    manager.save_checkpoint(
        4, model, optimizer, scheduler={"lr": 0.1}, metrics={"score": np.float64(0.5)}, step=40, state={"x": 1}
    )
    manager.wait()
    other, other_optimizer = trained(1)
    content = manager.load_checkpoint(tmp_path / LATEST, other, other_optimizer)
    assert content == {
        "epoch": 4,
        "step": 40,
        "metrics": {"score": 0.5},
        "scheduler": {"lr": 0.1},
        "state": {"x": 1},
    }
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    mine, theirs = optimizer.state_dict(), other_optimizer.state_dict()
    assert mine["param_groups"] == theirs["param_groups"]
    for index in mine["state"]:
        assert all(torch.equal(mine["state"][index][k], theirs["state"][index][k]) for k in mine["state"][index])


def test_save__a_snapshot_is_not_changed_by_later_steps(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    model, optimizer = trained()
    before = model.weight.detach().clone()
    manager.save_checkpoint(0, model, optimizer)
    with torch.no_grad():
        model.weight.zero_()
    manager.wait()
    assert torch.equal(read_checkpoint(tmp_path / LATEST)["model"]["weight"], before)


# -- the file --------------------------------------------------------------------------------------------------------


def test_write__every_dtype_and_shape_comes_back_and_safetensors_can_read_it(tmp_path: Path) -> None:
    # 3 and 5 elements: the starts of wide tensors are multiples of their width only if the layout sees to it.
    state = {name: torch.arange(3).to(dtype) for name, dtype in container._DTYPES.items()}
    state |= {"bytes": torch.arange(5, dtype=torch.uint8), "empty": torch.zeros(0, 7), "scalar": torch.tensor(2.5)}
    state |= {"transposed": torch.arange(6.0).view(2, 3).t(), "negative": torch.tensor([-0.0, float("nan")])}
    nested = {"tensors": state, "a.b": torch.ones(1), "a": {"b": torch.zeros(1)}, "__sha256__": torch.ones(2)}
    sha256 = write_checkpoint(tmp_path / "c.pth", nested)
    assert sha256 == file_sha256(tmp_path / "c.pth")
    back = read_checkpoint(tmp_path / "c.pth")
    for name, tensor in state.items():
        found = back["tensors"][name]
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(container.flat(found), container.flat(tensor)), name
    assert (back["a.b"].item(), back["a"]["b"].item(), back["__sha256__"].tolist()) == (1, 0, [1, 1])
    theirs = safetensors.torch.load_file(tmp_path / "c.pth")
    assert torch.equal(theirs["tensors.transposed"], state["transposed"])
    write_checkpoint(tmp_path / "none.pth", {"n": 1})
    assert read_checkpoint(tmp_path / "none.pth") == {"n": 1}


def test_read__tensors_of_other_parts_are_checked_and_not_kept(tmp_path: Path) -> None:
    path = save(CheckpointManager(tmp_path), 3)
    content = read_checkpoint(path, ("model",))
    assert content["model"]["weight"].device.type == "cpu"
    assert content["optimizer"]["state"][0]["exp_avg"].is_meta
    assert content["optimizer"]["state"][0]["exp_avg"].shape == (4, 4)
    damaged = bytearray(path.read_bytes())
    damaged[-40] ^= 1  # in the last tensor
    path.write_bytes(damaged)
    with pytest.raises(DamagedCheckpointError, match="checksum"):
        read_checkpoint(path, ())


def test_read_header__reads_no_tensor(tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    size = 64_000_000
    lineage = {"config": "abc", "world": [1, 2]}
    state = {"lineage": lineage, "rng": np.zeros(4, dtype=np.uint32)}
    write_checkpoint(path, {"epoch": 3, "step": 40, "metrics": {"x": 0.5}, "model": torch.ones(size), "state": state})
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before = _bytes_read()
    header = read_header(path)
    assert _bytes_read() - before < 100_000
    assert (header["epoch"], header["step"], header["metrics"]) == (3, 40, {"x": 0.5})
    assert header["state"]["lineage"] == lineage
    assert (header["model"].shape, header["model"].is_meta) == ((size,), True)


def _bytes_read() -> int:
    """By this process, from the disk or from memory."""
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["rchar"])


def test_damage__a_change_of_any_byte_is_found(tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    write_checkpoint(path, {"epoch": 1, "step": 2, "t": torch.arange(8.0), "b": torch.ones(3, dtype=torch.bool)})
    good = path.read_bytes()
    end = _length(good)
    padding = good[:end].rindex(b"}") + 1
    assert (end, good[padding:end].strip()) == (container.BLOCK, b"")
    for position in [*range(padding), padding, end - 1, *range(end, len(good))]:
        bad = bytearray(good)
        bad[position] ^= 1 << position % 8
        path.write_bytes(bad)
        # A changed digit of the schema may look like a newer one: refused in words too.
        with pytest.raises((DamagedCheckpointError, UserError)):
            read_checkpoint(path)
    json_text = good.index(b"step")
    bad = bytearray(good)
    bad[json_text + 1] ^= 1
    path.write_bytes(bad)
    with pytest.raises(DamagedCheckpointError, match="checksum of its header"):
        read_header(path)


def _length(good: bytes) -> int:
    return 8 + int.from_bytes(good[:8], "little")


def _flip(good: bytes, position: int) -> bytes:
    bad = bytearray(good)
    bad[position] ^= 1
    return bytes(bad)


def _newer(good: bytes) -> bytes:
    assert good.count(b'"schema":"2"') == 1
    return good.replace(b'"schema":"2"', b'"schema":"3"')


def _foreign(_: bytes) -> bytes:
    return safetensors.torch.save({"weight": torch.ones(2)})


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda good: b"", "it is empty"),
    "a text": (lambda good: b"not a checkpoint", "does not begin like one"),
    "five bytes": (lambda good: good[:5], "it ends within its header"),
    "cut in the header": (lambda good: good[: _length(good) // 2], "it ends within its header"),
    "cut in the tensors": (lambda good: good[:-100], "bytes and should have"),
    "something after the end": (lambda good: good + b"x", "bytes and should have"),
    "flipped in the length": (lambda good: _flip(good, 0), "header cannot be read"),
    "flipped in the length's high byte": (lambda good: _flip(good, 7), "does not begin like one"),
    "flipped in the table": (lambda good: _flip(good, good.index(b"data_offsets")), "header cannot be read"),
    "flipped in the JSON": (lambda good: _flip(good, good.index(b"metrics")), "checksum"),
    "flipped in a tensor": (lambda good: _flip(good, _length(good) + 10), "checksum"),
    "flipped in the checksum": (lambda good: _flip(good, -1), "checksum"),
    "zeros": (lambda good: bytes(len(good)), "does not begin like one"),
    "of another program": (_foreign, "not a checkpoint of hjepa"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damage__is_said_and_the_previous_one_is_used(tmp_path: Path, case: str) -> None:
    damage, words = DAMAGES[case]
    manager = CheckpointManager(tmp_path)
    good, bad = save(manager, 0), save(manager, 1)
    bad.write_bytes(damage(bad.read_bytes()))
    with pytest.raises(DamagedCheckpointError, match=words):
        read_checkpoint(bad)
    said: list[str] = []
    assert manager.find_resumable(said.append) == good
    assert len(said) == 1  # the latest and the epoch's file are one
    assert words in said[0]
    assert LATEST in said[0]
    assert "trying the one before" in said[0]


@contextmanager
def _unprivileged() -> Iterator[None]:
    """root may read everything, so it is somebody else for a moment."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


def test_refused__what_a_user_can_mend(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    path = save(manager, 0)
    good = path.read_bytes()
    with pytest.raises(UserError, match="no checkpoint at"):
        manager.load_checkpoint(tmp_path / "nope.pth")
    with pytest.raises(UserError, match="no checkpoint at"):
        manager.load_checkpoint(path / "below_a_file.pth")
    with pytest.raises(UserError, match="is a folder"):
        manager.load_checkpoint(tmp_path)
    path.chmod(0)
    with _unprivileged(), pytest.raises(UserError, match="may not be read"):
        manager.load_checkpoint(path)
    path.chmod(0o600)
    path.write_bytes(_newer(good))
    with pytest.raises(UserError, match=r"newer hjepa \(schema 3\); this one reads up to 2: update"):
        manager.load_checkpoint(path)
    with pytest.raises(UserError, match="newer"):  # no older one is taken in its place
        manager.find_resumable(print)
    write_checkpoint(path, {"epoch": 0, "model": {}, "something": 1})
    with pytest.raises(UserError, match="holds no optimizer"):
        manager.load_checkpoint(path, optimizer=trained()[1])


class _Malicious:
    """Unpickling it makes a file."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.trace),))


def _torch_save(value: object, *, archive: bool) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=archive)
    return file.getvalue()


PICKLES: dict[str, tuple[Callable[[object], bytes], str]] = {
    "torch.save": (lambda value: _torch_save(value, archive=True), "an archive written by torch.save"),
    "torch.save before 1.6": (lambda value: _torch_save(value, archive=False), "is a pickle"),
    "protocol 5": (lambda value: pickle.dumps(value, 5), "is a pickle"),
    "protocol 2": (lambda value: pickle.dumps(value, 2), "is a pickle"),
    "protocol 0": (lambda value: pickle.dumps(value, 0), "no checkpoint at all"),
}


@pytest.mark.parametrize("case", PICKLES)
def test_pickle__is_named_and_not_executed(tmp_path: Path, case: str) -> None:
    dumps, words = PICKLES[case]
    trace = tmp_path / "executed"
    path = tmp_path / LATEST
    path.write_bytes(dumps({"model": _Malicious(trace)}))
    manager = CheckpointManager(tmp_path)
    for load in (manager.load_checkpoint, read_checkpoint, read_header):
        with pytest.raises(HjepaError, match=words):
            load(path)
    assert not trace.exists()
    pickle.loads(pickle.dumps(_Malicious(trace)))  # noqa: S301 - it would have
    assert trace.exists()


def _write_schema_1(path: Path, state: dict[str, Any]) -> None:
    """As version 0.1.0 did."""
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(pack(state, tensors))
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name] = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    metadata = {"hjepa": text, "schema": "1", "sha256": digest.hexdigest()}
    path.write_bytes(safetensors.torch.save(tensors, metadata))


def test_schema_1__is_still_read_and_checked(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    new = read_checkpoint(save(manager, 7, 0.5))
    old = tmp_path / "old.pth"
    _write_schema_1(old, new | {"state": {"rng": np.arange(3, dtype=np.uint32), "b": torch.ones(1, dtype=torch.bool)}})
    model, optimizer = trained(1)
    found = manager.load_checkpoint(old, model, optimizer)
    assert torch.equal(model.state_dict()["weight"], new["model"]["weight"])
    assert found["state"]["rng"].tolist() == [0, 1, 2]
    assert read_header(old)["step"] == 70
    good = old.read_bytes()
    for position in (_length(good) + 10, good.index(b"metrics")):
        old.write_bytes(_flip(good, position))
        with pytest.raises(DamagedCheckpointError, match="checksum"):
            read_checkpoint(old)


# -- what fits what --------------------------------------------------------------------------------------------------


def test_load__nothing_is_changed_unless_all_of_it_fits(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    groups = [{"params": model[0].parameters()}, {"params": model[1].parameters(), "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    path = manager.save_checkpoint(0, model, optimizer, wait=True)

    wider = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    deeper = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(2, 2))
    same = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    swapped = [same[1].weight, same[1].bias], [same[0].weight, same[0].bias]
    cases: list[tuple[nn.Module, torch.optim.Optimizer | None, str]] = [
        (wider, None, r"does not fit this model; of another shape: 1.weight \(2x4 in the file, 3x4 in the model\)"),
        (deeper, None, "only in the model: 2.weight, 2.bias"),
        (same[0], None, "only in the file: 0.weight, 0.bias, 1.weight and 1 more"),
        (same, torch.optim.AdamW(same.parameters()), r"groups have \[2, 2\] parameters, those of this optimiser \[4\]"),
        (
            same,
            torch.optim.SGD([{"params": m.parameters()} for m in same]),
            "settings .*betas.*this SGD has .*momentum",
        ),
        (
            same,
            torch.optim.AdamW([{"params": group} for group in swapped]),
            "exp_avg of parameter 0 is 4x4, the .* 2x4",
        ),
    ]
    for other, other_optimizer, words in cases:
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(UserError, match=words):
            manager.load_checkpoint(path, other, other_optimizer)
        assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
        assert not (other_optimizer and other_optimizer.state)
    manager.load_checkpoint(path, same, torch.optim.AdamW([{"params": m.parameters()} for m in same]))
    assert torch.equal(same[1].weight, model[1].weight)


def _wrapped(kind: str, model: nn.Module) -> nn.Module:
    if kind == "DataParallel":
        return nn.DataParallel(model)
    if kind == "DDP":
        return nn.parallel.DistributedDataParallel(model)
    if kind == "compiled":
        return torch.compile(model, backend="eager")  # type: ignore[return-value]
    if kind == "compiled DDP":
        return torch.compile(_wrapped("DDP", model), backend="eager")  # type: ignore[return-value]
    if kind == "DDP of compiled":
        return _wrapped("DDP", _wrapped("compiled", model))
    for name, child in model.named_children():
        setattr(model, name, torch.compile(child, backend="eager"))
    return model


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
    gc.collect()  # what holds the group must not be collected in a process that is forked later


@pytest.mark.parametrize(
    "kind", ["DataParallel", "DDP", "compiled", "compiled DDP", "DDP of compiled", "compiled blocks"]
)
@pytest.mark.usefixtures("one_rank")
def test_wrappers__leave_no_trace_in_the_file(tmp_path: Path, kind: str) -> None:
    manager = CheckpointManager(tmp_path)
    plain = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    wrapped = _wrapped(kind, copy.deepcopy(plain))
    optimizer = torch.optim.AdamW(wrapped.parameters())
    wrapped(torch.randn(2, 4)).square().sum().backward()
    optimizer.step()
    path = manager.save_checkpoint(0, wrapped, optimizer, wait=True)
    assert list(read_header(path)["model"]) == list(plain.state_dict())
    manager.load_checkpoint(path, plain, torch.optim.AdamW(plain.parameters()))  # on one process, without the wrapper
    for ours, theirs in zip(plain.parameters(), wrapped.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    other = _wrapped(kind, nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))
    manager.load_checkpoint(path, other)
    for ours, theirs in zip(plain.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_gathered_states__are_the_same_file_as_live_objects(tmp_path: Path) -> None:
    model, optimizer = trained()
    live = CheckpointManager(tmp_path / "live").save_checkpoint(0, model, optimizer, wait=True)
    states = model.state_dict(), optimizer.state_dict()
    gathered = CheckpointManager(tmp_path / "gathered").save_checkpoint(0, *states, wait=True)
    assert live.read_bytes() == gathered.read_bytes()


def test_usage_of_the_spec__runs_as_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, optimizer = trained()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    scaler.scale(model(torch.ones(1, 4)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    epoch, val_loss, is_best, scheduler_state = 9, 0.25, True, {"step": 90}
    weight = model.weight.detach().clone()

    from hjepa.utils import CheckpointManager

    ckpt_manager = CheckpointManager(
        checkpoint_dir='results/checkpoints',
        keep_best_n=3,
        save_frequency=10,
        metric_name='val_loss',
        mode='min',
    )  # fmt: skip

    # Save checkpoint
    ckpt_manager.save_checkpoint(
        epoch=epoch,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler_state,
        scaler=scaler,
        metrics={'val_loss': val_loss},
        is_best=is_best,
    )  # fmt: skip

    model, optimizer = trained(1)
    scaler = torch.amp.GradScaler("cpu")

    # Load checkpoint
    metadata = ckpt_manager.load_checkpoint(
        checkpoint_path='results/checkpoints/checkpoint_best.pth',
        model=model,
        optimizer=optimizer,
        scaler=scaler,
    )  # fmt: skip

    assert torch.equal(model.weight, weight)
    assert scaler.state_dict() == {
        "scale": 1024.0,
        "growth_factor": 2.0,
        "backoff_factor": 0.5,
        "growth_interval": 2,
        "_growth_tracker": 1,
    }
    assert metadata == {"epoch": 9, "step": 0, "metrics": {"val_loss": 0.25}, "scheduler": {"step": 90}, "state": {}}


def test_scaler__none_or_disabled_on_either_side_is_fine(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    scalers = [None, torch.amp.GradScaler("cpu", enabled=False), torch.amp.GradScaler("cpu", init_scale=8.0)]
    for saved in scalers:
        model, optimizer = trained()
        path = manager.save_checkpoint(0, model, optimizer, scaler=saved)
        for enabled in (False, True):
            loaded = torch.amp.GradScaler("cpu", init_scale=2.0, enabled=enabled)
            manager.load_checkpoint(path, model, optimizer, loaded)
            assert loaded.get_scale() == (1.0 if not enabled else 8.0 if saved is scalers[2] else 2.0)


# -- life cycle ------------------------------------------------------------------------------------------------------


def test_save__within_an_epoch_leaves_the_ranked_file_of_its_start_alone(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, metric_name="score", mode="max", save_frequency=1)
    model, optimizer = trained()
    best = manager.save_checkpoint(3, model, optimizer, metrics={"score": 0.9}, step=30, wait=True)
    stopped = manager.save_checkpoint(3, model, optimizer, step=34, wait=True)
    assert read_header(best)["step"] == 30
    assert read_header(tmp_path / LATEST)["step"] == 34
    assert [(name, step) for _, name, step in manager.ranking] == [(best.name, 30)]
    found = list(good_checkpoints(tmp_path, print))
    assert [content["step"] for _, content in found] == [34, 30]
    assert stopped.name == "checkpoint_epoch_0003_step_00000034.pth"


def test_keep__best_n_and_latest_are_kept_apart(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep_best_n=2, metric_name="score", mode="max")
    for epoch, score in enumerate([0.1, 0.9, 0.3, 0.8, 0.2]):
        save(manager, epoch, score)
    names = sorted(path.name for path in tmp_path.glob("checkpoint_epoch_*"))
    assert names == ["checkpoint_epoch_0001.pth", "checkpoint_epoch_0003.pth", "checkpoint_epoch_0004.pth"]
    assert read_checkpoint(tmp_path / BEST)["epoch"] == 1
    assert read_checkpoint(tmp_path / LATEST)["epoch"] == 4
    # The ranking is a part of the state: a resumed manager goes on with it.
    resumed = CheckpointManager(tmp_path, keep_best_n=2, metric_name="score", mode="max")
    resumed.load_checkpoint(tmp_path / LATEST)
    save(resumed, 5, 0.85)
    assert read_checkpoint(tmp_path / BEST)["epoch"] == 1
    assert not (tmp_path / "checkpoint_epoch_0003.pth").exists()


def test_should_save__every_nth_epoch(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, save_frequency=10)
    assert [epoch for epoch in range(30) if manager.should_save(epoch)] == [9, 19, 29]


@pytest.mark.parametrize("mode", ["min", "max"])
def test_is_best__given_or_by_the_metric(tmp_path: Path, mode: Any) -> None:
    manager = CheckpointManager(tmp_path, metric_name="score", mode=mode)
    assert manager.get_best_checkpoint() is None
    assert manager.get_latest_checkpoint() is None
    best = []
    for epoch, score in enumerate([0.5, 0.7, float("nan"), None, 0.2, 0.2]):
        save(manager, epoch, score)
        found = manager.get_best_checkpoint()
        assert found is not None
        best.append(read_header(found)["epoch"])
    assert best == ([0, 0, 0, 0, 4, 4] if mode == "min" else [0, 1, 1, 1, 1, 1])
    model, _ = trained()
    manager.save_checkpoint(6, model, is_best=True, wait=True)
    manager.save_checkpoint(7, model, metrics={"score": 100.0 if mode == "max" else -1.0}, is_best=False, wait=True)
    assert read_header(tmp_path / BEST)["epoch"] == 6
    latest = manager.get_latest_checkpoint()
    assert latest is not None
    assert read_header(latest)["epoch"] == 7


def test_cleanup__keeps_the_newest_and_the_best_beyond_epoch_9999(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep_best_n=1, metric_name="score", mode="max")
    for epoch, score in ((9997, 0.9), (9998, 0.1), (9999, 0.2), (10000, 0.3), (10001, 0.1)):
        save(manager, epoch, score)

    def epochs() -> list[int]:
        return sorted(int(path.stem.split("_")[-1]) for path in tmp_path.glob("checkpoint_epoch_*"))

    assert epochs() == [9997, 10000, 10001]
    assert [content["epoch"] for _, content in good_checkpoints(tmp_path, print)] == [10001, 10000, 9997]
    manager.cleanup_old_checkpoints(keep_last_n=1)
    assert epochs() == [9997, 10001]
    manager.cleanup_old_checkpoints(keep_last_n=0)
    assert epochs() == [9997]
    assert read_checkpoint(tmp_path / LATEST)["epoch"] == 10001


def test_manager__impossible_settings_are_refused(tmp_path: Path) -> None:
    for settings in ({"save_frequency": 0}, {"keep_best_n": -1}, {"mode": "largest"}):
        with pytest.raises(UserError, match="expected"):
            CheckpointManager(tmp_path, **settings)  # type: ignore[arg-type]


def test_on_saved__gets_the_digest_of_the_durable_file(tmp_path: Path) -> None:
    found: list[tuple[SavedCheckpoint, str]] = []
    manager = CheckpointManager(
        tmp_path, metric_name="score", on_saved=lambda saved: found.append((saved, file_sha256(saved.path)))
    )
    save(manager, 3, 0.5)
    [(saved, sha256)] = found
    assert saved.sha256 == sha256
    assert (saved.epoch, saved.step, saved.metrics, saved.is_best, saved.ranking) == (
        3,
        30,
        {"score": 0.5},
        True,
        (30,),
    )


@pytest.mark.parametrize("piece", [64, 2 * container.BLOCK])
def test_save__memory_is_reused_grows_and_may_straddle_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr("hjepa.utils.checkpoint._PIECE", piece)
    manager = CheckpointManager(tmp_path)
    for epoch, size in enumerate((3, 40, 7, 5000, 0)):
        state = {"wide": torch.randn(size, 3).t(), "odd": torch.arange(size) % 2 == 0, "half": torch.randn(5).half()}
        manager.save_checkpoint(epoch, state, wait=True)
        back = read_checkpoint(tmp_path / LATEST)["model"]
        assert all(torch.equal(back[name], value) for name, value in state.items())
    before = [piece.data_ptr() for piece in manager._memory._pieces]
    manager.save_checkpoint(9, state, wait=True)
    assert [piece.data_ptr() for piece in manager._memory._pieces] == before


@pytest.mark.parametrize("size", [0, 1, -1])
@pytest.mark.parametrize("blocks", [1, 2, 2048, 4096])  # 4096 blocks are two of the chunks that are written at a time
def test_save__sizes_around_whole_blocks(tmp_path: Path, blocks: int, size: int) -> None:
    tensor = torch.arange(blocks * container.BLOCK + size).to(torch.uint8)
    path = CheckpointManager(tmp_path).save_checkpoint(0, {"t": tensor}, wait=True)
    assert torch.equal(read_checkpoint(path)["model"]["t"], tensor)
    assert path.stat().st_size == container.BLOCK + len(tensor) + 32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_save__from_cuda_is_not_overtaken_by_the_next_step(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    model = nn.Linear(8192, 8192, device="cuda")
    for epoch in range(3):
        with torch.no_grad():
            model.weight.fill_(epoch)
        manager.save_checkpoint(epoch, model)
        with torch.no_grad():
            model.weight.fill_(-1)
        manager.wait()
        assert read_checkpoint(tmp_path / LATEST)["model"]["weight"].unique().tolist() == [epoch]
    assert all(piece.is_pinned() for piece in manager._memory._pieces)


def test_reserve__finds_the_memory_of_the_first_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hjepa.utils.checkpoint._PIECE", 1 << 20)
    manager, weights = CheckpointManager(tmp_path), {"weight": torch.arange(1_000_000.0)}
    manager.reserve(4_000_000)
    assert manager._reserving is not None
    manager._reserving.join()
    reserved = list(manager._memory._pieces)
    assert len(reserved) == 4
    manager.save_checkpoint(0, weights, wait=True)
    assert [piece.data_ptr() for piece in manager._memory._pieces] == [piece.data_ptr() for piece in reserved]
    assert torch.equal(read_checkpoint(tmp_path / LATEST)["model"]["weight"], weights["weight"])
    manager.save_checkpoint(1, {"weight": torch.arange(2_000_000.0)}, wait=True)  # larger than expected
    assert read_checkpoint(tmp_path / LATEST)["model"]["weight"][-1] == 1_999_999


def test_save__a_second_one_waits_for_the_first(tmp_path: Path) -> None:
    release, epochs = threading.Event(), []

    def slow(saved: SavedCheckpoint) -> None:
        assert release.wait(10)
        epochs.append((saved.epoch, read_checkpoint(saved.path)["model"]["weight"][0, 0].item()))

    manager = CheckpointManager(tmp_path, on_saved=slow)
    model, _ = trained()
    for epoch in range(3):
        with torch.no_grad():
            model.weight.fill_(epoch)
        threading.Timer(0.05, release.set).start()
        manager.save_checkpoint(epoch, model)
    manager.wait()
    assert epochs == [(0, 0.0), (1, 1.0), (2, 2.0)]


def test_save__the_last_one_outlives_the_program(tmp_path: Path) -> None:
    program = (
        "import sys, torch\n"
        "from hjepa.utils.checkpoint import CheckpointManager\n"
        "CheckpointManager(sys.argv[1]).save_checkpoint(0, {'weight': torch.ones(20_000_000)})\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
    assert read_checkpoint(tmp_path / LATEST)["model"]["weight"].sum() == 20_000_000


def test_disk_full__is_said_and_the_previous_one_stays_whole(small_disk: Path) -> None:
    manager = CheckpointManager(small_disk, metric_name="score", mode="max")
    small = save(manager, 0, 0.1)
    manager.save_checkpoint(1, {"weight": torch.ones(1_000_000)}, metrics={"score": 0.9})
    with pytest.raises(HjepaError, match=r"No space left.*the previous one is whole"):
        manager.wait()
    assert sorted(path.name for path in small_disk.iterdir()) == sorted([small.name, LATEST, BEST])
    assert manager.find_resumable(print) == small_disk / LATEST
    # What was never written is not the best, and the next save works.
    assert manager.is_better({"score": 0.5})
    save(manager, 2, 0.5)
    assert read_checkpoint(small_disk / BEST)["epoch"] == 2


# Forks a child that saves without pause, kills it at a random moment, and reads what it left; many times.
KILLS = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from hjepa.utils.checkpoint import LATEST, CheckpointManager, read_checkpoint

folder = Path(sys.argv[1])
torch.set_num_threads(1)
random.seed(0)

def save(count):
    manager = CheckpointManager(folder, keep_best_n=1, metric_name="score", mode="max")
    latest = manager.get_latest_checkpoint()
    first = manager.load_checkpoint(latest)["epoch"] + 1 if latest else 0
    for epoch in range(first, first + count):
        weight = torch.full((1_000_000,), float(epoch))
        manager.save_checkpoint(epoch, {"weight": weight}, metrics={"score": random.random()}, step=epoch)
    manager.wait()

start = time.monotonic()
save(4)
seconds = time.monotonic() - start  # on a busy machine a save takes longer, and so do the lives
kills, torn, epochs = 0, 0, [3]
while kills < 20 or (min(torn, len(set(epochs))) <= 3 and time.monotonic() - start < 60):
    child = os.fork()
    if child == 0:
        save(1000)
    time.sleep(random.uniform(0, seconds))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    kills += 1
    for path in folder.iterdir():
        if path.name.startswith("."):
            torn += 1
            continue
        content = read_checkpoint(path)
        assert content["model"]["weight"].unique().tolist() == [content["step"]], path
        if path.name == LATEST:
            assert content["epoch"] >= epochs[-1], (content["epoch"], epochs)
            epochs.append(content["epoch"])
    assert len(epochs) == kills + 1, "the latest is gone"
print(kills, torn, len(set(epochs)))
"""


def test_kill__at_any_moment_leaves_whole_checkpoints_only(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLS, str(tmp_path)]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert outcome.returncode == 0, outcome.stderr
    kills, torn, different = map(int, outcome.stdout.split())
    assert kills >= 20
    assert torn > 3, "too few kills fell into a write"
    assert different > 3, "too few kills came after a write"
    CheckpointManager(tmp_path)
    assert not list(tmp_path.glob(".*"))  # what they left behind is removed at the next start
