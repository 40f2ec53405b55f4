"""One strict, frozen configuration tree, resolved once per run.

A configuration is YAML over the defaults below; ``configs/default.yaml`` spells every default out. Overrides are
dotted strings (``training.lr=3e-4``). Every mistake in a file is reported in one go. This module imports no torch, so
a laptop validates a run in half a second.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from hjepa.errors import UserError

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
MIN_CACHED_BLOCKS = 16  # beside those in use, some are on their way and some are not yet let go
# What the probe measures during training, and evaluation of every readout.
COLLAPSE_MEASURES = ("std", "rankme", "cosine", "norm")
# What evaluation measures of a readout beside that, of which more is better.
SCORES = ("knn_top1", "linear_top1", "low_shot_1pct_top1", "low_shot_10pct_top1", "retrieval_map", "retrieval_recall1")
TOKEN_SCORES = ("attentive_top1", "dense_map", "dense_recall1")  # not of the mean over all patches, which has no cells
Range = tuple[Positive, Positive]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class DataConfig(Section):
    name: str = "image-folder"  # a row of hjepa.data.datasets.DATASETS, or a torchvision dataset class
    root: str | None = None  # a folder, a table or tar files, here or in S3; null lets the data set fetch itself
    image_root: str | None = None  # of a table: where its paths start, and may not leave; null is the table's folder
    path_column: str | None = None  # of a table; null finds it by its name
    label_column: str | None = None  # of a table, or field of a shard's .json; "" uses no labels
    split_column: str | None = None  # of a table; "" uses none
    image_size: Count = 224  # pixels, square, after cropping
    channels: Literal[1, 3] = 3
    crop_scale: Range = (0.3, 1.0)  # area share of the random crop; (1, 1) turns cropping off
    horizontal_flip: bool = False
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1  # held out where the source has no test split
    num_workers: Annotated[int, Field(ge=0)] = 8  # loader processes per rank; 0 decodes in the training process
    shard_mb: Count = 128
    short_side: Annotated[int, Field(ge=64)] | None = None  # pixels that larger images are reduced to; null keeps them
    jpeg_quality: Annotated[int, Field(ge=1, le=100)] = 90  # of photographs that short_side reduces
    part_images: Annotated[int, Field(ge=1000)] = 65536  # prepared as a unit, by one machine
    find_duplicates: bool = True  # exact and near ones, in prepare_data
    remove_leaks: bool = False  # take images out of the training split that the test split has too
    quarantine_limit: Fraction = 0.05  # share of unreadable files above which prepare_data fails
    max_pixels: Count = 100_000_000  # larger images are quarantined as decompression bombs
    cache_dir: str = "~/.cache/hjepa"
    cache_gb: Positive = 64.0  # shards from S3 that are kept in cache_dir, by all runs together, in 1e9 bytes
    block_mb: Count = 8  # what one request to S3 brings
    window_mb: Count = 2000  # of a set that does not fit the cache, the part that batches are drawn from


class EMAConfig(Section):
    momentum: Fraction = 0.996
    momentum_end: Fraction = 1.0
    momentum_warmup_epochs: NonNegative = 0.0  # epochs during which the momentum stays at its start value


class PredictorConfig(Section):
    embed_dim: Count = 384
    depth: Count = 6
    num_heads: Count = 6


class ModelConfig(Section):
    patch_size: Count = 16
    embed_dim: Count = 768
    depth: Count = 12
    num_heads: Count = 12
    mlp_ratio: Positive = 4.0
    num_levels: Count = 2  # level l predicts the patch grid merged 2^l x 2^l; 1 is I-JEPA
    stop_gradient: bool = True  # false: targets come from the trained encoder itself, with gradient
    predictor: PredictorConfig = PredictorConfig()
    ema: EMAConfig = EMAConfig()


class MaskingConfig(Section):
    num_targets: Count = 4
    target_scale: Range = (0.15, 0.2)  # area share of one target block
    target_aspect: Range = (0.75, 1.5)
    context_scale: Range = (0.85, 1.0)
    min_context: Count = 4  # visible patches that every image keeps at least
    redraw_below: Fraction = 0.75  # share of the mean context; an image with less is masked anew
    context_multiple: Count = 1  # visible patches are cut to a multiple of it, so that fewer shapes are compiled


class RegularizerConfig(Section):
    name: Literal["none", "vicreg", "sigreg"] = "none"
    weight: Positive = 0.05  # of the term, beside the prediction loss
    level_weights: tuple[NonNegative, ...] | None = None  # one per level; null weighs all levels equally
    projector_dim: Count = 128  # width of the vectors that are regularised
    num_slices: Count = 256  # random directions of sigreg, drawn anew at every step


class LossConfig(Section):
    level_weights: tuple[NonNegative, ...] | None = None  # one per level; null weighs all levels equally
    smooth_l1_beta: Positive = 1.0
    regularizer: RegularizerConfig = RegularizerConfig()


class TrainingConfig(Section):
    epochs: Count = 300
    warmup_epochs: NonNegative = 40.0
    batch_size: Count = 2048  # global: over all ranks and accumulation steps
    accumulation_steps: Count = 1
    optimizer: Literal["adamw", "adam", "sgd", "lars"] = "adamw"
    schedule: Literal["cosine", "linear"] = "cosine"  # of the learning rate, after the warm-up
    lr: Positive = 1e-3
    min_lr: NonNegative = 1e-6
    weight_decay: NonNegative = 0.05
    weight_decay_end: NonNegative | None = None  # null keeps weight_decay; else half a cosine leads there
    betas: tuple[Momentum, Momentum] = (0.9, 0.95)
    clip_grad: Positive | None = 3.0  # largest gradient norm; null turns clipping off
    use_amp: bool = True  # mixed precision
    amp_dtype: Literal["auto", "bfloat16", "float16"] = "auto"  # auto: bf16 where the hardware has it, else fp16
    max_skipped: Count = 3  # non-finite steps in a row before the run rewinds, once, and then stops
    parallel: Literal["ddp", "fsdp"] = "ddp"  # fsdp shards weights and optimiser state over the ranks
    compile: bool = False  # torch.compile each transformer block; pays on a GPU
    device: str = "auto"  # auto, cpu, cuda, cuda:1


class CheckpointConfig(Section):
    save_frequency: Count = 10  # epochs between periodic checkpoints
    keep_best_n: Annotated[int, Field(ge=0)] = 3
    checkpoint_dir: str = "results/checkpoints"
    # A representation metric, never the self-distillation loss, which favours collapse. auto: probe/knn_top1 where the
    # training images have labels, collapse/rankme where not.
    metric: str = "auto"
    mode: Literal["min", "max"] = "max"


class CollapseConfig(Section):
    probe_samples: Count = 512  # images of the fixed probe set
    frequency: Count = 1  # epochs between measurements
    min_std: NonNegative = 0.05  # across-image std of the embedding, below which it counts as collapsed
    min_rank: Positive = 2.0  # effective rank (RankMe) below which it counts as collapsed
    action: Literal["warn", "stop"] = "stop"
    patience: Count = 3  # collapsed measurements in a row before the action


class WandbConfig(Section):
    enabled: bool = False
    project: str = "h-jepa"


class TensorboardConfig(Section):
    enabled: bool = True


class LoggingConfig(Section):
    experiment_name: str = "hjepa"
    log_dir: str = "results/logs"
    log_frequency: Count = 100  # optimiser steps between log lines
    picture_frequency: Annotated[int, Field(ge=0)] = 10  # epochs between pictures and histograms; 0: none
    wandb: WandbConfig = WandbConfig()
    tensorboard: TensorboardConfig = TensorboardConfig()


class EvaluationConfig(Section):
    train_samples: Count | None = None  # the first n of the train split are the labelled set; null takes all
    test_samples: Count | None = None
    batch_size: Count = 256
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0, 1, 2)
    bootstrap_resamples: Count = 1000  # of the test items, behind every 95 % interval
    knn_k: Count = 20
    knn_ks: tuple[Count, ...] = (10, 20, 100, 200)  # reported beside knn_k, from the same search
    knn_temperature: Positive = 0.07
    # Penalties per squared weight of the linear probe; the one that held-out training images prefer is taken.
    linear_l2: Annotated[tuple[NonNegative, ...], Field(min_length=1)] = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
    linear_iterations: Count = 60
    attentive_lr: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1e-3, 4e-3)
    attentive_weight_decay: Annotated[tuple[NonNegative, ...], Field(min_length=1)] = (0.01, 1.0)
    attentive_heads: Count = 4  # attention heads of the attentive probe; they must divide the embedding
    attentive_epochs: Count = 5
    token_cache_gb: NonNegative = 4.0  # tokens of one split kept in memory; more are computed anew in every epoch
    retrieval_queries: Count = 1000  # test images that look for images of their class
    retrieval_gallery: Count = 5000  # training images among which they look
    dense_retrieval_queries: Count = 200  # likewise, comparing cell by cell
    dense_retrieval_gallery: Count = 1000
    view_images: Count = 500  # images behind the alignment and LiDAR
    views: Annotated[int, Field(ge=2)] = 8  # random crops of each
    view_scale: Range = (0.5, 1.0)  # area share of such a crop
    primary_metric: str = "eval/linear_top1"  # what the champion is chosen by

    @field_validator("linear_l2", mode="before")
    @classmethod
    def _one_penalty(cls, value: Any) -> Any:
        """A single number is a grid of one."""
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return (value,)
        return tuple(value) if isinstance(value, list) else value  # strict: a validated value is no longer JSON


class ExportConfig(Section):
    weights: Literal["target", "context"] = "target"  # the EMA encoder, or the one that was trained
    tolerance: Positive = 1e-5  # largest allowed difference between export and training code
    formats: tuple[Literal["torch.export", "onnx"], ...] = ("torch.export", "onnx")  # beside the safetensors
    format_tolerance: Positive = 1e-4  # largest allowed difference between such a format and PyTorch
    license: str = ""  # of the weights, for the model card; free text


class StorageConfig(Section):
    uri: str = "s3://hjepa"  # bucket and prefix; keys come from the environment, never from here
    endpoint_url: str | None = None  # null takes AWS_ENDPOINT_URL, then AWS itself
    region: str = "us-east-1"


class TrackingConfig(Section):
    uri: str | None = None  # null takes MLFLOW_TRACKING_URI
    registered_model: str = "hjepa"
    champion_margin: NonNegative = 0.005  # the primary metric must rise by more than this


Quantity = Annotated[str, Field(pattern=r"^\d+(\.\d+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?$")]  # as Kubernetes writes amounts


_CREDENTIAL = re.compile(
    r"AWS_ACCESS_KEY_ID|MLFLOW_TRACKING_USERNAME|(.*_)?(TOKEN|PASSWORD|API_KEY)|(.*_)?SECRET(_.*)?", re.IGNORECASE
)


def misplaced_variables(names: Iterable[str]) -> list[str]:
    """What is wrong with plain variables of a training pod, by their names alone; a value is never told."""
    names = sorted(names)
    secret = [name for name in names if _CREDENTIAL.fullmatch(name)]
    taken = [name for name in names if name.startswith("PET_")]
    found = []
    if secret:
        found.append(
            f"the job's variables hold {', '.join(secret)}: a manifest is readable by everybody in the namespace. "
            "Put them into the Secret that cluster.s3_secret or cluster.mlflow_secret names"
        )
    if taken:
        found.append(
            f"the job's variables hold {', '.join(taken)}, which start torchrun and are set by hjepa and the operator; "
            "use cluster.nodes, cluster.processes_per_node, cluster.max_restarts and cluster.grace_seconds"
        )
    return found


class Toleration(Section):
    key: str
    operator: Literal["Exists", "Equal"] = "Exists"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = "NoSchedule"


class ClusterConfig(Section):
    """Where and on what the tasks run. It decides nothing about the result and is no part of the run's identity."""

    backend: Literal["auto", "pytorchjob", "trainjob", "local"] = "auto"  # auto: what the cluster has installed
    namespace: str | None = None  # null takes the launcher's own
    registry: str = ""  # host/path before the names of the images
    image: str | None = None  # of the training pods; null takes hjepa-train of this version
    image_pull_secrets: tuple[str, ...] = ()
    nodes: Count = 1
    gpus_per_node: Annotated[int, Field(ge=0)] = 1  # 0 trains on CPUs
    processes_per_node: Count | None = None  # null: one per GPU, or one
    gpu_resource: str = "nvidia.com/gpu"
    cpu: Quantity = "8"  # per node
    memory: Quantity = "64Gi"  # per node; /dev/shm counts
    shm: Quantity = "16Gi"  # /dev/shm, which NCCL and PyTorch use between processes
    scratch: Quantity = "100Gi"  # /tmp: the shard cache and checkpoints on their way to S3
    node_selector: dict[str, str] = {}
    tolerations: tuple[Toleration, ...] = (Toleration(key="nvidia.com/gpu"),)
    priority_class: str | None = None
    queue: str | None = None  # a Kueue LocalQueue
    service_account: str = "hjepa-train"  # of the training pods, which call no API
    s3_secret: str = "hjepa-s3"
    mlflow_secret: str = "hjepa-mlflow"  # need not exist
    env: dict[str, str] = {}  # for the training pods, such as NCCL_SOCKET_IFNAME; nothing secret
    max_restarts: Annotated[int, Field(ge=0)] = 5  # of the whole job, after a failure that a retry may mend
    grace_seconds: Count = 120  # from SIGTERM to SIGKILL: long enough to save a checkpoint
    queue_timeout_seconds: Positive | None = None  # admitted by the queue; null waits for ever
    schedule_timeout_seconds: Positive = 900.0  # a node found for every pod
    image_timeout_seconds: Positive = 300.0  # of failing to pull the image
    start_timeout_seconds: Positive = 1800.0  # every pod running
    total_timeout_seconds: Positive | None = None  # without the time in the queue; null: none
    cleanup: Literal["keep", "delete-on-success", "delete-always"] = "delete-on-success"
    on_sigterm: Literal["auto", "stop", "leave"] = "auto"  # auto: stop the job if the pipeline run was cancelled

    @field_validator("env")
    @classmethod
    def _public(cls, env: dict[str, str]) -> dict[str, str]:
        """Here, not where a job is written: pipelines carry these variables, and stored runs keep them."""
        if found := misplaced_variables(env):
            raise ValueError("; ".join(found))
        return env


