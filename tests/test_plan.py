"""The plan: its counts against the real model, its sizes against real files, its mask audit against known masks."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hjepa.config import Config, load_config
from hjepa.errors import HjepaError, UserError
from hjepa.losses import HierarchicalLoss
from hjepa.masks import Masks, MultiBlockMasking
from hjepa.models import HJEPAModel, MaskTensors
from hjepa.plan import (
    audit_masks,
    checkpoint_bytes,
    count_parameters,
    curves_of,
    estimate_memory,
    meta_model,
    model_flops,
    plan,
    refuse_blind_spots,
    render,
    saved_bytes,
    shapes_of,
)
from hjepa.trainers import create_optimizer
from hjepa.utils.checkpoint import write_checkpoint

TINY = """
data: {image_size: 32}
model:
  {patch_size: 4, embed_dim: 48, depth: 2, num_heads: 3, num_levels: 2,
   predictor: {embed_dim: 24, depth: 3, num_heads: 3}}
training: {batch_size: 8, epochs: 10, warmup_epochs: 2, use_amp: false}
collapse: {probe_samples: 8}
"""
VIT_S = ("model.embed_dim=384", "model.depth=12", "model.num_heads=6")


def draw_masks(config: Config, batch: int) -> Masks:
    return MultiBlockMasking(config)(step=3, epochs=0, samples=np.arange(batch))


def tensors(masks: Masks) -> MaskTensors:
    return MaskTensors(
        torch.from_numpy(masks.context),
        [torch.from_numpy(cells) for cells in masks.targets],
        torch.from_numpy(masks.union),
        torch.from_numpy(masks.place),
        masks.rows,
    )


def images(config: Config, batch: int) -> torch.Tensor:
    size = config.data.image_size
    return torch.randn(batch, config.data.channels, size, size)


# -- parameters and FLOPs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "encoder"),
    [
        ([], 85_646_592),  # ViT-B/16: 85.80 M less the class token and its learned positions
        (["model.embed_dim=1280", "model.depth=32", "model.num_heads=16", "model.patch_size=14"], 630_434_560),
    ],
)
def test_parameters__of_known_vision_transformers(overrides: list[str], encoder: int) -> None:
    assert count_parameters(load_config("default", overrides)).encoder == encoder


@pytest.mark.parametrize("regularizer", ["none", "vicreg"])
def test_parameters__are_those_of_the_real_model_and_take_no_memory(regularizer: str) -> None:
    config = load_config(TINY, [f"loss.regularizer.name={regularizer}"])
    found, model = count_parameters(config), HJEPAModel(config)
    assert found.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.total == sum(p.numel() for p in model.parameters())
    assert found.target == found.encoder
    big = [p for p in meta_model(config).parameters() if not p.is_meta]
    assert sum(p.numel() for p in big) < found.total / 500  # the mask tokens


@pytest.mark.parametrize(
    ("source", "overrides", "batch"),
    [
        (TINY, [], 8),
        (TINY, ["model.num_levels=1", "model.predictor.depth=1", "model.depth=1"], 3),
        (TINY, ["model.predictor.depth=2", "model.mlp_ratio=3.0", "masking.num_targets=2"], 8),
        (TINY, ["loss.regularizer.name=vicreg", "model.stop_gradient=false"], 8),
        ("default", VIT_S, 1),
    ],
)
def test_flops__equal_the_flop_counter_on_the_real_model(source: str, overrides: list[str], batch: int) -> None:
    config = load_config(source, overrides)
    masks = draw_masks(config, batch)
    shapes = shapes_of(masks)
    flops = model_flops(config, context=shapes.context, targets=shapes.targets, union=shapes.union, batch=batch)
    model, given, pixels = HJEPAModel(config), tensors(masks), images(config, batch)

    def counted(action: object) -> tuple[float, float]:
        """FLOPs per image of all operators, and of attention alone."""
        with FlopCounterMode(display=False) as counter:
            result = action() if callable(action) else None
        counts = counter.get_flop_counts().get("Global", {})
        attention = sum(number for operator, number in counts.items() if "scaled_dot_product" in str(operator))
        kept.append(result)
        return counter.get_total_flops() / batch, attention / batch

    kept: list[object] = []
    forward, attention = counted(lambda: model(pixels, given))
    assert flops.total.forward == pytest.approx(forward, rel=0.001)
    target, target_attention = counted(lambda: model.target_cells(pixels, given))
    assert flops.target.forward == pytest.approx(target, rel=0.001)
    context, _ = counted(lambda: model.context_encoder(pixels, given.context))
    assert flops.context.forward == pytest.approx(context, rel=0.001)

    out = kept[0]
    assert isinstance(out, tuple)
    loss = sum(item.square().mean() for part in out for item in part if item.requires_grad)
    assert isinstance(loss, torch.Tensor)
    backward, in_attention = counted(loss.backward)
    # Fused attention computes its forward product once more, which the convention leaves out.
    if config.model.stop_gradient:
        attention -= target_attention
    assert in_attention == pytest.approx(2.5 * attention, rel=0.001)
    assert flops.total.backward == pytest.approx(backward - 0.5 * attention, rel=0.01)


def test_flops__of_the_plain_step_are_those_of_ijepa_in_the_facts() -> None:
    """ViT-B/16 with a predictor of 6 x 384 at I-JEPA's mean mask sizes: 86.8 GFLOPs, and 82.3 with the savings."""
    config = load_config("default", ["model.num_levels=1"])
    sizes = {"context": 54.5, "targets": [32.2], "union": 85.5, "batch": 128}
    plain, exact = model_flops(config, **sizes, plain=True), model_flops(config, **sizes)  # type: ignore[arg-type]
    assert plain.total.total / 1e9 == pytest.approx(86.8, abs=0.1)
    assert exact.total.total / 1e9 == pytest.approx(82.3, abs=0.1)


