"""Who am I among the ranks. Everything that needs more than one process starts here."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from hjepa.errors import UserError


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


def init(world: World, device: torch.device) -> None:
    """Join the process group; a single process needs none."""
    if world.size > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")


def close() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


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
        index = device.index if device.index is not None else world.local_rank
        if index >= torch.cuda.device_count():
            raise UserError(f"training.device={name}: this machine has {torch.cuda.device_count()} CUDA devices")
        device = torch.device("cuda", index)
    return device


def amp_dtype(device: torch.device) -> torch.dtype | None:
    """bfloat16 where the hardware computes in it, float16 on older GPUs, None (stay in float32) on other CPUs."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if fast else None
    return None
