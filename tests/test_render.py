"""The manifests of a training job: what Pod Security, the operators' webhooks and torchrun make of them."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest
import yaml

from hjepa.adapters.cluster import pytorchjob, trainjob
from hjepa.adapters.cluster.render import amount, shutdown_timeout, threads, to_yaml
from hjepa.adapters.cluster.spec import LABELS, SPEC_HASH, Owner, TrainSpec
from hjepa.config import ClusterConfig, Toleration
from hjepa.errors import UserError
from tests.fake_apiserver import webhook_pytorchjob, webhook_trainjob
from tests.pod_security import pod_templates, violations

BACKENDS = {"pytorchjob": pytorchjob, "trainjob": trainjob}
ARGS = ("train", "--run-uri", "s3://bucket/prefix/runs/r")

both = pytest.mark.parametrize("backend", [pytest.param(module, id=name) for name, module in BACKENDS.items()])


def spec(*, env: dict[str, str] | None = None, owner: Owner | None = None, **cluster: Any) -> TrainSpec:
    return TrainSpec(
        name="hjepa-0123456789",
        image="registry/hjepa-train:1",
        args=ARGS,
        cluster=ClusterConfig(**cluster),
        env=env or {},
        labels={"pipeline/runid": "id"},
        owner=owner,
    )


def template(backend: Any, of: TrainSpec) -> dict[str, Any]:
    (found,) = pod_templates(backend.render(of))
    return found


def container(backend: Any, of: TrainSpec) -> dict[str, Any]:
    (found,) = template(backend, of)["spec"]["containers"]
    return found


def environment(backend: Any, of: TrainSpec) -> dict[str, str]:
    return {item["name"]: item["value"] for item in container(backend, of)["env"] if "value" in item}


# -- safety ----------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("gpus", [0, 8])
def test_pods__pass_pod_security_restricted(backend: Any, gpus: int) -> None:
    assert violations(template(backend, spec(gpus_per_node=gpus, nodes=2))["spec"]) == []


@both
def test_pods__can_write_to_limited_empty_volumes_alone(backend: Any) -> None:
    of = spec(scratch="7Gi", shm="3Gi")
    pod, main = template(backend, of)["spec"], container(backend, of)
    assert main["securityContext"]["readOnlyRootFilesystem"] is True
    volumes = {volume["name"]: volume["emptyDir"] for volume in pod["volumes"]}
    assert {mount["mountPath"]: volumes[mount["name"]] for mount in main["volumeMounts"]} == {
        "/tmp": {"sizeLimit": "7Gi"},
        "/dev/shm": {"medium": "Memory", "sizeLimit": "3Gi"},
    }
    folders = [value for name, value in environment(backend, of).items() if name.endswith(("HOME", "DIR"))]
    assert len(folders) >= 5
    assert all(folder == "/tmp" or folder.startswith("/tmp/") for folder in [*folders, main["workingDir"]])


@both
def test_pods__have_no_token_and_a_number_for_a_user(backend: Any) -> None:
    pod = template(backend, spec())["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False
    assert {type(pod["securityContext"][key]) for key in ("runAsUser", "runAsGroup", "fsGroup")} == {int}


@both
def test_secrets__come_by_name_and_only_s3s_must_exist(backend: Any) -> None:
    main = container(backend, spec(s3_secret="a", mlflow_secret="b"))
    assert main["envFrom"] == [
        {"secretRef": {"name": "a", "optional": False}},
        {"secretRef": {"name": "b", "optional": True}},
    ]


@both
@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_TOKEN"])
def test_secrets__as_plain_variables_are_refused(backend: Any, name: str) -> None:
    with pytest.raises(UserError, match=rf"{name}(?s:.)*cluster\.s3_secret"):
        backend.render(spec(env={name: "x"}))


@both
@pytest.mark.parametrize("name", ["WANDB_API_KEY", "HF_TOKEN"])
def test_secrets__of_other_services_are_refused_too(backend: Any, name: str) -> None:
    with pytest.raises(UserError, match=name):
        backend.render(spec(env={name: "x"}))


@both
def test_rendezvous__variables_of_the_user_are_refused(backend: Any) -> None:
    with pytest.raises(UserError, match=r"PET_NNODES(?s:.)*cluster\.nodes"):
        backend.render(spec(env={"PET_NNODES": "3"}))


@both
def test_shared_memory__must_fit_into_the_memory_that_it_is_part_of(backend: Any) -> None:
    with pytest.raises(UserError, match=r"cluster\.shm is 4096Mi and cluster\.memory 4Gi"):
        backend.render(spec(memory="4Gi", shm="4096Mi"))


# -- what the operators ask for --------------------------------------------------------------------------------------


@pytest.mark.parametrize("nodes", [1, 16])
def test_pytorchjob__passes_the_webhook(nodes: int) -> None:
    (job,) = pytorchjob.render(spec(nodes=nodes, gpus_per_node=8))
    assert webhook_pytorchjob(job) == []
    assert job["spec"]["nprocPerNode"] == "8"
    assert job["spec"]["pytorchReplicaSpecs"].keys() == {"Worker"}
    assert job["spec"]["pytorchReplicaSpecs"]["Worker"]["replicas"] == nodes


def test_trainjob__passes_the_webhook_and_keeps_placement_in_its_own_runtime() -> None:
    runtime, job = trainjob.render(spec(nodes=4, gpus_per_node=8))
    assert webhook_trainjob(job) == []
    assert job["spec"] == {
        "runtimeRef": {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": "hjepa-0123456789"},
        "trainer": {"numNodes": 4, "numProcPerNode": 8},
    }
    assert runtime["metadata"]["name"] == job["metadata"]["name"]
    (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    assert node["name"] == trainjob.CONTAINER
    assert "ttlSecondsAfterFinished" not in str(runtime)  # Trainer would run a failed job again


@both
def test_container__has_the_name_that_the_operator_looks_for_and_the_arguments(backend: Any) -> None:
    main = container(backend, spec())
    assert main["name"] == backend.CONTAINER
    assert tuple(main["args"]) == ARGS
    assert "command" not in main  # the image's entrypoint returns the exit codes


@both
def test_job__is_the_last_manifest_and_knows_no_namespace(backend: Any) -> None:
    manifests = backend.render(spec())
    assert manifests[-1]["kind"] == backend.KIND
    assert {item["apiVersion"] for item in manifests} == {f"{backend.GROUP}/{backend.VERSION}"}
    assert all("namespace" not in item["metadata"] for item in manifests)


@both
def test_labels__are_on_the_job_and_its_pods(backend: Any) -> None:
    wanted = (LABELS | {"pipeline/runid": "id"}).items()
    assert all(wanted <= item["metadata"]["labels"].items() for item in backend.render(spec()))
    assert (wanted | {("sidecar.istio.io/inject", "false")}) <= template(backend, spec())["metadata"]["labels"].items()


@both
def test_queue__is_a_label_and_suspending_is_left_to_kueue(backend: Any) -> None:
    *others, job = backend.render(spec(queue="gpus"))
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    assert all("kueue.x-k8s.io/queue-name" not in other["metadata"]["labels"] for other in others)
    assert "suspend" not in str(job)


@both
def test_owner__does_not_block_its_deletion(backend: Any) -> None:
    owner = Owner(api_version="argoproj.io/v1alpha1", kind="Workflow", name="w", uid="u")
    for item in backend.render(spec(owner=owner)):
        assert item["metadata"]["ownerReferences"] == [
            {
                "apiVersion": "argoproj.io/v1alpha1",
                "kind": "Workflow",
                "name": "w",
                "uid": "u",
                "controller": False,
                "blockOwnerDeletion": False,
            }
        ]
    assert all("ownerReferences" not in item["metadata"] for item in backend.render(spec()))


@both
def test_hash__changes_with_the_job_and_not_with_its_owner(backend: Any) -> None:
    def digest(of: TrainSpec) -> str:
        found = {item["metadata"]["annotations"][SPEC_HASH] for item in backend.render(of)}
        assert len(found) == 1
        return found.pop()

    owner = Owner(api_version="argoproj.io/v1alpha1", kind="Workflow", name="w", uid="u")
    assert digest(spec()) == digest(spec(owner=owner))
    assert len({digest(item) for item in (spec(), spec(nodes=2), spec(memory="65Gi"), spec(env={"A": "1"}))}) == 4


@both
def test_yaml__is_the_same_each_time_and_reads_back(backend: Any) -> None:
    one = to_yaml(backend.render(spec(env={"B": "2", "A": "1"}, node_selector={"y": "1", "x": "2"})))
    assert one == to_yaml(backend.render(spec(env={"A": "1", "B": "2"}, node_selector={"x": "2", "y": "1"})))
    assert list(yaml.safe_load_all(one)) == backend.render(
        spec(env={"A": "1", "B": "2"}, node_selector={"x": "2", "y": "1"})
    )


# -- placement -------------------------------------------------------------------------------------------------------


@both
def test_gpus__are_a_limit_and_tolerated(backend: Any) -> None:
    of = spec(gpus_per_node=4, gpu_resource="amd.com/gpu", tolerations=(Toleration(key="amd.com/gpu"),))
    assert container(backend, of)["resources"] == {
        "requests": {"cpu": "8", "memory": "64Gi"},
        "limits": {"memory": "64Gi", "amd.com/gpu": 4},
    }
    assert template(backend, of)["spec"]["tolerations"] == [
        {"key": "amd.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    ]


@both
def test_without_gpus__the_nodes_that_have_some_are_left_to_others(backend: Any) -> None:
    kept = Toleration(key="spot", operator="Equal", value="yes", effect=None)
    of = spec(gpus_per_node=0, tolerations=(Toleration(key="nvidia.com/gpu"), kept))
    assert "nvidia.com/gpu" not in container(backend, of)["resources"]["limits"]
    assert template(backend, of)["spec"]["tolerations"] == [{"key": "spot", "operator": "Equal", "value": "yes"}]


@both
def test_placement__is_taken_over_and_absent_by_default(backend: Any) -> None:
    keys = ("nodeSelector", "priorityClassName", "imagePullSecrets")
    full = spec(node_selector={"gpu": "h100"}, priority_class="high", image_pull_secrets=("one", "two"))
    pod = template(backend, full)["spec"]
    assert [pod[key] for key in keys] == [{"gpu": "h100"}, "high", [{"name": "one"}, {"name": "two"}]]
    assert pod["serviceAccountName"] == "hjepa-train"
    assert not set(keys) & template(backend, spec())["spec"].keys()


@pytest.mark.parametrize(
    ("cpu", "processes", "expected"), [("8", 1, 8), ("96", 8, 12), ("500m", 1, 1), ("2", 4, 1), ("1.5", 1, 1)]
)
def test_threads__share_the_cpus_of_the_pod(cpu: str, processes: int, expected: int) -> None:
    assert threads(spec(cpu=cpu, processes_per_node=processes)) == expected


@pytest.mark.parametrize(
    ("quantity", "number"), [("500m", 0.5), ("8", 8), ("1.5Gi", 1.5 * 2**30), ("2k", 2000), ("3Ti", 3 * 2**40)]
)
def test_amount__reads_what_kubernetes_writes(quantity: str, number: float) -> None:
    assert amount(quantity) == number


# -- ends ------------------------------------------------------------------------------------------------------------


@both
def test_grace__leaves_torchrun_time_to_report_after_the_ranks_have_saved(backend: Any) -> None:
    pod = template(backend, spec(grace_seconds=120))["spec"]
    assert pod["terminationGracePeriodSeconds"] == 120
    assert environment(backend, spec(grace_seconds=120))["PET_SHUTDOWN_TIMEOUT"] == "90"
    assert all(0 <= shutdown_timeout(grace) < grace for grace in range(1, 700))
    assert shutdown_timeout(600) == 570


@both
def test_errors__end_in_the_pods_status(backend: Any) -> None:
    assert container(backend, spec())["terminationMessagePolicy"] == "FallbackToLogsOnError"


@pytest.mark.parametrize(("nodes", "restarts"), [(1, 1), (1, 5), (4, 5)])
def test_pytorchjob__survives_as_many_incidents_as_it_may(nodes: int, restarts: int) -> None:
    (job,) = pytorchjob.render(spec(nodes=nodes, max_restarts=restarts))
    assert job["spec"]["pytorchReplicaSpecs"]["Worker"]["restartPolicy"] == "OnFailure"
    limit = job["spec"]["runPolicy"]["backoffLimit"]  # the operator fails the job when the sum reaches it
    each = 2 * nodes - 1  # all nodes, and all but the first a second time if they come back before it
    assert restarts * each < limit <= (restarts + 1) * each


def test_pytorchjob__without_restarts_fails_at_the_first() -> None:
    (job,) = pytorchjob.render(spec(max_restarts=0))
    assert job["spec"]["pytorchReplicaSpecs"]["Worker"]["restartPolicy"] == "Never"


def test_pytorchjob__gives_the_gpus_back_and_goes_away_unless_it_is_kept() -> None:
    (job,) = pytorchjob.render(spec())
    assert job["spec"]["runPolicy"]["cleanPodPolicy"] == "Running"
    assert job["spec"]["runPolicy"]["ttlSecondsAfterFinished"] == 86400
    (kept,) = pytorchjob.render(spec(cleanup="keep"))
    assert "ttlSecondsAfterFinished" not in kept["spec"]["runPolicy"]


@both
def test_total_timeout__is_a_backstop_in_the_job_itself(backend: Any) -> None:
    assert "activeDeadlineSeconds" not in str(backend.render(spec()))
    job = backend.render(spec(total_timeout_seconds=3600.0))[-1]["spec"]
    assert job.get("runPolicy", job)["activeDeadlineSeconds"] == 3600


@both
@pytest.mark.parametrize(("seconds", "limit"), [(0.2, 1), (1.0, 1), (59.4, 60)])
def test_total_timeout__is_never_shorter_than_asked_for(backend: Any, seconds: float, limit: int) -> None:
    job = backend.render(spec(total_timeout_seconds=seconds))[-1]["spec"]
    assert job.get("runPolicy", job)["activeDeadlineSeconds"] == limit


def test_trainjob__restarts_all_nodes_together_and_stops_at_a_failure_that_would_come_again() -> None:
    runtime, _ = trainjob.render(spec(max_restarts=3))
    jobset = runtime["spec"]["template"]["spec"]
    node = jobset["replicatedJobs"][0]["template"]["spec"]
    assert (jobset["failurePolicy"]["maxRestarts"], node["backoffLimit"]) == (3, 0)
    assert node["template"]["spec"]["restartPolicy"] == "Never"
    assert node["podFailurePolicy"]["rules"][0]["onExitCodes"] == {
        "containerName": "node",
        "operator": "In",
        "values": [2, 13],
    }

    def action(message: str) -> str:
        for rule in jobset["failurePolicy"]["rules"]:
            patterns = rule.get("onJobFailureMessagePatterns", [""])
            if "PodFailurePolicy" in rule["onJobFailureReasons"] and any(re.search(p, message) for p in patterns):
                return str(rule["action"])
        raise AssertionError(message)

    exited = "Container node for pod ns/j-node-0-0-abcde failed with exit code {} matching FailJob rule at index 0"
    assert action(exited.format(13)) == action(exited.format(2)) == "FailJobSet"
    assert action(exited.format(137)) == action(exited.format(25)) == "RestartJobSetAndIgnoreMaxRestarts"
    evicted = "Pod ns/j-node-0-0-abcde has condition DisruptionTarget matching FailJob rule at index 1"
    assert action(evicted) == "RestartJobSetAndIgnoreMaxRestarts"


# -- torchrun --------------------------------------------------------------------------------------------------------

# What each operator adds to a container; the last one of a name wins.
INJECTED = {
    "pytorchjob": {"PET_NPROC_PER_NODE": "8", "PET_NNODES": "4"},
    "trainjob": {
        "PET_NNODES": "4",
        "PET_NPROC_PER_NODE": "8",
        "PET_NODE_RANK": "3",
        "PET_MASTER_ADDR": "hjepa-0123456789-node-0-0.hjepa-0123456789",
        "PET_MASTER_PORT": "29500",
    },
}


@pytest.mark.parametrize("name", list(BACKENDS))
def test_torchrun__understands_the_environment_of_a_pod(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = pytest.importorskip("torch.distributed.run")
    for item in container(BACKENDS[name], spec(nodes=4, gpus_per_node=8))["env"]:
        # The kubelet's part: fields of the pod, and references to variables that came before.
        path = item.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath", "")
        value = (
            {"replica-index": "3", "job-name": "hjepa-0123456789"}[path.split("/")[1][:-2]] if path else item["value"]
        )
        value = re.sub(r"\$\((\w+)\)", lambda match: os.environ[match[1]], value)
        monkeypatch.setenv(item["name"], value)
    for key, value in INJECTED[name].items():
        monkeypatch.setenv(key, value)
    parsed = run.get_args_parser().parse_args(["script.py"])
    assert (parsed.nnodes, parsed.nproc_per_node, int(parsed.node_rank)) == ("4", "8", 3)
    assert parsed.master_addr.startswith("hjepa-0123456789-")
    assert int(parsed.master_port) > 1024
    assert (int(parsed.max_restarts), int(parsed.shutdown_timeout), parsed.rdzv_backend) == (0, 90, "static")
