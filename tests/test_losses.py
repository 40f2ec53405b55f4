"""The prediction loss, the regularisers, and what two real ranks make of them."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hjepa.config import Config, load_config
from hjepa.errors import UserError
from hjepa.losses import HierarchicalLoss, sigreg, vicreg
from hjepa.losses.sigreg import NODES, REACH, directions
from tests import ranks

CPU = torch.device("cpu")


def make_config(*overrides: str) -> Config:
    return load_config("data: {image_size: 32}\nmodel: {patch_size: 8}\n", list(overrides))


def cells(seed: int, batch: int = 6, levels: int = 2, dim: int = 5) -> list[Tensor]:
    """Per level, (B, M = 3 blocks, m_l cells, D); errors on both sides of the smooth L1's bend."""
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(batch, 3, 4 ** (levels - level), dim, generator=generator) for level in range(levels)]


def cloud(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- the prediction loss ---------------------------------------------------------------------------------------------


def test_prediction_loss__is_the_weighted_mean_of_the_levels() -> None:
    predictions, targets = cells(0), cells(1)
    loss, parts = HierarchicalLoss(make_config("loss.level_weights=[3, 0.5]", "loss.smooth_l1_beta=0.7"))(
        predictions, targets
    )
    each = []
    for prediction, target in zip(predictions, targets, strict=True):
        error = (prediction - target).abs()
        each.append(torch.where(error < 0.7, error**2 / 1.4, error - 0.35).mean())
    torch.testing.assert_close(loss, (3 * each[0] + 0.5 * each[1]) / 3.5)
    assert list(parts) == ["level_0", "level_1"]
    torch.testing.assert_close(list(parts.values()), each)
    assert not any(part.requires_grad for part in parts.values())


def test_prediction_loss__of_one_level_is_the_smooth_l1_mean_of_i_jepa() -> None:
    predictions, targets = cells(0, levels=1), cells(1, levels=1)
    loss, parts = HierarchicalLoss(make_config("model.num_levels=1"))(predictions, targets)
    assert torch.equal(loss, F.smooth_l1_loss(predictions[0], targets[0]))
    assert torch.equal(parts["level_0"], loss)


def test_prediction_loss__level_of_weight_zero_has_no_gradient() -> None:
    predictions = [item.requires_grad_() for item in cells(0)]
    loss, parts = HierarchicalLoss(make_config("loss.level_weights=[1, 0]"))(predictions, cells(1))
    loss.backward()
    assert torch.equal(loss, parts["level_0"])
    assert predictions[1].grad is not None
    assert predictions[1].grad.count_nonzero() == 0


@pytest.mark.parametrize("sizes", [[6], [3, 3], [1, 2, 3]])
def test_prediction_loss__accumulated_by_images_is_the_loss_of_one_batch(sizes: list[int]) -> None:
    layer, targets = nn.Linear(5, 5), cells(1)
    loss_fn = HierarchicalLoss(make_config())
    total = 0.0
    for inputs, wanted in zip(
        zip(*[item.split(sizes) for item in cells(0)], strict=True),
        zip(*[item.split(sizes) for item in targets], strict=True),
        strict=True,
    ):
        loss = loss_fn([layer(x) for x in inputs], wanted)[0] * len(inputs[0]) / 6
        loss.backward()
        total += float(loss.detach())
    whole = loss_fn([layer(x) for x in cells(0)], targets)[0]
    (expected,) = torch.autograd.grad(whole, [layer.weight])
    assert total == pytest.approx(whole.item(), rel=1e-6)
    torch.testing.assert_close(layer.weight.grad, expected)


def test_prediction_loss__bfloat16_predictions_are_compared_in_float32() -> None:
    predictions, targets = [item.bfloat16() for item in cells(0)], cells(1)
    loss_fn = HierarchicalLoss(make_config())
    loss, _ = loss_fn(predictions, targets)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, loss_fn([item.float() for item in predictions], targets)[0])


