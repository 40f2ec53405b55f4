"""Promises of the repository itself: configuration keys, README, pins, and what must not appear in it."""

from __future__ import annotations

import argparse
import ast
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from hjepa.cli import build_parser
from hjepa.config import Config, Section, all_keys, flatten, load_config, parse_yaml

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "hjepa"


def tracked_files() -> list[Path]:
    """What is, or would be, committed."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


# -- every configuration key is read ---------------------------------------------------------------------------------


class KeyReader(ast.NodeVisitor):
    """The dotted keys that one module reads, by following names that hold the configuration or one of its sections.

    A name holds a section if it is annotated with the section's class, or assigned from an expression that is one
    (``training = config.training``); anything called ``config`` holds the whole tree.
    """

    def __init__(self, module: ast.Module):
        self.read: set[str] = set()
        self._held: dict[str, set[str]] = {"config": {""}, "_config": {""}}
        while True:  # an alias may be used above the line that makes it
            before = str(self._held)
            self.visit(module)
            if str(self._held) == before:
                break

    def visit_arg(self, node: ast.arg) -> None:
        self._annotated(node.arg, node.annotation)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if isinstance(node.target, (ast.Name, ast.Attribute)):
            name = node.target.id if isinstance(node.target, ast.Name) else node.target.attr
            self._annotated(name, node.annotation)
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                for part, value in zip(target.elts, node.value.elts, strict=False):
                    self._assigned(part, value)
            else:
                self._assigned(target, node.value)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        for section in self._sections(node.value):
            self.read.add(f"{section}.{node.attr}".lstrip("."))
        self.generic_visit(node)

    def _annotated(self, name: str, annotation: ast.expr | None) -> None:
        named = {item.id for item in ast.walk(annotation) if isinstance(item, ast.Name)} if annotation else set()
        for section in named & SECTIONS.keys():
            self._held.setdefault(name, set()).add(SECTIONS[section])

    def _assigned(self, target: ast.expr, value: ast.expr) -> None:
        name = target.id if isinstance(target, ast.Name) else target.attr if isinstance(target, ast.Attribute) else None
        if name and (sections := self._sections(value)):
            self._held.setdefault(name, set()).update(sections)

    def _sections(self, node: ast.expr) -> set[str]:
        if isinstance(node, ast.Name):
            return self._held.get(node.id, set())
        if isinstance(node, ast.Attribute):
            inner = {f"{section}.{node.attr}".lstrip(".") for section in self._sections(node.value)}
            return {path for path in inner if path in SECTIONS.values()} or self._held.get(node.attr, set())
        return set()


def sections_by_class(section: type[Section] = Config, prefix: str = "") -> dict[str, str]:
    found = {section.__name__: prefix}
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            found |= sections_by_class(field.annotation, f"{prefix}.{name}".lstrip("."))
    return found


SECTIONS = sections_by_class()


def keys_read(source: str) -> set[str]:
    return KeyReader(ast.parse(source)).read


def test_config__every_key_is_read_by_code() -> None:
    modules = [path for path in SOURCE.rglob("*.py") if path != SOURCE / "config.py"]
    read = set().union(*(keys_read(path.read_text("utf-8")) for path in modules))
    unread = [key for key in all_keys() if key not in read]
    assert not unread, f"keys that no code reads: {', '.join(unread)}"


@pytest.mark.parametrize(
    ("source", "keys"),
    [
        ("config.training.lr", {"training.lr"}),
        ("self.config.model.ema.momentum", {"model.ema.momentum"}),
        ("data, model = config.data, run.config.model\nprint(data.root, model.depth)", {"data.root", "model.depth"}),
        ("def f(settings: 'MaskingConfig | None', x: MaskingConfig): x.min_context", {"masking.min_context"}),
        ("self.ema = config.model.ema\nself.ema.momentum_end", {"model.ema.momentum_end"}),
        ("self.wanted: ClusterConfig = spec.cluster\nself.wanted.nodes", {"cluster.nodes"}),
        ("model = build()\nmodel.depth", set()),
        ("data.root\nself.training.lr", set()),
    ],
)
def test_key_reader__follows_sections_and_nothing_else(source: str, keys: set[str]) -> None:
    assert keys_read(source) & set(all_keys()) == keys


# -- the packaged configurations -------------------------------------------------------------------------------------


def test_default_yaml__spells_out_every_key_with_its_default() -> None:
    written = parse_yaml((SOURCE / "configs" / "default.yaml").read_text("utf-8"))

    def leaves(node: object, prefix: str = "") -> Iterator[str]:
        if isinstance(node, dict) and node:
            for key, value in node.items():
                yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix[:-1]

    assert list(leaves(written)) == all_keys()
    assert flatten(load_config("default")) == flatten(Config())


def test_default_yaml__explains_every_key() -> None:
    lines = (SOURCE / "configs" / "default.yaml").read_text("utf-8").splitlines()
    bare = [line for line in lines if re.search(r":\s+\S", line) and " # " not in line and not line.startswith("#")]
    assert bare == []


# -- README and docs -------------------------------------------------------------------------------------------------

README = (ROOT / "README.md").read_text("utf-8")
DOCUMENTS = README + (ROOT / "docs" / "TRAINING.md").read_text("utf-8")


def code_blocks() -> list[str]:
    return re.findall(r"^```(?:sh|bash|console)\n(.*?)^```", DOCUMENTS, re.MULTILINE | re.DOTALL)


def inline_code() -> list[str]:
    prose = re.sub(r"^```.*?^```", "", DOCUMENTS, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", prose)


def commands(program: str) -> list[list[str]]:
    """Every call of a program in the documents, without the program's name.

    In prose a command is often only named (`hjepa sync`); what is returned then asks for its help.
    """
    lines = [line for block in code_blocks() for line in block.replace("\\\n", " ").splitlines()]
    called = [shlex.split(line, comments=True) for line in lines]
    for code in inline_code():
        if code.startswith(f"{program} "):
            words = shlex.split(code)
            only_named = program == "hjepa" and not any(word.startswith("-") for word in words)
            called.append([*words, "--help"] if only_named else words)
    return [words[1:] for words in called if len(words) > 1 and Path(words[0]).name == program]


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))


def test_readme__shows_commands() -> None:
    assert ["demo"] in commands("make")
    assert ["test"] in commands("make")
    assert {"run", "pipeline"} <= {command[0] for command in commands("hjepa")}


@pytest.mark.parametrize("command", commands("hjepa"), ids=" ".join)
def test_readme__hjepa_command_parses(command: list[str]) -> None:
    if command[-1] == "--help":
        with pytest.raises(SystemExit) as ended:
            build_parser().parse_args(command)
        assert ended.value.code == 0
    else:
        options = build_parser().parse_args(command)
        load_config(getattr(options, "config", "default"), getattr(options, "set", []))


@pytest.mark.parametrize("command", commands("make"), ids=" ".join)
def test_readme__make_target_exists(command: list[str]) -> None:
    assert {word for word in command if "=" not in word} <= make_targets()
    for arguments in (word.partition("=")[2] for word in command if word.startswith("ARGS=")):
        options = build_parser().parse_args(["run", *shlex.split(arguments)])
        load_config("demo", options.set)


def test_readme__python_compiles() -> None:
    for block in re.findall(r"^```python\n(.*?)^```", DOCUMENTS, re.MULTILINE | re.DOTALL):
        compile(block, "document", "exec")


def paths_named() -> list[str]:
    links = re.findall(r"\]\(([^)#\s]+)", DOCUMENTS) + re.findall(r'(?:src|href)="([^"#]+)"', DOCUMENTS)
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()}  # else it may be the name of a metric
    suffixes = r"\.(?:py|md|yaml|yml|toml|txt|svg|png|json)$"
    spoken = [
        word
        for word in inline_code()
        if re.fullmatch(r"[\w.{}/-]+", word)
        and (re.search(suffixes, word) or word.endswith("/") or word.split("/")[0] in folders)
        and not word.startswith(("/", "."))
    ]
    produced = {"error.json"}  # written by a run
    return sorted({path for path in [*links, *spoken] if "://" not in path and path not in produced})


@pytest.mark.parametrize("path", paths_named())
def test_readme__path_exists(path: str) -> None:
    assert any((folder / path).exists() for folder in (ROOT, SOURCE, ROOT / "docs"))


def test_readme__configuration_keys_exist() -> None:
    sections = {key.split(".")[0] for key in all_keys() if "." in key}
    spoken = {word for word in inline_code() if re.fullmatch(r"[a-z_]+(\.[a-z_0-9]+)+", word)}
    keys = {word for word in spoken if word.split(".")[0] in sections and not word.endswith((".py", ".yaml"))}
    assert keys <= set(all_keys())


def test_readme__names_every_command_of_the_cli() -> None:
    parsers = [action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction)]
    assert set(parsers[0].choices) <= {command[0] for command in commands("hjepa")}


# -- what must not be in the repository ------------------------------------------------------------------------------

PARTS = [("pypi", "org"), ("python" + "hosted", "org"), ("deb", "debian", "org"), ("registry", "npmjs", "org")]
HOSTS = [".".join(parts) for parts in PARTS]  # this file must not name them either
MACHINE_PATHS = re.compile(r"(?<![\w.$}{-])/(?:" + "work|root|home" + r")/[\w.]|(?<![\w.$}{-])/tmp/[\w.]")


CONTAINERS = {"images", "manifests"}  # what these describe has a /tmp of its own


def text_of(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError:
        return ""


def test_files__name_no_package_registry_and_no_path_of_one_machine() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in tracked_files()
        for number, line in enumerate(text_of(path).splitlines(), 1)
        if any(host in line for host in HOSTS)
        or MACHINE_PATHS.search(line.replace("/tmp/", "") if path.relative_to(ROOT).parts[0] in CONTAINERS else line)
    ]
    assert found == []


@pytest.mark.parametrize("text", ["see /tm" + "p/x", "'/roo" + "t/.cache'", "cd /wor" + "k/main"])
def test_machine_paths__are_recognised(text: str) -> None:
    assert MACHINE_PATHS.search(text)


@pytest.mark.parametrize("text", ["https://host/home/x", "results/work/x", "$HOME/tmp/x", "mountPath: /tmp", "a/tmp/b"])
def test_machine_paths__leave_other_text_alone(text: str) -> None:
    assert not MACHINE_PATHS.search(text)


def test_constraints__are_plain_pins() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if not line.startswith("#")]
    pin = re.compile(r'[a-z0-9-]+==[\w.+!]+( ; platform_system == "Linux")?')
    assert [line for line in lines if not pin.fullmatch(line)] == []
    names = [line.partition("==")[0] for line in lines]
    assert names == sorted(set(names))


def test_constraints__are_what_is_installed() -> None:
    """So that what passes here is what the next fresh clone gets."""
    pins = dict(
        line.partition(" ;")[0].split("==")
        for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines()
        if "==" in line and not line.startswith("#")
    )
    installed = {canonicalize_name(item.metadata["Name"]): item.version for item in distributions()}
    others = {f"{name}=={version}" for name, version in installed.items() if name in pins and version != pins[name]}
    assert others == set()
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = declared["optional-dependencies"].values()
    wanted = [*declared["dependencies"], *(requirement for extra in extras for requirement in extra)]
    names = {canonicalize_name(Requirement(requirement).name) for requirement in wanted}
    assert names - {"hjepa"} <= set(pins)