class Config(Section):
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    masking: MaskingConfig = MaskingConfig()
    loss: LossConfig = LossConfig()
    training: TrainingConfig = TrainingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    collapse: CollapseConfig = CollapseConfig()
    logging: LoggingConfig = LoggingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    export: ExportConfig = ExportConfig()
    storage: StorageConfig = StorageConfig()
    tracking: TrackingConfig = TrackingConfig()
    cluster: ClusterConfig = ClusterConfig()

    @property
    def grid_size(self) -> int:
        """Patches along one side of the image."""
        return self.data.image_size // self.model.patch_size

    @property
    def digest(self) -> str:
        """sha256 (hex) of the canonical JSON of the tree, without ``cluster``: where it ran changes no result."""
        return sha256_json(self.model_dump(mode="json", exclude={"cluster"}))


class ConfigError(UserError):
    """Every mistake of one configuration, each with its path, what it got and what was expected."""

    def __init__(self, source: str, problems: Sequence[str]):
        self.problems = list(problems)
        count = "1 mistake" if len(problems) == 1 else f"{len(problems)} mistakes"
        lines = "\n".join(f"  {i}. {problem}" for i, problem in enumerate(problems, 1))
        super().__init__(f"{source}: {count} in the configuration\n{lines}")


# -- what a training run is ------------------------------------------------------------------------------------------

