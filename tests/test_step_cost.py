"""What one step asks of the device: how many kernels, and never an answer."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from benchmarks.step import VIEWS, Operators, tensors
from hjepa.config import Config, load_config
from hjepa.distributed import World
from hjepa.losses import HierarchicalLoss
from hjepa.masks import MultiBlockMasking
from hjepa.models import HJEPAModel
from hjepa.trainers import create_optimizer
from hjepa.trainers.step import TrainStep

SYNCS = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero", "item"}
# ViT-B/16 at 224 pixels in depth, tokens and heads; the width changes no count, so the test is quick.
NARROW = ["model.embed_dim=48", "model.predictor.embed_dim=48", "training.batch_size=2"]


def operators(config: Config, dtype: torch.dtype | None) -> Counter[str]:
    """Of the second step: the first one makes the optimiser's state."""
    torch.manual_seed(0)
    model = HJEPAModel(config)
    step = TrainStep(
        model,
        model,
        create_optimizer(model, config),
        HierarchicalLoss(config),
        normalize=lambda images: images.float() / 255,
        clip_grad=config.training.clip_grad,
        amp_dtype=dtype,
        accumulation_steps=config.training.accumulation_steps,
        world=World(),
    )
    images = torch.zeros((2, 3, 224, 224), dtype=torch.uint8)
    masks = tensors(MultiBlockMasking(config)(step=0, epochs=0, samples=np.arange(2)))
    step(images, masks, 0.99)
    with Operators() as counted:
        step(images, masks, 0.99)
    return counted.count


@pytest.mark.parametrize("levels", [1, 2])
def test_step__has_a_budget_of_1600_operators(levels: int) -> None:
    config = load_config("default", [*NARROW, f"model.num_levels={levels}"])
    count = operators(config, torch.bfloat16)
    assert sum(number for name, number in count.items() if name not in VIEWS) <= 1600, count.most_common(20)


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["training.optimizer=sgd"],
        ["training.optimizer=adam", "training.clip_grad=null"],
        ["training.accumulation_steps=2"],
        ["loss.regularizer.name=sigreg"],
        ["loss.regularizer.name=vicreg"],
        ["model.stop_gradient=false"],
    ],
    ids=lambda settings: ",".join(settings) or "default",
)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
def test_step__never_waits_for_the_device(settings: list[str], dtype: torch.dtype | None) -> None:
    config = load_config("default", [*NARROW, "model.depth=2", "model.predictor.depth=2", *settings])
    count = operators(config, dtype)
    assert {name for name in count if name in SYNCS} == set()
