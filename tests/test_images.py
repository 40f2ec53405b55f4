"""The images without an engine: what their files promise, and that the light steps import no torch."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
IMAGES = ("prepare-data", "train", "evaluate", "tools")
BASE = ROOT / "images/base/Containerfile"
FINAL = {name: ROOT / "images" / name / "Containerfile" for name in IMAGES}
REQUIREMENTS = {"torch": ROOT / "images/base/torch.txt", "tools": ROOT / "images/tools/requirements.txt"}
# Steps -> image; every component says the same.
STEPS = {
    "resolve_config": "tools",
    "prepare_data": "prepare-data",
    "train": "train",
    "launch_training": "tools",
    "export_checkpoint": "evaluate",
    "evaluate": "evaluate",
    "register_model": "tools",
    "report": "tools",
    "resolve_sweep": "tools",
    "resolve_branch": "tools",
    "compare_branches": "evaluate",
    "plan_preparation": "prepare-data",
    "prepare_parts": "prepare-data",
}


def instructions(path: Path) -> list[tuple[str, str]]:
    """(INSTRUCTION, arguments) of a Containerfile, continued lines joined."""
    lines = re.sub(r"\\\n", " ", path.read_text()).splitlines()
    pairs = [line.split(maxsplit=1) for line in lines if line.strip() and not line.startswith("#")]
    return [(name.upper(), rest) for name, rest in pairs]


def names(path: Path) -> list[str]:
    lines = [line.partition("#")[0].strip() for line in path.read_text().splitlines()]
    return [line for line in lines if line]


@pytest.mark.parametrize("name", IMAGES)
def test_image__ends_as_another_user_with_the_entrypoint_and_labels(name: str) -> None:
    found = instructions(FINAL[name])
    last = dict(found)
    uid, _, gid = last["USER"].partition(":")
    assert int(uid) >= 10_000
    assert gid == "0"
    assert json.loads(last["ENTRYPOINT"]) == ["python3", "-m", "hjepa.entrypoint"]
    labels = re.findall(r"org\.opencontainers\.image\.(\S+?)=", last["LABEL"])
    assert labels == ["title", "description", "licenses", "base.name", "version", "revision"]
    assert f'title="hjepa-{name}"' in last["LABEL"]
    after_user = [instruction for instruction, _ in found[[i for i, _ in found].index("USER") :]]
    assert not {"RUN", "COPY", "ADD"} & set(after_user)


def test_base__is_pinned_and_everything_else_is_built_here() -> None:
    default = next(rest for name, rest in instructions(BASE) if name == "ARG")
    assert re.fullmatch(r"PYTHON=python:3\.\d+\.\d+-slim-\w+", default)
    stages = {rest.split(" AS ")[-1] for name, rest in instructions(BASE) if name == "FROM"}
    for path in (BASE, *FINAL.values()):
        own = {f"hjepa-{stage}" for stage in stages} | stages | {"${PYTHON}"}
        sources = {rest.split()[0] for name, rest in instructions(path) if name == "FROM"}
        assert sources <= own, path


@pytest.mark.parametrize("path", [BASE, *FINAL.values()], ids=lambda path: path.parent.name)
def test_files__leave_no_cache_and_name_no_server(path: Path) -> None:
    for name, rest in instructions(path):
        assert name != "ADD"
        if name == "RUN":
            assert "--mount=type=cache,target=/var/cache/pip" in rest
            assert not re.search(r"\b(pip install|apt|apt-get|curl|wget)\b", rest), "install-packages alone installs"
    for file in [*path.parent.iterdir()]:
        assert not re.search(r"https?://", file.read_text()), file


def test_installed_packages__have_a_fixed_version() -> None:
    pinned = {line.partition("==")[0].strip().lower(): line for line in names(ROOT / "constraints.txt") if "==" in line}
    for path in REQUIREMENTS.values():
        assert {name.lower() for name in names(path)} <= pinned.keys()
    assert {"kfp", "hatchling"} <= pinned.keys()  # installed by name in images/base/install
    assert not {"torch", "torchvision"} & set(names(REQUIREMENTS["tools"]))


def test_installed_packages__cover_what_the_package_declares() -> None:
    """A new dependency has to be thought of here: in the images, or among those that only a laptop needs."""
    declared = {
        re.match(r"[\w-]+", text)[0]  # type: ignore[index]
        for text in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    }
    only_elsewhere = {"matplotlib", "mlflow"}  # hjepa plan's picture; the server, whose client is mlflow-skinny
    assert declared - only_elsewhere <= set(names(REQUIREMENTS["torch"]))


def test_bake__builds_the_same_images_with_both_tags() -> None:
    text = (ROOT / "images/docker-bake.hcl").read_text()
    step = re.search(r"step = (\[.*\])", text)
    assert step is not None
    assert json.loads(step[1]) == list(IMAGES)
    assert ":${VERSION}" in text
    assert ":${VERSION}-${REVISION}" in text
    stages = re.search(r"part = (\[.*\])", text)
    assert stages is not None
    targets = {rest.split(" AS ")[1] for name, rest in instructions(BASE) if name == "FROM" and " AS " in rest}
    assert set(json.loads(stages[1])) <= targets
    default = next(rest for name, rest in instructions(BASE) if name == "ARG").partition("=")[2]
    assert f'variable "PYTHON" {{ default = "{default}" }}' in text
    script = (ROOT / "images/build").read_text()
    assert f"IMAGES=({' '.join(IMAGES)})" in script
    assert f"for target in {' '.join(json.loads(stages[1]))}; do" in script


def test_scripts__are_valid_shell() -> None:
    for name in ("build", "report", "base/install"):
        shell = "bash" if name != "base/install" else "sh"
        subprocess.run([shell, "-n", str(ROOT / "images" / name)], check=True)


def test_build__without_an_engine_says_what_to_do() -> None:
    done = subprocess.run(
        [ROOT / "images/build"],
        env={"PATH": "/usr/bin:/bin", "DOCKER": "no-docker-here"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "no no-docker-here here" in done.stderr


def test_components__name_the_image_that_has_what_they_need() -> None:
    found = {}
    for path in sorted((ROOT / "pipelines/compiled").glob("*.yaml")):
        executors = next(yaml.safe_load_all(path.read_text()))["deploymentSpec"]["executors"]
        for name, executor in executors.items():
            image = executor["container"]["image"].rpartition("/")[2]
            found[name.removeprefix("exec-").replace("-", "_")] = image.removeprefix("hjepa-").partition(":")[0]
    assert found.items() <= STEPS.items()


WITHOUT_TORCH = """
import importlib.abc, sys