_VIEWS = tuple(f"data.{key}" for key in ("image_size", "channels", "crop_scale", "horizontal_flip"))
# Of the section data these change how stored images are read; the others, which images are stored, and how.
_READING = {f"data.{key}" for key in ("image_size", "crop_scale", "horizontal_flip", "num_workers", "cache_dir")}
_READING |= {f"data.{key}" for key in ("cache_gb", "block_mb", "window_mb")}
_LINEAGE = ("seed", "model.", "masking.", "loss.", "training.", *_VIEWS)
# May change on resume: where and how fast the same steps are taken, not which.
_ELASTIC = tuple(
    f"training.{key}"
    for key in ("device", "accumulation_steps", "use_amp", "amp_dtype", "parallel", "compile", "max_skipped")
)


def lineage(config: Config) -> dict[str, Any]:
    """Dotted key -> value of the settings that decide where the next step leads."""
    settings = {key: value for key, value in flatten(config).items() if key.startswith(_LINEAGE)}
    elastic = set(_ELASTIC)
    if config.loss.regularizer.name != "none":
        elastic.remove("training.accumulation_steps")  # its statistics are those of a micro-batch
    return {key: value for key, value in settings.items() if key not in elastic}


def prepares(key: str) -> bool:
    """Whether a dotted key says which images are stored, or how."""
    return key.startswith("data.") and key not in _READING


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """What two lineages differ in, as words."""
    return [f"{key}: {theirs.get(key)} there, {ours[key]} here" for key in sorted(ours) if theirs.get(key) != ours[key]]