# -- memory and disk -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", [[], ["model.stop_gradient=false"], ["model.depth=4", "model.num_levels=1"]])
def test_memory__activations_are_what_autograd_keeps(overrides: list[str]) -> None:
    config = load_config(TINY, overrides)
    masks, batch = draw_masks(config, 8), 8
    model, loss_fn = HJEPAModel(config), HierarchicalLoss(config)
    weights = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(images(config, batch), tensors(masks))
        loss = loss_fn(out.predictions, out.targets, out.embeddings)[0]
    measured = sum(storage.nbytes() for storage in kept.values())
    assert loss.isfinite()
    assert batch * saved_bytes(config, shapes_of(masks), half=False) == pytest.approx(measured, rel=0.1)


def test_memory__ranks_and_precision_change_what_they_should() -> None:
    parts = {}
    for name, overrides, ranks in (
        ("one", [], 1),
        ("ddp", [], 2),
        ("fsdp", ["training.parallel=fsdp"], 2),
        ("half", ["training.use_amp=true", "training.amp_dtype=bfloat16"], 1),
        ("sgd", ["training.optimizer=sgd"], 1),
    ):
        config = load_config(TINY, overrides)
        shapes = [shapes_of(draw_masks(config, 8))]
        parts[name] = estimate_memory(config, count_parameters(config), shapes, world_size=ranks).parts
    assert parts["ddp"]["weights"] == parts["one"]["weights"] == 2 * parts["fsdp"]["weights"]
    assert parts["ddp"]["activations"] == parts["one"]["activations"] / 2
    assert parts["one"]["optimiser"] == 2 * parts["one"]["weights"] == 2 * parts["sgd"]["optimiser"]
    assert 0.5 < parts["half"]["activations"] / parts["one"]["activations"] < 0.65  # the residual stream stays float32
    config = load_config(TINY)
    with pytest.raises(UserError, match="batch_size=8 does not divide over 3 ranks"):
        estimate_memory(config, count_parameters(config), shapes, world_size=3)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_checkpoint__is_as_large_as_the_plan_says(tmp_path: Path, optimizer: str) -> None:
    config = load_config("demo", [f"training.optimizer={optimizer}"])
    model = HJEPAModel(config)
    own = create_optimizer(model, config)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    own.step()
    write_checkpoint(tmp_path / "c.pth", {"model": model.state_dict(), "optimizer": own.state_dict()})
    written = (tmp_path / "c.pth").stat().st_size
    assert checkpoint_bytes(config, count_parameters(config)) == pytest.approx(written, rel=0.01)


# -- schedules -------------------------------------------------------------------------------------------------------


def test_curves__start_peak_and_end_where_the_configuration_says() -> None:
    config = load_config(TINY, ["training.weight_decay_end=0.4"])
    curves = curves_of(config, 1001)
    assert curves.known
    assert curves.total_steps == math.ceil(10 * 1001 / 8)
    assert curves.warmup_steps == round(2 * 1001 / 8)
    assert curves.images_seen == curves.total_steps * 8
    rows = {step: values for step, _, values in curves.rows()}
    training, ema = config.training, config.model.ema
    start = {"learning rate": 0.0, "EMA momentum": ema.momentum, "weight decay": training.weight_decay}
    assert rows[0] == pytest.approx(start)
    assert rows[curves.warmup_steps]["learning rate"] == training.lr
    end = rows[curves.total_steps - 1]
    assert end["learning rate"] == pytest.approx(training.min_lr)
    assert end["EMA momentum"] == pytest.approx(ema.momentum_end)
    assert end["weight decay"] == pytest.approx(0.4)


def test_curves__know_fashion_mnist_and_say_when_they_assume() -> None:
    assert curves_of(load_config("demo"), None).num_samples == 60_000
    assert not curves_of(load_config("default"), None).known
    with pytest.raises(UserError, match="at least 1, got 0"):
        curves_of(load_config("demo"), 0)


# -- masks -----------------------------------------------------------------------------------------------------------


