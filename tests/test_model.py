"""The model: what it sees, what it predicts, and what its hierarchy means."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hjepa.config import Config, load_config
from hjepa.losses import HierarchicalLoss
from hjepa.masks import MultiBlockMasking
from hjepa.models import HierarchicalEncoder, HJEPAModel, MaskTensors, build_encoder, merge_cells
from hjepa.models.vit import Attention, Block, gather_tokens

TINY = """
data: {image_size: 32, channels: 3}
model: {patch_size: 4, embed_dim: 32, depth: 2, num_heads: 2, num_levels: 3,
        predictor: {embed_dim: 16, depth: 2, num_heads: 2}}
masking: {num_targets: 3}
training: {batch_size: 8, epochs: 2, warmup_epochs: 0.5}
"""


def tiny(*overrides: str) -> Config:
    return load_config(TINY, overrides)


def masked_batch(config: Config) -> tuple[torch.Tensor, MaskTensors]:
    context, targets, union, place, rows = MultiBlockMasking(config)(step=3, epochs=1, samples=np.arange(8))
    images = torch.rand(8, config.data.channels, config.data.image_size, config.data.image_size)
    tensor = torch.from_numpy
    return images, MaskTensors(tensor(context), [tensor(t) for t in targets], tensor(union), tensor(place), rows)


def randomized(model: HJEPAModel) -> HJEPAModel:
    """The target encoder moved away from the context encoder."""
    with torch.no_grad():
        for parameter in model.target_encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def test_context__sequence_length_is_the_visible_patch_count() -> None:
    config = tiny()
    model = HJEPAModel(config)
    images, masks = masked_batch(config)
    lengths: dict[str, list[int]] = {"context": [], "target": []}
    for name, encoder in (("context", model.context_encoder), ("target", model.target_encoder)):
        for block in encoder.blocks:
            block.register_forward_hook(lambda _, x, y, name=name: lengths[name].append((x[0].shape[1], y.shape[1])))
    model(images, masks)
    visible, wanted = masks.context.shape[1], masks.union.shape[1]
    assert visible < 64
    assert lengths == {"context": [(visible, visible)] * 2, "target": [(64, 64), (64, wanted)]}


def test_context__masked_pixels_change_nothing() -> None:
    config = tiny()
    model = HJEPAModel(config)
    images, masks = masked_batch(config)
    visible = torch.zeros(8, 64).scatter_(1, masks.context, 1.0).view(8, 1, 8, 8)
    pixels = F.interpolate(visible, scale_factor=4)
    noise = torch.randn_like(images)
    seen = model.context_encoder(images, masks.context)
    assert torch.equal(seen, model.context_encoder(images + noise * (1 - pixels), masks.context))
    assert not torch.equal(seen, model.context_encoder(images + noise * pixels, masks.context))
    predictions = model(images, masks).predictions
    for before, after in zip(predictions, model(images + noise * (1 - pixels), masks).predictions, strict=True):
        assert torch.equal(before, after)


def test_encoder__all_patches_in_any_order_equal_the_full_pass() -> None:
    config = tiny()
    encoder = build_encoder(config)
    images = torch.rand(2, 3, 32, 32)
    order = torch.stack([torch.randperm(64), torch.randperm(64)])
    full = encoder(images).gather(1, order.unsqueeze(-1).expand(-1, -1, 32))
    torch.testing.assert_close(encoder(images, order), full, atol=1e-5, rtol=1e-5)


def test_hierarchy__a_coarse_cell_is_the_mean_of_its_four_children() -> None:
    tokens = torch.randn(2, 64, 5)
    for level, side in ((1, 8), (2, 4)):
        children = merge_cells(tokens, level - 1).view(2, side, side, 5)
        cells = merge_cells(tokens, level).view(2, side // 2, side // 2, 5)
        for row, column in ((0, 0), (side // 2 - 1, 1)):
            block = children[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            torch.testing.assert_close(cells[:, row, column], block.mean((1, 2)))


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_targets__are_layer_normed_cells_of_the_whole_image(levels: int) -> None:
    """Computed at the union of the blocks and merged inside a block, they equal the cells of the whole grid."""
    config = tiny(f"model.num_levels={levels}")
    model = randomized(HJEPAModel(config))
    images, masks = masked_batch(config)
    found = model.target_cells(images, masks)
    tokens = F.layer_norm(model.target_encoder(images), (32,))
    assert len(found) == levels
    for level, cells in enumerate(masks.targets):
        expected = gather_tokens(merge_cells(tokens, level), cells.flatten(1)).view(*cells.shape, 32)
        torch.testing.assert_close(found[level], expected, atol=1e-5, rtol=1e-5)
        assert not found[level].requires_grad
        assert found[level].dtype == torch.float32
    torch.testing.assert_close(found[0].mean(-1), torch.zeros_like(found[0].mean(-1)), atol=1e-5, rtol=0)


def test_targets__padding_of_the_union_changes_nothing() -> None:
    config = tiny()
    model = randomized(HJEPAModel(config))
    images, masks = masked_batch(config)
    all_patches = torch.stack([torch.randperm(64) for _ in range(8)])
    place = torch.stack([order.argsort()[cells] for order, cells in zip(all_patches, masks.targets[0], strict=True)])
    padded = masks._replace(union=all_patches, place=place)
    for a, b in zip(model.target_cells(images, masks), model.target_cells(images, padded), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_targets__without_stop_gradient_are_the_context_encoders_and_carry_its_gradient() -> None:
    config = tiny("model.stop_gradient=false")
    model = randomized(HJEPAModel(config))
    images, masks = masked_batch(config)
    parameters = list(model.context_encoder.parameters())
    out = model(images, masks)
    loss = sum(F.mse_loss(p, t) for p, t in zip(out.predictions, out.targets, strict=True))
    found = torch.autograd.grad(loss, parameters)

    tokens = F.layer_norm(model.context_encoder(images), (32,))
    predictions = model.predictor(model.context_encoder(images, masks.context), masks.context, masks.targets)
    expected = sum(
        F.mse_loss(p, gather_tokens(merge_cells(tokens, level), cells.flatten(1)).view_as(p))
        for level, (p, cells) in enumerate(zip(predictions, masks.targets, strict=True))
    )
    for a, b in zip(found, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    with torch.no_grad():
        assert not model(images, masks).targets[0].requires_grad


def test_target_encoder__equals_the_context_encoder_at_the_start() -> None:
    model = HJEPAModel(tiny())
    for ours, theirs in zip(model.target_encoder.parameters(), model.context_encoder.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert not ours.requires_grad


@pytest.mark.parametrize("moved", [None, 1.0])
def test_update_target__is_the_exponential_mean(moved: float | None) -> None:
    model = randomized(HJEPAModel(tiny()))
    before = [parameter.clone() for parameter in model.target_encoder.parameters()]
    model.context_encoder.positions += 1.0
    model.update_target(0.9, None if moved is None else torch.tensor(moved))
    for old, new, student in zip(
        before, model.target_encoder.parameters(), model.context_encoder.parameters(), strict=True
    ):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * student)
    assert torch.equal(model.target_encoder.positions, model.context_encoder.positions)


def test_update_target__after_a_skipped_step_changes_no_bit() -> None:
    model = randomized(HJEPAModel(tiny()))
    before = copy.deepcopy(model.target_encoder)
    model.context_encoder.positions += 1.0
    model.update_target(0.9, torch.tensor(0.0))
    for old, new in zip(before.parameters(), model.target_encoder.parameters(), strict=True):
        assert torch.equal(old, new)
    assert torch.equal(before.positions, model.target_encoder.positions)


# -- the block -------------------------------------------------------------------------------------------------------


@pytest.fixture
def block() -> Block:
    torch.manual_seed(0)
    return Block(32, 4, 4.0)


def test_block__wanted_tokens_equal_those_of_the_full_pass(block: Block) -> None:
    x, wanted = torch.randn(3, 10, 32), torch.tensor([[9, 0], [4, 5], [1, 8]])
    torch.testing.assert_close(block(x, wanted=wanted), gather_tokens(block(x), wanted), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(block(x, start=6), block(x)[:, 6:], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("start", [0, 5])
def test_block__sequences_from_a_table_equal_those_written_out(block: Block, start: int) -> None:
    x, table, index = torch.randn(2, 5, 32), torch.randn(7, 32), torch.randint(0, 7, (2, 3, 4))
    written = torch.cat([x.repeat_interleave(3, 0), table[index].flatten(0, 1)], 1)
    torch.testing.assert_close(
        block(x, table=table, index=index, start=start), block(written)[:, start:], atol=1e-6, rtol=1e-5
    )


def test_attention__in_bfloat16_is_that_of_float32_rounded() -> None:
    torch.manual_seed(0)
    attention, x = Attention(32, 4), torch.randn(2, 9, 32)
    with torch.autocast("cpu", torch.bfloat16):
        found, part = attention(x), attention(x, x[:, 2:4])
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), attention(x), atol=0.02, rtol=0.02)
    torch.testing.assert_close(part.float(), attention(x)[:, 2:4], atol=0.02, rtol=0.02)


# -- the whole -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["loss.regularizer.name=none", "loss.regularizer.name=sigreg", "model.depth=1"])
def test_gradients__reach_every_trained_parameter_and_no_target(setting: str) -> None:
    config = tiny(setting, "model.predictor.depth=1" if "depth" in setting else "seed=0")
    model, loss_fn = HJEPAModel(config), HierarchicalLoss(config)
    loss, _ = loss_fn(*model(*masked_batch(config)))
    loss.backward()
    for name, parameter in model.named_parameters():
        if name.startswith("target_encoder"):
            assert parameter.grad is None
        else:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


def test_embeddings__are_projected_means_of_a_levels_predictions() -> None:
    config = tiny("loss.regularizer.name=vicreg", "loss.regularizer.projector_dim=5")
    model = HJEPAModel(config)
    out = model(*masked_batch(config))
    assert [vectors.shape for vectors in out.embeddings] == [(8, 5)] * 3
    torch.testing.assert_close(out.embeddings[1], model.projectors[1](out.predictions[1].flatten(1, 2).mean(1)))
    assert HJEPAModel(tiny())(*masked_batch(tiny())).embeddings == []


def test_forward__in_bfloat16_keeps_targets_and_residuals_in_float32() -> None:
    config = tiny("loss.regularizer.name=vicreg")
    model = randomized(HJEPAModel(config))
    images, masks = masked_batch(config)
    exact = model(images, masks)
    residuals = []
    model.context_encoder.blocks[0].register_forward_hook(lambda _, __, y: residuals.append(y.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(images, masks)
    assert residuals == [torch.float32]
    for level in range(3):
        assert out.targets[level].dtype == torch.float32
        assert F.mse_loss(out.targets[level], exact.targets[level]) < 1e-3
        assert F.mse_loss(out.predictions[level].float(), exact.predictions[level]) < 1e-3


@pytest.mark.slow
def test_compile_blocks__makes_one_graph_per_kind_of_call_and_changes_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []

    def count(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiled(f, backend=count, **options))
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    config = tiny("model.num_levels=1", "model.depth=4", "model.predictor.depth=4")
    model = HJEPAModel(config)
    names = list(model.state_dict())
    images, masks = masked_batch(config)
    expected = model(images, masks)
    try:
        model.compile_blocks()
        out = model(images, masks)
        # context; target and its last block; the predictor's first, middle and last block
        assert len(graphs) == 6
        short = masks._replace(context=masks.context[:, :-5])
        model(images, short)
        assert len(graphs) == 6
    finally:
        torch._dynamo.config.recompile_limit = limit
        torch._dynamo.reset()
    assert list(model.state_dict()) == names
    for a, b in zip(out.predictions, expected.predictions, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(2, 1, 32, 32), (2, 3, 28, 28), (3, 32, 32)])
def test_encoder__says_which_images_it_takes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"expected (B, 3, 32, 32), got {shape}. embed_images")):
        build_encoder(tiny())(torch.zeros(shape))


def test_encoder__levels_are_cells_of_their_grid_and_all_holds_the_mean_once() -> None:
    config = tiny()
    encoder = HierarchicalEncoder(build_encoder(config), num_levels=3).eval()
    images = torch.rand(2, 3, 32, 32)
    embedded = encoder.embed(images)
    assert {level: value.shape[1] for level, value in embedded.items()} == {
        "mean": 32,
        "0": 32,
        "1": 32,
        "2": 32,
        "all": 128,
    }
    assert (encoder.embedding_dim(1), encoder.embedding_dim("mean"), encoder.embedding_dim()) == (32, 32, 128)
    torch.testing.assert_close(embedded["1"], encoder.tokens(images, 1).amax(1))
    torch.testing.assert_close(embedded["all"][:, :32], encoder.tokens(images, 2).mean(1))
    assert torch.equal(encoder(images, 1), embedded["1"])
    with pytest.raises(ValueError, match="expected one of"):
        encoder(images, 3)