# -- reading ---------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but with the floats of YAML 1.2 (``1e-3``) and no repeated keys."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.[\d_]+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    for (key_node, _), key in zip(node.value, keys, strict=True):
        if not isinstance(key, (str, int, float, type(None))):  # such as a date, which no JSON has for a key
            raise yaml.constructor.ConstructorError(
                None, None, f"key {key!s} is no text; write it in quotes", key_node.start_mark
            )
        if keys.count(key) > 1:
            raise yaml.constructor.ConstructorError(
                None, None, f"key {key!r} is written {keys.count(key)} times", key_node.start_mark
            )
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def parse_yaml(text: str) -> Any:
    return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader


def packaged_configs() -> list[str]:
    """Names that ``--config`` accepts without a file."""
    folder = resources.files("hjepa") / "configs"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def read_source(source: str, what: str = "configuration") -> tuple[str, str]:
    """(name to show, YAML text) of a packaged configuration's name, a file, or YAML text itself.

    Args:
        what: What it is, for the message.
    """
    if "\n" in source or ": " in source or source.strip() == "":
        return what, source
    if source in packaged_configs():
        return source, (resources.files("hjepa") / "configs" / f"{source}.yaml").read_text("utf-8")
    path = Path(source).expanduser()
    if path.suffix in {".yaml", ".yml"} or path.exists():
        try:
            return source, path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the {what} {source}: {error}") from None
    raise UserError(
        f"no configuration {source!r}: neither a file nor one of the packaged ones ({', '.join(packaged_configs())})."
        + _suggest(source, packaged_configs())
    )


def load_config(source: str = "default", overrides: Iterable[str] = ()) -> Config:
    """Read, override and validate a configuration.

    Args:
        source: A packaged name (``demo``), a path, or YAML text.
        overrides: ``section.key=value`` strings; the value is YAML. Later ones win.

    Raises:
        ConfigError: with all mistakes at once.
        UserError: if the source cannot be read.
    """
    name, text = read_source(source)
    try:
        raw = parse_yaml(text)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{name} is not valid YAML: {error}") from None
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise UserError(f"{name}: expected a mapping of sections, got {type(raw).__name__}")
    problems = []
    for override in overrides:
        problem = _apply(raw, override)
        if problem:
            problems.append(problem)
    return validate(raw, source=name, problems=problems)


def _apply(raw: dict[str, Any], override: str) -> str | None:
    """Set one dotted key in place; returns what is wrong with the override, if anything."""
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        return f"override {override!r}: expected section.key=value, such as training.lr=3e-4"
    try:
        value = parse_yaml(text)
    except (yaml.YAMLError, ValueError):  # such as a date that is none
        return f"override {override!r}: {text!r} is not a YAML value; quote it"
    node = raw
    for key in keys[:-1]:
        if node.get(key) is None:
            node[key] = {}
        node = node[key]
        if not isinstance(node, dict):
            return f"override {override!r}: {key} is a value, not a section"
    node[keys[-1]] = value
    return None


# -- checking --------------------------------------------------------------------------------------------------------


def validate(raw: Mapping[str, Any], *, source: str = "configuration", problems: Sequence[str] = ()) -> Config:
    """The configuration that ``raw`` describes, or one ConfigError with every mistake in it."""
    found = list(problems)
    tree = json.loads(json.dumps(raw, default=str))
    try:
        config = Config.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        refused = [_location(tree, item["loc"]) for item in error.errors()]
        found += dict.fromkeys(_explain(tree, item) for item in error.errors())
        # What is left must still be checked for contradictions, so the refused keys take their defaults.
        for path in refused:
            _remove(tree, path)
        try:
            config = Config.model_validate_json(json.dumps(tree))
        except ValidationError:
            raise ConfigError(source, found) from None
        found += [text for keys, text in contradictions(config) if not _touches(keys, refused)]
        raise ConfigError(source, found) from None
    found += [text for _, text in contradictions(config)]
    if found:
        raise ConfigError(source, found)
    return config


def contradictions(config: Config) -> list[tuple[tuple[str, ...], str]]:
    """Pairs (keys involved, message) for values that are each allowed but cannot stand together."""
    data, model, training, masking = config.data, config.model, config.training, config.masking
    found: list[tuple[tuple[str, ...], str]] = []
    measures = primary_metrics(config)
    primary = config.evaluation.primary_metric
    probes = ["auto", "probe/knn_top1", *(f"collapse/{name}" for name in COLLAPSE_MEASURES)]

    def check(wrong: bool, keys: tuple[str, ...], message: str) -> None:
        if wrong:
            found.append((keys, f"{' and '.join(keys)}: {message}"))

    kind = re.sub(r"[^a-z0-9]", "", data.name.lower())
    for key, value, kinds in (
        ("image_root", data.image_root, ("table",)),
        ("path_column", data.path_column, ("table",)),
        ("label_column", data.label_column, ("table", "tar-shards")),
        ("split_column", data.split_column, ("table",)),
    ):
        check(
            value is not None and kind not in (known.replace("-", "") for known in kinds),
            (f"data.{key}", "data.name"),
            f"{value!r} says something about {' or '.join(kinds)}, but data.name is {data.name}",
        )
    check(
        data.remove_leaks and not data.find_duplicates,
        ("data.remove_leaks", "data.find_duplicates"),
        "only what is looked for can be removed; set data.find_duplicates=true",
    )
    check(
        data.root is not None and not data.root.strip(),
        ("data.root",),
        "an empty text; name the folder, the table or the tar files, or use null for a set that fetches itself",
    )
    check(data.shard_mb > 5000, ("data.shard_mb",), "S3 copies objects of at most 5 GB; use at most 5000")
    size, patch, levels = data.image_size, model.patch_size, model.num_levels
    check(
        size % patch != 0,
        ("data.image_size", "model.patch_size"),
        f"{size} pixels are not a whole number of {patch}-pixel patches; "
        f"use data.image_size={max(1, round(size / patch)) * patch}",
    )
    cell = 2 ** (levels - 1)
    check(
        size % patch == 0 and (size // patch) % cell != 0,
        ("model.num_levels", "data.image_size", "model.patch_size"),
        f"the {size // patch}x{size // patch} patch grid cannot be merged {cell}x{cell} at level {levels - 1}; "
        f"use at most {_levels_that_fit(size // patch)} levels, or an image size whose grid divides by {cell}",
    )
    check(
        size % patch == 0 and (size // patch) % cell == 0 and size // patch // cell < 2,
        ("model.num_levels",),
        f"level {levels - 1} would be one single cell, with no context left to predict it from; use fewer levels",
    )
    for path, width, heads in (
        ("model", model.embed_dim, model.num_heads),
        ("model.predictor", model.predictor.embed_dim, model.predictor.num_heads),
    ):
        keys = (f"{path}.embed_dim", f"{path}.num_heads")
        check(width % heads != 0, keys, f"a width of {width} does not divide into {heads} heads")
        check(width % 4 != 0, keys[:1], f"{width} must be a multiple of 4 for 2-D sine-cosine positions")
    check(
        training.warmup_epochs >= training.epochs,
        ("training.warmup_epochs", "training.epochs"),
        f"the warm-up ({training.warmup_epochs:g} epochs) would not end before training does ({training.epochs})",
    )
    check(
        model.ema.momentum_warmup_epochs >= training.epochs,
        ("model.ema.momentum_warmup_epochs", "training.epochs"),
        f"the momentum would stay flat for {model.ema.momentum_warmup_epochs:g} of {training.epochs} epochs",
    )
    check(
        model.ema.momentum > model.ema.momentum_end,
        ("model.ema.momentum", "model.ema.momentum_end"),
        f"the momentum must not fall, got {model.ema.momentum} -> {model.ema.momentum_end}",
    )
    check(
        training.min_lr > training.lr,
        ("training.min_lr", "training.lr"),
        f"the smallest learning rate {training.min_lr:g} is above the largest {training.lr:g}",
    )
    check(
        training.accumulation_steps > training.batch_size,
        ("training.batch_size", "training.accumulation_steps"),
        f"a global batch of {training.batch_size} has no image for each of {training.accumulation_steps} micro-batches",
    )
    weights = config.loss.level_weights
    if weights is not None:
        check(
            len(weights) != levels,
            ("loss.level_weights", "model.num_levels"),
            f"expected one weight per level, got {len(weights)} weights for {levels} levels",
        )
        check(sum(weights) == 0, ("loss.level_weights",), "at least one level needs a weight above 0")
    weights = config.loss.regularizer.level_weights
    if weights is not None:
        check(
            len(weights) != levels,
            ("loss.regularizer.level_weights", "model.num_levels"),
            f"expected one weight per level, got {len(weights)} weights for {levels} levels",
        )
        check(sum(weights) == 0, ("loss.regularizer.level_weights",), "at least one level needs a weight above 0")
    for key in ("target_scale", "target_aspect", "context_scale"):
        low, high = getattr(masking, key)
        check(low > high, (f"masking.{key}",), f"expected (low, high), got ({low:g}, {high:g})")
    for path, (_, high) in (
        ("masking.target_scale", masking.target_scale),
        ("masking.context_scale", masking.context_scale),
        ("data.crop_scale", data.crop_scale),
    ):
        check(high > 1, (path,), f"an area share cannot be above 1, got {high:g}")
    check(
        data.crop_scale[0] > data.crop_scale[1],
        ("data.crop_scale",),
        f"expected (low, high), got ({data.crop_scale[0]:g}, {data.crop_scale[1]:g})",
    )
    blocks = int(data.cache_gb * 1000 / data.block_mb)
    check(
        blocks < MIN_CACHED_BLOCKS,
        ("data.cache_gb", "data.block_mb"),
        f"a cache of {data.cache_gb:g} GB holds {blocks} blocks of {data.block_mb} MB, and needs {MIN_CACHED_BLOCKS}",
    )
    check(
        size % patch == 0 and masking.min_context >= (size // patch) ** 2,
        ("masking.min_context", "data.image_size", "model.patch_size"),
        f"{masking.min_context} visible patches leave nothing to predict in a grid of {(size // patch) ** 2}",
    )
    check(
        primary not in measures,
        ("evaluation.primary_metric",),
        f"{primary!r} is never measured.{_suggest(primary, measures)} Expected eval/NAME, eval/mean/NAME or "
        f"eval/level_0/NAME, with NAME one of {', '.join(_names_of(measures))}; eval/mean has no "
        f"{', '.join(TOKEN_SCORES)}",
    )
    check(
        config.checkpoint.metric not in probes,
        ("checkpoint.metric",),
        f"{config.checkpoint.metric!r} is never measured.{_suggest(config.checkpoint.metric, probes)} "
        f"Expected one of {', '.join(probes)}",
    )
    check(
        config.checkpoint.metric == "auto" and config.checkpoint.mode == "min",
        ("checkpoint.metric", "checkpoint.mode"),
        "the metric that auto picks is better when larger; use checkpoint.mode=max",
    )
    name = config.tracking.registered_model
    check(
        re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) is None,
        ("tracking.registered_model",),
        f"expected letters, digits, '_' and '-', got {name!r}",
    )
    check(
        config.collapse.probe_samples <= config.collapse.min_rank + 1,
        ("collapse.probe_samples", "collapse.min_rank"),
        f"{config.collapse.probe_samples} images cannot have an effective rank of {config.collapse.min_rank:g}",
    )
    for key, url in (("storage.endpoint_url", config.storage.endpoint_url), ("tracking.uri", config.tracking.uri)):
        check(
            url is not None and re.match(r"\w+://[^/]*@", url) is not None,
            (key,),
            "a password does not belong in a configuration, which is logged and stored; "
            "give it in the environment (AWS_..., MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD)",
        )
    check(
        not config.storage.uri.startswith("s3://") or config.storage.uri == "s3://",
        ("storage.uri",),
        f"expected s3://bucket or s3://bucket/prefix, got {config.storage.uri!r}",
    )
    return found


def primary_metrics(config: Config) -> list[str]:
    """What ``evaluation.primary_metric`` may name."""
    plain = (*SCORES, *(f"knn{k}_top1" for k in config.evaluation.knn_ks), *COLLAPSE_MEASURES)
    names = {"mean/": plain} | dict.fromkeys(
        ["", *(f"level_{level}/" for level in range(config.model.num_levels))], (*plain, *TOKEN_SCORES)
    )
    return [f"eval/{readout}{name}" for readout, each in names.items() for name in each]


def _names_of(metrics: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(metric.rpartition("/")[2] for metric in metrics))


def _levels_that_fit(grid: int) -> int:
    levels = 1
    while grid % 2**levels == 0 and grid // 2**levels >= 2:
        levels += 1
    return levels


def _location(tree: Any, loc: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """The part of a pydantic location that is a path in the user's file (it also names union members)."""
    path: list[int | str] = []
    for key in loc:
        known = range(len(tree)) if isinstance(tree, list) else tree if isinstance(tree, dict) else ()
        if key not in known:
            break
        tree = tree[key]
        path.append(key)
    return tuple(path)


def _remove(tree: Any, path: tuple[int | str, ...]) -> None:
    """Take out the smallest mapping entry that holds ``path`` (an item cannot be cut out of a tuple)."""
    keys = list(path)
    while keys and isinstance(keys[-1], int):
        keys.pop()
    for key in keys[:-1]:
        tree = tree.get(key, {}) if isinstance(tree, dict) else {}
    if keys and isinstance(tree, dict):
        tree.pop(keys[-1], None)


def _touches(keys: Iterable[str], refused: Iterable[tuple[int | str, ...]]) -> bool:
    dotted = {".".join(str(part) for part in path if isinstance(part, str)) for path in refused}
    return any(key == path or key.startswith(f"{path}.") for key in keys for path in dotted)


def _explain(tree: dict[str, Any], item: Any) -> str:
    path = _location(tree, item["loc"])
    dotted = ".".join(str(key) for key in path)
    got = _describe(item["input"])
    if item["type"] == "extra_forbidden":
        section, unknown = ".".join(str(key) for key in path[:-1]), str(path[-1])
        known = _fields(path[:-1])
        everywhere = [p for p in all_keys() if p.rpartition(".")[2] == unknown]
        hint = f" Did you mean {everywhere[0]}?" if everywhere else _suggest(unknown, known, prefix=section)
        return f"{dotted}: unknown key.{hint} Known here: {', '.join(known)}."
    context = item.get("ctx", {})
    kind = item["type"]
    if kind == "value_error":
        return f"{dotted}: {context['error']}."
    if kind == "literal_error":
        options = re.findall(r"'([^']*)'", context["expected"]) or [context["expected"]]
        return f"{dotted}: got {got}, expected one of {', '.join(options)}.{_suggest(str(item['input']), options)}"
    bounds = {"greater_than": ">", "greater_than_equal": ">=", "less_than": "<", "less_than_equal": "<="}
    if kind in bounds:
        return f"{dotted}: got {got}, expected a number {bounds[kind]} {next(iter(context.values())):g}."
    expected = {
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "float_type": "a number",
        "finite_number": "a finite number",
        "bool_type": "true or false",
        "string_type": "a text",
        "model_type": "a section with keys",
        "model_attributes_type": "a section with keys",
        "tuple_type": "a list",
        "missing": "one more item",
        "too_long": f"at most {context.get('max_length')} items",
        "string_pattern_mismatch": "an amount as Kubernetes writes it, such as 500m or 64Gi",  # the only pattern
    }.get(kind)
    if expected is None:
        return f"{dotted}: got {got}, {item['msg']}."
    return f"{dotted}: got {got}, expected {expected}."


def _describe(value: Any) -> str:
    if isinstance(value, str):
        return f"the text {value!r}"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    return json.dumps(value) if isinstance(value, (int, float, list)) else f"a {type(value).__name__}"


def _section(path: Sequence[int | str]) -> type[Section]:
    section: type[Section] = Config
    for key in path:
        annotation = section.model_fields[str(key)].annotation
        options = [annotation, *get_args(annotation)]
        section = next(item for item in options if isinstance(item, type) and issubclass(item, Section))
    return section


def _fields(path: Sequence[int | str]) -> list[str]:
    return list(_section(path).model_fields)


def all_keys(section: type[Section] = Config, prefix: str = "") -> list[str]:
    """Dotted paths of every leaf of the tree."""
    keys: list[str] = []
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            keys += all_keys(field.annotation, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def _suggest(word: str, options: Iterable[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(word, list(options), n=1, cutoff=0.6)
    if not near:
        return ""
    return f" Did you mean {prefix + '.' if prefix else ''}{near[0]}?"


# -- writing ---------------------------------------------------------------------------------------------------------


def dump_yaml(config: Config) -> str:
    """The resolved configuration as YAML that ``load_config`` reads back to an equal tree."""
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=100)
    return text


def flatten(config: Config) -> dict[str, Any]:
    """Dotted key -> value, for parameter tables."""
    tree = config.model_dump(mode="json")
    return {key: functools.reduce(operator.getitem, key.split("."), tree) for key in all_keys()}


def flatten_tree(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten_tree(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def sha256_json(value: Any) -> str:
    """sha256 (hex) of the canonical JSON of a value: sorted keys, no blanks."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
