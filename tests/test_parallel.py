"""Two real ranks against one: the same gradients, steps and states, replicated and sharded."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytorch_optimizer import LARS
from torch import Tensor

from hjepa import distributed
from hjepa.config import load_config
from hjepa.distributed import World
from hjepa.errors import UserError
from hjepa.masks import MultiBlockMasking
from hjepa.models import HJEPAModel, MaskTensors
from hjepa.trainers import create_optimizer, parallel
from hjepa.utils.checkpoint import read_checkpoint, write_checkpoint
from tests import ranks

# Widths that two ranks cannot halve evenly, and a weight with fewer rows than ranks: one rank's shard of it is empty.
CONFIG = """
data: {image_size: 16, channels: 1}
model: {patch_size: 4, embed_dim: 12, depth: 1, num_heads: 3, num_levels: 2,
        predictor: {embed_dim: 8, depth: 1, num_heads: 2}}
masking: {num_targets: 2}
loss: {regularizer: {name: vicreg, projector_dim: 1}}
training: {batch_size: 8, device: cpu, lr: 0.01}
"""
LR = 0.01
CPU = torch.device("cpu")
MODES = ["ddp", "fsdp"]


class Party:
    """A model, its optimiser and this rank's share of one global batch."""

    def __init__(self, mode: str, world: World, *, seed: int = 0, optimizer: str = "adamw"):
        config = load_config(CONFIG)
        torch.manual_seed(seed)
        self.world = world
        self.core = HJEPAModel(config)
        trained = [p for p in self.core.parameters() if p.requires_grad]
        self.optimizer: torch.optim.Optimizer
        if optimizer == "lars":
            self.optimizer = LARS(trained, lr=0.5, momentum=0.9, weight_decay=0.01)
        elif optimizer == "sgd":
            self.optimizer = torch.optim.SGD(trained, lr=0.5, momentum=0.9, fused=True)
        else:
            self.optimizer = create_optimizer(self.core, config)
        names = parallel.parameter_names(self.core, self.optimizer)
        self.model = parallel.wrap(self.core, mode, world, CPU, None)
        parallel.rebind(self.optimizer, self.model, names)
        self.images = torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(1))
        self.masks = MultiBlockMasking(config)(step=0, epochs=0, samples=torch.arange(8).numpy())

    def loss(self, images: slice) -> Tensor:
        context, targets, union, place, rows = self.masks.take(images)
        tensors = MaskTensors(
            torch.from_numpy(context),
            [torch.from_numpy(cells) for cells in targets],
            torch.from_numpy(union),
            torch.from_numpy(place),
            rows,
        )
        out = self.model(self.images[images], tensors)
        losses = [F.smooth_l1_loss(p, t) for p, t in zip(out.predictions, out.targets, strict=True)]
        return torch.stack(losses).sum() + sum(e.square().mean() for e in out.embeddings)

    def backward(self, micro_batches: int = 1) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        share = self.world.slice(8)
        size = (share.stop - share.start) // micro_batches
        for i in range(micro_batches):
            with parallel.no_sync(self.model, last=i == micro_batches - 1):
                start = share.start + i * size
                (self.loss(slice(start, start + size)) / micro_batches).backward()

    def step(self, found_inf: float = 0.0) -> None:
        parallel.optimizer_step(self.optimizer, torch.tensor(found_inf))

    def gradients(self) -> dict[str, Tensor]:
        return {name: whole(p.grad).clone() for name, p in self.core.named_parameters() if p.grad is not None}

    def weights(self) -> dict[str, Tensor]:
        return {name: whole(p.detach()).clone() for name, p in self.core.named_parameters()}

    def pieces(self) -> list[Tensor]:
        """What this rank holds, cheaper than the whole weights where ranks need not be compared."""
        return [piece.detach().clone() for piece in parallel.local_tensors(list(self.core.parameters()))]

    def state(self) -> dict[str, Any] | None:
        weights, moments = parallel.gather_state(self.model, self.optimizer)
        return None if weights is None else copy.deepcopy({"model": weights, "optimizer": moments})


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[no-any-return]


