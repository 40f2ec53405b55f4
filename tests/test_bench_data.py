"""The benchmark of the data path: its photographs, and a small run from end to end."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import data as bench


def jpeg(number: int) -> bytes:
    buffer = io.BytesIO()
    bench.photograph(number).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def test_photographs__are_fixed_and_as_large_as_photographs(tmp_path: Path) -> None:
    paths = bench.photographs(tmp_path, 10)
    assert [path.read_bytes() for path in paths[:2]] == [jpeg(0), jpeg(1)]
    assert len({path.read_bytes() for path in paths}) == 10
    bits = [8 * path.stat().st_size / (image.width * image.height) for path in paths for image in [Image.open(path)]]
    assert 3.2 < sum(bits) / 10 < 4.0  # per pixel; 84 KB at 500 x 375 are 3.6
    times = [path.stat().st_mtime_ns for path in paths]
    assert [path.stat().st_mtime_ns for path in bench.photographs(tmp_path, 10)] == times


def test_with_damage__three_in_a_hundred_and_the_originals_stay(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.jpg" for i in range(200)]
    for path in paths:
        path.write_bytes(b"picture")
    folder = bench.with_damage(paths, tmp_path / "damaged")
    assert len(list(folder.iterdir())) == 200
    assert sum(path.read_bytes() != b"picture" for path in folder.iterdir()) == 6
    assert all(path.read_bytes() == b"picture" for path in paths)


def test_smoke__measures_all_and_writes_it_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "data.json"
    bench.main(["--smoke", "--folder", str(tmp_path), "--output", str(output)])
    result = json.loads(output.read_text())
    assert list(result["views"]) == ["plain", "same JPEGs", "short side 256"]
    for row in result["views"].values():
        assert row["images_per_second_per_core"] > 0
        assert row["x_plain"]["min"] <= row["x_plain"]["median"] <= row["x_plain"]["max"]
    assert result["views"]["plain"]["x_plain"]["median"] == 1
    assert result["likeness"]["psnr_db"] >= result["goals"]["psnr_db"]
    assert result["likeness"]["largest_difference"] <= 1
    assert 0 < result["reader_us"] < 1000
    rates = result["prepare"]
    assert [row["images"] for row in rates.values()] == [40, 40, 40, 80]
    assert [row["quarantined"] for row in rates.values()] == [0, 0, 1, 0]
    assert all(row["peak_rss_mb"] < result["goals"]["peak_rss_mb"] for row in rates.values())
    assert rates["short side 256"]["stored_bytes_per_image"] < 0.5 * rates["once"]["stored_bytes_per_image"]
    assert "prepare 80 images" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["photographs-1"]  # no shards are left
