"""What steps measured, on its way to the host, without making the host wait for the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass
class _InFlight(Generic[T]):
    values: Tensor  # on the host; filled when ``done`` has happened
    done: torch.cuda.Event | None
    context: T


class Readout(Generic[T]):
    """A queue of small device tensors that are read ``lag`` steps after they were made.

    The lag is a constant, not "when it happens to be there", so that all ranks learn of a step at the same step. On
    a GPU it is one step: the device works on the next step while the host reads this one. A CPU has no queue.
    """

    def __init__(self, device: torch.device):
        self.lag = 1 if device.type == "cuda" else 0
        self._queue: deque[_InFlight[T]] = deque()

    def push(self, measured: Tensor, context: T) -> None:
        """Start to copy ``measured`` (n,) to the host; ``context`` comes back with it."""
        if measured.device.type == "cuda":
            host = torch.empty(measured.shape, dtype=measured.dtype, pin_memory=True)
            host.copy_(measured, non_blocking=True)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
            self._queue.append(_InFlight(host, done, context))
        else:
            self._queue.append(_InFlight(measured, None, context))

    def pop(self, *, all: bool = False) -> Iterator[tuple[list[float], T]]:
        """What is due, oldest first; with ``all`` everything, waiting for the device."""
        while len(self._queue) > (0 if all else self.lag):
            item = self._queue.popleft()
            if item.done is not None:
                item.done.synchronize()
            yield item.values.numpy().tolist(), item.context

    def clear(self) -> None:
        self._queue.clear()
