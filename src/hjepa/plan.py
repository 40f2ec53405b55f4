"""What a configuration costs, and whether its masks do their work, before anything is spent on it.

Everything is counted from shapes; no weight is allocated and no device is touched. FLOPs are matrix products alone, two
per multiply-add. The backward pass counts twice its forward (a gradient for the input and one for the weight), without
the recomputation inside fused attention; the patch projection, whose input needs no gradient, counts once. That is the
usual convention of model FLOP utilisation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.overrides import TorchFunctionMode

from hjepa import distributed
from hjepa.config import Config
from hjepa.data.datasets import require_known
from hjepa.data.fashion_mnist import SAMPLES
from hjepa.errors import HjepaError, UserError
from hjepa.masks import Masks, MultiBlockMasking
from hjepa.models import HJEPAModel
from hjepa.utils.scheduler import Schedule, create_ema_scheduler, create_lr_scheduler, create_weight_decay_scheduler
from hjepa.words import counted, in_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NOMINAL_IMAGES = 1_000_000  # what steps are counted for while the size of the training split is unknown
AUDIT_IMAGES, AUDIT_STEPS, AUDIT_BATCH = 4_096, 64, 2_048  # at least, at least, at most
ALONE = 4  # images per step whose masks are also made outside their batch
NAMED = 6  # patches that an error spells out
BYTES = 4  # of a float32 number
ENTRY_BYTES = 250  # of a tensor's name, shape and place in a checkpoint, as measured

Indices = NDArray[np.int64]
Rates = NDArray[np.float64]
MakeMasks = Callable[..., Masks]  # (*, step: int, epochs: int, samples: (B,)) -> masks of the batch


# -- parameters ------------------------------------------------------------------------------------------------------


class _NoWeights(TorchFunctionMode):
    """Modules get their weights on the meta device, without initialisation; tables of positions are computed.

    All of it on the meta device would import a compiler for seconds.
    """

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty:
            return func(*args, **kwargs | {"device": "meta"})
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def meta_model(config: Config) -> HJEPAModel:
    """The model without memory: shapes and names alone."""
    with _NoWeights():
        return HJEPAModel(config)


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters; ``tensors`` is how many tensors hold the trained ones."""

    encoder: int
    predictor: int
    projectors: int  # of the loss's regulariser
    target: int  # the EMA copy of the encoder
    tensors: int
    target_tensors: int

    @property
    def trained(self) -> int:
        return self.encoder + self.predictor + self.projectors

    @property
    def total(self) -> int:
        return self.trained + self.target


def count_parameters(config: Config) -> Parameters:
    model = meta_model(config)
    every = list(model.parameters())
    trained = [parameter for parameter in every if parameter.requires_grad]
    encoder = sum(parameter.numel() for parameter in model.context_encoder.parameters())
    predictor = sum(parameter.numel() for parameter in model.predictor.parameters())
    sizes = sum(parameter.numel() for parameter in trained)
    return Parameters(
        encoder=encoder,
        predictor=predictor,
        projectors=sizes - encoder - predictor,
        target=sum(parameter.numel() for parameter in every) - sizes,
        tensors=len(trained),
        target_tensors=len(every) - len(trained),
    )


# -- FLOPs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """FLOPs per image."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        return self.forward + self.backward

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.forward + other.forward, self.backward + other.backward)


@dataclass(frozen=True)
class Flops:
    """FLOPs per image of one training step."""

    context: Cost
    target: Cost
    predictor: Cost

    @property
    def total(self) -> Cost:
        return self.context + self.target + self.predictor


@dataclass(frozen=True)
class Shapes:
    """Sizes of one step's masks, per image; means need not be whole numbers."""

    context: float  # visible patches
    targets: tuple[float, ...]  # cells of one target block at each level
    union: float  # patches in at least one target block, padded


def shapes_of(masks: Masks) -> Shapes:
    return Shapes(
        context=masks.context.shape[1],
        targets=tuple(float(cells.shape[2]) for cells in masks.targets),
        union=masks.union.shape[1],
    )


