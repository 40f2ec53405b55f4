"""One optimiser step on the device, without host synchronisation.

Forward, loss, backward, clip, optimiser, target update: nothing here asks the device for a value, so the host can
queue the next step while the device computes this one. What must be decided from a value (a step that is not finite
moves nothing) is decided on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise

import torch
from torch import Tensor, nn

from hjepa.distributed import World
from hjepa.losses import HierarchicalLoss
from hjepa.models import Forward, HJEPAModel, MaskTensors
from hjepa.trainers import parallel

# What a step measures, in this order, before the parts of the loss.
SKIPPED, STOP, LOSS, NORM = range(4)


def move(masks: MaskTensors, device: torch.device) -> MaskTensors:
    """The masks of a batch on ``device``."""
    context, targets, union, place, rows = masks
    context, union, place = (item.to(device, non_blocking=True) for item in (context, union, place))
    return MaskTensors(context, [item.to(device, non_blocking=True) for item in targets], union, place, rows)


def rows_of(masks: MaskTensors, start: int, stop: int) -> MaskTensors:
    """The masks of the images ``start`` to ``stop - 1``."""
    context, targets, union, place, rows = masks
    own = slice(start, stop)
    return MaskTensors(context[own], [item[own] for item in targets], union[own], place[own], rows)


class TrainStep:
    """Takes one optimiser step.

    Args:
        model: The model as it is called, inside DistributedDataParallel or sharded by FSDP.
        core: The same model without a wrapper.
        normalize: uint8 images (b, C, S, S) -> float, on the device.
        clip_grad: Largest gradient norm, applied after the loss scale is taken out; None does not clip.
        amp_dtype: bfloat16, float16 (with loss scaling) or None for float32.
        accumulation_steps: Micro-batches per step; each weighs as much as it has images.
    """

    def __init__(
        self,
        model: nn.Module,
        core: HJEPAModel,
        optimizer: torch.optim.Optimizer,
        loss_fn: HierarchicalLoss,
        *,
        normalize: Callable[[Tensor], Tensor],
        clip_grad: float | None,
        amp_dtype: torch.dtype | None,
        accumulation_steps: int,
        world: World,
    ):
        self.model, self.core, self.optimizer, self.loss_fn = model, core, optimizer, loss_fn
        self.normalize, self.clip_grad, self.amp_dtype = normalize, clip_grad, amp_dtype
        self.accumulation_steps, self.world = accumulation_steps, world
        self.device = next(core.parameters()).device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp_dtype == torch.float16)
        self.parts: list[str] = []  # names of the parts of the loss, known after the first step

    def __call__(
        self,
        images: Tensor,
        masks: MaskTensors,
        momentum: float,
        *,
        number: int = 0,
        stop: bool = False,
        keep_gradients: bool = False,
    ) -> Tensor:
        """One step over this rank's images (b, C, S, S) and their masks.

        Args:
            momentum: Of the target encoder.
            number: The step's number; it seeds what the loss draws.
            stop: Whether this rank was told to stop.
            keep_gradients: Leave them for somebody to look at; the next step clears them.

        Returns:
            (4 + parts of the loss,) float32 on the device, means over all ranks: whether the step was skipped, whether
            some rank has to stop, loss, gradient norm before clipping, parts of the loss.
        """
        self.optimizer.zero_grad(set_to_none=True)
        images, masks = images.to(self.device, non_blocking=True), move(masks, self.device)
        pieces = self.micro_batches(len(images))
        found: list[Tensor] = []
        for start, end in pieces:
            with parallel.no_sync(self.model, last=end == len(images)):
                loss, parts = self.loss(images[start:end], rows_of(masks, start, end), number)
                share = (end - start) / len(images)
                self.scaler.scale(loss * share).backward()  # type: ignore[no-untyped-call]
            found.append(torch.stack([loss.detach(), *parts.values()]) * share)
            self.parts = list(parts)
        measured = torch.stack(found).sum(0) if len(found) > 1 else found[0]
        told = measured.new_full((1,), float(stop))
        if self.world.size > 1:
            reduced = parallel.all_reduce_mean(torch.cat([told, measured]))
            told, measured = reduced[:1], reduced[1:]
        if self.scaler.is_enabled():
            parallel.unscale(self.scaler, self.optimizer)
        norm = parallel.clip_grad_norm(self.core, self.clip_grad)
        finite = (norm + measured[0]).isfinite()
        skipped = (~finite).float()
        parallel.optimizer_step(self.optimizer, skipped)
        if self.scaler.is_enabled():
            self.scaler.update()
        self.core.update_target(momentum, finite.float())
        if not keep_gradients:
            self.optimizer.zero_grad(set_to_none=True)
        return torch.cat([skipped[None], told, measured[:1], norm[None], measured[1:]])

    def micro_batches(self, count: int) -> list[tuple[int, int]]:
        """(start, stop) of the parts in which ``count`` images go through the model; none is empty."""
        k = min(self.accumulation_steps, count)
        return list(pairwise(count * i // k for i in range(k + 1)))

    def autocast(self) -> AbstractContextManager[None]:
        amp = self.amp_dtype
        return torch.autocast(self.device.type, amp) if amp is not None else nullcontext()

    def loss(self, images: Tensor, masks: MaskTensors, number: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss () and its detached parts, of images that are on the device."""
        out = self.forward(images, masks)
        loss, parts = self.loss_fn(out.predictions, out.targets, out.embeddings, step=number)
        return loss, parts

    def forward(self, images: Tensor, masks: MaskTensors) -> Forward:
        with self.autocast():
            out: Forward = self.model(self.normalize(images), masks)
        return out
