"""The compiled pipeline as a product: reproducible, strictly valid, self-describing, free of secrets."""

import copy
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import json_format
from kfp import components
from kfp.kubernetes import kubernetes_executor_config_pb2
from kfp.pipeline_spec import pipeline_spec_pb2

from hjepa import entrypoint, steps
from hjepa.adapters import pipeline_spec
from hjepa.adapters.cluster.spec import train_image
from hjepa.adapters.pipeline_spec import CompiledPipeline
from hjepa.config import ClusterConfig, Config, load_config
from hjepa.errors import UserError
from pipelines.placement import BRANCHES_AT_ONCE, OF_TASKS, Placement

ROOT = Path(__file__).parents[1]
ALL_COMPILED = sorted((ROOT / "pipelines" / "compiled").glob("*.yaml"))
PRETRAIN = ROOT / "pipelines" / "compiled" / "pretrain.yaml"
SWEEP = ROOT / "pipelines" / "compiled" / "pretrain-sweep.yaml"
DISTRIBUTED = ROOT / "pipelines" / "compiled" / "pretrain-distributed.yaml"
STEPS = ["resolve-config", "prepare-data", "train", "export-checkpoint", "evaluate", "register-model", "report"]

compiled_pipelines = pytest.mark.parametrize("path", ALL_COMPILED, ids=lambda path: path.stem)


@pytest.fixture
def pretrain() -> CompiledPipeline:
    return pipeline_spec.load(PRETRAIN)


def executors(pipeline: CompiledPipeline) -> dict[str, Any]:
    found: dict[str, Any] = pipeline.spec["deploymentSpec"]["executors"]
    return found


