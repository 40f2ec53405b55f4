"""Optimisers, with weight decay only where it belongs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hjepa.config import Config
from hjepa.errors import UserError


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases, norms and mask tokens do not. Parameters without gradient are left out.

    The two groups say by "decayed" which they are, and keep saying it in a checkpoint.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (plain if parameter.ndim <= 1 or name.endswith("mask_tokens") else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay, "decayed": True},
        {"params": plain, "weight_decay": 0.0, "decayed": False},
    ]


def create_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """The optimiser that ``training.optimizer`` names; the trainer sets its learning rate before every step.

    adamw shrinks weights by lr * decay beside the step (Loshchilov & Hutter 2019). In adam, sgd and lars decay is what
    their authors made it, an L2 penalty: decay * w is added to the gradient, so adam scales it like the gradient, and
    a decay that suits adamw is usually too strong for adam.

    Raises:
        UserError: lars is asked for and its library is not installed.
    """
    training = config.training
    groups = parameter_groups(model, training.weight_decay)
    if training.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=training.lr, betas=training.betas, fused=True)
    if training.optimizer == "adam":
        return torch.optim.Adam(groups, lr=training.lr, betas=training.betas, fused=True)
    momentum = training.betas[0]
    if training.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, lr=training.lr, momentum=momentum, fused=True)
        if momentum > 0:
            optimizer.register_step_pre_hook(_start_momentum)
        return optimizer
    try:
        from hjepa.trainers.lars import LARS
    except ModuleNotFoundError as error:
        if error.name != "pytorch_optimizer":
            raise
        raise UserError(
            "training.optimizer=lars: its library pytorch-optimizer is not installed here; "
            "pip install pytorch-optimizer, or use training.optimizer=sgd"
        ) from None
    return LARS(groups, lr=training.lr, momentum=momentum)


def set_hyperparameters(optimizer: torch.optim.Optimizer, *, lr: float, weight_decay: float) -> None:
    """Write what the schedules say: ``lr`` into every group, ``weight_decay`` into those that decay.

    Groups that do not say whether they decay, which somebody else made, keep the weight decay they have.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
        if group.get("decayed"):
            group["weight_decay"] = weight_decay


def supports_found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """Whether ``step`` moves nothing where the device finds 1.0 in ``optimizer.found_inf``: torch's fused ones do.

    For the others, lars among them, the host must read the verdict and leave ``step`` out.
    """
    return all(group.get("fused") for group in optimizer.param_groups)


def _start_momentum(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Momentum starts from zeros, which gives the step that torch's fused SGD takes without a buffer.

    Left to itself it makes a buffer of unset memory for the first step to fill; if that step is skipped, the second
    one adds the memory's content to the weights.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None and optimizer.state[p].get("momentum_buffer") is None:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
