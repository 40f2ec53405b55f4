"""The images' entrypoint: real processes and real torchrun ranks, their exit codes, and what the kubelet would show."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from hjepa.entrypoint import MESSAGE_BYTES, _code_of, processes_here, termination_message
from hjepa.utils.checkpoint import LATEST, read_checkpoint

CONFIG = """
data: {{name: image-folder, root: {root}, image_size: 16, channels: 1, crop_scale: [0.5, 1.0], num_workers: 0,
       cache_dir: {folder}/cache, test_fraction: 0.2}}
model: {{patch_size: 4, embed_dim: 16, depth: 1, num_heads: 2, num_levels: 2, predictor: {{embed_dim: 8, depth: 1,
        num_heads: 2}}}}
masking: {{num_targets: 2}}
training: {{batch_size: 12, epochs: 2, warmup_epochs: 1, device: cpu}}
checkpoint: {{save_frequency: 100000, checkpoint_dir: {folder}/checkpoints}}
collapse: {{frequency: 5, probe_samples: 32, action: warn}}
logging: {{log_dir: {folder}/logs, log_frequency: 3, tensorboard: {{enabled: false}}}}
evaluation: {{knn_k: 3}}
"""
COLLAPSES = ("collapse.action=stop", "collapse.min_rank=16", "collapse.patience=1", "collapse.frequency=1")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A training of seconds on forty images."""
    root = tmp_path / "images" / "class"
    root.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(60):
        Image.fromarray(rng.integers(0, 256, (20, 20), dtype=np.uint8)).save(root / f"{i:03d}.png")
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.format(folder=tmp_path, root=root.parent))
    return path