def kubernetes(pipeline: CompiledPipeline) -> dict[str, Any]:
    found: dict[str, Any] = pipeline.platforms["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    return found


@compiled_pipelines
@pytest.mark.parametrize("hash_seed", ["0", "4711"])
def test_compiled__is_what_the_source_compiles_to(path: Path, hash_seed: str, tmp_path: Path) -> None:
    fresh = tmp_path / path.name
    subprocess.run(
        [sys.executable, "-m", "pipelines.pretrain", "--pipeline", path.stem, str(fresh)],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        check=True,
    )
    assert fresh.read_bytes() == path.read_bytes(), f"python -m pipelines.pretrain brings {path.name} up to date"


@compiled_pipelines
def test_compiled__parses_strictly(path: Path) -> None:
    documents = list(yaml.safe_load_all(path.read_text("utf-8")))
    assert len(documents) == 2
    json_format.ParseDict(documents[0], pipeline_spec_pb2.PipelineSpec())
    json_format.ParseDict(documents[1], pipeline_spec_pb2.PlatformSpec())
    for executor in documents[0]["deploymentSpec"]["executors"].values():
        json_format.ParseDict(executor, pipeline_spec_pb2.PipelineDeploymentConfig.ExecutorSpec())
    for config in documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values():
        json_format.ParseDict(config, kubernetes_executor_config_pb2.KubernetesExecutorConfig())
    assert components.load_component_from_file(str(path)).pipeline_spec.pipeline_info.name


@compiled_pipelines
def test_compiled__has_no_problem(path: Path) -> None:
    assert list(pipeline_spec.find_problems(pipeline_spec.load(path))) == []


@compiled_pipelines
def test_compiled__every_parameter_has_type_default_and_description(path: Path) -> None:
    parameters = pipeline_spec.load(path).parameters
    assert parameters
    for name, parameter in parameters.items():
        assert parameter["parameterType"], name
        assert "defaultValue" in parameter, name
        assert len(parameter.get("description", "")) > 20, name


@compiled_pipelines
def test_compiled__images_carry_the_packages_version_and_no_registry(path: Path) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    for executor in executors(pipeline_spec.load(path)).values():
        assert re.fullmatch(rf"hjepa-[a-z-]+:{re.escape(version)}", executor["container"]["image"])


@compiled_pipelines
def test_compiled__installs_nothing_and_holds_no_secret(path: Path) -> None:
    text = path.read_text("utf-8")
    assert "pip install" not in text
    assert ":latest" not in text
    # A variable of this kind may be named (it is the key in a Secret), but has no value here.
    for executor in executors(pipeline_spec.load(path)).values():
        assert not any(
            re.search("SECRET|TOKEN|KEY|PASSWORD", env["name"]) for env in executor["container"].get("env", [])
        )


def test_pretrain__steps_in_order(pretrain: CompiledPipeline) -> None:
    assert pretrain.steps() == STEPS


@compiled_pipelines
def test_compiled__every_task_has_credentials_by_name_a_time_limit_and_no_cache(path: Path) -> None:
    pipeline = pipeline_spec.load(path)
    for step in pipeline.steps():
        settings = kubernetes(pipeline)[f"exec-{step}"]
        secrets = {secret["secretName"]: secret["optional"] for secret in settings["secretAsEnv"]}
        assert secrets == {"hjepa-s3": False, "hjepa-mlflow": True}
        assert int(settings["activeDeadlineSeconds"]) > 0
        assert pipeline.tasks[step]["cachingOptions"] == {}


@compiled_pipelines
def test_compiled__report_runs_whatever_happens(path: Path) -> None:
    pipeline = pipeline_spec.load(path)
    report = pipeline.tasks["report"]
    assert report["triggerPolicy"] == {"strategy": "ALL_UPSTREAM_TASKS_COMPLETED"}
    assert set(pipeline.spec["root"]["dag"]["tasks"]) == {*report["dependentTasks"], "report"}
    # What leads to the run's servers must reach both the first step and the last one in the same way.
    first = pipeline.tasks[pipeline.steps()[0]]["inputs"]["parameters"]
    for name, source in report["inputs"]["parameters"].items():
        if name == "status":
            continue
        inner = source.get("componentInputParameter")
        assert first[name] == ({"componentInputParameter": f"pipelinechannel--{inner}"} if inner else source)


def test_pretrain__training_gets_gpus_shared_memory_a_toleration_and_retries(pretrain: CompiledPipeline) -> None:
    resources = executors(pretrain)["exec-train"]["container"]["resources"]
    assert resources["accelerator"]["resourceType"] == "nvidia.com/gpu"
    assert resources["accelerator"]["resourceCount"] == "{{$.inputs.parameters['pipelinechannel--gpus']}}"
    cluster = Config().cluster
    assert (resources["resourceCpuRequest"], resources["resourceMemoryLimit"]) == (cluster.cpu, cluster.memory)
    assert pretrain.parameters["gpus"]["parameterType"] == "STRING"  # KFP's driver ignores a number here
    settings = kubernetes(pretrain)["exec-train"]
    shm = {"medium": "Memory", "mountPath": "/dev/shm", "sizeLimit": cluster.shm, "volumeName": "dshm"}
    assert settings["emptyDirMounts"] == [shm]
    assert settings["tolerations"] == [{"effect": "NoSchedule", "key": "nvidia.com/gpu", "operator": "Exists"}]
    assert pretrain.tasks["train"]["retryPolicy"]["maxRetryCount"] == 5


def test_distributed__no_task_of_its_own_takes_a_gpu() -> None:
    distributed = pipeline_spec.load(DISTRIBUTED)
    assert distributed.steps() == ["launch-training" if step == "train" else step for step in STEPS]
    assert not [label for label, item in executors(distributed).items() if "resources" in item["container"]]
    assert {"nodes", "gpus", "backend"} <= set(distributed.parameters)


PROFILE = """
cluster:
  gpus_per_node: 4
  gpu_resource: amd.com/gpu
  cpu: "24"
  memory: 200Gi
  shm: 24Gi
  node_selector: {zone: a}
  tolerations: [{key: dedicated, operator: Equal, value: gpu, effect: NoExecute}]
  s3_secret: team-s3
  mlflow_secret: team-mlflow
  image_pull_secrets: [regcred]
  env: {NCCL_DEBUG: INFO}
"""


def compile_with(profile: Path, output: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipelines.pretrain", "--profile", str(profile), str(output), *more]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_profile__decides_placement_secrets_and_sizes(tmp_path: Path) -> None:
    profile, output = tmp_path / "profile.yaml", tmp_path / "out.yaml"
    profile.write_text(PROFILE, "utf-8")
    assert compile_with(profile, output).returncode == 0
    pipeline = pipeline_spec.load(output)
    container = executors(pipeline)["exec-train"]["container"]
    assert container["resources"]["accelerator"]["resourceType"] == "amd.com/gpu"
    assert (container["resources"]["resourceCpuRequest"], container["resources"]["resourceMemoryLimit"]) == (
        "24",
        "200Gi",
    )
    assert container["env"] == [{"name": "NCCL_DEBUG", "value": "INFO"}]
    settings = kubernetes(pipeline)["exec-train"]
    assert settings["nodeSelector"] == {"labels": {"zone": "a"}}
    assert settings["tolerations"] == [{"effect": "NoExecute", "key": "dedicated", "operator": "Equal", "value": "gpu"}]
    for step in pipeline.steps():
        settings = kubernetes(pipeline)[f"exec-{step}"]
        assert {secret["secretName"] for secret in settings["secretAsEnv"]} == {"team-s3", "team-mlflow"}
        assert [secret["secretName"] for secret in settings["imagePullSecret"]] == ["regcred"]
    assert pipeline.parameters["gpus"]["defaultValue"] == "4"
    carried = pipeline.parameters["profile"]["defaultValue"]
    assert yaml.safe_load(carried) == yaml.safe_load(PROFILE)


def test_images_claim__is_mounted_where_the_source_is_read_and_nowhere_else(tmp_path: Path) -> None:
    output = tmp_path / "out.yaml"
    command = [sys.executable, "-m", "pipelines.pretrain", str(output), "--images-claim", "hjepa-images"]
    subprocess.run(command, cwd=ROOT, check=True)
    pipeline = pipeline_spec.load(output)
    mounts = {step: kubernetes(pipeline)[f"exec-{step}"].get("pvcMount") for step in pipeline.steps()}
    (mount,) = mounts.pop("prepare-data")
    assert (mount["constant"], mount["mountPath"]) == ("hjepa-images", "/data")
    assert set(mounts.values()) == {None}


@pytest.mark.parametrize("name", ["Bad Name!", "-a", "a.", "a..b", "x" * 254])
def test_images_claim__that_can_be_none_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="expected the name of a PersistentVolumeClaim"):
        Placement(images_claim=name)
    assert Placement(images_claim="team.images-1").images_claim == "team.images-1"


JOB_PROFILE = """
cluster:
  image: registry.example.com/mine:3
  processes_per_node: 2
  queue: gpus
  nodes: 1
  namespace: team
  grace_seconds: 60
  scratch: 5Gi
  priority_class: high
"""


def test_profile__reaches_the_training_task_or_is_said_to_be_without_effect(tmp_path: Path) -> None:
    profile, output = tmp_path / "profile.yaml", tmp_path / "out.yaml"
    profile.write_text(JOB_PROFILE, "utf-8")
    done = compile_with(profile, output)
    assert done.returncode == 0, done.stderr
    pipeline = pipeline_spec.load(output)
    container = executors(pipeline)["exec-train"]["container"]
    assert container["image"] == "registry.example.com/mine:3"
    assert container["env"] == [{"name": entrypoint.PROCESSES, "value": "2"}]
    labels = kubernetes(pipeline)["exec-train"]["podMetadata"]["labels"]
    assert labels["kueue.x-k8s.io/queue-name"] == "gpus"
    others = [item["container"]["image"] for name, item in executors(pipeline).items() if name != "exec-train"]
    assert not [image for image in others if image == "registry.example.com/mine:3"]
    (note,) = [line for line in done.stderr.splitlines() if line.startswith("note:")]
    silent = ["cluster.grace_seconds", "cluster.namespace", "cluster.priority_class", "cluster.scratch"]
    assert note.endswith(": " + ", ".join(silent))
    distributed = compile_with(profile, output, "--pipeline", "pretrain-distributed")
    assert (distributed.returncode, "note:" in distributed.stderr) == (0, False)


def test_profile__every_key_is_said_to_act_or_not() -> None:
    guide = (ROOT / "docs" / "CLUSTER.md").read_text("utf-8")
    keys = set(ClusterConfig.model_fields)
    assert keys >= OF_TASKS
    named = guide.partition("`pretrain` starts no training job")[2].partition("\n\n")[0]
    acting, _, silent = named.partition("KFP has no word")
    assert {key for key in keys if f"`{key}`" in acting} == OF_TASKS
    timeouts = {key for key in keys if key.endswith("_timeout_seconds")}
    assert {key for key in keys if f"`{key}`" in silent} | timeouts == keys - OF_TASKS


def test_profile__of_a_logged_run_takes_its_key_from_the_secret(pretrain: CompiledPipeline) -> None:
    secrets = kubernetes(pretrain)["exec-train"]["secretAsEnv"]
    (found,) = [item for item in secrets if item["keyToEnv"][0]["envVar"] == "WANDB_API_KEY"]
    assert (found["secretName"], found["optional"]) == ("hjepa-mlflow", True)


@pytest.mark.parametrize(
    "profile", sorted((ROOT / "pipelines" / "profiles").glob("*.yaml")), ids=lambda path: path.stem
)
def test_profiles__of_the_repository_compile_both_pipelines(profile: Path, tmp_path: Path) -> None:
    for name in ("pretrain", "pretrain-distributed"):
        done = compile_with(profile, tmp_path / f"{name}.yaml", "--pipeline", name)
        assert done.returncode == 0, done.stderr
        assert pipeline_spec.load(tmp_path / f"{name}.yaml").parameters["profile"]["defaultValue"]


def test_pretrain__run_is_named_after_the_kfp_run_by_default(pretrain: CompiledPipeline) -> None:
    job = pretrain.tasks["resolve-config"]["inputs"]["parameters"]["job"]
    assert job == {"runtimeValue": {"constant": "{{$.pipeline_job_uuid}}"}}


Change = Callable[[CompiledPipeline], None]


def dangling_component(pipeline: CompiledPipeline) -> None:
    pipeline.tasks["train"]["componentRef"]["name"] = "comp-nope"


def dangling_dependency(pipeline: CompiledPipeline) -> None:
    pipeline.tasks["train"]["dependentTasks"].append("nope")


def dangling_producer(pipeline: CompiledPipeline) -> None:
    pipeline.tasks["train"]["inputs"]["artifacts"]["dataset"]["taskOutputArtifact"]["producerTask"] = "nope"


def dangling_output(pipeline: CompiledPipeline) -> None:
    pipeline.tasks["train"]["inputs"]["artifacts"]["dataset"]["taskOutputArtifact"]["outputArtifactKey"] = "nope"


def missing_executor(pipeline: CompiledPipeline) -> None:
    del executors(pipeline)["exec-train"]


def unset_artifact(pipeline: CompiledPipeline) -> None:
    del pipeline.tasks["train"]["inputs"]["artifacts"]["dataset"]


def unknown_task_key(pipeline: CompiledPipeline) -> None:
    pipeline.tasks["train"]["retryPolicyy"] = {}


def unknown_executor_key(pipeline: CompiledPipeline) -> None:
    executors(pipeline)["exec-train"]["container"]["imagee"] = "x"


def unknown_platform_key(pipeline: CompiledPipeline) -> None:
    kubernetes(pipeline)["exec-train"]["toleration"] = []


def untagged_image(pipeline: CompiledPipeline) -> None:
    executors(pipeline)["exec-train"]["container"]["image"] = "registry.example.com:5000/hjepa-train"


def moving_image(pipeline: CompiledPipeline) -> None:
    executors(pipeline)["exec-train"]["container"]["image"] = "hjepa-train:latest"


def install_at_start(pipeline: CompiledPipeline) -> None:
    executors(pipeline)["exec-train"]["container"]["command"][2] = "python3 -m pip install torch\n"


def secret_value(pipeline: CompiledPipeline) -> None:
    executors(pipeline)["exec-train"]["container"]["env"] = [{"name": "AWS_SECRET_ACCESS_KEY", "value": "abc"}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dangling_component, "comp-exit-handler-1.train: no component comp-nope"),
        (dangling_dependency, "comp-exit-handler-1.train: waits for nope, which is no task"),
        (dangling_producer, "comp-exit-handler-1.train: input dataset comes from nope, which is no task"),
        (dangling_output, "comp-exit-handler-1.train: input dataset: prepare-data makes no nope"),
        (missing_executor, "comp-exit-handler-1.train: no executor exec-train"),
        (unset_artifact, "comp-exit-handler-1.train: input dataset is not set"),
        (unknown_task_key, "retryPolicyy"),
        (unknown_executor_key, "imagee"),
        (unknown_platform_key, "toleration"),
        (untagged_image, "image 'registry.example.com:5000/hjepa-train' has no tag"),
        (moving_image, "image 'hjepa-train:latest' moves"),
        (install_at_start, "exec-train: installs packages when it starts"),
        (secret_value, "environment variable AWS_SECRET_ACCESS_KEY holds its value in the open"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_load__refuses(pretrain: CompiledPipeline, tmp_path: Path, change: Change, message: str) -> None:
    broken = copy.deepcopy(pretrain)
    change(broken)
    path = tmp_path / "broken.yaml"
    path.write_text(broken.to_yaml(), "utf-8")
    with pytest.raises(UserError) as caught:
        pipeline_spec.load(path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "a: [", "- 1\n", "a: 1\n---\nb: 1\n---\nc: 1\n", "\ud800".encode("utf-8", "surrogatepass")]
)
def test_load__refuses_what_is_no_pipeline(tmp_path: Path, text: str | bytes) -> None:
    path = tmp_path / "other.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=r"other\.yaml"):
        pipeline_spec.load(path)


def test_load__missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read the pipeline .*nowhere\.yaml"):
        pipeline_spec.load(tmp_path / "nowhere.yaml")


def test_to_yaml__round_trip(pretrain: CompiledPipeline, tmp_path: Path) -> None:
    path = tmp_path / "again.yaml"
    path.write_text(pretrain.to_yaml(), "utf-8")
    assert pipeline_spec.load(path) == pretrain


def test_with_registry__keeps_images_that_name_one(pretrain: CompiledPipeline) -> None:
    once = pretrain.with_registry("registry.example.com/team")
    assert once.with_registry("other.example.com/team") == once
    assert executors(pretrain)["exec-train"]["container"]["image"].startswith("hjepa-train:")


def test_with_registry__reaches_the_image_of_a_launched_job(pretrain: CompiledPipeline) -> None:
    profile = pretrain.with_registry("registry.example.com/team/").parameters["profile"]["defaultValue"]
    config = load_config("default", steps.profile_settings(profile))
    assert train_image(config.cluster).startswith("registry.example.com/team/hjepa-train:")
    assert pretrain.parameters["profile"]["defaultValue"] == ""


def test_sweep__branches_run_side_by_side_within_a_bound_and_meet_again(tmp_path: Path) -> None:
    sweep = pipeline_spec.load(SWEEP)
    assert sweep.looped() == {"resolve-branch", "train", "export-checkpoint", "evaluate"}
    loop = sweep.spec["components"]["comp-exit-handler-1"]["dag"]["tasks"]["for-loop-2"]
    assert loop["iteratorPolicy"] == {"parallelismLimit": BRANCHES_AT_ONCE}
    assert sweep.tasks["compare-branches"]["dependentTasks"] == ["for-loop-2", "prepare-data", "resolve-sweep"]
    one = sweep.for_one_machine().spec["components"]["comp-exit-handler-1"]["dag"]["tasks"]["for-loop-2"]
    assert one["iteratorPolicy"] == {"parallelismLimit": 1}
    output = tmp_path / "wide.yaml"
    subprocess.run(
        [sys.executable, "-m", "pipelines.pretrain", "--pipeline", "pretrain-sweep", "--at-once", "7", str(output)],
        cwd=ROOT,
        check=True,
    )
    assert "parallelismLimit: 7" in output.read_text("utf-8")


def test_sweep__trains_like_pretrain(pretrain: CompiledPipeline) -> None:
    sweep = pipeline_spec.load(SWEEP)
    for step in ("exec-prepare-data", "exec-train", "exec-export-checkpoint", "exec-evaluate", "exec-register-model"):
        assert executors(sweep)[step] == executors(pretrain)[step]
        assert kubernetes(sweep)[step] == kubernetes(pretrain)[step]


def test_for_one_machine__changes_nothing_else(pretrain: CompiledPipeline) -> None:
    expected = copy.deepcopy(pretrain)
    assert len(expected.tasks) == len(STEPS)
    for task in expected.tasks.values():
        task.pop("retryPolicy", None)
    assert pretrain.for_one_machine() == expected
    assert pretrain.tasks["train"]["retryPolicy"]


@pytest.mark.parametrize(
    ("kind", "right", "wrong"),
    [
        ("NUMBER_INTEGER", [3], ["3", 3.5, True]),
        ("NUMBER_DOUBLE", [3, 3.5], ["3", False]),
        ("BOOLEAN", [True], ["true", 1]),
        ("LIST", [[], ["a"]], ["a"]),
        ("STRUCT", [{}], [[], "a"]),
        ("STRING", ["3"], [3, None]),
    ],
)
def test_check_arguments__types(pretrain: CompiledPipeline, kind: str, right: list[Any], wrong: list[Any]) -> None:
    pretrain.parameters["run"]["parameterType"] = kind
    for value in right:
        pretrain.check_arguments({"run": value})
    for value in wrong:
        with pytest.raises(UserError, match=r"run: got .*, expected "):
            pretrain.check_arguments({"run": value})


def test_check_arguments__all_mistakes_at_once(pretrain: CompiledPipeline) -> None:
    del pretrain.parameters["config"]["isOptional"]
    with pytest.raises(UserError) as caught:
        pretrain.check_arguments({"runn": "a", "overrides": "b"})
    assert [line.split(":")[0] for line in str(caught.value).splitlines()[1:]] == ["  runn", "  overrides", "  config"]
