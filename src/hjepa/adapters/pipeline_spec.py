"""Read, check and rewrite a compiled pipeline: what must hold before it is run here or sent to a server."""

from __future__ import annotations

import copy
import difflib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from google.protobuf import json_format
from kfp.kubernetes import kubernetes_executor_config_pb2
from kfp.pipeline_spec import pipeline_spec_pb2

from hjepa.errors import UserError

# PyYAML's own parser takes half a second for a pipeline; the C one, where it was built, a tenth of that.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)

# What a value of each KFP type looks like in Python. An int is good enough for a double, a bool is not an int.
_TYPES: dict[str, tuple[str, tuple[type, ...]]] = {
    "STRING": ("a text", (str,)),
    "NUMBER_INTEGER": ("a whole number", (int,)),
    "NUMBER_DOUBLE": ("a number", (int, float)),
    "BOOLEAN": ("true or false", (bool,)),
    "LIST": ("a list", (list, tuple)),
    "STRUCT": ("a mapping", (dict,)),
}


@dataclass(frozen=True)
class CompiledPipeline:
    """The two YAML documents of a compiled pipeline, as plain mappings; the second may be empty."""

    spec: dict[str, Any]
    platforms: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.spec["pipelineInfo"]["name"])

    @property
    def tasks(self) -> dict[str, Any]:
        """Task name -> task, of everything that runs in a container; groups such as exit handlers are opened."""
        return {name: task for dag in self._dags() for name, task in dag["tasks"].items() if not self._group(task)}

    def _dags(self) -> list[dict[str, Any]]:
        """The root DAG, then those of the groups."""
        return [item["dag"] for item in (self.spec["root"], *self.spec["components"].values()) if "dag" in item]

    def _group(self, task: Mapping[str, Any]) -> dict[str, Any] | None:
        """The DAG that a task stands for, if it is no task in a container."""
        component = self.spec["components"].get(task["componentRef"]["name"], {})
        dag: dict[str, Any] | None = component.get("dag")
        return dag

    @property
    def parameters(self) -> dict[str, Any]:
        """Parameter name -> {parameterType, defaultValue, isOptional, description}."""
        parameters: dict[str, Any] = self.spec["root"].get("inputDefinitions", {}).get("parameters", {})
        return parameters

    def steps(self) -> list[str]:
        """Task names in an order in which they can run; the order of the file decides between equals."""
        return self._in_order(self.spec["root"]["dag"])

    def _in_order(self, dag: Mapping[str, Any]) -> list[str]:
        done: list[str] = []
        order: list[str] = []
        while len(done) < len(dag["tasks"]):
            ready = [
                name
                for name, task in dag["tasks"].items()
                if name not in done and all(needed in done for needed in task.get("dependentTasks", []))
            ]
            if not ready:
                raise UserError(f"{self.name}: its tasks wait for each other in a circle; compile it again")
            done += ready[:1]
            group = self._group(dag["tasks"][ready[0]])
            order += self._in_order(group) if group else ready[:1]
        return order

    def looped(self) -> set[str]:
        """The tasks that run once for each item of a loop."""
        return {
            name
            for dag in self._dags()
            for task in dag["tasks"].values()
            if "parameterIterator" in task and (group := self._group(task))
            for name in self._in_order(group)
        }

    def for_one_machine(self) -> CompiledPipeline:
        """The same pipeline in which a failed task fails at once, and a loop takes one item after the other.

        Retries are for pods that a cluster evicts; on one machine they only repeat a mistake. Items that run at the
        same time would share its cores and memory.
        """
        pipeline = CompiledPipeline(copy.deepcopy(self.spec), self.platforms)
        for dag in pipeline._dags():
            for task in dag["tasks"].values():
                task.pop("retryPolicy", None)
                if "parameterIterator" in task:
                    task["iteratorPolicy"] = {"parallelismLimit": 1}
        return pipeline

    def with_registry(self, registry: str) -> CompiledPipeline:
        """The same pipeline with ``registry`` (``HOST[:PORT]/NAMESPACE``) in front of the images that name none.

        Its profile gets the registry too, if it has none: the image of a launched job comes from there.
        """
        prefix = registry.strip().removesuffix("/")
        if not re.fullmatch(r"[\w.-]+(:\d+)?(/[\w.-]+)*", prefix):
            raise UserError(f"registry {registry!r}: expected HOST/NAMESPACE, such as registry.example.com/team")
        pipeline = CompiledPipeline(copy.deepcopy(self.spec), self.platforms)
        for executor in pipeline.spec["deploymentSpec"]["executors"].values():
            container = executor.get("container")
            if container is not None and "/" not in container["image"]:
                container["image"] = f"{prefix}/{container['image']}"
        if "profile" in pipeline.parameters:
            profile = json.loads(pipeline.parameters["profile"]["defaultValue"] or '{"cluster": {}}')
            profile["cluster"]["registry"] = profile["cluster"].get("registry") or prefix
            pipeline.parameters["profile"]["defaultValue"] = json.dumps(profile)
        return pipeline

    def to_yaml(self) -> str:
        documents = [self.spec, self.platforms] if self.platforms else [self.spec]
        text: str = yaml.dump_all(documents, Dumper=_DUMPER)
        return text

    def check_arguments(self, arguments: Mapping[str, Any]) -> None:
        """Raise one UserError that names every argument the pipeline would refuse."""
        problems = []
        for name, value in arguments.items():
            if name not in self.parameters:
                near = difflib.get_close_matches(name, self.parameters, n=1)
                hint = f" Did you mean {near[0]}?" if near else ""
                problems.append(f"{name}: no such parameter.{hint} Known: {', '.join(self.parameters)}.")
                continue
            expected, types = _TYPES[self.parameters[name]["parameterType"]]
            if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
                problems.append(f"{name}: got {value!r}, expected {expected}.")
        for name, parameter in self.parameters.items():
            if name not in arguments and not parameter.get("isOptional"):
                problems.append(f"{name}: missing, and it has no default.")
        if problems:
            raise UserError(f"pipeline {self.name} cannot take these arguments\n  " + "\n  ".join(problems))


