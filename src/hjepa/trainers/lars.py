"""LARS; a module of its own, for the library takes a second to import and is only installed where it is wanted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_optimizer
import torch
from torch.optim.sgd import sgd


class LARS(pytorch_optimizer.LARS):
    """Layer-wise adaptive rates (You et al. 2017, algorithm 1), for the groups that decay only.

    The library decides by a parameter's number of dimensions what it adapts; here a mask token, a matrix of one row
    per level, takes plain momentum steps like a bias.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        groups = self.param_groups
        self.param_groups = [group for group in groups if group["decayed"]]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if not group["decayed"]:
                self._momentum_step(group)
        return loss

    def _momentum_step(self, group: dict[str, Any]) -> None:
        self.init_group(group)  # buffers of zeros, where there are none
        moved = [p for p in group["params"] if p.grad is not None]
        sgd(
            moved,
            [p.grad for p in moved],
            [self.state[p].get("momentum_buffer") for p in moved],
            weight_decay=0.0,
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )
