"""The pretraining pipelines. ``python -m pipelines.pretrain`` compiles them to ``pipelines/compiled/``.

``pretrain`` trains in its task's own pod, on all GPUs of one node; ``pretrain-distributed`` in a PyTorchJob or
TrainJob over many nodes; the rest is the same. ``pretrain-sweep`` trains several settings side by side, each like
``pretrain``, compares them, and takes the best to the gate.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kfp import compiler, dsl

from components.compare_branches import compare_branches
from components.evaluate import evaluate
from components.export_checkpoint import export_checkpoint
from components.launch_training import launch_training
from components.plan_preparation import plan_preparation
from components.prepare_data import prepare_data
from components.prepare_parts import prepare_parts
from components.register_model import register_model
from components.report import report
from components.resolve_branch import resolve_branch
from components.resolve_config import resolve_config
from components.resolve_sweep import resolve_sweep
from components.train import train
from pipelines.placement import BRANCHES_AT_ONCE, DAY, HOUR, Placement

COMPILED = Path(__file__).with_name("compiled")
JOB = dsl.PIPELINE_JOB_ID_PLACEHOLDER
Train = Callable[[dsl.PipelineTask, dsl.PipelineTask], dsl.PipelineTask]  # (resolved, prepared) -> trained


def pretrain(place: Placement) -> Any:
    """The pipeline that trains in a pod of its own."""

    @dsl.pipeline(name="hjepa-pretrain")
    def pipeline(
        config: str = "default",
        overrides: list[str] = [],  # noqa: B006 - KFP reads the default, nothing changes it
        data_name: str = "",
        data_root: str = "",
        storage_uri: str = "",
        storage_endpoint_url: str = "",
        tracking_uri: str = "",
        registered_model: str = "",
        champion_margin: str = "",
        run: str = "",
        gpus: str = str(place.cluster.gpus_per_node),
        profile: str = place.text,
        pipeline_ui: str = "",
    ) -> None:
        """From raw images to a registered encoder: prepare, pretrain, export, evaluate, register.

        Args:
            config: Name of a packaged configuration, or YAML text.
            overrides: Settings in the form section.key=value, such as training.lr=3e-4; later ones win.
            data_name: Data set to use; empty keeps what the configuration says.
            data_root: Folder of its images; empty keeps what the configuration says.
            storage_uri: Bucket and prefix for everything that is stored; empty keeps what the configuration says.
            storage_endpoint_url: S3 endpoint; empty keeps what the configuration says.
            tracking_uri: MLflow server; empty keeps what the configuration says.
            registered_model: Name in the model registry; empty keeps what the configuration says.
            champion_margin: Rise of the primary metric that makes a champion; empty keeps what the configuration says.
            run: Name of the run; a name used before resumes that run. Empty takes the id of the KFP run.
            gpus: How many GPUs the training task gets; 0 trains on CPUs. On a laptop training.device decides.
            pipeline_ui: Address of the KFP UI, for the link from the MLflow run; empty writes none.
            profile: The cluster's profile as YAML, a section cluster alone; overrides outrank it.
        """

        def training(resolved: dsl.PipelineTask, prepared: dsl.PipelineTask) -> dsl.PipelineTask:
            return _train_here(place, resolved.outputs["resolved"], prepared, gpus)

        _steps(
            place,
            training,
            where={
                "storage_uri": storage_uri,
                "storage_endpoint_url": storage_endpoint_url,
                "tracking_uri": tracking_uri,
                # KFP passes the parameter of a limit into a group only if some task there takes it too.
                "gpus": gpus,
                "profile": profile,
            },
            what={"config": config, "overrides": overrides, "run": run},
            settings={
                "data_name": data_name,
                "data_root": data_root,
                "registered_model": registered_model,
                "champion_margin": champion_margin,
                "pipeline_ui": pipeline_ui,
            },
        )

    return pipeline


def pretrain_distributed(place: Placement) -> Any:
    """The pipeline that launches a training job."""

    @dsl.pipeline(name="hjepa-pretrain-distributed")
    def pipeline(
        config: str = "default",
        overrides: list[str] = [],  # noqa: B006 - KFP reads the default, nothing changes it
        data_name: str = "",
        data_root: str = "",
        storage_uri: str = "",
        storage_endpoint_url: str = "",
        tracking_uri: str = "",
        registered_model: str = "",
        champion_margin: str = "",
        run: str = "",
        nodes: str = "",
        gpus: str = "",
        backend: str = "",
        profile: str = place.text,
        pipeline_ui: str = "",
    ) -> None:
        """From raw images to a registered encoder, trained over many nodes by a PyTorchJob or TrainJob.

        Args:
            config: Name of a packaged configuration, or YAML text.
            overrides: Settings in the form section.key=value, such as training.lr=3e-4; later ones win.
            data_name: Data set to use; empty keeps what the configuration says.
            data_root: Folder of its images; empty keeps what the configuration says.
            storage_uri: Bucket and prefix for everything that is stored; empty keeps what the configuration says.
            storage_endpoint_url: S3 endpoint; empty keeps what the configuration says.
            tracking_uri: MLflow server; empty keeps what the configuration says.
            registered_model: Name in the model registry; empty keeps what the configuration says.
            champion_margin: Rise of the primary metric that makes a champion; empty keeps what the configuration says.
            run: Name of the run; a name used before resumes that run. Empty takes the id of the KFP run.
            nodes: How many nodes the training job gets; empty keeps what profile and configuration say.
            gpus: How many GPUs per node; empty keeps what profile and configuration say, 0 trains on CPUs.
            backend: One of trainjob, pytorchjob, local, auto; empty keeps what profile and configuration say.
            pipeline_ui: Address of the KFP UI, for the link from the MLflow run; empty writes none.
            profile: The cluster's profile as YAML, a section cluster alone; overrides outrank it.
        """

        def training(resolved: dsl.PipelineTask, prepared: dsl.PipelineTask) -> dsl.PipelineTask:
            trained = launch_training(resolved=resolved.outputs["resolved"], dataset=prepared.output)
            place.everywhere(trained, timeout_seconds=30 * DAY, retries=5)  # queueing counts
            return trained

        _steps(
            place,
            training,
            where={
                "storage_uri": storage_uri,
                "storage_endpoint_url": storage_endpoint_url,
                "tracking_uri": tracking_uri,
                "nodes": nodes,
                "gpus": gpus,
                "backend": backend,
                "profile": profile,
            },
            what={"config": config, "overrides": overrides, "run": run},
            settings={
                "data_name": data_name,
                "data_root": data_root,
                "registered_model": registered_model,
                "champion_margin": champion_margin,
                "pipeline_ui": pipeline_ui,
            },
        )

    return pipeline


def pretrain_sweep(place: Placement) -> Any:
    """The pipeline that trains several settings, ``place.branches_at_once`` of them at the same time."""

    @dsl.pipeline(name="hjepa-pretrain-sweep")
    def pipeline(
        sets: list[Any] = [],  # noqa: B006 - KFP reads the default, nothing changes it
        config: str = "default",
        overrides: list[str] = [],  # noqa: B006
        data_name: str = "",
        data_root: str = "",
        storage_uri: str = "",
        storage_endpoint_url: str = "",
        tracking_uri: str = "",
        registered_model: str = "",
        champion_margin: str = "",
        run: str = "",
        gpus: str = str(place.cluster.gpus_per_node),
        profile: str = place.text,
        pipeline_ui: str = "",
    ) -> None:
        """From raw images to the best of several encoders: prepare once, pretrain each setting, compare, register.

        Args:
            sets: One set of overrides per branch, such as [["training.lr=1e-3"], ["training.lr=3e-3"]]; at least two.
            config: Name of a packaged configuration, or YAML text.
            overrides: Settings in the form section.key=value for all branches; the sets outrank them.
            data_name: Data set to use; empty keeps what the configuration says.
            data_root: Folder of its images; empty keeps what the configuration says.
            storage_uri: Bucket and prefix for everything that is stored; empty keeps what the configuration says.
            storage_endpoint_url: S3 endpoint; empty keeps what the configuration says.
            tracking_uri: MLflow server; empty keeps what the configuration says.
            registered_model: Name in the model registry; empty keeps what the configuration says.
            champion_margin: Rise of the primary metric that makes a champion; empty keeps what the configuration says.
            run: Name of the sweep; a name used before resumes that sweep. Empty takes the id of the KFP run.
            gpus: How many GPUs each branch's training gets; 0 trains on CPUs. On a laptop training.device decides.
            pipeline_ui: Address of the KFP UI, for the link from the MLflow runs; empty writes none.
            profile: The cluster's profile as YAML, a section cluster alone; overrides outrank it.
        """
        where = {
            "storage_uri": storage_uri,
            "storage_endpoint_url": storage_endpoint_url,
            "tracking_uri": tracking_uri,
            "gpus": gpus,
            "profile": profile,
        }
        what = {"config": config, "overrides": overrides, "run": run}
        reported = report(**what, **where, job=JOB)
        place.everywhere(reported, timeout_seconds=HOUR // 4)
        with dsl.ExitHandler(reported):
            planned = resolve_sweep(
                sets=sets,
                **what,
                **where,
                data_name=data_name,
                data_root=data_root,
                registered_model=registered_model,
                champion_margin=champion_margin,
                pipeline_ui=pipeline_ui,
                job=JOB,
            )
            place.everywhere(planned, timeout_seconds=HOUR // 4, retries=0)
            sweep = {"resolved_sweep": planned.outputs["resolved"], "sweep": planned.outputs["sweep"]}
            prepared = _prepare(place, planned.outputs["resolved"])
            sweep["dataset"] = prepared.output
            with dsl.ParallelFor(planned.outputs["Output"], parallelism=place.branches_at_once) as branch:
                resolved = resolve_branch(**sweep, branch=branch, gpus=gpus)
                place.everywhere(resolved, timeout_seconds=HOUR // 4)
                trained = _train_here(place, resolved.output, prepared, gpus)
                _, evaluated = _export_and_evaluate(place, resolved.output, prepared, trained)
            compared = compare_branches(**sweep, evaluations=dsl.Collected(evaluated.outputs["evaluation"]))
            place.everywhere(compared, timeout_seconds=HOUR)
            _register(place, *(compared.outputs[name] for name in ("resolved", "model", "evaluation")))

    return pipeline


def prepare(place: Placement) -> Any:
    """The pipeline that prepares a data set on several pods, and nothing else."""

    @dsl.pipeline(name="hjepa-prepare")
    def pipeline(
        config: str = "default",
        overrides: list[str] = [],  # noqa: B006 - KFP reads the default, nothing changes it
        data_name: str = "",
        data_root: str = "",
        storage_uri: str = "",
        storage_endpoint_url: str = "",
        tracking_uri: str = "",
        run: str = "",
        pods: int = 8,
        profile: str = place.text,
        pipeline_ui: str = "",
    ) -> None:
        """From raw images to shards, on many pods; a pretraining pipeline of the same images then finds them done.

        Args:
            config: Name of a packaged configuration, or YAML text.
            overrides: Settings in the form section.key=value, such as data.short_side=256; later ones win.
            data_name: Data set to use; empty keeps what the configuration says.
            data_root: Where its images are; empty keeps what the configuration says.
            storage_uri: Bucket and prefix for everything that is stored; empty keeps what the configuration says.
            storage_endpoint_url: S3 endpoint; empty keeps what the configuration says.
            tracking_uri: MLflow server; empty keeps what the configuration says.
            run: Name of the run; a name used before resumes that run. Empty takes the id of the KFP run.
            pods: How many pods share the work; each makes parts of data.part_images images.
            profile: The cluster's profile as YAML, a section cluster alone; overrides outrank it.
            pipeline_ui: Address of the KFP UI, for the link from the MLflow run; empty writes none.
        """
        where = {
            "storage_uri": storage_uri,
            "storage_endpoint_url": storage_endpoint_url,
            "tracking_uri": tracking_uri,
            "profile": profile,
        }
        what = {"config": config, "overrides": overrides, "run": run}
        reported = report(**what, **where, job=JOB)
        place.everywhere(reported, timeout_seconds=HOUR // 4)
        with dsl.ExitHandler(reported):
            resolved = resolve_config(
                **what, **where, data_name=data_name, data_root=data_root, pipeline_ui=pipeline_ui, job=JOB
            )
            place.everywhere(resolved, timeout_seconds=HOUR // 4, retries=0)
            resolved_run = resolved.outputs["resolved"]
            planned = plan_preparation(resolved=resolved_run, pods=pods)
            place.everywhere(planned, timeout_seconds=HOUR, retries=2)
            place.reads_source(planned)
            with dsl.ParallelFor(planned.output) as pod:
                made = prepare_parts(resolved=resolved_run, pod=pod, pods=pods)
                place.everywhere(made, timeout_seconds=DAY)
                place.reads_source(made)
            _prepare(place, resolved_run, pods=dsl.Collected(made.output))

    return pipeline


PIPELINES: dict[str, Callable[[Placement], Any]] = {
    "pretrain": pretrain,
    "pretrain-distributed": pretrain_distributed,
    "pretrain-sweep": pretrain_sweep,
    "prepare": prepare,
}


def _steps(
    place: Placement, training: Train, *, what: dict[str, Any], where: dict[str, Any], settings: dict[str, Any]
) -> None:
    """The tasks that both pipelines have.

    Args:
        what: Parameters that name the run.
        where: Parameters that lead to its servers and its job; the report needs these too.
        settings: The other parameters of resolve_config.
    """
    reported = report(**what, **where, job=JOB)
    place.everywhere(reported, timeout_seconds=HOUR // 4)
    with dsl.ExitHandler(reported):
        resolved = resolve_config(**what, **where, **settings, job=JOB)
        resolved_run = resolved.outputs["resolved"]
        # No retry here: what this step refuses, it would refuse again.
        place.everywhere(resolved, timeout_seconds=HOUR // 4, retries=0)
        prepared = _prepare(place, resolved_run)
        trained = training(resolved, prepared)
        exported, evaluated = _export_and_evaluate(place, resolved_run, prepared, trained)
        _register(place, resolved_run, exported.output, evaluated.outputs["evaluation"])


def _prepare(place: Placement, resolved: Any, **waits_for: Any) -> dsl.PipelineTask:
    prepared = prepare_data(resolved=resolved, **waits_for)
    place.everywhere(prepared, timeout_seconds=DAY)
    place.reads_source(prepared)
    place.loads_images(prepared)
    return prepared


def _train_here(place: Placement, resolved: Any, prepared: dsl.PipelineTask, gpus: Any) -> dsl.PipelineTask:
    trained = train(resolved=resolved, dataset=prepared.output)
    place.everywhere(trained, timeout_seconds=14 * DAY, retries=5)
    place.trains(trained, gpus=gpus)
    return trained


def _export_and_evaluate(
    place: Placement, resolved: Any, prepared: dsl.PipelineTask, trained: dsl.PipelineTask
) -> tuple[dsl.PipelineTask, dsl.PipelineTask]:
    exported = export_checkpoint(resolved=resolved, dataset=prepared.output, checkpoint=trained.output)
    place.everywhere(exported, timeout_seconds=HOUR)
    evaluated = evaluate(resolved=resolved, dataset=prepared.output, model=exported.output)
    place.everywhere(evaluated, timeout_seconds=DAY // 2)
    place.loads_images(evaluated)
    return exported, evaluated


def _register(place: Placement, resolved: Any, model: Any, evaluation: Any) -> None:
    registered = register_model(resolved=resolved, model=model, evaluation=evaluation)
    place.everywhere(registered, timeout_seconds=HOUR)


def compile_to(path: Path, name: str, place: Placement) -> None:
    """Write a pipeline as YAML; the same source, placement and kfp give the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    compiler.Compiler().compile(PIPELINES[name](place), str(path))


def main() -> int:
    """Compile, and return the exit code: 2 for a mistake of the caller, told without a traceback."""
    from hjepa.errors import UserError

    parser = argparse.ArgumentParser(prog="python -m pipelines.pretrain", description=__doc__)
    parser.add_argument("output", nargs="?", type=Path, help="the YAML to write; default: all, to pipelines/compiled")
    parser.add_argument("--pipeline", choices=PIPELINES, default="pretrain", help="which one goes to OUTPUT")
    parser.add_argument("--profile", type=Path, help="a cluster's profile, such as pipelines/profiles/kind.yaml")
    parser.add_argument("--images-claim", metavar="NAME", help="claim with the images, for prepare_data at /data")
    parser.add_argument(
        "--at-once",
        type=int,
        default=BRANCHES_AT_ONCE,
        metavar="N",
        help="branches of pretrain-sweep that run at the same time (default: %(default)s)",
    )
    options = parser.parse_args()
    if options.at_once < 1:
        parser.error(f"--at-once {options.at_once}: expected 1 or more")
    if options.output is None and (options.profile or options.images_claim or options.at_once != BRANCHES_AT_ONCE):
        parser.error("name the OUTPUT: the committed pipelines belong to no cluster")
    if options.output is not None and options.output.suffix not in {".yaml", ".yml"}:
        parser.error(f"{options.output}: expected a name that ends with .yaml")
    try:
        if options.output is None:
            for name in PIPELINES:
                compile_to(COMPILED / f"{name}.yaml", name, Placement())
            return 0
        place = Placement(options.profile, options.images_claim, branches_at_once=options.at_once)
        compile_to(options.output, options.pipeline, place)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return UserError.exit_code
    if options.pipeline != "pretrain-distributed" and place.of_jobs_alone:
        keys = ", ".join(f"cluster.{key}" for key in place.of_jobs_alone)
        print(f"note: without effect in {options.pipeline}, which starts no training job: {keys}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
