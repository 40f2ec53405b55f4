"""Optimisers: what decays, one step against the closed form, skipped steps."""

from __future__ import annotations

import copy
import json
import math
import sys

import pytest
import torch
from torch import Tensor, nn

from hjepa.config import Config, load_config
from hjepa.errors import UserError
from hjepa.models import HJEPAModel
from hjepa.trainers.optim import create_optimizer, set_hyperparameters, supports_found_inf

ALL = ["adamw", "adam", "sgd", "lars"]


def make_config(*overrides: str) -> Config:
    text = """
data: {image_size: 16, channels: 1}
model: {patch_size: 4, embed_dim: 16, depth: 1, num_heads: 2, num_levels: 2,
        predictor: {embed_dim: 8, depth: 1, num_heads: 2}}
loss: {regularizer: {name: vicreg, projector_dim: 4}}
training: {weight_decay: 0.1, lr: 0.5, betas: [0.8, 0.9]}
"""
    return load_config(text, list(overrides))


class Small(nn.Module):
    """One parameter of every kind that is treated in its own way."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, 4, generator=generator))
        self.bias = nn.Parameter(torch.randn(4, generator=generator))
        self.mask_tokens = nn.Parameter(torch.randn(2, 4, generator=generator))
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)

    def set_gradients(self, seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        for p in (self.weight, self.bias, self.mask_tokens):
            p.grad = torch.randn(p.shape, generator=generator)
        return [p.grad.clone() for p in (self.weight, self.bias, self.mask_tokens) if p.grad is not None]

    def values(self) -> list[Tensor]:
        return [p.detach().clone() for p in (self.weight, self.bias, self.mask_tokens)]


def make(name: str) -> tuple[Small, torch.optim.Optimizer]:
    model = Small()
    return model, create_optimizer(model, make_config(f"training.optimizer={name}"))


@pytest.mark.parametrize("name", ALL)
def test_groups__matrices_decay_and_frozen_parameters_are_left_out(name: str) -> None:
    config = make_config(f"training.optimizer={name}")
    model = HJEPAModel(config)
    decayed, plain = create_optimizer(model, config).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    in_decayed, in_plain = ({names[id(p)] for p in group["params"]} for group in (decayed, plain))
    assert {name.rsplit(".", 1)[-1] for name in in_decayed} == {"weight"}
    assert not [name for name in in_decayed if "norm" in name]
    assert in_plain >= {"predictor.mask_tokens", "context_encoder.norm.weight", "context_encoder.patch_embed.bias"}
    assert in_decayed | in_plain == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not in_decayed & in_plain
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert decayed["lr"] == plain["lr"] == 0.5


@pytest.mark.parametrize("name", ALL)
def test_set_hyperparameters__writes_lr_everywhere_and_decay_where_it_belongs(name: str) -> None:
    _, optimizer = make(name)
    set_hyperparameters(optimizer, lr=0.25, weight_decay=0.0)
    set_hyperparameters(optimizer, lr=0.125, weight_decay=0.3)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.125, 0.3), (0.125, 0.0)]
    _, other = make(name)
    other.load_state_dict(optimizer.state_dict())
    set_hyperparameters(other, lr=0.5, weight_decay=0.6)
    assert [group["weight_decay"] for group in other.param_groups] == [0.6, 0.0], "a checkpoint knows what decays"


def test_set_hyperparameters__leaves_the_decay_of_somebody_elses_groups_alone() -> None:
    optimizer = torch.optim.SGD(Small().parameters(), lr=1.0, weight_decay=0.4)
    set_hyperparameters(optimizer, lr=0.1, weight_decay=0.2)
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (0.1, 0.4)


# -- one step against the closed form --------------------------------------------------------------------------------


def two_steps(name: str) -> tuple[list[Tensor], list[list[Tensor]], list[Tensor]]:
    """Weights before, gradients of the two steps, and weights after them."""
    model, optimizer = make(name)
    before, gradients = model.values(), []
    for seed in (1, 2):
        gradients.append(model.set_gradients(seed))
        optimizer.step()
    assert torch.equal(model.frozen, torch.ones(2, 2))
    return before, gradients, model.values()


@pytest.mark.parametrize("name", ["adamw", "adam"])
def test_adam__decay_is_beside_the_step_in_adamw_and_in_the_gradient_in_adam(name: str) -> None:
    before, gradients, after = two_steps(name)
    for i, (w, decay) in enumerate(zip(before, (0.1, 0.0, 0.0), strict=True)):
        mean, square = torch.zeros_like(w), torch.zeros_like(w)
        for t in (1, 2):
            g = gradients[t - 1][i]
            if name == "adamw":
                w = w * (1 - 0.5 * decay)
            else:
                g = g + decay * w
            mean, square = 0.8 * mean + 0.2 * g, 0.9 * square + 0.1 * g**2
            w = w - 0.5 * (mean / (1 - 0.8**t)) / ((square / (1 - 0.9**t)).sqrt() + 1e-8)
        torch.testing.assert_close(after[i], w)


def test_sgd__is_heavy_ball_momentum() -> None:
    before, gradients, after = two_steps("sgd")
    for i, (w, decay) in enumerate(zip(before, (0.1, 0.0, 0.0), strict=True)):
        velocity = torch.zeros_like(w)
        for g in (step[i] for step in gradients):
            velocity = 0.8 * velocity + g + decay * w
            w = w - 0.5 * velocity
        torch.testing.assert_close(after[i], w)


def test_lars__is_you_et_al_for_matrices_and_plain_momentum_for_the_rest() -> None:
    before, gradients, after = two_steps("lars")
    for i, w in enumerate(before):
        velocity = torch.zeros_like(w)
        for g in (step[i] for step in gradients):
            if i == 0:  # local rate = 0.001 |w| / (|g| + decay |w|)
                g = 0.001 * w.norm() / (g.norm() + 0.1 * w.norm()) * (g + 0.1 * w)
            velocity = 0.8 * velocity + g
            w = w - 0.5 * velocity
        torch.testing.assert_close(after[i], w)


def test_lars__state_goes_through_a_checkpoint() -> None:
    model, optimizer = make("lars")
    model.set_gradients(1)
    optimizer.step()
    twin = copy.deepcopy(model)
    other = create_optimizer(twin, make_config("training.optimizer=lars"))
    state = optimizer.state_dict()
    json.dumps(state["param_groups"])
    other.load_state_dict(copy.deepcopy(state))
    for m, o in ((model, optimizer), (twin, other)):
        m.set_gradients(2)
        o.step()
    assert all(torch.equal(a, b) for a, b in zip(model.values(), twin.values(), strict=True))


def test_lars__is_imported_only_when_asked_for_and_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "hjepa.trainers.lars", raising=False)
    for name in ("adamw", "adam", "sgd"):
        make(name)
    with pytest.raises(UserError, match=r"pip install pytorch-optimizer"):
        make("lars")


# -- skipped steps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize("skipped", [0, 1, 2])
def test_found_inf__moves_neither_weights_nor_moments_nor_the_step_count(name: str, skipped: int) -> None:
    model, optimizer = make(name)
    straight, without = make(name)
    assert supports_found_inf(optimizer)
    for step in range(3):
        model.set_gradients(step)
        before, state = model.values(), copy.deepcopy(optimizer.state_dict()["state"])
        if step == skipped:
            for p in (model.weight, model.bias):
                assert p.grad is not None
                p.grad[0] = math.nan
        optimizer.found_inf = torch.tensor(float(step == skipped))  # type: ignore[attr-defined]
        optimizer.step()
        if step == skipped:
            assert all(torch.equal(a, b) for a, b in zip(model.values(), before, strict=True))
            for index, entry in optimizer.state_dict()["state"].items():
                for key, value in entry.items():
                    expected = state[index][key] if index in state else torch.zeros_like(value)
                    assert torch.equal(value, expected), (index, key)
        else:
            straight.set_gradients(step)
            without.step()
    assert all(torch.equal(a, b) for a, b in zip(model.values(), straight.values(), strict=True))


def test_found_inf__is_not_for_lars_nor_for_optimisers_that_are_not_fused() -> None:
    assert not supports_found_inf(make("lars")[1])
    assert not supports_found_inf(torch.optim.AdamW(Small().parameters()))


def test_sgd__without_momentum_has_no_state() -> None:
    model = Small()
    optimizer = create_optimizer(model, make_config("training.optimizer=sgd", "training.betas=[0, 0.9]"))
    before = model.weight.detach().clone()
    (gradient, *_) = model.set_gradients(1)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), before - 0.5 * (gradient + 0.1 * before))
    assert not any(entry.get("momentum_buffer") is not None for entry in optimizer.state.values())
