"""What a user installs: the wheel, in an environment without the checkout."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from hjepa import __version__
from hjepa.config import packaged_configs

ROOT = Path(__file__).resolve().parents[1]
COMPILED = ROOT / "pipelines" / "compiled"


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a virtual environment that holds the wheel, and borrows the dependencies of this one."""
    folder = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    programs = folder / "bin"
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        programs / "python",
        "install",
        "--no-deps",
        "--no-index",
        wheel,
        cwd=folder,
    )
    # A .pth file adds this environment's packages behind the wheel's; the editable install among them is itself a .pth
    # file, and those are not followed twice.
    borrowed = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})["purelib"]
    (Path(borrowed) / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", "utf-8")
    return programs


def test_wheel__holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names} == {"hjepa", f"hjepa-{__version__}.dist-info"}
    assert f"hjepa-{__version__}.dist-info/licenses/LICENSE" in names
    assert not [name for name in names if "__pycache__" in name]


def test_wheel__program_runs(installed: Path, tmp_path: Path) -> None:
    assert run(installed / "hjepa", "--version", cwd=tmp_path) == f"hjepa {__version__}\n"


def test_wheel__is_what_is_imported(installed: Path, tmp_path: Path) -> None:
    where = run(installed / "python", "-c", "import hjepa; print(hjepa.__file__)", cwd=tmp_path).strip()
    assert Path(where).is_relative_to(installed.parent)
    assert not Path(where).is_relative_to(ROOT)


def test_wheel__brings_the_packaged_configurations(installed: Path, tmp_path: Path) -> None:
    code = "from hjepa.config import *; [print(name) for name in packaged_configs() if load_config(name)]"
    assert run(installed / "python", "-c", code, cwd=tmp_path).split() == packaged_configs()


def test_wheel__brings_the_compiled_pipelines(installed: Path, tmp_path: Path) -> None:
    code = "from importlib import resources; print(resources.files('hjepa') / 'pipelines')"
    folder = Path(run(installed / "python", "-c", code, cwd=tmp_path).strip())
    committed = sorted(COMPILED.glob("*.yaml"))
    assert committed
    for path in committed:
        assert (folder / path.name).read_bytes() == path.read_bytes()
    found = run(installed / "python", "-c", "from hjepa.cli import *; print(compiled_pipeline())", cwd=tmp_path).strip()
    assert Path(found) == folder / "pretrain.yaml"


def test_wheel__imports_every_module(installed: Path, tmp_path: Path) -> None:
    code = (
        "import hjepa, importlib, pkgutil\n"
        "for module in pkgutil.walk_packages(hjepa.__path__, 'hjepa.'):\n"
        "    importlib.import_module(module.name)\n"
        "    print(module.name)\n"
    )
    names = run(installed / "python", "-c", code, cwd=tmp_path).split()
    assert {"hjepa.cli", "hjepa.steps", "hjepa.models", "hjepa.adapters.registry"} <= set(names)
