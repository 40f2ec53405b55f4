"""Pictures for a person: what is masked, how well it is predicted, and what the predictions look like.

Everything comes in as arrays or tensors and goes out as (H, W, 3) uint8. Cells are numbered in raster order; level l
lies on the patch grid merged 2^l x 2^l.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Picture = NDArray[np.uint8]
Floats = NDArray[np.float32]

SIDE = 140  # pixels that a panel has at least
GAP = 6
HIDDEN = (64, 72, 88)  # no image has this slate for a background
TEXT = (30, 34, 42)
# Colours that the colour-blind can tell apart (Okabe and Ito 2008), for the target blocks.
BLOCKS = ((230, 159, 0), (86, 180, 233), (0, 200, 140), (240, 228, 66), (213, 94, 0), (204, 121, 167))
# Anchors of the viridis colour map, dark (0) to bright (1).
MAP = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], np.float32)


def as_array(values: Any) -> NDArray[Any]:
    """A tensor on any device, or anything NumPy takes."""
    if hasattr(values, "detach"):
        values = values.detach()
        values = (values.float() if values.is_floating_point() else values).cpu().numpy()  # NumPy has no bfloat16
    return np.asarray(values)


def as_picture(image: Any) -> Picture:
    """(H, W), (C, H, W) or (H, W, C) with C of 1 or 3, uint8 or floats in [0, 1] -> (H, W, 3) uint8.

    Raises:
        ValueError: for another shape.
    """
    array = as_array(image)
    if array.ndim == 3 and array.shape[-1] not in (1, 3):
        array = array.transpose(1, 2, 0)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[-1] not in (1, 3):
        raise ValueError(f"a picture is (H, W), (C, H, W) or (H, W, C) with 1 or 3 channels; got {np.shape(image)}")
    if array.dtype == np.bool_ or np.issubdtype(array.dtype, np.floating):
        array = np.rint(np.nan_to_num(array.astype(np.float32)).clip(0, 1) * 255)
    pixels = np.broadcast_to(array.clip(0, 255).astype(np.uint8), (*array.shape[:2], 3))
    return np.ascontiguousarray(pixels)


def as_pictures(images: Any) -> Picture:
    """A batch of such images -> (B, H, W, 3)."""
    return np.stack([as_picture(image) for image in images])


def image_grid(images: Any, columns: int | None = None) -> Picture:
    """Images of one size, enlarged, in rows of ``columns``."""
    panels = [upscale(image) for image in as_pictures(images)]
    columns = columns or math.ceil(math.sqrt(len(panels)))
    return _compose([panels[i : i + columns] for i in range(0, len(panels), columns)])


def upscale(picture: Picture) -> Picture:
    """Whole pixels repeated until the shorter side has at least ``SIDE``."""
    factor = _factor(min(picture.shape[:2]))
    return picture.repeat(factor, 0).repeat(factor, 1)


def _factor(side: int) -> int:
    return max(1, math.ceil(SIDE / side))


# -- masks -----------------------------------------------------------------------------------------------------------


def mask_picture(images: Any, context: Any, targets: Sequence[Any], grid: int, *, most: int = 8) -> Picture:
    """Per image: itself, what the context encoder sees, and the outlined target blocks with the cells of each level.

    Args:
        images: (B, C, S, S), uint8 or floats in [0, 1]; the first ``most`` are drawn.
        context: (B, n) visible patches.
        targets: per level l, (B, M, m_l) cells of that level.
        grid: patches along a side.
    """
    pixels, visible = as_pictures(images[:most]), as_array(context[:most])
    blocks = [as_array(cells[:most]) for cells in targets]
    header = ["image", "context", *(f"targets, level {level}" for level in range(len(blocks)))]
    rows = []
    for i, image in enumerate(pixels):
        seen = _cells_to_pixels(_chosen(visible[i], grid), image)
        row = [upscale(image), upscale(_hide(image, ~seen))]
        for level, cells in enumerate(blocks):
            row.append(_outlined(image, cells[i], grid >> level))
        rows.append(row)
    return _in_strips(rows, header)


def _outlined(image: Picture, blocks: NDArray[np.int64], grid: int) -> Picture:
    """Everything but the target blocks (M, m) is dimmed; each block has its colour and its cells."""
    masks = [_chosen(cells, grid) for cells in blocks]
    inside = _cells_to_pixels(np.any(masks, axis=0), image)
    dimmed = _blend(image, HIDDEN, 0.75)
    panel = upscale(np.where(inside[..., None], image, dimmed))
    for number, mask in enumerate(masks):
        colour = BLOCKS[number % len(BLOCKS)]
        large = _cells_to_pixels(mask, panel)
        pitch = panel.shape[0] // grid
        lines = large & ((np.indices(large.shape) % pitch) == 0).any(0)
        panel[lines] = _blend(panel[lines], colour, 0.5)
        panel[_edge(large, 2)] = colour
    return panel


# -- predictions -----------------------------------------------------------------------------------------------------


class Comparison(NamedTuple):
    """Predictions of one level against their targets, per masked cell: (B, M, m)."""

    cosine: Floats  # of prediction and target
    error: Floats  # squared, as a share of the mean squared target: 1 is as bad as predicting zero


def compare(predictions: Any, targets: Any) -> Comparison:
    """Compare (B, M, m, D) predictions with their targets."""
    p, t = as_array(predictions).astype(np.float32), as_array(targets).astype(np.float32)
    norms = np.linalg.norm(p, axis=-1) * np.linalg.norm(t, axis=-1)
    scale = max(float(np.square(t).sum(-1).mean()), 1e-12)
    return Comparison((p * t).sum(-1) / np.maximum(norms, 1e-12), np.square(p - t).sum(-1) / scale)


def comparison_picture(
    images: Any, cells: Sequence[Any], comparisons: Sequence[Comparison], grid: int, *, most: int = 8
) -> Picture:
    """Per image and level, maps of cosine similarity and error over the masked cells; bright is good in both.

    Args:
        images: (B, C, S, S).
        cells: per level l, (B, M, m_l) cells that were predicted; where blocks overlap, the mean is shown.
        comparisons: per level.
        grid: patches along a side.
    """
    pixels = as_pictures(images[:most])
    header = ["image"]
    for level, found in enumerate(comparisons):
        means = (("cosine", found.cosine.mean()), ("error", found.error.mean()))
        header += [f"{name}, level {level}: {mean:.2f}" for name, mean in means]
    rows = []
    for i, image in enumerate(pixels):
        row = [upscale(image)]
        for level, found in enumerate(comparisons):
            where = as_array(cells[level][i]).ravel()
            row.append(_heat(image, where, found.cosine[i].ravel(), grid >> level))
            row.append(_heat(image, where, 1 - found.error[i].ravel(), grid >> level))
        rows.append(row)
    picture = _in_strips(rows, header)
    return np.concatenate([picture, _legend(picture.shape[1], "cosine 0, error 1", "cosine 1, error 0")])


def _heat(image: Picture, cells: NDArray[np.int64], values: Floats, grid: int) -> Picture:
    """Values in [0, 1] of ``cells`` as colours, over the dimmed image."""
    total, count = np.zeros(grid * grid, np.float32), np.zeros(grid * grid, np.float32)
    np.add.at(total, cells, np.nan_to_num(values))
    np.add.at(count, cells, 1)
    colours = _colours((total / np.maximum(count, 1)).reshape(grid, grid))
    panel = upscale(_blend(image, HIDDEN, 0.6))
    pitch = panel.shape[0] // grid
    inside = _cells_to_pixels((count > 0).reshape(grid, grid), panel)
    return np.where(inside[..., None], colours.repeat(pitch, 0).repeat(pitch, 1), panel)


def _colours(values: NDArray[np.floating[Any]]) -> Picture:
    """[0, 1] -> (..., 3)."""
    at = values.clip(0, 1) * (len(MAP) - 1)
    anchors = np.arange(len(MAP))
    return np.stack([np.interp(at, anchors, MAP[:, channel]) for channel in range(3)], -1).astype(np.uint8)


def _legend(width: int, low: str, high: str) -> Picture:
    bar = _colours(np.linspace(0, 1, min(200, width // 2))[None].repeat(10, 0))
    line = np.full((24, width, 3), 255, np.uint8)
    start = (width - bar.shape[1]) // 2
    line[7:17, start : start + bar.shape[1]] = bar
    drawn = Image.fromarray(line)
    pen, font = ImageDraw.Draw(drawn), ImageFont.load_default(12)
    pen.text((start - 6 - pen.textlength(low, font), 4), low, TEXT, font)
    pen.text((start + bar.shape[1] + 6, 4), high, TEXT, font)
    return np.asarray(drawn)


class Neighbours(NamedTuple):
    """For each predicted cell, the cell whose target is nearest (cosine), an index into the flat targets (B*M*m,)."""

    any: NDArray[np.int64]  # (B, M, m)
    elsewhere: NDArray[np.int64] | None  # in another image; None if there is no other
    own_share: float  # share of the predictions whose nearest target is their own


def nearest_neighbours(predictions: Any, targets: Any, cells: Any) -> Neighbours:
    """Look every prediction (B, M, m, D) up among the targets (B, M, m, D) of all ``cells`` (B, M, m)."""
    p, t = as_array(predictions).astype(np.float32), as_array(targets).astype(np.float32)
    where = as_array(cells)
    b, m, k, _ = t.shape
    bank = _unit(t.reshape(b * m * k, -1))
    image = np.arange(b).repeat(m * k)
    found, elsewhere = np.empty((b, m * k), np.int64), np.empty((b, m * k), np.int64)
    for i in range(b):  # image by image: the table of all pairs could be large
        similar = _unit(p[i].reshape(m * k, -1)) @ bank.T
        found[i] = similar.argmax(1)
        similar[:, image == i] = -np.inf
        elsewhere[i] = similar.argmax(1)
    # A cell that two blocks share is in the bank twice.
    same = (image[found] == np.arange(b)[:, None]) & (where.ravel()[found] == where.reshape(b, -1))
    shape = (b, m, k)
    return Neighbours(found.reshape(shape), elsewhere.reshape(shape) if b > 1 else None, float(same.mean()))


def neighbour_picture(
    images: Any, cells: Sequence[Any], neighbours: Sequence[Neighbours], grid: int, *, most: int = 8
) -> Picture:
    """Per image and level, the masked cells filled with the pixels of the cells that their predictions resemble most.

    Args:
        images: (B, C, S, S), all that the neighbours were looked up in; the first ``most`` are drawn.
        cells: per level l, (B, M, m_l) cells that were predicted.
        neighbours: per level.
        grid: patches along a side.
    """
    pixels = as_pictures(images)
    header = ["image", "masked"]
    for level, found in enumerate(neighbours):
        header.append(f"nearest, level {level}")
        header += [f"elsewhere, level {level}"] if found.elsewhere is not None else []
    rows = []
    for i, image in enumerate(pixels[:most]):
        hidden = _cells_to_pixels(_chosen(as_array(cells[0][i]).ravel(), grid), image)
        row = [upscale(image), upscale(_hide(image, hidden))]
        for level, found in enumerate(neighbours):
            where = as_array(cells[level])
            for source in (found.any, found.elsewhere):
                if source is not None:
                    row.append(_reconstruct(pixels, i, where, source[i], grid >> level))
        rows.append(row)
    return _in_strips(rows, header)


def _reconstruct(images: Picture, i: int, cells: NDArray[np.int64], source: NDArray[np.int64], grid: int) -> Picture:
    """Image ``i`` with the pixels of each of its ``cells`` (B, M, m) taken from the cell at ``source`` (M, m)."""
    per_image = cells[0].size
    pitch = images.shape[1] // grid
    made = images[i].copy()
    for cell, index in zip(cells[i].ravel(), source.ravel(), strict=True):
        other = images[index // per_image]
        made[_window(cell, grid, pitch)] = other[_window(cells.ravel()[index], grid, pitch)]
    panel = upscale(made)
    inside = _cells_to_pixels(_chosen(cells[i].ravel(), grid), panel)
    panel[_edge(inside, 2)] = BLOCKS[0]
    return panel


def _window(cell: np.int64, grid: int, pitch: int) -> tuple[slice, slice]:
    top, left = int(cell) // grid * pitch, int(cell) % grid * pitch
    return slice(top, top + pitch), slice(left, left + pitch)


def _unit(vectors: Floats) -> Floats:
    scaled: Floats = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
    return scaled


# -- drawing ---------------------------------------------------------------------------------------------------------


def _chosen(cells: NDArray[np.int64], grid: int) -> NDArray[np.bool_]:
    """(grid, grid), true at ``cells``."""
    mask = np.zeros(grid * grid, bool)
    mask[cells] = True
    return mask.reshape(grid, grid)


def _cells_to_pixels(mask: NDArray[np.bool_], image: Picture) -> NDArray[np.bool_]:
    pitch = image.shape[0] // mask.shape[0]
    return mask.repeat(pitch, 0).repeat(pitch, 1)


def _hide(image: Picture, hidden: NDArray[np.bool_]) -> Picture:
    return np.where(hidden[..., None], np.array(HIDDEN, np.uint8), image)


def _blend(image: Picture, colour: tuple[int, int, int], share: float) -> Picture:
    blended: Picture = (image * (1 - share) + np.array(colour) * share).astype(np.uint8)
    return blended


def _edge(mask: NDArray[np.bool_], thickness: int) -> NDArray[np.bool_]:
    """The pixels of ``mask`` that are within ``thickness`` of its outside, or of the picture's border."""
    inner = np.pad(mask, thickness)
    for axis in (0, 1):
        inner = np.minimum.reduce([np.roll(inner, shift, axis) for shift in range(-thickness, thickness + 1)])
    return mask & ~inner[thickness:-thickness, thickness:-thickness]