def test_audit__rates_and_sizes_agree_with_each_other() -> None:
    config = load_config(TINY)
    audit = audit_masks(MultiBlockMasking(config), grid=8, batch=32)
    assert audit.leaked == 0
    assert audit.images == 4096
    assert audit.context_rate.sum() == pytest.approx(np.mean([item.context for item in audit.shapes]))
    mean_union = np.mean([item.union for item in audit.shapes])
    assert audit.target_rate.sum() == pytest.approx((1 - audit.padding) * mean_union)
    assert audit.context_rate.min() > 0
    assert audit.target_rate.min() > 0
    assert 0 < audit.lost < 1
    refuse_blind_spots(config, audit)


def test_audit__an_image_alone_loses_nothing_to_its_batch() -> None:
    assert audit_masks(MultiBlockMasking(load_config(TINY)), grid=8, batch=1, images=64).lost == 0


def test_plan__counts_the_images_that_are_masked_anew() -> None:
    found = [plan(load_config(TINY, [f"masking.redraw_below={share}"])).audit for share in (0.0, 0.75, 0.9)]
    assert found[0].redrawn == 0
    assert 0.02 < found[1].redrawn < found[2].redrawn < 0.6
    assert found[0].kept < found[1].kept


def hand_made(offset: int, *, leak: bool = False) -> object:
    """A sampler on a 6x6 grid of one 2x2 target block, whose corner is drawn from [0, 4 + offset), and the rest."""

    def make(*, step: int, epochs: int, samples: np.ndarray) -> Masks:  # type: ignore[type-arg]
        random = np.random.default_rng([step, int(samples[0])])
        corner = random.integers(0, 4 + offset, (len(samples), 2))
        block = (corner[:, :1] * 6 + corner[:, 1:]) + np.array([0, 1, 6, 7])
        context = np.array([np.setdiff1d(np.arange(36), row)[: 36 - 4] for row in block])
        if leak:
            context[0, 0] = block[0, 0]
        place = np.broadcast_to(np.arange(4), (len(samples), 1, 4))
        return Masks(context, [block[:, None]], block, place, 2)

    return make


def test_audit__finds_the_exclusive_offset_of_the_published_sampler() -> None:
    """Corners drawn from [0, H - h) never put a block on the last row and column."""
    config = load_config(TINY)
    good = audit_masks(hand_made(1), grid=6, batch=64)  # type: ignore[arg-type]
    refuse_blind_spots(config, good)
    bad = audit_masks(hand_made(0), grid=6, batch=64)  # type: ignore[arg-type]
    assert sorted(bad.never(bad.target_rate)) == sorted({(5, i) for i in range(6)} | {(i, 5) for i in range(6)})
    with pytest.raises(UserError, match=r"\(row 0, column 5\).* and 5 more are never in a target block.*target_scale"):
        refuse_blind_spots(config, bad)


def test_audit__counts_every_leaked_patch() -> None:
    audit = audit_masks(hand_made(1, leak=True), grid=6, batch=64)  # type: ignore[arg-type]
    assert audit.leaked == len(audit.shapes)
    with pytest.raises(HjepaError, match="masks leak"):
        refuse_blind_spots(load_config(TINY), audit)


def test_plan__refuses_masks_that_hide_the_middle_from_every_context(tmp_path: Path) -> None:
    """A block of 6 x 6 of 8 x 8 cells covers the 4 x 4 in the middle wherever it lies."""
    config = load_config(TINY, ["model.num_levels=1", "masking.target_scale=[0.56, 0.57]", "masking.num_targets=1",
                                "masking.target_aspect=[1.0, 1.0]"])  # fmt: skip
    with pytest.raises(UserError) as caught:
        plan(config, num_samples=100, picture=tmp_path / "plan.png")
    message = str(caught.value)
    assert "(row 2, column 2)" in message
    assert "and 10 more are never visible as context" in message
    assert "masking.target_scale=[0.56, 0.57]" in message
    assert caught.value.exit_code == 2
    assert (tmp_path / "plan.png").exists()


# -- the whole -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [0, -2])
def test_plan__of_no_rank_is_refused(ranks: int) -> None:
    with pytest.raises(UserError, match=f"the number of ranks must be at least 1, got {ranks}"):
        plan(load_config(TINY), world_size=ranks)


def test_plan__of_an_unknown_data_set_is_refused_and_the_near_one_named() -> None:
    with pytest.raises(UserError, match=r"data\.name=CIFAR11: no such data set\. Did you mean CIFAR10"):
        plan(load_config(TINY, ["data.name=CIFAR11"]))


def test_plan__is_the_same_twice_and_says_it_all(tmp_path: Path) -> None:
    config = load_config("demo")
    found = plan(config, picture=tmp_path / "plan.png")
    text = render(found)
    assert text == render(plan(config))
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert max(map(len, text.splitlines())) <= 120
    for part in ("799,744", "1,875 steps of 128 images", "context and target at once: 0", "checkpoints: 14.4 MB"):
        assert part in text
    assert "assumed" not in text
    assert "assumed: the size of the training" in render(plan(load_config(TINY)))
    assert found.kept_bytes == 5 * found.checkpoint  # the best two, the newest two, and one being written
