"""The model card: what an exported encoder is, from what it was made, how it is used and where its limits are."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

Json = Mapping[str, Any]

METRICS = {
    "linear_top1": "linear probe",
    "knn_top1": "k-NN",
    "attentive_top1": "attentive probe",
    "low_shot_1pct_top1": "1 % of the labels",
    "low_shot_10pct_top1": "10 % of the labels",
    "retrieval_map": "retrieval mAP",
    "rankme": "RankMe",
}
SHARES = ("linear", "knn", "attentive", "low_shot", "retrieval", "dense")  # from 0 to 1, shown in per cent


def model_card(model: Json, dataset: Json | None, evaluation: Json | None = None, license: str = "") -> str:
    """The card as Markdown; the same arguments give the same text.

    Args:
        model: model.json, or what of it is known at export: levels, preprocessing, checks, checkpoint.
        dataset: dataset.json; None where it is not at hand.
        evaluation: evaluation.json; None before the encoder was evaluated.
        license: Text of ``export.license``.
    """
    sections = [
        "# H-JEPA encoder",
        "A vision transformer, trained on images without labels, that turns an image into embeddings at every level "
        "of a hierarchy. It is an encoder alone: it names no classes.",
        _list([("license", license or "not stated; ask the one who trained it before you use it")]),
        "## Data",
        _list(_data(model, dataset)),
        "## Method",
        _method(model),
        "## Levels",
        _levels(model["levels"]),
        "## How to load it",
        _loading(model),
        "## Preprocessing",
        _preprocessing(model["preprocessing"]),
        "## Checks",
        _checks(model.get("checks", {})),
        "## Evaluation",
        _evaluation(evaluation),
        "## Limits",
        _limits(model, dataset),
    ]
    return "\n\n".join(sections) + "\n"


def _data(model: Json, dataset: Json | None) -> list[tuple[str, str]]:
    checkpoint = model.get("checkpoint", {})
    facts = dataset or {}
    lines = [
        ("name", str(facts.get("name") or checkpoint.get("dataset") or "not recorded")),
        ("digest", str(facts.get("digest") or checkpoint.get("dataset_digest") or "not recorded")),
    ]
    lines += [(f"images in {name}", f"{split['samples']:,}") for name, split in facts.get("splits", {}).items()]
    if classes := facts.get("classes"):
        lines.append(("classes", f"{len(classes):,}; labels are not used in training, only to measure"))
    if quarantine := facts.get("quarantine"):
        lines.append(("files left out as unreadable or unfit", f"{quarantine['total']:,}"))
    return lines


def _method(model: Json) -> str:
    checkpoint, levels = model.get("checkpoint", {}), len(model["levels"])
    text = (
        "A joint-embedding predictive architecture (I-JEPA, Assran et al. 2023) with "
        f"{levels} level{'s' if levels > 1 else ''}: from the visible patches of an image, a predictor guesses the "
        "representations of hidden ones at each level. Predictor and training state are not part of the export."
    )
    names = {
        "run": "run",
        "epoch": "epochs",
        "step": "optimiser steps",
        "images_seen": "images seen",
        "weights": "weights",
        "config_digest": "configuration digest",
        "code_version": "code version",
        "mlflow_run_id": "MLflow run",
    }
    facts = [(label, _plain(checkpoint[key])) for key, label in names.items() if checkpoint.get(key) is not None]
    return f"{text}\n\n{_list(facts)}" if facts else text


def _plain(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _levels(levels: Sequence[Json]) -> str:
    width = levels[0]["embedding_dim"]
    rows = [["mean", "mean", "all cells, averaged", str(width)]]
    rows += [
        [
            str(level["level"]),
            f"level_{level['level']}",
            f"{level['grid']} x {level['grid']} cells, their maximum",
            str(level["embedding_dim"]),
        ]
        for level in levels
    ]
    rows.append(["all", "all", "the rows above, one after the other", str(width * (len(levels) + 1))])
    return _table(["level", "output in encoder.pt2 and model.onnx", "what it describes", "numbers per image"], rows)


def _loading(model: Json) -> str:
    where, first = str(model.get("uri") or "FOLDER"), model["levels"][0]["level"]
    parts = [
        "`model.safetensors` holds the weights and `config.json` describes them; nothing is unpickled.",
        "```python\n"
        "import hjepa\n\n"
        f'encoder = hjepa.load_encoder("{where}")\n'
        f"embeddings = encoder.embed_images(images, level={first})  # uint8 (B, C, H, W), any size\n"
        "```",
    ]
    checks, size, channels = model.get("checks", {}), *_shape(model["preprocessing"])
    batch = f"float32, prepared as below, (B, {channels}, {size}, {size})"
    if "onnx" in checks:
        parts.append(
            "```python\n"
            "import onnxruntime\n\n"
            'session = onnxruntime.InferenceSession("model.onnx")\n'
            f'(embeddings,) = session.run(["level_{first}"], {{"images": batch}})  # {batch}\n'
            "```"
        )
    if "torch.export" in checks:
        parts.append(
            "```python\n"
            "import torch\n\n"
            f'embeddings = torch.export.load("encoder.pt2").module()(batch)["level_{first}"]  # {batch}\n'
            "```\n\n"
            "`torch.export.load` may unpickle: only load an `encoder.pt2` whose origin you trust."
        )
    return "\n\n".join(parts)


def _shape(preprocessing: Json) -> tuple[int, int]:
    return preprocessing["image_size"], preprocessing["channels"]


def _preprocessing(preprocessing: Json) -> str:
    size, channels = _shape(preprocessing)
    facts = [("size", f"{size} x {size} pixels"), ("channels", str(channels))]
    facts += [(key, str(preprocessing[key])) for key in ("resize", "crop") if key in preprocessing]
    facts += [
        (key, f"{', '.join(f'{value:.4f}' for value in preprocessing[key])} (per channel, of pixels in 0..1)")
        for key in ("mean", "std")
    ]
    return f"{_list(facts)}\n\nA pixel x in 0..255 becomes (x / 255 - mean) / std. `embed_images` does all of this."


def _checks(checks: Json) -> str:
    if not checks:
        return "No further format was written, so there was none to compare with PyTorch."
    rows = [
        [
            name,
            f"{check['max_abs_difference']:.2e}",
            f"{check['tolerance']:g}",
            "passed" if check["passed"] else "FAILED",
        ]
        for name, check in checks.items()
    ]
    return "Each format was read back and compared with PyTorch on CPU.\n\n" + _table(
        ["format", "largest difference", "tolerance", "result"], rows
    )


# -- metrics ---------------------------------------------------------------------------------------------------------


def _evaluation(evaluation: Json | None) -> str:
    if evaluation is None:
        return "Not evaluated when this card was written."
    primary = evaluation["primary_metric"]
    name = primary["name"].rpartition("/")[2]
    metrics = list(dict.fromkeys([name, *METRICS]))
    metrics = [key for key in metrics if any(row.get(key) is not None for row in evaluation["table"])]
    rows = [[row["encoder"], row["level"], *(_score(row, key) for key in metrics)] for row in evaluation["table"]]
    split = evaluation["split"]
    sizes = ", ".join(f"{split[key]:,} {key}" for key in ("train", "test") if key in split)
    parts = [
        f"Frozen features, {sizes} images; shares in per cent, 95 % bootstrap intervals in brackets. "
        f"What decides is `{primary['name']}`: {_number(name, primary['value'])}.",
        _table(["encoder", "level", *(METRICS.get(key, key) for key in metrics)], rows),
    ]
    if evaluation.get("collapse"):
        parts.append(f"**The representation has collapsed:** {_line(evaluation['collapse'])}")
    return "\n\n".join(parts)


def _score(row: Json, name: str) -> str:
    if row.get(name) is None:
        return ""
    low, high, spread = (row.get(f"{name}_{end}") for end in ("low", "high", "std"))
    text = _number(name, row[name])
    if low is not None and high is not None:
        text += f" [{_number(name, low)}, {_number(name, high)}]"
    return text if spread is None else f"{text} ± {_number(name, spread)}"


def _number(name: str, value: float) -> str:
    if not math.isfinite(value):
        return "not finite"
    return f"{100 * value:.2f}" if name.startswith(SHARES) else f"{value:.3g}"


def _limits(model: Json, dataset: Json | None) -> str:
    name = _line((dataset or {}).get("name") or model.get("checkpoint", {}).get("dataset") or "the images named above")
    size, channels = _shape(model["preprocessing"])
    return "\n".join(
        [
            f"- It has seen {name} and nothing else. On images of another kind, measure before you rely on it.",
            f"- It looks at {channels} channel{'s' if channels > 1 else ''} of {size} x {size} pixels: what is lost at "
            "that size, or outside the centre, it cannot see.",
            "- It takes over what is uneven in its training images. Nobody has looked for bias against groups of "
            "people; do not base decisions about people on it without an evaluation made for that purpose.",
            "- Intervals cover the choice of test images, not another training run or other data.",
            "- The licence above is that of the weights; the training images have their own.",
        ]
    )


# -- Markdown --------------------------------------------------------------------------------------------------------


def _line(text: object) -> str:
    """Text from outside, as one line that cannot become markup."""
    words = re.sub(r"\s+", " ", str(text)).strip()
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", words)


def _list(facts: Sequence[tuple[str, str]]) -> str:
    return "\n".join(f"- **{_line(name)}:** {_line(value)}" for name, value in facts)


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [[_cell(cell) for cell in row] for row in (head, *rows)]
    lines.insert(1, ["---"] * len(head))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: object) -> str:
    # An interval's brackets are no link.
    return _line(value).replace(r"\[", "[").replace(r"\]", "]")
