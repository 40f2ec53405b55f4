"""One model on several ranks: replicated (DistributedDataParallel) or sharded (FSDP2), and its whole state for a file.

The state that is gathered is what one rank alone would have, so a checkpoint fits any number of ranks and either mode.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from hjepa import distributed as ranks
from hjepa.distributed import World
from hjepa.models import HJEPAModel
from hjepa.models.vit import Block

State = dict[str, Any]


def wrap(
    model: HJEPAModel, mode: str, world: World, device: torch.device, amp_dtype: torch.dtype | None
) -> DistributedDataParallel | HJEPAModel:
    """The model as the training step calls it, on ``device``, with the main rank's weights everywhere.

    Args:
        mode: ``ddp`` or ``fsdp``. A single rank needs neither.
        amp_dtype: with bfloat16 on a GPU, sharded weights travel in bfloat16; gradients are summed in float32.
    """
    if world.size == 1:
        return model.to(device)
    if mode == "fsdp":
        return _shard(model, world, device, amp_dtype)
    # Every trainable parameter gets a gradient in every step, a zero one if its level weighs nothing: no search for
    # unused ones. Forward does not change buffers; torch has renamed the argument that says so, not the attribute.
    replica = DistributedDataParallel(model.to(device), gradient_as_bucket_view=True)
    replica.broadcast_buffers = False
    return replica


def _shard(model: HJEPAModel, world: World, device: torch.device, amp_dtype: torch.dtype | None) -> HJEPAModel:
    """Block by block, so that a model that comes on the CPU never lies on the device as a whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    for value in model.state_dict().values():
        distributed.broadcast(value, src=0)
    policy = MixedPrecisionPolicy()
    if device.type == "cuda" and amp_dtype == torch.bfloat16:
        # Inputs are left alone: autocast decides, and the residual stream stays in float32 as it does with ddp.
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = init_device_mesh(device.type, (world.size,))
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for module in (*blocks, model.context_encoder, model.target_encoder, model.predictor, model):
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    return model