class NoTorch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "torchvision", "triton", "matplotlib", "sklearn", "PIL", "tensorboard"}:
            raise ModuleNotFoundError(f"No module named {name!r} in the tools image", name=name)

sys.meta_path.insert(0, NoTorch())
"""


def without_torch(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH + code, *arguments], capture_output=True, text=True, cwd="/", check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_tools_steps__import_no_torch() -> None:
    """Every module that these steps load, at once and later."""
    without_torch(
        "import hjepa.steps, hjepa.entrypoint, hjepa.cli, hjepa.adapters.registry, hjepa.adapters.preflight\n"
        "import hjepa.adapters.tracking, hjepa.adapters.s3\n"
        "import pkgutil, importlib, hjepa.adapters.cluster as cluster\n"
        "for module in pkgutil.iter_modules(cluster.__path__):\n"
        "    importlib.import_module(f'hjepa.adapters.cluster.{module.name}')\n"
        "from hjepa.config import load_config\n"
        "from hjepa.adapters import preflight\n"
        "found = preflight.check(load_config('default'), servers=False, source=False, trains_here=False)\n"
        "assert not [item for item in found if 'No module' in item.detail], found\n"
    )


def test_model__is_saved_for_the_registry_without_torch(tmp_path: Path) -> None:
    """MLflow runs pyfunc.py while it saves the model."""
    (tmp_path / "export").mkdir()
    without_torch(
        "import sys, mlflow.pyfunc, hjepa.adapters as adapters\n"
        "from pathlib import Path\n"
        "mlflow.pyfunc.save_model(Path(sys.argv[1]) / 'model',\n"
        "    python_model=str(Path(adapters.__file__).with_name('pyfunc.py')),\n"
        "    artifacts={'export': str(Path(sys.argv[1]) / 'export')}, pip_requirements=['hjepa'])\n",
        str(tmp_path),
    )
    assert (tmp_path / "model" / "pyfunc.py").exists()


def test_requirements_of_a_model__are_those_of_the_export_not_of_this_process() -> None:
    from hjepa.adapters.registry import _requirements

    version = importlib.metadata.version("hjepa")
    assert _requirements({"packages": {"torch": "9.8.7+cu1", "numpy": "1.2.3"}}) == [
        f"hjepa=={version}",
        "torch==9.8.7",
        "numpy==1.2.3",
    ]
