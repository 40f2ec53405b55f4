"""`hjepa pipeline` against a server that speaks KFP's API."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from fake_kfp_server import FakeKfpServer

from hjepa.config import parse_yaml


def hjepa(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hjepa.cli", "pipeline", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_run__creates_everything_and_follows_to_the_end() -> None:
    with FakeKfpServer() as server:
        done = hjepa("run", "--endpoint", server.url, "config=demo", "gpus=4", 'overrides=["training.lr=3e-4"]')
        assert done.returncode == 0, done.stderr
        assert "SUCCEEDED" in done.stdout
        state = server.state
        (run,) = state.runs.values()
        given = run["runtime_config"]["parameters"]
        assert given == {"config": "demo", "gpus": "4", "overrides": ["training.lr=3e-4"]}
        assert len(state.pipelines) == len(state.versions) == len(state.experiments) == 1
        again = hjepa("upload", "--endpoint", server.url)
        assert again.returncode == 0
        assert "already there" in again.stdout
        assert len(state.versions) == 1


def test_run__a_local_file_travels_as_text(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("training: {epochs: 7, warmup_epochs: 1}\n", "utf-8")
    with FakeKfpServer() as server:
        done = hjepa("run", "--endpoint", server.url, "--no-follow", f"config={file}")
        assert done.returncode == 0, done.stderr
        (run,) = server.state.runs.values()
        sent = run["runtime_config"]["parameters"]["config"]
        assert parse_yaml(sent)["training"]["epochs"] == 7


def test_run__mistakes_are_found_before_anything_is_sent() -> None:
    with FakeKfpServer() as server:
        for arguments, message in (
            (["confg=demo"], "confg"),
            (["config=demo", 'overrides=["training.lr=fast"]'], "training.lr"),
            (["config"], "expected NAME=VALUE"),
        ):
            done = hjepa("run", "--endpoint", server.url, *arguments)
            assert done.returncode == 2
            assert message in done.stderr
            assert "Traceback" not in done.stderr
        assert not server.state.pipelines


def test_upload__unreachable_server_is_one_clear_message() -> None:
    done = hjepa("upload", "--endpoint", "http://127.0.0.1:9")
    assert done.returncode == 2
    assert "127.0.0.1:9" in done.stderr
    assert "Traceback" not in done.stderr
