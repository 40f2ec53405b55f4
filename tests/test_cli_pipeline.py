"""`hjepa pipeline` against a server that speaks KFP's API."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
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
        # The address is for the link from the MLflow run to this one.
        assert given == {
            "config": "demo",
            "gpus": "4",
            "overrides": ["training.lr=3e-4"],
            "pipeline_ui": server.url,
        }
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


def test_run__sets_of_a_sweep_are_a_list_or_have_names() -> None:
    with FakeKfpServer() as server:
        for text in ('[["seed=1"],["seed=2"]]', "{one: [seed=1], two: seed=2}"):
            done = hjepa("run", "--endpoint", server.url, "--no-follow", "--pipeline", "pretrain-sweep", f"sets={text}")
            assert done.returncode == 0, done.stderr
        sent = [run["runtime_config"]["parameters"]["sets"] for run in server.state.runs.values()]
        assert sent == [
            [["seed=1"], ["seed=2"]],
            [{"name": "one", "set": ["seed=1"]}, {"name": "two", "set": "seed=2"}],
        ]


def test_run__mistakes_are_found_before_anything_is_sent() -> None:
    with FakeKfpServer() as server:
        for arguments, message in (
            (["confg=demo"], "confg"),
            (["config=demo", 'overrides=["training.lr=fast"]'], "training.lr"),
            (["config"], "expected NAME=VALUE"),
            (["gpus=many"], "cluster.gpus_per_node"),
            (["champion_margin=-1"], "tracking.champion_margin"),
            (['overrides=["training.lr=fast"]'], "training.lr"),
            (["run=a/b"], "run=a/b: expected lower-case letters"),
            (["run=" + "x" * 64], "at most 63"),
            (["profile={cluster: {env: {HF_TOKEN: verysecret}}}"], "HF_TOKEN"),
            (["--pipeline", "pretrain-distributed", "nodes=0"], "cluster.nodes"),
            (["--pipeline", "pretrain-distributed", "backend=slurm"], "cluster.backend"),
            (["--pipeline", "pretrain-sweep"], "needs sets, one per branch: --sweep FILE, or for example 'sets=[["),
            (["--pipeline", "pretrain-sweep", 'sets=[["seed=1"]]'], "sets=: 1 mistake\n  got 1 set, expected 2 to 100"),
            (["--pipeline", "pretrain-sweep", "sets=7"], "sets=: expected a list of sets"),
            (["--pipeline", "pretrain-sweep", "sets={a: [sed=1], b: []}"], "set a: "),
            (["--pipeline", "pretrain-sweep", f"sets={{{'a' * 27}: [seed=1], b: []}}"], "at most 63"),
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


def test_upload__for_a_profile_is_another_version_with_its_placement_and_registry(tmp_path: Path) -> None:
    profile = tmp_path / "profile.yaml"
    profile.write_text(
        "cluster: {registry: registry.example.com/team, s3_secret: team-s3, gpus_per_node: 2}\n", "utf-8"
    )
    with FakeKfpServer() as server:
        plain = hjepa("upload", "--endpoint", server.url)
        placed = hjepa("run", "--endpoint", server.url, "--profile", str(profile), "--no-follow", "config=demo")
        assert plain.returncode == placed.returncode == 0, placed.stderr
        assert len(server.state.pipelines) == 1
        _, version = server.state.versions.values()
        spec, platform = (version["pipeline_spec"][key] for key in ("pipeline_spec", "platform_spec"))
    images = {item["container"]["image"] for item in spec["deploymentSpec"]["executors"].values()}
    assert all(image.startswith("registry.example.com/team/hjepa-") for image in images)
    executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values()
    assert all(item["secretAsEnv"][0]["secretName"] == "team-s3" for item in executors)
    assert spec["root"]["inputDefinitions"]["parameters"]["gpus"]["defaultValue"] == "2"


def test_compile__mistakes_in_a_profile_are_told_without_a_traceback(tmp_path: Path) -> None:
    profile = tmp_path / "profile.yaml"
    for text, message in (
        ("cluster: {nodes: many}", "cluster.nodes"),
        ("training: {epochs: 1}", "one section, cluster"),
        ("cluster: {env: {AWS_SECRET_ACCESS_KEY: verysecret}}", "AWS_SECRET_ACCESS_KEY"),
        ("cluster: {env: {PET_NNODES: '7'}}", "PET_NNODES"),
        ("cluster: {env: {2024-01-01: a}}", "write it in quotes"),
    ):
        profile.write_text(text, "utf-8")
        done = hjepa("compile", "--profile", str(profile), "--output", str(tmp_path / "out.yaml"))
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr
        assert "verysecret" not in done.stderr
        assert not (tmp_path / "out.yaml").exists()
    nowhere = hjepa("compile", "--profile", str(profile))
    assert nowhere.returncode == 2
    assert "--output" in nowhere.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "/proc/x.yaml"], "/proc/x.yaml"),
        (["--output", "out.txt"], "expected a name that ends with .yaml"),
        (["--output", "out.yaml", "--images-claim", "Bad Name!"], "--images-claim Bad Name!"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_compile__mistakes_in_its_arguments_are_the_users(arguments: list[str], message: str) -> None:
    done = hjepa("compile", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_compile__says_what_of_a_profile_has_no_effect(tmp_path: Path) -> None:
    profile = tmp_path / "profile.yaml"
    profile.write_text("cluster: {grace_seconds: 60, cpu: '2'}\n", "utf-8")
    done = hjepa("compile", "--profile", str(profile), "--output", str(tmp_path / "out.yaml"))
    assert done.returncode == 0, done.stderr
    assert "note: without effect in pretrain, which starts no training job: cluster.grace_seconds\n" in done.stderr


def test_compile__writes_the_named_pipeline(tmp_path: Path) -> None:
    output = tmp_path / "out.yaml"
    done = hjepa("compile", "--pipeline", "pretrain-distributed", "--output", str(output))
    assert done.returncode == 0, done.stderr
    compiled = Path(__file__).parents[1] / "pipelines" / "compiled" / "pretrain-distributed.yaml"
    assert output.read_bytes() == compiled.read_bytes()
