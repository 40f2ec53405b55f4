"""Who am I among the ranks. Everything that needs more than one process starts here."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from hjepa.errors import HjepaError, UserError

# How long a rank waits for the others before it gives up. A dead rank is noticed at once, by the launcher; this is for
# one that hangs, and has to cover what one rank does alone, such as reading a checkpoint.
TIMEOUT = timedelta(minutes=10)

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The place of this process, as torchrun describes it in the environment."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> World:
        return cls(
            rank=int(os.environ.get("RANK", 0)),
            size=int(os.environ.get("WORLD_SIZE", 1)),
            local_rank=int(os.environ.get("LOCAL_RANK", 0)),
        )

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def slice(self, global_batch: int) -> slice:
        """This rank's share of a global batch."""
        return slice(self.rank * global_batch // self.size, (self.rank + 1) * global_batch // self.size)


_rounds = itertools.count()  # how often this process has joined


def init(world: World, device: torch.device) -> None:
    """Join the process group; a single process needs none.

    CPU tensors always go through gloo, so that ranks can agree on something without waiting for their GPUs.
    """
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)  # threads of libraries take the current device, not ours
    if world.size == 1 or torch.distributed.is_initialized():
        return
    # torchrun's store outlives a group. Under the same names a second group would find the addresses of the first.
    store, _, _ = next(rendezvous("env://", timeout=TIMEOUT))
    store = PrefixStore(f"hjepa-{next(_rounds)}", store)
    torch.distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=store,
        rank=world.rank,
        world_size=world.size,
        timeout=TIMEOUT,
        device_id=device if cuda else None,
    )


def close() -> None:
    """Leave the process group, all ranks together.

    Not for the way out of an error of this rank alone: the others may never come, so there the group ends with the
    process, and the launcher stops the others.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    torch.distributed.barrier()  # a rank that leaves early cuts the others off from what they still read
    torch.distributed.destroy_process_group()


def leave() -> None:
    """``close`` on the way to an exit code of this rank's own.

    torchrun terminates the other ranks as soon as one has failed. They are on their way out with a code that says why;
    a signal in Python's last moments would replace it.
    """
    close()
    if World.from_environment().size > 1:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def broadcast_object(value: T, world: World) -> T:
    """The main rank's ``value`` on every rank. Small things only: it is pickled."""
    if world.size == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def on_main(make: Callable[[], T], world: World) -> T:
    """``make()`` of the main rank on every rank; an error of hjepa is raised on every rank too.

    The others would wait for a main rank that failed alone until the launcher kills them, and say nothing of use.
    """
    found: tuple[T | None, HjepaError | None] = (None, None)
    if world.is_main:
        try:
            found = make(), None
        except HjepaError as error:
            if world.size == 1:
                raise
            found = None, error
    value, failure = broadcast_object(found, world)
    if failure is not None:
        raise failure
    return value  # type: ignore[return-value]


def pick_device(name: str, world: World) -> torch.device:
    """``training.device`` -> a device that exists.

    Raises:
        UserError: the device asked for is not there; it is never replaced by another one silently.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"training.device: expected auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(
                f"training.device={name}: no CUDA device is visible here; "
                "use training.device=cpu, or run on a node with an NVIDIA GPU and its driver"
            )
        if device.index is not None and world.size > 1:
            raise UserError(
                f"training.device={name}: {world.size} ranks cannot share one GPU; use training.device=cuda"
            )
        index = device.index if device.index is not None else world.local_rank
        if index >= torch.cuda.device_count():
            raise UserError(f"training.device={name}: this machine has {torch.cuda.device_count()} CUDA devices")
        device = torch.device("cuda", index)
    return device


def amp_dtype(device: torch.device, name: str = "auto") -> torch.dtype | None:
    """The dtype of mixed precision, ``training.amp_dtype``.

    ``auto`` is bfloat16 where the hardware computes in it, float16 on older GPUs, None (stay in float32) on other CPUs.
    """
    if name != "auto":
        return {"bfloat16": torch.bfloat16, "float16": torch.float16}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if fast else None
    return None
