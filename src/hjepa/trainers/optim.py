"""Optimisers, with weight decay only where it belongs."""

from __future__ import annotations

import torch
from torch import nn

from hjepa.config import Config


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Matrices decay; biases, norms and mask tokens do not. Parameters without gradient are left out."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (plain if parameter.ndim <= 1 or name.endswith("mask_tokens") else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def create_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """The optimiser that ``training.optimizer`` names; the trainer sets its learning rate before every step."""
    training = config.training
    groups = parameter_groups(model, training.weight_decay)
    if training.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=training.lr, betas=training.betas, fused=True)
    if training.optimizer == "adam":
        return torch.optim.Adam(groups, lr=training.lr, betas=training.betas, fused=True)
    return torch.optim.SGD(groups, lr=training.lr, momentum=training.betas[0], fused=True)
