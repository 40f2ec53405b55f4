"""The model: what it sees, what it predicts, and what its hierarchy means."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hjepa.config import Config, load_config
from hjepa.losses import HierarchicalLoss
from hjepa.masks import MultiBlockMasking
from hjepa.models import HierarchicalEncoder, HJEPAModel, build_encoder, merge_cells
from hjepa.models.vit import Block

TINY = """
data: {image_size: 32, channels: 3}
model: {patch_size: 4, embed_dim: 32, depth: 2, num_heads: 2, num_levels: 3,
        predictor: {embed_dim: 16, depth: 2, num_heads: 2}}
masking: {num_targets: 3}
training: {batch_size: 8, epochs: 2, warmup_epochs: 0.5}
"""


def tiny(*overrides: str) -> Config:
    return load_config(TINY, overrides)


def masked_batch(config: Config) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    masks = MultiBlockMasking(config)(step=3, epoch=1, samples=np.arange(8))
    images = torch.rand(8, config.data.channels, config.data.image_size, config.data.image_size)
    return images, torch.from_numpy(masks.context), [torch.from_numpy(cells) for cells in masks.targets]


def test_context__sequence_length_is_the_visible_patch_count() -> None:
    config = tiny()
    model = HJEPAModel(config)
    images, context, _ = masked_batch(config)
    lengths = []
    model.context_encoder.blocks[0].register_forward_hook(lambda _, inputs, __: lengths.append(inputs[0].shape[1]))
    assert model.context_encoder(images, context).shape == (8, context.shape[1], 32)
    assert lengths == [context.shape[1]]
    assert context.shape[1] < 64


def test_context__masked_pixels_change_nothing() -> None:
    config = tiny()
    model = HJEPAModel(config)
    images, context, _ = masked_batch(config)
    visible = torch.zeros(8, 64).scatter_(1, context, 1.0).view(8, 1, 8, 8)
    pixels = F.interpolate(visible, scale_factor=4)
    noise = torch.randn_like(images)
    assert torch.equal(
        model.context_encoder(images, context), model.context_encoder(images + noise * (1 - pixels), context)
    )
    assert not torch.equal(
        model.context_encoder(images, context), model.context_encoder(images + noise * pixels, context)
    )


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


def test_targets__are_layer_normed_cells_of_the_full_image() -> None:
    config = tiny()
    model = HJEPAModel(config)
    images, _, targets = masked_batch(config)
    cells = model.target_cells(images, targets)
    tokens = F.layer_norm(model.target_encoder(images), (32,))
    for level in range(3):
        expected = merge_cells(tokens, level)[5, targets[level][5, 2]]
        torch.testing.assert_close(cells[level][5, 2], expected)
    torch.testing.assert_close(cells[0].mean(-1), torch.zeros_like(cells[0].mean(-1)), atol=1e-5, rtol=0)
    assert not any(cell.requires_grad for cell in cells)


def test_target_encoder__equals_the_context_encoder_at_the_start() -> None:
    model = HJEPAModel(tiny())
    for ours, theirs in zip(model.target_encoder.parameters(), model.context_encoder.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert not ours.requires_grad


def test_update_target__is_the_exponential_mean() -> None:
    model = HJEPAModel(tiny())
    before = [parameter.clone() for parameter in model.target_encoder.parameters()]
    with torch.no_grad():
        for parameter in model.context_encoder.parameters():
            parameter.add_(torch.randn_like(parameter))
    model.update_target(0.9)
    for old, new, student in zip(
        before, model.target_encoder.parameters(), model.context_encoder.parameters(), strict=True
    ):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * student)


def test_one_level__is_i_jepas_loss_on_the_same_masks() -> None:
    """Written out from the paper: one pass per target block, smooth L1 of layer-normed target tokens."""
    config = tiny("model.num_levels=1")
    model, loss_fn = HJEPAModel(config), HierarchicalLoss(config)
    images, context, targets = masked_batch(config)
    loss, levels = loss_fn(*model(images, context, targets))

    predictor = model.predictor
    h = F.layer_norm(model.target_encoder(images), (32,))
    z = predictor.embed(model.context_encoder(images, context)) + predictor.positions_0[context]
    losses = []
    for block in range(3):
        cells = targets[0][:, block]
        x = torch.cat([z, predictor.mask_tokens[0] + predictor.positions_0[cells]], 1)
        for layer in predictor.blocks:
            x = layer(x)
        prediction = predictor.heads[0](predictor.norm(x[:, context.shape[1] :]))
        target = h.gather(1, cells.unsqueeze(-1).expand(-1, -1, 32))
        losses.append(F.smooth_l1_loss(prediction, target))
    torch.testing.assert_close(loss, torch.stack(losses).mean())
    torch.testing.assert_close(levels, loss.detach()[None])


def test_loss__weights_levels_and_divides_by_their_sum() -> None:
    config = tiny("loss.level_weights=[1.0, 0.5, 0.0]")
    predictions = [torch.zeros(2, 3, n, 4) for n in (16, 4, 1)]
    targets = [torch.full_like(p, value) for p, value in zip(predictions, (0.2, 0.4, 9.0), strict=True)]
    loss, levels = HierarchicalLoss(config)(predictions, targets)
    torch.testing.assert_close(levels, torch.tensor([0.02, 0.08, 8.5]))
    torch.testing.assert_close(loss, torch.tensor((0.02 + 0.5 * 0.08) / 1.5))


def test_block__last_tokens_equal_the_tail_of_the_full_pass() -> None:
    block = Block(32, 4, 4.0)
    x = torch.randn(3, 10, 32)
    torch.testing.assert_close(block.last_tokens(x, 6), block(x)[:, 6:], atol=1e-6, rtol=1e-5)


def test_gradients__reach_every_trained_parameter_and_no_target() -> None:
    config = tiny()
    model, loss_fn = HJEPAModel(config), HierarchicalLoss(config)
    loss, _ = loss_fn(*model(*masked_batch(config)))
    loss.backward()
    for name, parameter in model.named_parameters():
        if name.startswith("target_encoder"):
            assert parameter.grad is None
        else:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


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
