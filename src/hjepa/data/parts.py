"""A split is prepared in parts that do not know of each other, so that many machines can share the work.

Which images a part has depends on ``data.part_images`` alone. So the same shards come out whoever makes which part, and
a preparation that was killed makes only the parts that are missing. What a part leaves behind:

- ``<part>-000000.tar``, ...: its shards;
- ``<part>.index``: as of a split, with its own shards counted from 0;
- ``<part>.prints``: two uint64 per sample, for ``hjepa.data.duplicates``; empty where those are not looked for;
- ``<part>.quarantine.jsonl``: a line per file that cannot be used;
- ``<part>.json``: everything else, written last.
"""

from __future__ import annotations

import base64
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hjepa.data.shards import StoredFile
from hjepa.data.sources import Source
from hjepa.errors import HjepaError

INDEX, PRINTS, REPORT = "index", "prints", "quarantine.jsonl"
SIDECARS = (INDEX, PRINTS, REPORT)
Print = NDArray[np.uint64]


class Part(NamedTuple):
    """The samples ``start`` to ``stop - 1`` of a split of the source."""

    split: str
    number: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:05d}"

    def file(self, kind: str) -> str:
        """The name of one of its ``SIDECARS``."""
        return f"{self.name}.{kind}"


def parts_of(source: Source, size: int) -> list[Part]:
    """All parts of a source, in order, of at most ``size`` samples each."""
    return [
        Part(name, number, start, min(start + size, len(split)))
        for name, split in source.splits.items()
        for number, start in enumerate(range(0, len(split), size))
    ]


@dataclass(frozen=True)
class Thumbnail:
    """A small picture of one sample, for the contact sheet."""

    number: int
    label: int | None
    png: bytes


@dataclass(frozen=True)
class PartResult:
    part: Part
    shards: list[StoredFile]
    samples: int
    content: str  # sha256 over pixels and labels in order
    labels: Counter[int | None]
    shapes: set[tuple[int, int]]  # (H, W); two of them are enough to know that they differ
    sums: NDArray[np.float64]  # (2, C): mean and mean square, summed over images
    reasons: Counter[str]  # of what is in quarantine
    examples: list[str]
    thumbnails: list[Thumbnail]
    sidecars: dict[str, str]  # kind -> sha256

    def to_json(self) -> dict[str, Any]:
        return {
            "part": list(self.part),
            "shards": [
                {"key": shard.key, "bytes": shard.bytes, "sha256": shard.sha256, "samples": shard.samples}
                for shard in self.shards
            ],
            "samples": self.samples,
            "content": self.content,
            "labels": [[label, count] for label, count in self.labels.items()],
            "shapes": sorted(self.shapes),
            "sums": self.sums.tolist(),  # a float64 comes back exactly from JSON
            "reasons": dict(self.reasons),
            "examples": self.examples,
            "thumbnails": [[t.number, t.label, base64.b64encode(t.png).decode()] for t in self.thumbnails],
            "sidecars": self.sidecars,
        }

    @classmethod
    def from_json(cls, content: dict[str, Any], folder: Path) -> PartResult:
        """``folder`` is where its files are, or are to be."""
        return cls(
            part=Part(*content["part"]),
            shards=[StoredFile(path=folder / shard["key"], **shard) for shard in content["shards"]],
            samples=content["samples"],
            content=content["content"],
            labels=Counter(dict(content["labels"])),
            shapes={(height, width) for height, width in content["shapes"]},
            sums=np.array(content["sums"]),
            reasons=Counter(content["reasons"]),
            examples=content["examples"],
            thumbnails=[
                Thumbnail(number, label, base64.b64decode(png)) for number, label, png in content["thumbnails"]
            ],
            sidecars=content["sidecars"],
        )


def read_prints(path: Path, samples: int) -> Print:
    """[N, 2]: content and perceptual hash. Raises HjepaError if they are not those of ``samples`` images."""
    found = np.fromfile(path, dtype="<u8").reshape(-1, 2).astype(np.uint64, copy=False)
    if len(found) not in (0, samples):
        raise HjepaError(f"{path} is of {len(found)} images, its part has {samples}; prepare the data set again")
    return found