def load(path: Path) -> CompiledPipeline:
    """Read and check a compiled pipeline.

    Raises:
        UserError: if the file cannot be read or is no pipeline that a server would run.
    """
    try:
        documents = [document for document in yaml.load_all(path.read_text("utf-8"), _LOADER) if document is not None]
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the pipeline {path}: {error}") from None
    if not 1 <= len(documents) <= 2 or not all(isinstance(document, dict) for document in documents):
        raise UserError(f"{path} is not a compiled pipeline: expected one or two YAML mappings")
    pipeline = CompiledPipeline(spec=documents[0], platforms=documents[1] if len(documents) == 2 else {})
    problems = list(find_problems(pipeline))
    if problems:
        raise UserError(f"{path} is not a valid compiled pipeline\n  " + "\n  ".join(problems))
    return pipeline


def find_problems(pipeline: CompiledPipeline) -> Iterator[str]:
    """What is wrong with a pipeline, strictly: unknown keys, dangling references, unset inputs, images, secrets."""
    try:
        spec = json_format.ParseDict(pipeline.spec, pipeline_spec_pb2.PipelineSpec())
        json_format.ParseDict(pipeline.platforms, pipeline_spec_pb2.PlatformSpec())
    except json_format.ParseError as error:
        yield str(error)
        return
    if not spec.pipeline_info.name or spec.root.WhichOneof("implementation") != "dag":
        yield "no pipelineInfo.name, or no root.dag"
        return
    executors = pipeline.spec.get("deploymentSpec", {}).get("executors", {})
    for label, executor in executors.items():
        yield from (f"{label}: {problem}" for problem in _executor_problems(executor))
    yield from _dag_problems(spec, spec.root, "root", set(executors))
    kubernetes = pipeline.platforms.get("platforms", {}).get("kubernetes", {})
    for label, settings in kubernetes.get("deploymentSpec", {}).get("executors", {}).items():
        if label not in executors:
            yield f"platforms.kubernetes: settings for {label}, which is no executor"
        try:
            json_format.ParseDict(settings, kubernetes_executor_config_pb2.KubernetesExecutorConfig())
        except json_format.ParseError as error:
            yield f"platforms.kubernetes.{label}: {error}"


def _executor_problems(executor: Mapping[str, Any]) -> Iterator[str]:
    # The deployment is an untyped Struct in the pipeline's own schema, so unknown keys pass there.
    try:
        parsed = json_format.ParseDict(executor, pipeline_spec_pb2.PipelineDeploymentConfig.ExecutorSpec())
    except json_format.ParseError as error:
        yield str(error)
        return
    container = parsed.container
    name, digest, _ = container.image.rpartition("@")
    tag = (name or container.image).rsplit("/", 1)[-1].partition(":")[2]
    if not digest and not tag:
        yield f"image {container.image!r} has no tag"
    if tag == "latest":
        yield f"image {container.image!r} moves; use a version"
    if re.search(r"\bpip3?\s+install\b", " ".join(container.command)):
        yield "installs packages when it starts; put them in the image"
    for variable in container.env:
        if re.search(r"SECRET|TOKEN|PASSWORD|ACCESS_KEY", variable.name):
            yield f"environment variable {variable.name} holds its value in the open; take it from a Secret"


def _dag_problems(
    spec: pipeline_spec_pb2.PipelineSpec, component: Any, name: str, executors: set[str]
) -> Iterator[str]:
    tasks = component.dag.tasks
    for task_name, task in tasks.items():
        where = f"{name}.{task_name}"
        for needed in task.dependent_tasks:
            if needed not in tasks:
                yield f"{where}: waits for {needed}, which is no task"
        if task.component_ref.name not in spec.components:
            yield f"{where}: no component {task.component_ref.name}"
            continue
        target = spec.components[task.component_ref.name]
        if target.WhichOneof("implementation") == "dag":
            yield from _dag_problems(spec, target, task.component_ref.name, executors)
        elif target.executor_label not in executors:
            yield f"{where}: no executor {target.executor_label}"
        given = {*task.inputs.parameters, *task.inputs.artifacts}
        if task.WhichOneof("iterator") == "parameter_iterator":  # of a loop, which sets it anew each time
            given.add(task.parameter_iterator.item_input)
        inputs = target.input_definitions
        for kind in (inputs.parameters, inputs.artifacts):
            for key, definition in kind.items():
                if key not in given and not definition.is_optional:
                    yield f"{where}: input {key} is not set"
        for key, source in task.inputs.artifacts.items():
            yield from (f"{where}: {problem}" for problem in _source_problems(spec, component, key, source))


def _source_problems(spec: pipeline_spec_pb2.PipelineSpec, component: Any, key: str, source: Any) -> Iterator[str]:
    if source.WhichOneof("kind") == "component_input_artifact":
        if source.component_input_artifact not in component.input_definitions.artifacts:
            yield f"input {key} comes from {source.component_input_artifact}, which is no input of the pipeline"
        return
    output = source.task_output_artifact
    producer = component.dag.tasks.get(output.producer_task)
    if producer is None:
        yield f"input {key} comes from {output.producer_task}, which is no task"
        return
    if producer.component_ref.name not in spec.components:
        return
    if output.output_artifact_key not in spec.components[producer.component_ref.name].output_definitions.artifacts:
        yield f"input {key}: {output.producer_task} makes no {output.output_artifact_key}"