def _in_strips(rows: list[list[Picture]], header: list[str]) -> Picture:
    """Rows of panels below their captions; many short rows stand in two strips side by side."""
    if len(rows) >= 4 and len(header) <= 6:
        half = math.ceil(len(rows) / 2)
        left, right = _compose(rows[:half], header), _compose(rows[half:], header)
        right = np.pad(right, ((0, left.shape[0] - right.shape[0]), (0, 0), (0, 0)), constant_values=255)
        return np.concatenate([left, np.full((left.shape[0], 3 * GAP, 3), 255, np.uint8), right], 1)
    return _compose(rows, header)


def _compose(rows: list[list[Picture]], header: Sequence[str] = ()) -> Picture:
    """Panels of one size in a white sheet, the captions above the columns."""
    height, width = rows[0][0].shape[:2]
    columns = max(len(row) for row in rows)
    top = 20 if header else 0
    sheet = np.full((top + len(rows) * (height + GAP) + GAP, columns * (width + GAP) + GAP, 3), 255, np.uint8)
    for y, row in enumerate(rows):
        for x, panel in enumerate(row):
            down, right = top + GAP + y * (height + GAP), GAP + x * (width + GAP)
            sheet[down : down + height, right : right + width] = panel
    if not header:
        return sheet
    drawn = Image.fromarray(sheet)
    pen = ImageDraw.Draw(drawn)
    for x, caption in enumerate(header):
        fonts = [ImageFont.load_default(size) for size in (14, 13, 12, 11, 10, 9)]
        font = next((font for font in fonts if pen.textlength(caption, font) <= width), fonts[-1])
        pen.text((GAP + x * (width + GAP), 5), caption, TEXT, font)
    return np.asarray(drawn)