class Pod:
    """A container's process, started as the kubelet would."""

    def __init__(self, folder: Path, *arguments: str, ranks: int = 1, **variables: str):
        self.log, self.message_file = folder / "output", folder / "termination-log"
        self.message_file.touch()
        dropped = ("AWS_", "MLFLOW_", "PET_", "HJEPA_", "RANK", "WORLD_SIZE", "LOCAL_RANK")
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
        variables |= {"TERMINATION_LOG": str(self.message_file), "HJEPA_PROCESSES": str(ranks), "OMP_NUM_THREADS": "1"}
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "hjepa.entrypoint", *arguments],
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=inherited | variables,
            )

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, text: str) -> None:
        end = time.monotonic() + 90
        while text not in self.output:
            assert self.process.poll() is None, self.output
            assert time.monotonic() < end, self.output
            time.sleep(0.05)

    def wait_to_catch(self, number: signal.Signals) -> None:
        """Until there is a handler; process 1 of a container ignores the signal until then, this one dies of it."""
        status = Path(f"/proc/{self.process.pid}/status")
        end = time.monotonic() + 30
        while True:
            caught = re.search(r"^SigCgt:\s*([0-9a-f]+)$", status.read_text(), re.M)
            if caught and int(caught[1], 16) >> (number - 1) & 1:
                return
            assert self.process.poll() is None, self.output
            assert time.monotonic() < end, self.output
            time.sleep(0.005)

    def rank(self, number: int) -> psutil.Process:
        children = psutil.Process(self.process.pid).children()
        return next(child for child in children if child.environ().get("RANK") == str(number))

    def ends(self, timeout: float = 120) -> tuple[int, dict[str, Any]]:
        """Its exit code, and the termination message."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            family = [self.process, *psutil.Process(self.process.pid).children(recursive=True)]
            for process in family:
                process.kill()
            pytest.fail(f"still runs after {timeout:g} s\n{self.output}")
        return code, json.loads(self.message_file.read_text())


def train(config: Path, *settings: str, ranks: int = 1, **variables: str) -> Pod:
    arguments = ["train", "--config", str(config), *(part for setting in settings for part in ("--set", setting))]
    return Pod(config.parent, *arguments, ranks=ranks, **variables)


def step_of(config: Path) -> int:
    return int(read_checkpoint(config.parent / "checkpoints" / LATEST)["step"])


def test_other_commands__are_the_command_line(tmp_path: Path) -> None:
    pod = Pod(tmp_path, "config", "--config", "demo")
    assert pod.ends() == (0, {"rc": 0, "reason": "done"})
    assert "embed_dim: 128" in pod.output


def test_mistake__exits_2_and_the_message_names_it(tmp_path: Path) -> None:
    code, message = Pod(tmp_path, "train", "--set", "training.epochs=-1").ends()
    assert (code, message["rc"]) == (2, 2)
    assert "training.epochs" in message["reason"]


def test_wrong_argument__exits_2(tmp_path: Path) -> None:
    code, message = Pod(tmp_path, "train", "--no-such-thing").ends()
    assert (code, message["rc"]) == (2, 2)


def test_failure__exits_1_and_the_message_has_its_reason(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"s": 1, "t": 1, "m": {"loss": 1.0}}\n')
    journal = ("sync", "metrics.jsonl", "--run-id", "0" * 32, "--uri", f"http://127.0.0.1:{free_port()}")
    code, message = Pod(tmp_path, *journal, MLFLOW_HTTP_REQUEST_MAX_RETRIES="0").ends()
    assert (code, message["rc"]) == (1, 1)
    assert "127.0.0.1" in message["reason"]


def test_crash__exits_1_and_the_message_has_the_last_line_of_the_traceback(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import hjepa.config\n"
        "def broken(*_): raise RuntimeError('a mistake of ours')\n"
        "hjepa.config.dump_yaml = broken\n"
    )
    pod = Pod(tmp_path, "config", PYTHONPATH=str(tmp_path))
    assert pod.ends() == (1, {"rc": 1, "reason": "RuntimeError: a mistake of ours"})
    assert "Traceback" in pod.output


def test_program__replaces_the_entrypoint_as_kfp_needs_it(tmp_path: Path) -> None:
    pod = Pod(tmp_path, "sh", "-c", "echo $$ from sh; exit 7")
    assert pod.process.wait(30) == 7
    assert pod.output == f"{pod.process.pid} from sh\n"


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_training__exits_0_and_collapse_exits_13(config: Path, ranks: int) -> None:
    pod = train(config, ranks=ranks)
    assert pod.ends() == (0, {"rc": 0, "reason": "done"}), pod.output
    assert step_of(config) == 8
    elsewhere = f"checkpoint.checkpoint_dir={config.parent}/collapsed"
    code, message = train(config, *COLLAPSES, elsewhere, ranks=ranks).ends()
    assert (code, message["rc"]) == (13, 13)
    assert "effective rank" in message["reason"]


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_sigterm__reaches_every_rank_saves_once_and_exits_143(config: Path, ranks: int) -> None:
    pod = train(config, "training.epochs=5000", ranks=ranks)
    pod.wait_for("step 12/")
    pod.process.send_signal(signal.SIGTERM)
    code, message = pod.ends(30)
    assert (code, message["rc"]) == (143, 143)
    told = re.search(r"at step (\d+) of \d+: the state is saved", message["reason"])
    assert told is not None, message
    assert step_of(config) == int(told[1]) >= 12


@pytest.mark.slow
def test_killed_rank__exits_137_and_says_so(config: Path) -> None:
    pod = train(config, "training.epochs=5000", ranks=2)
    pod.wait_for("step 12/")
    pod.rank(1).kill()
    code, message = pod.ends()
    assert (code, message["rc"]) == (137, 137)
    assert "killed" in message["reason"]


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_sigterm__before_training_has_begun_exits_143(config: Path, ranks: int) -> None:
    pod = train(config, ranks=ranks)
    pod.wait_to_catch(signal.SIGTERM)
    pod.process.send_signal(signal.SIGTERM)
    assert pod.ends(30)[0] == 143, pod.output


@pytest.mark.parametrize("node", [0, 1])
def test_sigterm__while_other_nodes_are_awaited_exits_143(tmp_path: Path, node: int) -> None:
    """torchrun waits for the others in C++, where a handler of Python's would never run."""
    awaited = {"PET_NNODES": "3", "PET_NPROC_PER_NODE": "1", "PET_NODE_RANK": str(node)}
    with socket.create_server(("127.0.0.1", 0)) as first:
        port = first.getsockname()[1] if node else free_port()
        where = {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(port)}
        pod = Pod(tmp_path, "train", "--config", "demo", "--device", "cpu", **awaited, **where)
        pod.wait_for("training with 1 processes")
        time.sleep(2)  # until torchrun waits
        pod.process.send_signal(signal.SIGTERM)
        code, message = pod.ends(15)
    assert (code, message["rc"]) == (143, 143)


@pytest.mark.parametrize(
    "variables",
    [
        {"PET_NNODES": "abc"},
        {"PET_NNODES": ""},
        {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "first"},
        {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "first", "PET_MASTER_PORT": "x"},
    ],
)
def test_operators_variables__that_make_no_sense_are_named(tmp_path: Path, variables: dict[str, str]) -> None:
    pod = Pod(tmp_path, "train", "--config", "demo", "--device", "cpu", **variables)
    code, message = pod.ends(30)
    assert (code, message["rc"]) == (2, 2)
    assert message["reason"].startswith(("PET_NNODES=", "PET_MASTER_PORT="))
    assert "Traceback" not in pod.output