def unwrap(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


def is_sharded(model: nn.Module) -> bool:
    """Whether this rank holds only a piece of each parameter, so that forward is for all ranks together."""
    return hasattr(next(model.parameters()), "to_local")


def local_tensors(tensors: list[Tensor]) -> list[Tensor]:
    """What this rank holds of each, sharing its memory."""
    return [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]


# -- the optimiser ---------------------------------------------------------------------------------------------------


def parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """The names of the parameters in each group of ``optimizer``."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]


def rebind(optimizer: torch.optim.Optimizer, model: nn.Module, names: list[list[str]]) -> None:
    """Point a fresh optimiser to the parameters that ``model`` has now: sharding replaces them."""
    parameters = dict(unwrap(model).named_parameters())
    for group, members in zip(optimizer.param_groups, names, strict=True):
        group["params"] = [parameters[name] for name in members]
        if not is_sharded(model):
            continue
        # Of the fused optimisers only Adam and AdamW take shards, and LARS fails on them when it works on lists.
        if isinstance(optimizer, torch.optim.SGD):
            group["fused"], group["foreach"] = False, True
        elif not group.get("fused"):
            group["foreach"] = False


def optimizer_step(optimizer: torch.optim.Optimizer, found_inf: Tensor) -> None:
    """Step, or change nothing where ``found_inf`` (0-d float32 on the device) is 1.

    Fused optimisers decide it on the device. The others cannot: there the host waits for the value.
    """
    if not all(group.get("fused") for group in optimizer.param_groups):
        if not found_inf.item():
            optimizer.step()
        return
    if isinstance(optimizer, torch.optim.SGD) and not optimizer.state:
        # Its first step would make buffers, and leave them uninitialised if it is skipped. From zero it is the same.
        for group in optimizer.param_groups:
            for parameter in group["params"] if group["momentum"] else []:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    optimizer.found_inf = found_inf  # type: ignore[attr-defined]
    optimizer.step()


def unscale(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
    """Take float16's loss scale out of the gradients; all ranks see an overflow that only one has in its shards."""
    scaler.unscale_(optimizer)
    if hasattr(optimizer.param_groups[0]["params"][0], "to_local"):
        for flag in scaler._found_inf_per_device(optimizer).values():
            distributed.all_reduce(flag, distributed.ReduceOp.MAX)


def clip_grad_norm(model: nn.Module, limit: float | None) -> Tensor:
    """Scale the gradients so that their norm is at most ``limit``; the 0-d norm before, over all ranks' shards."""
    grads = local_tensors([p.grad for p in model.parameters() if p.grad is not None])
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    if is_sharded(model):
        norm = norm.square()
        distributed.all_reduce(norm)
        norm = norm.sqrt()
    if limit is not None:
        torch._foreach_mul_(grads, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm


@contextmanager
def no_sync(model: nn.Module, *, last: bool) -> Iterator[None]:
    """Around forward and backward of one micro-batch: only the ``last`` exchanges gradients between ranks."""
    if isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
        return
    if is_sharded(model):
        model.set_requires_gradient_sync(last)  # type: ignore[operator]
    yield


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """Replace ``tensor`` by its mean over the ranks, without gradient."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(tensor)
        tensor /= distributed.get_world_size()
    return tensor


# -- the whole state -------------------------------------------------------------------------------------------------


def gather_state(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> tuple[State | None, State | None]:
    """``state_dict()`` of model and optimiser as one rank alone would have them; all ranks must call it.

    Sharded state is copied to the CPU of the main rank, one tensor after another, and the other ranks get None. Else
    it is every rank's own state, not copied.
    """
    weights = unwrap(model).state_dict()
    moments = optimizer.state_dict() if optimizer else None
    if not is_sharded(model):
        return weights, moments
    main = distributed.get_rank() == 0
    weights = {name: _whole(value, main) for name, value in weights.items()}
    if moments is not None:
        # One dict per parameter, with a few tensors and numbers each.
        moments["state"] = {
            index: {key: _whole(value, main) for key, value in entry.items()}
            for index, entry in moments["state"].items()
        }
    return (weights, moments) if main else (None, None)


def state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Of what ``gather_state`` gives once the optimiser has its moments, about."""
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = 2 if "betas" in optimizer.defaults else 1
    return sum(t.numel() * t.element_size() for t in (*model.state_dict().values(), *(trained * moments)))


def _whole(value: Any, keep: bool) -> Any:
    whole = value.full_tensor() if hasattr(value, "full_tensor") else value
    return whole.to("cpu") if keep and isinstance(whole, Tensor) else whole if keep else None


class _Outline(NamedTuple):
    """Stands for a tensor until it arrives."""

    shape: torch.Size
    dtype: torch.dtype


def scatter_state(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, content: Mapping[str, Any] | None, world: World
) -> None:
    """Load what ``gather_state`` returned, of any number of ranks and either mode.

    Args:
        content: ``{"model": ..., "optimizer": ... or None}`` on the main rank, None on the others; all ranks must call.

    Raises:
        ValueError: on all ranks and before anything has changed: the state is not that of this model and optimiser.
    """
    weights, moments = (content["model"], content["optimizer"]) if content else ({}, None)
    outline = ranks.broadcast_object((_outline(weights), _outline(moments)), world)
    current = unwrap(model).state_dict()
    _require_equal(
        {name: tuple(value.shape) for name, value in current.items()},
        {name: tuple(value.shape) for name, value in outline[0].items()},
    )
    restore = optimizer is not None and outline[1] is not None
    if restore:
        assert optimizer is not None
        mine, theirs = (
            [len(group["params"]) for group in of] for of in (optimizer.param_groups, outline[1]["param_groups"])
        )
        if mine != theirs:
            raise ValueError(f"the optimiser has groups of {theirs} parameters there, of {mine} here")
    with torch.no_grad():
        for name, value in current.items():
            own = local_tensors([value])[0]
            own.copy_(local_tensors([_take(weights.get(name), outline[0][name], value, world)])[0])
    if not restore:
        return
    assert optimizer is not None
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in outline[1]["param_groups"] for number in group["params"]]
    state = {
        number: {
            key: _take(moments["state"][number][key] if moments else None, value, parameter, world)
            if isinstance(value, _Outline)
            else value
            for key, value in outline[1]["state"][number].items()
        }
        for number, parameter in zip(numbers, parameters, strict=True)
        if number in outline[1]["state"]
    }
    # How this optimiser is computed is no part of the state: it depends on the mode.
    groups = [
        group | {key: own[key] for key in ("fused", "foreach", "decayed") if key in own}
        for group, own in zip(outline[1]["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _outline(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _Outline(value.shape, value.dtype)
    if isinstance(value, Mapping):
        return {key: _outline(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_outline(item) for item in value)
    return value


def _take(tensor: Tensor | None, outline: _Outline, like: Tensor, world: World) -> Tensor:
    """The main rank's ``tensor`` on the device of ``like``; this rank's shard of it where ``like`` is sharded."""
    if tensor is None:
        tensor = torch.empty(outline.shape, dtype=outline.dtype, device=like.device)
    tensor = tensor.to(like.device, copy=True)
    if world.size > 1:
        distributed.broadcast(tensor, src=0)
    if hasattr(like, "to_local") and tensor.shape == like.shape:
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(like, DTensor)
        return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return tensor


def _require_equal(here: Mapping[str, Any], there: Mapping[str, Any]) -> None:
    different = [
        f"{name}: {there.get(name, 'nothing')} there, {here.get(name, 'nothing')} here"
        for name in sorted({*here, *there})
        if here.get(name) != there.get(name)
    ]
    if different:
        more = f"\n  and {len(different) - 8} more" if len(different) > 8 else ""
        raise ValueError("the weights have other names or shapes\n  " + "\n  ".join(different[:8]) + more)
