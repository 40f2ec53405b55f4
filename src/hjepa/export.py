"""The trained encoder as a folder that anyone can load: safetensors, a JSON description, nothing to unpickle."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from hjepa.config import Config
from hjepa.data.transforms import eval_view, normalize, to_channels
from hjepa.errors import HjepaError, UserError
from hjepa.files import file_sha256
from hjepa.model_card import model_card
from hjepa.models import HierarchicalEncoder, VisionTransformer, build_encoder
from hjepa.utils.checkpoint import read_checkpoint

SCHEMA = 1
WEIGHTS, DESCRIPTION, CARD = "model.safetensors", "config.json", "README.md"
CHECKED_IMAGES = 8  # of the sample; a format that is wrong is wrong on any image
NAMED_TENSORS = 3  # in a message about weights that do not fit

Runner = Callable[[Tensor], Mapping[str, Tensor]]


class ExportedEncoder(HierarchicalEncoder):
    """A HierarchicalEncoder that also knows how its images were prepared."""

    def __init__(
        self,
        vit: VisionTransformer,
        *,
        num_levels: int,
        image_size: int,
        channels: int,
        mean: Sequence[float],
        std: Sequence[float],
    ):
        super().__init__(vit, num_levels=num_levels)
        self.image_size, self.channels = image_size, channels
        self.mean, self.std = tuple(mean), tuple(std)

    def preprocess(self, images: Tensor | Sequence[Tensor]) -> Tensor:
        """uint8 (B, C, H, W), or B images (C, H, W) of any sizes -> normalised (B, C, S, S).

        The short side is scaled to S and the centre kept.
        """
        batch = torch.stack([eval_view(to_channels(image, self.channels), self.image_size) for image in images])
        return normalize(batch, self.mean, self.std)

    def embed_images(self, images: Tensor | Sequence[Tensor], level: int | str = "all") -> Tensor:
        """Embeddings (B, embedding_dim(level)) of raw images, as ``preprocess`` takes them; no gradient."""
        with torch.inference_mode():
            device = self.vit.patch_embed.weight.device
            return self.forward(self.preprocess(images).to(device), level)


def untrained_encoder(config: Config, *, mean: Sequence[float], std: Sequence[float]) -> ExportedEncoder:
    """The encoder as training starts from it: same shape, same seed, same weights."""
    torch.manual_seed(config.seed)
    return _wrap(build_encoder(config), config, mean, std)


def _wrap(vit: VisionTransformer, config: Config, mean: Sequence[float], std: Sequence[float]) -> ExportedEncoder:
    encoder = ExportedEncoder(
        vit,
        num_levels=config.model.num_levels,
        image_size=config.data.image_size,
        channels=config.data.channels,
        mean=mean,
        std=std,
    )
    return encoder.eval().requires_grad_(False)


def encoder_of_checkpoint(
    path: Path, config: Config, *, mean: Sequence[float], std: Sequence[float]
) -> ExportedEncoder:
    """The encoder that ``export.weights`` names, with the weights of a training checkpoint."""
    prefix = f"{config.export.weights}_encoder."
    model = read_checkpoint(path, parts=("model",))["model"]
    vit = build_encoder(config)
    vit.load_state_dict({name.removeprefix(prefix): value for name, value in model.items() if name.startswith(prefix)})
    return _wrap(vit, config, mean, std)


def save_export(
    encoder: ExportedEncoder,
    folder: Path,
    *,
    config: Config,
    provenance: Mapping[str, Any],
    sample: Tensor | None = None,
    dataset: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write an export and return its part of ``model.json``: digest, files, levels, preprocessing, checks.

    The digest is that of weights and description alone, so that it is the same whatever else is written, and by
    whichever version of the exporters.

    Args:
        sample: uint8 images (B, C, H, W) on which the formats of ``export.formats`` are checked; None writes no such
            format.
        dataset: dataset.json, for the model card.

    Raises:
        UserError, HjepaError: as ``write_formats``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.contiguous().cpu() for name, value in encoder.vit.state_dict().items()}
    preprocessing = {
        "image_size": encoder.image_size,
        "channels": encoder.channels,
        "mean": list(encoder.mean),
        "std": list(encoder.std),
        "resize": "short side, bilinear with antialiasing",
        "crop": "centre",
    }
    levels = [
        {"level": level, "grid": encoder.vit.grid // 2**level, "embedding_dim": encoder.embedding_dim(level)}
        for level in encoder.levels
    ]
    description = {
        "schema": SCHEMA,
        "architecture": "hjepa.models.HierarchicalEncoder",
        "encoder": {
            "image_size": config.data.image_size,
            "patch_size": config.model.patch_size,
            "channels": config.data.channels,
            "embed_dim": config.model.embed_dim,
            "depth": config.model.depth,
            "num_heads": config.model.num_heads,
            "mlp_ratio": config.model.mlp_ratio,
        },
        "num_levels": config.model.num_levels,
        "levels": levels,
        "embedding_dim": encoder.embedding_dim(),
        "preprocessing": preprocessing,
        "provenance": dict(provenance),
    }
    safetensors.torch.save_file(weights, folder / WEIGHTS)
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=1, sort_keys=True), "utf-8")
    checks = {} if sample is None else write_formats(encoder, folder, config, sample)
    made = {"levels": levels, "preprocessing": preprocessing, "checks": checks}
    card = model_card({**made, "checkpoint": provenance}, dataset, license=config.export.license)
    (folder / CARD).write_text(card, "utf-8")
    names = (WEIGHTS, DESCRIPTION, CARD, *(FORMATS[name].file for name in checks))
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)} for name in names}
    parts = "".join(str(files[name]["sha256"]) for name in sorted((WEIGHTS, DESCRIPTION)))
    return {"digest": hashlib.sha256(parts.encode()).hexdigest(), "files": files, **made}


def load_export(folder: Path, device: str | torch.device = "cpu") -> ExportedEncoder:
    """The encoder of an export folder, frozen and in evaluation mode; only JSON and safetensors are read.

    Raises:
        UserError: the folder is no export, or a newer one than this code reads.
        HjepaError: its description is damaged, or its weights do not fit it.
    """
    try:
        description = json.loads((folder / DESCRIPTION).read_text("utf-8"))
    except OSError as error:
        raise UserError(
            f"{folder} is not an exported encoder: expected {WEIGHTS} and {DESCRIPTION} in it ({error.strerror})"
        ) from None
    except ValueError as error:
        raise HjepaError(f"{folder / DESCRIPTION} is not valid JSON: {error}; export or fetch it again") from None
    if not isinstance(description, dict):
        raise HjepaError(f"{folder / DESCRIPTION} describes no encoder: expected a JSON object; export it again")
    if description.get("schema", SCHEMA + 1) > SCHEMA:
        raise UserError(f"{folder} was exported by a newer hjepa (schema {description.get('schema')}); update this one")
    try:
        preprocessing = description["preprocessing"]
        encoder = ExportedEncoder(
            VisionTransformer(**description["encoder"]),
            num_levels=description["num_levels"],
            image_size=preprocessing["image_size"],
            channels=preprocessing["channels"],
            mean=preprocessing["mean"],
            std=preprocessing["std"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise HjepaError(
            f"{folder / DESCRIPTION} describes no encoder: {type(error).__name__}: {error}; export or fetch it again"
        ) from None
    try:
        weights = safetensors.torch.load_file(folder / WEIGHTS)
    except (OSError, safetensors.SafetensorError) as error:
        raise HjepaError(f"the weights in {folder} cannot be loaded: {error}; export or fetch it again") from None
    if problems := _misfits(encoder.vit.state_dict(), weights):
        more = f"; and {len(problems) - NAMED_TENSORS} more" if len(problems) > NAMED_TENSORS else ""
        raise HjepaError(
            f"the weights in {folder} cannot be loaded: {WEIGHTS} does not fit {DESCRIPTION}: "
            f"{'; '.join(problems[:NAMED_TENSORS])}{more}. Both must be of one export: export or fetch it again"
        )
    encoder.vit.load_state_dict(weights)
    return encoder.to(device).eval().requires_grad_(False)


def _misfits(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """What is wrong with each tensor, in the order of the encoder's layers."""
    problems = []
    for name, tensor in expected.items():
        if name not in found:
            problems.append(f"{name}: expected shape {tuple(tensor.shape)}, found no such tensor")
        elif found[name].shape != tensor.shape:
            problems.append(f"{name}: expected shape {tuple(tensor.shape)}, found {tuple(found[name].shape)}")
    surplus = [name for name in found if name not in expected]
    return problems + [f"{name}: expected no such tensor, found shape {tuple(found[name].shape)}" for name in surplus]


