"""The loader's benchmark from end to end, on a tiny set and the real S3 server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import loader


@pytest.mark.usefixtures("stack_environment")
def test_smoke__measures_everything_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loader.main(["--smoke", "--workers", "0", "--folder", str(tmp_path), "--output", str(tmp_path / "out.json")])
    result = json.loads((tmp_path / "out.json").read_text())
    orders = {name: found["order"] for name, found in result["fed"].items()}
    windows = "random in windows of 1 blocks of 0.02 MB"
    assert orders == {"windows": windows, "random": "random", "cached": "random"}
    for way, found in result["fed"].items():
        assert 0 < found["ratio"]["min"] <= found["ratio"]["median"] <= found["ratio"]["max"]
        assert (found["fetched_mb"] > 0) == (way != "cached")
    assert result["set"]["images"] > result["set"]["distinct_images"]
    assert len(result["first_batch_seconds"]) == 5
    assert result["reader"]["plain_us"] > 0
    assert "of the rate without I/O" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"out.json"}