def journey(mode: str, world: World, states: dict[str, Any]) -> dict[str, Any]:
    """Everything that one rank and two must agree on; ``states`` are of other worlds, to go on from.

    What concerns each rank by itself is checked here: a skipped step moves nothing, neither with the first optimiser
    step nor later nor in the target, and a loaded state goes on like the one that was saved.
    """
    found: dict[str, Any] = {}
    party = Party(mode, world, seed=world.rank)
    found["weights"] = party.weights()
    found["empty"] = party.state()
    party.backward()
    found["gradients"] = party.gradients()
    party.backward(micro_batches=2)
    found["accumulated"] = party.gradients()
    found["norm"] = parallel.clip_grad_norm(party.core, None)
    found["unclipped"] = party.gradients()
    found["norm"] = parallel.clip_grad_norm(party.core, 0.01)
    found["clipped"] = party.gradients()
    before = party.pieces()
    party.step(found_inf=1.0)
    assert_same(party.pieces(), before)
    for entry in party.optimizer.state.values():
        assert not any(value.any() for value in parallel.local_tensors(list(entry.values())))
    party.step()
    before = party.pieces()
    party.core.update_target(0.9, torch.tensor(0.0))
    assert_same(party.pieces(), before)
    found["stepped"] = party.weights()
    party.core.update_target(0.9, torch.tensor(1.0))
    found["target"] = party.weights()
    with torch.no_grad():
        found["probed"] = party.core.target_encoder(party.images)
    party.backward()
    party.step()
    found["state"] = party.state()
    for name, content in (states | {"own": found["state"], "own empty": found["empty"]}).items():
        other = Party(mode, world, seed=7)
        parallel.scatter_state(other.model, other.optimizer, content if world.is_main else None, world)
        found[f"from {name}"] = other.state()
        if name == "own":
            for one in (party, other):
                one.backward()
                one.step()
            assert_same(other.pieces(), party.pieces())
    for name in ("sgd", "lars"):
        party = Party(mode, world, optimizer=name)
        before = party.pieces()
        party.backward()
        party.step(found_inf=1.0)
        assert_same(party.pieces(), before)
        party.step()
        party.backward()
        party.step()
        found[name] = party.weights()
    state = party.state()
    other = Party(mode, world, seed=7, optimizer="lars")
    parallel.scatter_state(other.model, other.optimizer, state, world)
    found["lars state"], found["from lars"] = state, other.state()
    found["refused"] = refusal(mode, world, found["state"])
    found["overflow"] = overflow(mode, world)
    return found


def refusal(mode: str, world: World, state: dict[str, Any] | None) -> str:
    """What every rank says to the state of another model."""
    party = Party(mode, world)
    if state is not None:
        weights = {name: value for name, value in state["model"].items() if name != "predictor.mask_tokens"}
        state = {"model": weights | {"more": torch.ones(3)}, "optimizer": state["optimizer"]}
    with pytest.raises(ValueError, match="other names or shapes") as raised:
        parallel.scatter_state(party.model, party.optimizer, state, world)
    return str(raised.value)


def overflow(mode: str, world: World) -> float:
    """Loss scale after one gradient value, in the last rank's shard if there are shards, was infinite."""
    party = Party(mode, world)
    party.backward()
    if mode == "ddp" or world.rank == world.size - 1:
        (gradient,) = parallel.local_tensors([party.core.predictor.embed.weight.grad])
        gradient[-1] = math.inf
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.tensor(1.0))
    parallel.unscale(scaler, party.optimizer)
    scaler.update()
    return float(scaler.get_scale())


def two_ranks(states: dict[str, Any], results: Path) -> None:
    """Leaves what this rank found in a file. In the end rank 1 fails, for the test of the failure."""
    world = World.from_environment()
    distributed.init(world, CPU)

    def fail() -> None:
        raise UserError("the main rank's mistake")

    with pytest.raises(UserError, match="the main rank's mistake"):
        distributed.on_main(fail, world)
    found: dict[str, Any] = {
        "said": distributed.on_main(lambda: {"rank": world.rank}, world),
        "object": distributed.broadcast_object(world.rank, world),
        "mean": parallel.all_reduce_mean(torch.tensor([float(world.rank), 1.0])),
    }
    for mode in MODES:
        found[mode] = journey(mode, world, states)
    for _ in range(8):  # further runs in the same process; their groups must not meet the addresses of old ones
        distributed.close()
        distributed.init(world, CPU)
        found["again"] = parallel.all_reduce_mean(torch.tensor(float(world.rank)))
    torch.save(found, results / f"{world.rank}")
    if world.rank == 1:
        raise RuntimeError("rank 1 has failed, as it should")
    torch.distributed.barrier()


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return journey("ddp", World(), {})