def max_abs_difference(a: ExportedEncoder, b: ExportedEncoder, images: Tensor) -> float:
    """Largest difference between the embeddings of two encoders for uint8 images (B, C, H, W), over all levels."""
    with torch.inference_mode():
        return _largest_difference(a.embed(a.preprocess(images)), b.embed(b.preprocess(images)))


def _largest_difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Over all outputs. NaN if any is NaN, which Python's ``max`` would lose; infinite if names or shapes differ."""
    if {name: value.shape for name, value in ours.items()} != {name: value.shape for name, value in theirs.items()}:
        return float("inf")
    return float(torch.stack([(ours[name] - theirs[name]).abs().max() for name in ours]).max())


# -- other formats ---------------------------------------------------------------------------------------------------


class Readouts(nn.Module):
    """The encoder as the other formats have it: normalised images in, one named output per level."""

    def __init__(self, encoder: ExportedEncoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """float32 (B, C, S, S) -> ``mean``, ``level_0``, ... (B, D) each, and ``all`` (B, (levels + 1) * D)."""
        return {
            f"level_{name}" if name.isdigit() else name: value for name, value in self.encoder.embed(images).items()
        }


def _write_torch(program: ExportedProgram, path: Path) -> None:
    torch.export.save(program, path)


def _run_torch(path: Path) -> Runner:
    module = torch.export.load(path).module()
    return lambda images: module(images)


def _write_onnx(program: ExportedProgram, path: Path) -> None:
    names = list(program.call_spec.out_spec.context)
    made = torch.onnx.export(
        program,
        input_names=["images"],
        output_names=names,
        dynamic_shapes={"images": {0: "batch"}},
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    if made is None:
        raise RuntimeError("torch.onnx.export made no program")
    for node in made.model.graph:
        node.metadata_props.clear()  # lines of the source files that made the node
    made.save(path)


def _run_onnx(path: Path) -> Runner:
    import onnxruntime  # type: ignore[import-untyped]

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(images: Tensor) -> dict[str, Tensor]:
        values = session.run(names, {"images": images.numpy()})
        return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}

    return run


@dataclass(frozen=True)
class Format:
    file: str
    packages: tuple[str, ...]
    write: Callable[[ExportedProgram, Path], None]
    open: Callable[[Path], Runner]


FORMATS = {
    "torch.export": Format("encoder.pt2", (), _write_torch, _run_torch),
    "onnx": Format("model.onnx", ("onnx", "onnxscript", "onnxruntime"), _write_onnx, _run_onnx),
}


def require_packages(config: Config) -> None:
    """Raises UserError if a package is missing that ``export.formats`` needs."""
    for name in config.export.formats:
        if missing := [package for package in FORMATS[name].packages if find_spec(package) is None]:
            raise UserError(
                f"export.formats has {name}, which needs the package{'s' if len(missing) > 1 else ''} "
                f"{', '.join(missing)}: pip install 'hjepa[onnx]', or take {name} out of export.formats"
            )


def write_formats(encoder: ExportedEncoder, folder: Path, config: Config, sample: Tensor) -> dict[str, dict[str, Any]]:
    """Write the formats that ``export.formats`` names, read each back, and compare it with PyTorch on CPU.

    The input is ``images``, float32, normalised, (B, C, S, S) with any B; the outputs are those of ``Readouts``. For
    the same weights and versions of the exporters, the bytes are the same.

    Both files are for other programs: hjepa itself reads only safetensors and JSON. ``encoder.pt2`` is a zip of JSON
    and raw weights, with one pickle, the example input, of which ``torch.export.load`` (2.15) needs nothing but
    tensors. But from a forged file that function runs any pickle, in this place or in that of a weight: only load one
    whose origin you trust. ONNX is protobuf and runs no code.

    Args:
        sample: uint8 images (B, C, H, W); a few are compared, in batches of three sizes.

    Returns:
        By format: ``max_abs_difference`` over all outputs and batches, ``tolerance``, ``passed``.

    Raises:
        UserError: a package is missing, or there is no image to compare with.
        HjepaError: a format cannot be written or run, or differs by more than ``export.format_tolerance``.
    """
    require_packages(config)
    if not config.export.formats:
        return {}
    if not len(sample):
        raise UserError("the formats of export.formats are compared on images: expected at least one, got none")
    readouts = Readouts(copy.deepcopy(encoder).cpu()).eval()
    images = encoder.preprocess(sample[:CHECKED_IMAGES].cpu())
    batches = [images, images[:1], torch.cat([images, images[:1]])]
    program: ExportedProgram | None = None
    checks: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(config.export.formats):
        form, path = FORMATS[name], folder / FORMATS[name].file
        try:
            with _quiet(), torch.no_grad():
                program = program or _trace(readouts)
                form.write(program, path)
                run = form.open(path)
                found = [_largest_difference(readouts(batch), run(batch)) for batch in batches]
        except _failures(form) as error:
            reason = (str(error).strip() or "no reason given").splitlines()[0][:300]
            raise HjepaError(
                f"the encoder cannot be exported as {name}: {type(error).__name__}: {reason}. "
                f"Take {name} out of export.formats to export it without"
            ) from error
        checks[name] = _held_to_tolerance(name, float(torch.tensor(found, dtype=torch.float64).max()), config)
    return checks


def _held_to_tolerance(name: str, difference: float, config: Config) -> dict[str, Any]:
    tolerance = config.export.format_tolerance
    if not difference <= tolerance:  # NaN too
        raise HjepaError(
            f"the encoder in {FORMATS[name].file} ({name}) differs from PyTorch by {difference:.2e}, more than "
            f"export.format_tolerance={tolerance:g}; raise it, or take {name} out of export.formats"
        )
    return {"max_abs_difference": difference, "tolerance": tolerance, "passed": True}


def _trace(readouts: Readouts) -> ExportedProgram:
    # The example input becomes a part of encoder.pt2: no image of the training set may. Two images, because torch takes
    # a size of 1 for a constant.
    example = torch.zeros(2, *readouts.encoder.vit.image_shape)
    shapes = {"images": {0: torch.export.Dim("batch")}}
    program = torch.export.export(readouts, (example,), dynamic_shapes=shapes, strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    return program


def _failures(form: Format) -> tuple[type[Exception], ...]:
    """What the exporters and runtimes raise; the errors of onnxruntime have no base class of their own."""
    known: tuple[type[Exception], ...] = (RuntimeError, ValueError, TypeError)
    if "onnxruntime" not in form.packages:
        return known
    from onnxruntime.capi import onnxruntime_pybind11_state as state  # type: ignore[import-untyped]

    raised = (state.Fail, state.InvalidArgument, state.InvalidGraph, state.InvalidProtobuf, state.NotImplemented)
    return (*known, *raised, state.RuntimeException)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' many lines about their own passes."""
    loggers = [logging.getLogger(name) for name in ("torch.export", "torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