@pytest.mark.slow
def test_operators_variables__make_two_nodes_of_one_rank(config: Path) -> None:
    """What the training operator injects, once per pod."""
    with_port = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_MASTER_ADDR": "127.0.0.1", "PET_MAX_RESTARTS": "0"}
    with_port |= {"PET_MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "PET_SHUTDOWN_TIMEOUT": "30"}
    pods = []
    for node in range(2):
        folder = config.parent / f"node{node}"
        folder.mkdir()
        arguments = ("train", "--config", str(config))
        pods.append(Pod(folder, *arguments, PET_NODE_RANK=str(node), RANK=str(node), **with_port))
    assert [pod.ends() for pod in pods] == [(0, {"rc": 0, "reason": "done"})] * 2, pods[0].output + pods[1].output
    assert sum("done: step 8" in pod.output for pod in pods) == 1


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_ranks__end_when_their_launcher_is_killed(config: Path) -> None:
    pod = train(config, "training.epochs=100000", ranks=2)
    pod.wait_for("step 3/")
    ranks = [pod.rank(number) for number in (0, 1)]
    pod.process.kill()
    pod.process.wait()
    _, alive = psutil.wait_procs(ranks, timeout=15)
    for rank in alive:
        rank.kill()
    assert alive == []


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        ([(10, 13), (10, -15)], 13),
        ([(10, 1), (10, -9)], 137),
        ([(10, 1), (40, -9)], 1),  # the second was killed by torchrun, for it did not end on SIGTERM
        ([(10, 143), (10, 1)], 1),  # the first was only stopped because the second had failed
        ([(10, 143), (10, -15)], 143),
        ([(10, -11), (11, 143)], 139),
        ([(10, 2), (10, 1)], 2),
    ],
)
def test_exit_code__is_the_one_that_says_most(ends: list[tuple[int, int]], code: int) -> None:
    assert _code_of(ends) == code


SECOND_NODE = """
import sys, time
from hjepa import entrypoint
entrypoint.MEETING_SECONDS = entrypoint.ROUND_OVER_SECONDS = 1
with entrypoint._error_file() as errors:
    with entrypoint._first_node():
        print("met", flush=True)
        time.sleep(float(sys.argv[1]))
    entrypoint._write_termination(0, errors)
"""


def second_node(folder: Path, port: int, *, works_for: float) -> subprocess.Popen[str]:
    where = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(port)}
    return subprocess.Popen(
        [sys.executable, "-c", SECOND_NODE, str(works_for)],
        env=os.environ | where | {"TERMINATION_LOG": str(folder / "termination-log")},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(("works_for", "code"), [(60, 1), (0.5, 0)])
def test_second_node__ends_with_the_first_unless_it_is_done_in_time(
    tmp_path: Path, works_for: float, code: int
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as first:
        node = second_node(tmp_path, first.getsockname()[1], works_for=works_for)
        connection, _ = first.accept()
        assert node.stdout is not None
        assert node.stdout.readline() == "met\n"
        connection.close()
        assert node.wait(20) == code
    message = json.loads((tmp_path / "termination-log").read_text())
    assert (message["rc"], "first node" in message["reason"]) == (code, code == 1)


def test_second_node__does_not_wait_for_ever_for_a_first_that_never_comes(tmp_path: Path) -> None:
    assert second_node(tmp_path, free_port(), works_for=60).wait(20) == 1


@pytest.mark.parametrize("reason", ["short", "x" * 10_000, "ü" * 3_000, '"\n' * 4_000])
def test_termination_message__fits_and_is_json(reason: str) -> None:
    message = termination_message(2, reason)
    found = json.loads(message)
    assert len(message.encode()) <= MESSAGE_BYTES
    assert found["rc"] == 2
    assert reason.startswith(found["reason"])
    assert found["reason"] == reason or len(message) > MESSAGE_BYTES * 0.9


def test_processes__come_from_the_platform_then_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PET_NPROC_PER_NODE", "HJEPA_PROCESSES"):
        monkeypatch.delenv(name, raising=False)
    assert processes_here("cpu") == processes_here("cuda:1") == 1
    assert processes_here("auto") == max(1, torch.cuda.device_count())
    monkeypatch.setenv("HJEPA_PROCESSES", "2")
    assert processes_here("cpu") == 2
    monkeypatch.setenv("PET_NPROC_PER_NODE", "4")
    assert processes_here("cpu") == 4
    monkeypatch.setenv("PET_NPROC_PER_NODE", "auto")  # the Trainer's word for: as many as there are GPUs
    assert processes_here("cpu") == 2
