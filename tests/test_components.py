"""The components: thin, importable without torch, shipped as source, and in step with ``hjepa.steps``."""

import ast
import builtins
import importlib
import inspect
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml

from hjepa.adapters import pipeline_spec

ROOT = Path(__file__).parents[1]
NAMES = sorted(path.parent.name for path in ROOT.glob("components/*/component.py"))

each_component = pytest.mark.parametrize("name", NAMES)


def component(name: str) -> Any:
    return getattr(importlib.import_module(f"components.{name}"), name)


def definition(name: str) -> ast.FunctionDef:
    source = textwrap.dedent(inspect.getsource(component(name).python_func))
    node = ast.parse(source).body[0]
    assert isinstance(node, ast.FunctionDef)
    return node


def calls_of_steps(name: str) -> list[ast.Call]:
    return [
        node
        for node in ast.walk(definition(name))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id in {"steps", "entrypoint"}
    ]


def test_components__are_the_steps_of_the_pipelines() -> None:
    compiled = [pipeline_spec.load(path) for path in (ROOT / "pipelines" / "compiled").glob("*.yaml")]
    steps = {step for pipeline in compiled for step in pipeline.steps()}
    assert {name.replace("_", "-") for name in NAMES} == steps


@each_component
def test_component__folder_is_complete(name: str) -> None:
    folder = ROOT / "components" / name
    metadata = yaml.safe_load((folder / "metadata.yaml").read_text("utf-8"))
    assert list(metadata)[:4] == ["name", "stability", "dependencies", "lastVerified"]
    assert metadata["name"] == name
    assert metadata["stability"] in {"experimental", "alpha", "beta", "stable"}
    assert (folder / "README.md").read_text("utf-8").startswith(f"# {name}\n")


@each_component
def test_component__readme_names_every_artifact_and_the_image(name: str) -> None:
    readme = (ROOT / "components" / name / "README.md").read_text("utf-8")
    spec = component(name).component_spec
    artifacts = [key for key, value in (spec.inputs or {}).items() if "@" in str(value.type)] + list(spec.outputs or {})
    assert all(f"`{key}`" in readme for key in artifacts)
    assert spec.implementation.container.image.partition(":")[0] in readme


@each_component
def test_component__every_argument_is_described(name: str) -> None:
    arguments = list(inspect.signature(component(name).python_func).parameters)
    assert all(f"\n        {argument}: " in inspect.getsource(component(name).python_func) for argument in arguments)


@each_component
def test_component__is_thin(name: str) -> None:
    statements = [node for node in definition(name).body[1:] if not isinstance(node, ast.Import | ast.ImportFrom)]
    assert 1 <= len(statements) <= 8
    assert len(calls_of_steps(name)) == 1


@each_component
def test_component__source_stands_alone(name: str) -> None:
    """KFP ships the function's text: a name from the module would be undefined in the pod."""
    function = definition(name)
    nodes = list(ast.walk(function))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names}
    names = [node for node in nodes if isinstance(node, ast.Name)]
    stored = {node.id for node in names if isinstance(node.ctx, ast.Store)}
    known = imported | stored | {argument.arg for argument in function.args.args} | set(dir(builtins))
    # Only annotations and the decorator, which KFP evaluates, may use what KFP itself imports.
    decorators = {id(node) for decorator in function.decorator_list for node in ast.walk(decorator)}
    annotations = {id(node) for argument in function.args.args for node in ast.walk(argument)}
    used = {node.id for node in names if id(node) not in decorators | annotations}
    assert used <= known


@each_component
def test_component__calls_its_step_as_it_is_defined(name: str) -> None:
    from hjepa import steps

    (call,) = calls_of_steps(name)
    assert isinstance(call.func, ast.Attribute)
    # train_here takes what steps.train takes, and calls it in one process per GPU.
    assert call.func.attr == {"train": "train_here"}.get(name, name)
    inspect.signature(getattr(steps, name)).bind(**{str(keyword.arg): None for keyword in call.keywords})


def test_components_and_pipelines__import_without_hjepa() -> None:
    """Compiling needs kfp and the standard library, not torch or the rest of the package."""
    code = (
        "import sys, pipelines.pretrain\n"
        "heavy = {'hjepa', 'torch', 'mlflow', 'boto3'} & {name.partition('.')[0] for name in sys.modules}\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