@pytest.fixture(scope="module")
def failure(alone: dict[str, Any], results: Path) -> str:
    """What ``ranks.run`` says of two ranks of which one has failed. They also load what one rank saved to a file."""
    write_checkpoint(results / "alone", alone["state"])
    with pytest.raises(AssertionError) as raised:
        ranks.run(two_ranks, {"one rank": read_checkpoint(results / "alone")}, results, timeout=200)
    return str(raised.value)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def together(failure: str, results: Path) -> list[dict[str, Any]]:
    """What each of two ranks found."""
    assert "rank 1 has failed, as it should" in failure, failure
    return [torch.load(results / f"{rank}", weights_only=False) for rank in range(2)]


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Bit for bit, types and order included."""
    if isinstance(a, Tensor):
        assert torch.equal(a, b), where
        assert a.dtype == b.dtype, where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert type(a) is type(b), where
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}.{i}")
    else:
        assert a == b, where


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor], atol: float = 1e-6) -> None:
    assert list(a) == list(b)
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], atol=atol, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("mode", MODES)
def test_wrap__starts_every_rank_from_the_main_ranks_weights(
    mode: str, alone: dict[str, Any], together: list[dict[str, Any]]
) -> None:
    for found in together:
        assert_same(found[mode]["weights"], alone["weights"])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("which", ["gradients", "accumulated", "unclipped", "clipped"])
def test_gradient__of_two_half_batches_is_that_of_the_batch(
    mode: str, which: str, alone: dict[str, Any], together: list[dict[str, Any]]
) -> None:
    for found in together:
        assert_close(found[mode][which], alone["clipped" if which == "clipped" else "gradients"])


@pytest.mark.parametrize("mode", MODES)
def test_clip__measures_and_limits_the_norm_over_all_shards(
    mode: str, alone: dict[str, Any], together: list[dict[str, Any]]
) -> None:
    exact = torch.stack([g.double().square().sum() for g in alone["gradients"].values()]).sum().sqrt()
    torch.testing.assert_close(alone["norm"].double(), exact, rtol=1e-6, atol=0)
    for found in together:
        torch.testing.assert_close(found[mode]["norm"], alone["norm"], rtol=1e-5, atol=0)
        assert found[mode]["norm"].shape == ()
        clipped = torch.stack([g.square().sum() for g in found[mode]["clipped"].values()]).sum().sqrt()
        assert float(clipped) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("which", ["stepped", "target", "sgd", "lars"])
def test_step__moves_weights_and_target_as_one_rank_does(
    mode: str, which: str, alone: dict[str, Any], together: list[dict[str, Any]]
) -> None:
    assert not torch.equal(alone["stepped"]["predictor.mask_tokens"], alone["weights"]["predictor.mask_tokens"])
    for found in together:
        # Adam divides by the gradient's size, so where a gradient is almost 0 its rounding is seen.
        assert_close(found[mode][which], alone[which], atol=1e-2 * LR)


@pytest.mark.parametrize("mode", MODES)
def test_encoder__can_be_probed_on_all_ranks(mode: str, alone: dict[str, Any], together: list[dict[str, Any]]) -> None:
    for found in together:
        torch.testing.assert_close(found[mode]["probed"], alone["probed"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_state__of_one_rank_is_loaded_and_gathered_bit_for_bit(
    mode: str, alone: dict[str, Any], together: list[dict[str, Any]]
) -> None:
    mine = together[0][mode]["from one rank"]
    assert_same(mine["model"], alone["state"]["model"])
    assert_same(mine["optimizer"]["state"], alone["state"]["optimizer"]["state"])
    assert_same(mine["optimizer"]["param_groups"], alone["state"]["optimizer"]["param_groups"])


@pytest.mark.parametrize("mode", MODES)
def test_state__of_two_ranks_comes_back_and_the_run_goes_on_the_same(mode: str, together: list[dict[str, Any]]) -> None:
    main = together[0][mode]
    assert_same(main["from own"], main["state"])
    assert_same(main["from own empty"], main["empty"])
    assert_same(main["from lars"], main["lars state"])
    assert together[1]["fsdp"]["state"] is None


@pytest.mark.parametrize("mode", MODES)
def test_state__of_two_ranks_fits_one(mode: str, together: list[dict[str, Any]], tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "two", together[0][mode]["state"])
    party = Party("ddp", World(), seed=3)
    parallel.scatter_state(party.model, party.optimizer, read_checkpoint(tmp_path / "two"), World())
    assert_same(party.state(), together[0][mode]["state"])


def test_state__is_the_same_from_either_mode(alone: dict[str, Any], together: list[dict[str, Any]]) -> None:
    ddp, fsdp = (together[0][mode]["empty"] for mode in MODES)
    assert_same(ddp, fsdp)
    assert_same(ddp, alone["empty"])
    ddp, fsdp = (together[0][mode]["state"] for mode in MODES)
    assert_close(ddp["model"], fsdp["model"], atol=1e-2 * LR)
    for a, b in zip(ddp["optimizer"]["state"].values(), fsdp["optimizer"]["state"].values(), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("mode", MODES)
def test_state__of_another_model_is_refused_on_every_rank(
    mode: str, alone: dict[str, Any], together: list[dict[str, Any]]
) -> None:
    assert "more: (3,) there, nothing here" in alone["refused"]
    assert [found[mode]["refused"] for found in together] == [alone["refused"]] * 2


@pytest.mark.parametrize("mode", MODES)
def test_overflow__in_one_ranks_shard_halves_the_loss_scale_of_all(mode: str, together: list[dict[str, Any]]) -> None:
    assert [found[mode]["overflow"] for found in together] == [512.0, 512.0]


def test_ranks__share_objects_means_and_errors(together: list[dict[str, Any]]) -> None:
    for found in together:
        assert found["said"] == {"rank": 0}
        assert found["object"] == 0
        assert found["mean"].tolist() == [0.5, 1.0]
        assert found["again"] == 0.5


def test_failed_rank__ends_the_job_and_its_traceback_is_shown(failure: str) -> None:
    assert "RuntimeError: rank 1 has failed, as it should" in failure
    assert "Traceback" in failure


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_state_bytes__foresees_what_a_checkpoint_holds(name: str) -> None:
    model = HJEPAModel(config := load_config("demo", [f"training.optimizer={name}"]))
    optimizer = create_optimizer(model, config)
    expected = parallel.state_bytes(model, optimizer)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moments = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    assert expected == sum(t.nbytes for t in (*model.state_dict().values(), *moments))