def _block(keys: float, queries: float, width: int, hidden: int) -> float:
    """Forward FLOPs of a transformer block that computes ``queries`` of its ``keys`` tokens."""
    projections = 2 * width * width * (2 * keys + queries)
    attention = 4 * queries * keys * width
    return projections + attention + 2 * queries * width * (width + 2 * hidden)


def model_flops(
    config: Config, *, context: float, targets: Sequence[float], union: float, batch: float, plain: bool = False
) -> Flops:
    """FLOPs per image of a training step, as the model does it.

    The model saves what the mathematics allows: masked patches are dropped before the patch projection, the target
    encoder's last block computes the patches of the target blocks alone, the predictor's first block projects the
    context once for all target blocks and each distinct query once for all images, and its last block computes the
    queries alone. The regulariser's projectors count with the predictor.

    Args:
        context: Visible patches per image.
        targets: Cells of one target block at each level.
        union: Patches in at least one target block, with padding.
        batch: Images of a micro-batch, which share the projection of the queries.
        plain: Count the same step without the savings, as I-JEPA's published code does it.
    """
    model = config.model
    patches, width, depth = config.grid_size**2, model.embed_dim, model.depth
    hidden = round(width * model.mlp_ratio)
    project = 2 * config.data.channels * model.patch_size**2 * width  # a patch
    entry = (patches if plain else context) * project
    seen = entry + depth * _block(context, context, width, hidden)
    whole = _block(patches, patches, width, hidden)
    last = whole if plain else _block(patches, union, width, hidden)
    target = patches * project + (depth - 1) * whole + last

    blocks, narrow, layers = config.masking.num_targets, model.predictor.embed_dim, model.predictor.depth
    inner = round(narrow * model.mlp_ratio)
    queries = sum(targets)
    tokens = context + queries
    predictor = 2 * context * width * narrow + blocks * queries * 2 * narrow * width
    if plain:
        predictor += blocks * layers * _block(tokens, tokens, narrow, inner)
    else:
        distinct = sum(patches // 4**level for level in range(model.num_levels))
        ends = (tokens, queries) if layers > 1 else (queries,)  # tokens that the first and the last block compute
        predictor += blocks * max(layers - 2, 0) * _block(tokens, tokens, narrow, inner)
        predictor += blocks * sum(_block(tokens, count, narrow, inner) for count in ends)
        # The first block's share of qkv, done once instead.
        predictor += 6 * narrow**2 * (context + distinct / batch) - 2 * narrow**2 * blocks * (2 * tokens + ends[0])
    if config.loss.regularizer.name != "none":
        predictor += model.num_levels * 2 * hidden * (width + config.loss.regularizer.projector_dim)
    return Flops(
        context=Cost(seen, 2 * seen - entry),
        target=Cost(target, 0.0 if model.stop_gradient else 2 * target - patches * project),
        predictor=Cost(predictor, 2 * predictor),
    )


def mean_flops(config: Config, shapes: Sequence[Shapes], *, batch: float) -> Flops:
    """The mean over steps: attention grows with the square of a size, so it is not the value at the mean size."""
    found = [
        model_flops(config, context=item.context, targets=item.targets, union=item.union, batch=batch)
        for item in shapes
    ]

    def mean(part: str) -> Cost:
        costs = [getattr(item, part) for item in found]
        return Cost(sum(cost.forward for cost in costs) / len(costs), sum(cost.backward for cost in costs) / len(costs))

    return Flops(context=mean("context"), target=mean("target"), predictor=mean("predictor"))


# -- memory ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank at the peak of a training step: an estimate, from what eager PyTorch keeps."""

    micro_batch: int  # images
    half: bool  # activations and matrix products in 16 bits
    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def is_half(config: Config) -> bool:
    """Whether matrix products run in 16 bits; where the device is left open, as on a GPU."""
    training = config.training
    if not training.use_amp:
        return False
    if training.device == "cpu" and training.amp_dtype == "auto":
        return distributed.amp_dtype(torch.device("cpu")) is not None
    return True


def saved_bytes(config: Config, shapes: Shapes, *, half: bool) -> float:
    """Bytes per image that the forward pass keeps for the backward pass.

    A block keeps, per token and in units of its width: the inputs of its two LayerNorms (float32, the residual
    stream), and in the matrix products' type the inputs of qkv, proj and the MLP's two layers, q, k, v, and the MLP's
    hidden values before GELU.
    """
    model, size = config.model, 2 if half else BYTES
    ratio, width, narrow = model.mlp_ratio, model.embed_dim, model.predictor.embed_dim

    def block(keys: float, queries: float, dim: int) -> float:
        return dim * (BYTES * (keys + queries) + size * (3 * keys + queries * (3 + 2 * ratio)))

    def encoder(tokens: float, last: float) -> float:
        patch = config.data.channels * model.patch_size**2
        ends = tokens * patch * size + last * width * BYTES
        return ends + (model.depth - 1) * block(tokens, tokens, width) + block(tokens, last, width)

    queries = sum(shapes.targets)
    tokens, blocks, layers = shapes.context + queries, config.masking.num_targets, model.predictor.depth
    predictor = (
        shapes.context * width * size
        + blocks * ((layers - 1) * block(tokens, tokens, narrow) + block(tokens, queries, narrow))
        + blocks * queries * narrow * (BYTES + size)
        + blocks * queries * width * 2 * BYTES  # predictions and targets, in the loss
    )
    seen = encoder(shapes.context, shapes.context)
    target = 0.0 if model.stop_gradient else encoder(config.grid_size**2, shapes.union)
    return seen + target + predictor


def estimate_memory(config: Config, parameters: Parameters, shapes: Sequence[Shapes], *, world_size: int) -> Memory:
    """Bytes on one rank.

    Raises:
        UserError: the batch does not divide over the ranks and micro-batches.
    """
    training, model = config.training, config.model
    if training.batch_size % (world_size * training.accumulation_steps):
        raise UserError(
            f"training.batch_size={training.batch_size} does not divide over {world_size} ranks with "
            f"training.accumulation_steps={training.accumulation_steps}"
        )
    share = training.batch_size // world_size
    micro_batch, half = share // training.accumulation_steps, is_half(config)
    size = 2 if half else BYTES
    sharded = world_size if training.parallel == "fsdp" else 1
    moments = 2 if training.optimizer in ("adamw", "adam") else 1
    pixels = config.data.channels * config.data.image_size**2
    largest = max(shapes, key=lambda item: saved_bytes(config, item, half=half))
    # A pass over one block holds its residual stream twice, and the MLP's hidden values twice.
    per_number = 2 * BYTES + 2 * model.mlp_ratio * size
    sequences = config.masking.num_targets * (largest.context + sum(largest.targets)) * model.predictor.embed_dim
    working = per_number * max(largest.context * model.embed_dim, sequences)
    activations = saved_bytes(config, largest, half=half)
    # The target encoder without gradient comes first, when nothing is kept yet.
    working = max(working, per_number * config.grid_size**2 * model.embed_dim - activations)
    parts = {
        "weights": BYTES * parameters.trained / sharded,
        "EMA copy": BYTES * parameters.target / sharded,
        "gradients": BYTES * parameters.trained / sharded,
        "optimiser": BYTES * moments * parameters.trained / sharded,
        "images": share * pixels + micro_batch * pixels * BYTES,
        "activations": micro_batch * activations,
        "working set": micro_batch * working,
    }
    if half:
        parts["16-bit weights"] = 2 * parameters.trained / sharded
    return Memory(micro_batch=micro_batch, half=half, parts=parts)


def checkpoint_bytes(config: Config, parameters: Parameters) -> int:
    """Size of one checkpoint file: weights, EMA copy and the optimiser's state, in float32."""
    adam = config.training.optimizer in ("adamw", "adam")
    numbers = parameters.total + (2 if adam else 1) * parameters.trained
    steps = parameters.tensors if adam else 0  # Adam counts its steps for each tensor
    entries = parameters.tensors * (4 if adam else 2) + parameters.target_tensors
    return BYTES * (numbers + steps) + ENTRY_BYTES * entries


# -- schedules -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curves:
    """Length of the run, and its schedules as functions of the optimiser step."""

    num_samples: int
    known: bool  # False: counted for NOMINAL_IMAGES
    steps_per_epoch: float
    total_steps: int
    warmup_steps: int
    images_seen: int
    schedules: dict[str, Schedule]

    def rows(self) -> list[tuple[int, float, dict[str, float]]]:
        """(step, epoch, values) at the start, the end of the warm-up, the quarters and the last step."""
        last = self.total_steps - 1
        steps = sorted({0, min(self.warmup_steps, last), *(last * part // 4 for part in range(1, 5))})
        return [
            (step, step / self.steps_per_epoch, {name: curve(step) for name, curve in self.schedules.items()})
            for step in steps
        ]


def curves_of(config: Config, num_samples: int | None) -> Curves:
    """The schedules over ``num_samples`` training images; None takes what is known of the data set."""
    training, ema = config.training, config.model.ema
    if num_samples is None and "".join(filter(str.isalnum, config.data.name.lower())) == "fashionmnist":
        num_samples = SAMPLES["train"]
    known = num_samples is not None
    samples = NOMINAL_IMAGES if num_samples is None else num_samples
    if samples < 1:
        raise UserError(f"the number of training images must be at least 1, got {samples}")
    per_epoch = samples / training.batch_size
    learning_rate = create_lr_scheduler(
        optimizer_type=training.optimizer,
        base_lr=training.lr,
        min_lr=training.min_lr,
        epochs=training.epochs,
        steps_per_epoch=per_epoch,
        warmup_epochs=training.warmup_epochs,
        schedule_type=training.schedule,
    )
    schedules: dict[str, Schedule] = {
        "learning rate": learning_rate,
        "EMA momentum": create_ema_scheduler(
            base_momentum=ema.momentum,
            final_momentum=ema.momentum_end,
            epochs=training.epochs,
            steps_per_epoch=per_epoch,
            warmup_epochs=ema.momentum_warmup_epochs,
        ),
    }
    if training.weight_decay_end is not None:
        schedules["weight decay"] = create_weight_decay_scheduler(
            training.weight_decay, training.weight_decay_end, training.epochs, per_epoch
        )
    total = -(-training.epochs * samples // training.batch_size)
    return Curves(
        num_samples=samples,
        known=known,
        steps_per_epoch=per_epoch,
        total_steps=total,
        warmup_steps=learning_rate.warmup_steps,
        images_seen=total * training.batch_size,
        schedules=schedules,
    )


# -- masks -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MaskAudit:
    """What was seen of the masks of ``images`` images."""

    grid: int
    batch: int  # images that shared a context size
    images: int
    shapes: tuple[Shapes, ...]  # one per step
    context_rate: Rates  # (N,) share of the images that see a patch
    target_rate: Rates  # (N,) share of the images that have to predict it
    alone: float  # mean visible patches of an image outside its batch
    kept: float  # mean visible patches of the same images in it
    padding: float  # share of the union that is in no target block
    redrawn: float  # share of the images whose first draw left too little context
    leaked: int  # (image, patch) pairs that are context and target at once

    @property
    def lost(self) -> float:
        """Share of the visible patches that the batch's common size cuts away."""
        return 1 - self.kept / self.alone

    def never(self, rate: Rates) -> list[tuple[int, int]]:
        """(row, column) of the patches whose rate is 0."""
        return [(int(patch) // self.grid, int(patch) % self.grid) for patch in np.flatnonzero(rate == 0)]


def audit_masks(
    make_masks: MakeMasks,
    *,
    grid: int,
    batch: int,
    images: int = AUDIT_IMAGES,
    alone: MakeMasks | None = None,
    first: MakeMasks | None = None,
) -> MaskAudit:
    """Draw masks and count where they fall.

    A patch counts as never visited only after so many images that a fair sampler cannot have missed it by chance: a
    block on a grid of N patches reaches a corner at least once in N images, and 40 N are drawn before the verdict.

    Args:
        make_masks: As ``MultiBlockMasking``.
        grid: Patches along a side.
        batch: Images per step.
        images: Drawn at least.
        alone: Makes the masks of single images, to see what their batch costs them; the default is ``make_masks``.
        first: Makes the masks of the first draw, whatever they leave, to see which images were drawn again; the
            default is ``make_masks``.
    """
    count = grid**2
    context, target = np.zeros(count, np.int64), np.zeros(count, np.int64)
    shapes: list[Shapes] = []
    sizes: list[tuple[int, int]] = []  # visible patches of one image: alone, in its batch
    step = leaked = in_union = redrawn = compared = 0
    while step < max(AUDIT_STEPS, math.ceil(images / batch)) or (
        (not context.all() or not target.all()) and step * batch < 40 * count
    ):
        samples = np.arange(step * batch, (step + 1) * batch, dtype=np.int64)
        masks = make_masks(step=step, epochs=0, samples=samples)
        visible, hidden = _marked(masks.context, count), np.zeros((batch, count), bool)
        for level, cells in enumerate(masks.targets):
            hidden |= _marked(cells.reshape(batch, -1), (grid // 2**level) ** 2)[:, _cell_of_patch(grid, level)]
        context += visible.sum(0)
        target += hidden.sum(0)
        leaked += int((visible & hidden).sum())
        in_union += int(hidden.sum())
        shapes.append(shapes_of(masks))
        if step < AUDIT_STEPS:
            drawn_first = (first or make_masks)(step=step, epochs=0, samples=samples).targets[0]
            redrawn += int((drawn_first != masks.targets[0]).any((1, 2)).sum())
            compared += batch
            for sample in samples[:ALONE]:
                single = (alone or make_masks)(step=step, epochs=0, samples=np.array([sample], np.int64))
                sizes.append((single.context.shape[1], masks.context.shape[1]))
        step += 1
    drawn = step * batch
    own, shared = np.array(sizes).mean(0)
    return MaskAudit(
        grid=grid,
        batch=batch,
        images=drawn,
        shapes=tuple(shapes),
        context_rate=context / drawn,
        target_rate=target / drawn,
        alone=float(own),
        kept=float(shared),
        padding=1 - in_union / (batch * sum(item.union for item in shapes)),
        redrawn=redrawn / compared,
        leaked=leaked,
    )


def _marked(index: Indices, count: int) -> NDArray[np.bool_]:
    """(B, count) bool: which of ``count`` places the rows of ``index`` (B, n) name."""
    marked = np.zeros((len(index), count), bool)
    np.put_along_axis(marked, index, True, axis=1)
    return marked


def _cell_of_patch(grid: int, level: int) -> Indices:
    """(N,) the cell of ``level`` in which each patch lies."""
    row, column = np.divmod(np.arange(grid**2), grid)
    return (row >> level) * (grid >> level) + (column >> level)


def refuse_blind_spots(config: Config, audit: MaskAudit) -> None:
    """
    Raises:
        UserError: some patch is never context or never target.
        HjepaError: a patch is both at once, which would be an error of this program.
    """
    if audit.leaked:
        raise HjepaError(f"the masks leak: {audit.leaked} patches are context and target of the same image")
    masking = config.masking
    problems = []
    unseen, unasked = audit.never(audit.context_rate), audit.never(audit.target_rate)
    if unseen:
        hidden = all(audit.target_rate[row * audit.grid + column] == 1 for row, column in unseen)
        problems.append(
            f"{_named(unseen)} never visible as context"
            + (
                f", for a target block covers {'it' if len(unseen) == 1 else 'them'} in every image: lower "
                f"masking.target_scale={_pair(masking.target_scale)}"
                if hidden
                else f": raise masking.context_scale={_pair(masking.context_scale)}, or lower masking.target_scale="
                f"{_pair(masking.target_scale)} or masking.num_targets={masking.num_targets}"
            )
        )
    if unasked:
        problems.append(
            f"{_named(unasked)} never in a target block: change masking.target_scale={_pair(masking.target_scale)} and "
            f"masking.target_aspect={_pair(masking.target_aspect)}, or lower masking.min_context={masking.min_context}"
        )
    if problems:
        raise UserError(
            f"in the masks of {audit.images:,} images on the {audit.grid}x{audit.grid} grid of patches:\n"
            + "\n".join(f"  {i}. {problem}" for i, problem in enumerate(problems, 1))
        )


def _named(patches: Sequence[tuple[int, int]]) -> str:
    """``the patches (row 0, column 1) and 12 more are``; rows and columns from 0."""
    listed = ", ".join(f"(row {row}, column {column})" for row, column in patches[:NAMED])
    more = f" and {len(patches) - NAMED} more" if len(patches) > NAMED else ""
    return f"the patches {listed}{more} are" if len(patches) > 1 else f"the patch {listed} is"


def _pair(values: tuple[float, float]) -> str:
    return f"[{values[0]:g}, {values[1]:g}]"


# -- the plan --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Everything that is known before a run."""

    config: Config
    world_size: int
    parameters: Parameters
    flops: Flops
    memory: Memory
    curves: Curves
    checkpoint: int  # bytes of one file
    audit: MaskAudit

    @property
    def kept_bytes(self) -> int:
        """Disk for the checkpoints of a run: the best, the newest two, and the one that is being written."""
        return (self.config.checkpoint.keep_best_n + 3) * self.checkpoint


def plan(config: Config, *, num_samples: int | None = None, world_size: int = 1, picture: Path | None = None) -> Plan:
    """Count what the configuration costs and audit its masks.

    Args:
        num_samples: Images of the training split; None where it is not known.
        world_size: Ranks.
        picture: Where to draw schedules and masks as a PNG; drawn before a mask is refused.

    Raises:
        UserError: no such data set, the masks never visit some patch, or the batch does not divide over the ranks.
    """
    if world_size < 1:
        raise UserError(f"the number of ranks must be at least 1, got {world_size}")
    require_known(config.data.name)
    curves = curves_of(config, num_samples)
    parameters = count_parameters(config)

    def masking(**update: float) -> MultiBlockMasking:
        return MultiBlockMasking(config.model_copy(update={"masking": config.masking.model_copy(update=update)}))

    audit = audit_masks(
        masking(),
        grid=config.grid_size,
        batch=min(config.training.batch_size, AUDIT_BATCH),
        alone=masking(context_multiple=1),
        first=masking(redraw_below=0.0, min_context=1, context_multiple=1),
    )
    memory = estimate_memory(config, parameters, audit.shapes, world_size=world_size)
    found = Plan(
        config=config,
        world_size=world_size,
        parameters=parameters,
        flops=mean_flops(config, audit.shapes, batch=memory.micro_batch),
        memory=memory,
        curves=curves,
        checkpoint=checkpoint_bytes(config, parameters),
        audit=audit,
    )
    if picture is not None:
        draw(found, picture)
    refuse_blind_spots(config, audit)
    return found


# -- for the reader --------------------------------------------------------------------------------------------------


def render(plan: Plan) -> str:
    """The plan as text."""
    config = plan.config
    model, grid = config.model, config.grid_size
    lines = [
        f"ViT of {model.depth} x {model.embed_dim}, {config.data.image_size} pixels in patches of {model.patch_size}: "
        f"a {grid}x{grid} grid; {counted(model.num_levels, 'level')}; predictor of {model.predictor.depth} x "
        f"{model.predictor.embed_dim}",
        *_parameter_lines(plan),
        *_flop_lines(plan),
        *_memory_lines(plan),
        *_length_lines(plan),
        *_checkpoint_lines(plan),
        *_mask_lines(plan.audit),
    ]
    return "\n".join(lines)


def _count(number: float) -> str:
    """12,345,678 -> ``12.35 M``."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:.0f}"


def _parameter_lines(plan: Plan) -> list[str]:
    found = plan.parameters
    rows = [("encoder", found.encoder), ("predictor", found.predictor)]
    if found.projectors:
        rows.append(("regulariser's projectors", found.projectors))
    rows += [("trained", found.trained), ("with the EMA copy", found.total)]
    return ["", "parameters", *(f"  {name:<26}{number:>15,}" for name, number in rows)]


def _flop_lines(plan: Plan) -> list[str]:
    flops, run = plan.flops, plan.flops.total.total * plan.curves.images_seen
    rows = [("context", flops.context), ("target", flops.target), ("predictor", flops.predictor), ("sum", flops.total)]
    return [
        "",
        "GFLOPs per image and step (matrix products, 2 per multiply-add; backward = 2 x forward)",
        f"  {'':<12}{'forward':>10}{'backward':>10}{'both':>10}{'share':>8}",
        *(
            f"  {name:<12}{cost.forward / 1e9:>10.3f}{cost.backward / 1e9:>10.3f}{cost.total / 1e9:>10.3f}"
            f"{cost.total / flops.total.total:>8.0%}"
            for name, cost in rows
        ),
        f"  the whole run: {run:.3g} FLOPs{'' if plan.curves.known else ' (see the number of images below)'}",
    ]


def _memory_lines(plan: Plan) -> list[str]:
    memory, training = plan.memory, plan.config.training
    ranks = "1 rank" if plan.world_size == 1 else f"{plan.world_size} ranks ({training.parallel})"
    kind = "16-bit activations" if memory.half else "float32"
    return [
        "",
        f"memory per rank, an estimate: {ranks}, micro-batch of {memory.micro_batch:,} images, {kind}",
        *(f"  {name:<18}{in_bytes(size):>12}" for name, size in memory.parts.items()),
        f"  {'sum':<18}{in_bytes(memory.total):>12}",
        "  Not in it: the device's context and libraries, workspaces, fragmentation, communication buffers, the",
        "  evaluation's batches, the loader's workers. torch.compile keeps less.",
    ]


def _length_lines(plan: Plan) -> list[str]:
    curves, training = plan.curves, plan.config.training
    if curves.known:
        head = f"length: {training.epochs:,} epochs of {curves.num_samples:,} images"
    else:
        head = (
            f"length: {training.epochs:,} epochs of {curves.num_samples:,} images (assumed: the size of the training "
            "split is not known\n  before its preparation; give it with --images)"
        )
    names = list(curves.schedules)
    return [
        "",
        head,
        f"  {curves.total_steps:,} steps of {training.batch_size:,} images, {curves.steps_per_epoch:,.2f} per epoch; "
        f"{curves.warmup_steps:,} of warm-up; {curves.images_seen:,} images seen",
        f"  {'step':>12}{'epoch':>10}" + "".join(f"{name:>16}" for name in names),
        *(
            f"  {step:>12,}{epoch:>10.2f}" + "".join(f"{values[name]:>16.6g}" for name in names)
            for step, epoch, values in curves.rows()
        ),
    ]


def _checkpoint_lines(plan: Plan) -> list[str]:
    kept = plan.config.checkpoint.keep_best_n
    return [
        "",
        f"checkpoints: {in_bytes(plan.checkpoint)} each; {in_bytes(plan.kept_bytes)} of disk for the best {kept}, the "
        "newest 2, and the one being written",
    ]


def _mask_lines(audit: MaskAudit) -> list[str]:
    def sizes(name: str, values: Sequence[float], unit: str) -> str:
        return f"  {name:<26}{min(values):>8.0f}{np.mean(values):>10.1f}{max(values):>8.0f}  {unit}"

    def rates(name: str, rate: Rates) -> str:
        row, column = divmod(int(rate.argmin()), audit.grid)
        return (
            f"  {name:<26}{rate.min():>8.1%}{rate.mean():>10.1%}{rate.max():>8.1%}  of images; least at row {row}, "
            f"column {column}"
        )

    shapes = audit.shapes
    levels = range(len(shapes[0].targets))
    return [
        "",
        f"masks of {audit.images:,} images in {len(shapes)} steps of {audit.batch:,}",
        f"  {'':<26}{'min':>8}{'mean':>10}{'max':>8}",
        rates("a patch is context", audit.context_rate),
        rates("a patch is target", audit.target_rate),
        sizes("context", [item.context for item in shapes], "patches"),
        *(sizes(f"target block, level {level}", [item.targets[level] for item in shapes], "cells") for level in levels),
        sizes("union of the blocks", [item.union for item in shapes], "patches"),
        f"  padding in the union {audit.padding:.1%}; context lost to the batch's common size {audit.lost:.1%} "
        f"({audit.alone:.1f} -> {audit.kept:.1f} patches)",
        f"  context and target at once: {audit.leaked} patches; {audit.redrawn:.1%} of the images masked anew",
    ]


# -- the picture -----------------------------------------------------------------------------------------------------

INK, FAINT, ACCENT = "#1f2933", "#9aa5b1", "#0b6e99"
PARTS = {"context": "#0b6e99", "target": "#e09f3e", "predictor": "#7a9e7e"}


def draw(plan: Plan, path: Path) -> None:
    """Schedules, FLOPs, and where the masks fall, as one PNG."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: Any = {
        "figure.constrained_layout.w_pad": 0.12,
        "figure.constrained_layout.h_pad": 0.12,
        "font.size": 9,
        "text.color": INK,
        "axes.edgecolor": FAINT,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "axes.titlepad": 10,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
    }
    with rc_context(style):
        figure = Figure(figsize=(12, 7), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(2, 3)
        curves = plan.curves
        steps = np.unique(np.linspace(0, curves.total_steps - 1, 400).astype(np.int64))
        epochs = steps / curves.steps_per_epoch
        cells = list(axes[0])
        for name, curve in curves.schedules.items():
            _draw_curve(cells.pop(0), name, epochs, [curve(int(step)) for step in steps], plan.config.training.epochs)
        if cells:
            _draw_flops(cells.pop(0), plan.flops)
        _draw_rates(axes[1, 0], "context: share of images", plan.audit.context_rate, plan.audit.grid)
        _draw_rates(axes[1, 1], "target: share of images", plan.audit.target_rate, plan.audit.grid)
        _draw_sizes(axes[1, 2], plan.audit)
        figure.savefig(path, format="png")


def _draw_curve(axes: Axes, name: str, epochs: Rates, values: Sequence[float], end: int) -> None:
    axes.plot(epochs, values, color=ACCENT, linewidth=1.8)
    axes.set_title(name)
    axes.set_xlabel("epoch")
    axes.set_xlim(0, end)
    axes.grid(axis="y", color=FAINT, alpha=0.25, linewidth=0.6)
    axes.ticklabel_format(axis="y", useOffset=False)


def _draw_flops(axes: Axes, flops: Flops) -> None:
    left = [0.0, 0.0]
    for part, color in PARTS.items():
        cost: Cost = getattr(flops, part)
        widths = [cost.forward / 1e9, cost.total / 1e9]
        axes.barh([1, 0], widths, left=left, height=0.5, color=color, label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_yticks([1, 0], ["forward", "with\nbackward"])
    axes.set_ylim(-0.5, 2.0)
    axes.set_title("GFLOPs per image")
    axes.legend(frameon=False, ncols=3, loc="upper left", borderaxespad=0, handlelength=1, columnspacing=1.2)


def _draw_rates(axes: Axes, title: str, rate: Rates, grid: int) -> None:
    image = axes.imshow(rate.reshape(grid, grid), cmap="viridis", vmin=0, vmax=max(float(rate.max()), 1e-9))
    axes.set_title(title)
    axes.set_xlabel(f"min {rate.min():.1%}, mean {rate.mean():.1%}, max {rate.max():.1%}")
    axes.set_xticks([0, grid - 1])
    axes.set_yticks([0, grid - 1])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    colorbar = axes.figure.colorbar(image, ax=axes, shrink=0.85)
    colorbar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    colorbar.outline.set_visible(False)


def _draw_sizes(axes: Axes, audit: MaskAudit) -> None:
    """Patches per image, one dot per step: what the model computes on."""
    from matplotlib.ticker import MaxNLocator

    rows = {
        "context": [item.context for item in audit.shapes],
        "one target\nblock": [item.targets[0] for item in audit.shapes],
        "union of\nthe blocks": [item.union for item in audit.shapes],
    }
    for height, (values, color) in enumerate(zip(rows.values(), PARTS.values(), strict=True)):
        spread = height + 0.22 * (np.arange(len(values)) % 5 - 2) / 2
        axes.scatter(values, spread, s=14, color=color, alpha=0.6, linewidths=0)
        axes.plot([np.mean(values)] * 2, [height - 0.34, height + 0.34], color=INK, linewidth=1.6)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, audit.grid**2)
    axes.set_xlabel(f"of {audit.grid**2} patches; the line is the mean")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_title("mask sizes in patches, per step")
    axes.grid(axis="x", color=FAINT, alpha=0.25, linewidth=0.6)
