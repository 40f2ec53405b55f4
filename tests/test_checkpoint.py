"""Checkpoints: what comes back, what is refused, what is kept."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from hjepa.errors import UserError
from hjepa.utils.checkpoint import (
    BEST,
    LATEST,
    CheckpointManager,
    DamagedCheckpointError,
    pack,
    read_checkpoint,
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


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "text"])
def test_load__damage_is_detected_and_the_previous_one_is_used(tmp_path: Path, damage: str) -> None:
    manager = CheckpointManager(tmp_path)
    good, bad = save(manager, 0), save(manager, 1)
    content = bytearray(bad.read_bytes())
    if damage == "truncate":
        content = content[:-100]
    elif damage == "flip":
        content[-5] ^= 1
    elif damage == "empty":
        content = bytearray()
    else:
        content = bytearray(b"not a checkpoint")
    bad.write_bytes(content)
    with pytest.raises(DamagedCheckpointError):
        read_checkpoint(bad)
    said: list[str] = []
    assert manager.find_resumable(said.append) == good
    assert "damaged" in said[0]
    assert LATEST in said[0]


def test_load__missing_file_is_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint at"):
        CheckpointManager(tmp_path).load_checkpoint(tmp_path / "nope.pth")


def test_load__other_shape_names_the_remedy(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    path = save(manager, 0)
    with pytest.raises(UserError, match="does not fit this model"):
        manager.load_checkpoint(path, nn.Linear(4, 5))


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


def _write_for_ever(path: str) -> None:
    state = {"tensor": torch.zeros(3_000_000), "n": 0}
    while True:
        state["n"] += 1
        state["tensor"].fill_(state["n"])
        write_checkpoint(Path(path), state)


def test_kill__at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    for delay in (0.05, 0.11, 0.23):
        process = multiprocessing.get_context("spawn").Process(target=_write_for_ever, args=(str(path),))
        process.start()
        while not path.exists():
            time.sleep(0.01)
        time.sleep(delay)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        state = read_checkpoint(path)
        assert torch.equal(state["tensor"], torch.full((3_000_000,), float(state["n"])))
