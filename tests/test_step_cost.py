"""What one step asks of the device: how many kernels, and never an answer."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hjepa.config import Config, load_config
from hjepa.distributed import World
from hjepa.losses import HierarchicalLoss
from hjepa.masks import MultiBlockMasking
from hjepa.models import HJEPAModel, MaskTensors
from hjepa.trainers import create_optimizer
from hjepa.trainers.step import TrainStep

# These launch no kernel: they change how memory is looked at, or reserve it.
VIEWS = {
    *("view", "_unsafe_view", "_reshape_alias", "as_strided", "alias", "detach", "lift_fresh", "set_"),
    *("t", "transpose", "permute", "expand", "unsqueeze", "squeeze", "unflatten"),
    *("slice", "select", "split", "split_with_sizes", "unbind", "size", "stride"),
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "zeros_like"),
}
SYNCS = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero", "item"}
# ViT-B/16 at 224 pixels in depth, tokens and heads; the width changes no count, so the test is quick.
NARROW = ["model.embed_dim=48", "model.predictor.embed_dim=48", "training.batch_size=2"]


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


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
    context, targets, union, place, rows = MultiBlockMasking(config)(step=0, epochs=0, samples=np.arange(2))
    tensor = torch.from_numpy
    masks = MaskTensors(tensor(context), [tensor(cells) for cells in targets], tensor(union), tensor(place), rows)
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