class Operators(TorchDispatchMode):
    """The names of the operators that are more than a view."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        views = [result.alias_info is not None and not result.alias_info.is_write for result in func._schema.returns]
        if not all(views):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "most"), [("none", 4), ("vicreg", 28), ("sigreg", 38)])
def test_loss__is_few_operators_and_never_asks_the_device(name: str, most: int) -> None:
    loss_fn = HierarchicalLoss(make_config(f"loss.regularizer.name={name}"))
    inputs = cells(0), cells(1), [cloud(6, 8), cloud(6, 8)]
    with Operators() as seen:
        loss_fn(*inputs)
    assert len(seen.names) <= most, seen.names
    assert not [op for op in seen.names if "local_scalar_dense" in op or "nonzero" in op or "is_nonzero" in op]


# -- SIGReg ----------------------------------------------------------------------------------------------------------


def statistic(z: Tensor, step: int = 0, slices: int = 256) -> float:
    return float(sigreg(z[None], directions(z.shape[1], slices, seed=0, step=step, device=CPU)))


def test_sigreg__is_its_formula() -> None:
    z, a = cloud(11, 3).double(), directions(3, 7, seed=0, step=0, device=CPU).double()
    total = 0.0
    for m in range(7):
        heights = []
        for j in range(NODES):
            t = REACH * j / (NODES - 1)
            values = [t * float(row @ a[:, m]) for row in z]
            cosine, sine = sum(map(math.cos, values)) / 11, sum(map(math.sin, values)) / 11
            gaussian = math.exp(-t * t / 2)
            heights.append(gaussian * ((cosine - gaussian) ** 2 + sine**2))
        trapezoids = sum((left + right) / 2 for left, right in pairwise(heights))
        total += 2 * trapezoids * REACH / (NODES - 1)  # over [-3, 3], which is twice that over [0, 3]
    torch.testing.assert_close(sigreg(z.float()[None], a.float())[0].double(), torch.tensor(11 * total / 7).double())


@pytest.mark.parametrize("count", [64, 1024])
def test_sigreg__of_a_gaussian_is_its_expectation_whatever_the_batch(count: int) -> None:
    # |mean_n e^(itx)|^2 - e^(-t^2) has the expectation (1 - e^(-t^2)) / N.
    t = torch.linspace(0, REACH, NODES, dtype=torch.float64)
    expected = 2 * float(torch.trapezoid((-t.square() / 2).exp() * (1 - (-t.square()).exp()), t))
    assert expected == pytest.approx(1.05, abs=0.01)
    found = [statistic(cloud(count, 16, seed=seed), step=seed) for seed in range(8)]
    assert sum(found) / len(found) == pytest.approx(expected, rel=0.1)


def test_sigreg__is_large_on_clouds_that_are_not_a_gaussian() -> None:
    z = cloud(512, 32)
    gaussian = statistic(z)
    line = cloud(512, 1, seed=1) @ cloud(1, 32, seed=2)
    assert gaussian < 1.5
    assert statistic(0.01 * z) > 150 * gaussian
    assert statistic(z + 1) > 50 * gaussian
    assert statistic(line) > 50 * gaussian
    assert statistic(torch.zeros(512, 32)) == pytest.approx(0.4 * 512, rel=0.02)
    assert statistic(3 * z) > 50 * gaussian, "it is not standardised: scale counts"


def test_sigreg__descent_turns_a_tiny_cloud_into_a_gaussian() -> None:
    z = (0.1 * cloud(128, 4)).requires_grad_()
    optimizer = torch.optim.Adam([z], lr=0.05)
    for step in range(60):
        optimizer.zero_grad()
        sigreg(z[None], directions(4, 64, seed=0, step=step, device=CPU)).sum().backward()
        optimizer.step()
    assert z.std(0).mean().item() == pytest.approx(1, abs=0.15)
    assert z.mean(0).norm() < 0.2


def test_directions__depend_on_seed_and_step_alone_and_have_unit_length() -> None:
    torch.manual_seed(1)
    a = directions(8, 100, seed=3, step=5, device=CPU)
    torch.manual_seed(2)
    assert torch.equal(a, directions(8, 100, seed=3, step=5, device=CPU))
    assert not torch.equal(a, directions(8, 100, seed=3, step=6, device=CPU))
    assert not torch.equal(a, directions(8, 100, seed=5, step=3, device=CPU))
    torch.testing.assert_close(a.norm(dim=0), torch.ones(100))
    assert a.mean(1).norm() < 0.3, "they point everywhere"


# -- VICReg ----------------------------------------------------------------------------------------------------------


def whitened(count: int, dim: int) -> Tensor:
    """A cloud of mean 0 and, exactly, covariance 1 (unbiased)."""
    z = cloud(count, dim).double()
    q, _ = torch.linalg.qr(z - z.mean(0))
    return (q * math.sqrt(count - 1)).float()


def test_vicreg__is_zero_on_decorrelated_vectors_of_unit_variance() -> None:
    z = whitened(64, 8)
    assert vicreg(z[None]).item() == pytest.approx(0, abs=1e-5)
    assert vicreg(5 + 3 * z[None]).item() == pytest.approx(0, abs=1e-5), "neither the mean nor a large variance counts"


def test_vicreg__of_constant_vectors_is_the_whole_hinge() -> None:
    z = torch.full((1, 16, 8), 7.0, requires_grad=True)
    term = vicreg(z)
    assert term.item() == pytest.approx(1 - math.sqrt(1e-4))
    term.sum().backward()
    assert z.grad is not None
    assert z.grad.isfinite().all()


def test_vicreg__known_values() -> None:
    # Half the standard deviation in every dimension: the hinge is 1 - sqrt(1/4 + 1e-4).
    assert vicreg(0.5 * whitened(64, 8)[None]).item() == pytest.approx(1 - math.sqrt(0.2501), abs=1e-5)
    # The same number in all K = 8 dimensions: K (K - 1) covariances of 1, over K, with the paper's 1 : 25.
    assert vicreg(whitened(64, 1).expand(64, 8)[None]).item() == pytest.approx(7 / 25, abs=1e-5)


def test_vicreg__gradient_is_that_of_torch_cov() -> None:
    z = cloud(1, 12, 5).double().requires_grad_()
    ours = torch.autograd.grad(vicreg(z).sum(), z)[0]
    covariance = torch.cov(z[0].T)
    hinge = torch.relu(1 - torch.sqrt(covariance.diagonal() + 1e-4)).mean()
    off = covariance[~torch.eye(5, dtype=torch.bool)]
    torch.testing.assert_close(ours, torch.autograd.grad(hinge + off.square().sum() / 5 / 25, z)[0])


def test_vicreg__of_one_image_is_refused() -> None:
    with pytest.raises(UserError, match="at least 2 images"):
        vicreg(torch.zeros(1, 1, 4))


# -- both together ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vicreg", "sigreg"])
def test_regularizer__is_added_with_its_weight_and_the_weights_of_its_levels(name: str) -> None:
    embeddings = [cloud(6, 8), 0.1 * cloud(6, 8, seed=1)]
    settings = (f"loss.regularizer.name={name}", "loss.regularizer.weight=0.25", "seed=9")

    def term(weights: str) -> float:
        loss_fn = HierarchicalLoss(make_config(*settings, f"loss.regularizer.level_weights={weights}"))
        loss, parts = loss_fn(cells(0), cells(1), embeddings, step=4)
        plain, _ = HierarchicalLoss(make_config())(cells(0), cells(1))
        assert list(parts) == ["level_0", "level_1", "regularizer"]
        torch.testing.assert_close(loss, plain + 0.25 * parts["regularizer"])
        return float(parts["regularizer"])

    assert term("[1, 3]") == pytest.approx(0.25 * term("[1, 0]") + 0.75 * term("[0, 1]"), rel=1e-5)
    assert term("null") == pytest.approx(term("[1, 1]"), rel=1e-6)
    a = directions(8, 256, seed=9, step=4, device=CPU)
    alone = vicreg(embeddings[1][None]) if name == "vicreg" else sigreg(embeddings[1][None], a)
    assert term("[0, 1]") == pytest.approx(float(alone), rel=1e-5)


@pytest.mark.parametrize("name", ["vicreg", "sigreg"])
def test_regularizer__computes_in_float32_under_autocast(name: str) -> None:
    loss_fn = HierarchicalLoss(make_config(f"loss.regularizer.name={name}"))
    embeddings = [cloud(64, 8).bfloat16(), cloud(64, 8, seed=1).bfloat16()]
    outside = loss_fn(cells(0), cells(1), embeddings)[1]["regularizer"]
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss_fn(cells(0), cells(1), embeddings)[1]["regularizer"]
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)


def test_regularizer__without_the_embeddings_of_every_level_is_an_error() -> None:
    loss_fn = HierarchicalLoss(make_config("loss.regularizer.name=vicreg"))
    with pytest.raises(ValueError, match="embeddings of 2 levels, got 0"):
        loss_fn(cells(0), cells(1))


class Tiny(nn.Module):
    """Inputs of all images (B, 5) -> predictions and embeddings of two levels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.predict = nn.ModuleList(nn.Linear(5, 5) for _ in range(2))
        self.project = nn.ModuleList(nn.Linear(5, 4) for _ in range(2))

    def forward(self, inputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        predictions = [layer(x) for layer, x in zip(self.predict, inputs, strict=True)]
        return predictions, [layer(x.mean((1, 2))) for layer, x in zip(self.project, predictions, strict=True)]


def loss_and_gradients(name: str, model: nn.Module, own: slice) -> dict[str, Tensor]:
    loss_fn = HierarchicalLoss(
        make_config(f"loss.regularizer.name={name}", "loss.regularizer.weight=0.5", "loss.regularizer.num_slices=32")
    )
    predictions, embeddings = model([x[own] for x in cells(0)])
    loss, parts = loss_fn(predictions, [x[own] for x in cells(1)], embeddings, step=3)
    loss.backward()
    gradients = {n.removeprefix("module."): p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **parts, **gradients}


def half_batch() -> dict[str, dict[str, Tensor]]:
    dist.init_process_group("gloo")
    start = 3 * dist.get_rank()
    return {
        name: loss_and_gradients(name, nn.parallel.DistributedDataParallel(Tiny()), slice(start, start + 3))
        for name in ("vicreg", "sigreg")
    }


def test_two_ranks__give_the_loss_and_the_gradients_of_one_batch() -> None:
    first, second = ranks.run(half_batch)
    for name in ("vicreg", "sigreg"):
        one, two, whole = first[name], second[name], loss_and_gradients(name, Tiny(), slice(0, 6))
        assert len(whole) == 4 + 8
        assert torch.equal(one["regularizer"], two["regularizer"]), "every rank knows the statistic of the whole batch"
        for key, expected in whole.items():
            mean = one[key] if key.startswith(("predict", "project")) else (one[key] + two[key]) / 2
            torch.testing.assert_close(mean, expected, atol=1e-6, rtol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
        assert whole["project.0.weight"].norm() > 1e-3, "the regulariser has a gradient to compare"
