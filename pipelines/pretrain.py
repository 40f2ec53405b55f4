"""The pretraining pipelines. ``python -m pipelines.pretrain`` compiles them to ``pipelines/compiled/``.

``pretrain`` trains in its task's own pod, on all GPUs of one node; ``pretrain-distributed`` in a PyTorchJob or
TrainJob over many nodes. The rest is the same.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kfp import compiler, dsl

from components.evaluate import evaluate
from components.export_checkpoint import export_checkpoint
from components.launch_training import launch_training
from components.prepare_data import prepare_data
from components.register_model import register_model
from components.report import report
from components.resolve_config import resolve_config
from components.train import train
from pipelines.placement import DAY, HOUR, Placement

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
            trained = train(resolved=resolved.outputs["resolved"], dataset=prepared.output)
            place.everywhere(trained, timeout_seconds=14 * DAY, retries=5)
            place.trains(trained, gpus=gpus)
            return trained

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


PIPELINES: dict[str, Callable[[Placement], Any]] = {"pretrain": pretrain, "pretrain-distributed": pretrain_distributed}


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
        prepared = prepare_data(resolved=resolved_run)
        trained = training(resolved, prepared)
        exported = export_checkpoint(resolved=resolved_run, dataset=prepared.output, checkpoint=trained.output)
        evaluated = evaluate(resolved=resolved_run, dataset=prepared.output, model=exported.output)
        registered = register_model(
            resolved=resolved_run, model=exported.output, evaluation=evaluated.outputs["evaluation"]
        )
    # No retry here: what this step refuses, it would refuse again.
    place.everywhere(resolved, timeout_seconds=HOUR // 4, retries=0)
    place.everywhere(prepared, timeout_seconds=DAY)
    place.everywhere(exported, timeout_seconds=HOUR)
    place.everywhere(evaluated, timeout_seconds=DAY // 2)
    place.everywhere(registered, timeout_seconds=HOUR)
    place.reads_source(prepared)
    for loading in (prepared, evaluated):
        place.loads_images(loading)


def compile_to(path: Path, name: str, place: Placement) -> None:
    """Write a pipeline as YAML; the same source, placement and kfp give the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    compiler.Compiler().compile(PIPELINES[name](place), str(path))


def main() -> int:
    """Compile, and return the exit code: 2 for a mistake of the caller, told without a traceback."""
    from hjepa.errors import UserError

    parser = argparse.ArgumentParser(prog="python -m pipelines.pretrain", description=__doc__)
    parser.add_argument("output", nargs="?", type=Path, help="the YAML to write; default: both, to pipelines/compiled")
    parser.add_argument("--pipeline", choices=PIPELINES, default="pretrain", help="which one goes to OUTPUT")
    parser.add_argument("--profile", type=Path, help="a cluster's profile, such as pipelines/profiles/kind.yaml")
    parser.add_argument("--images-claim", metavar="NAME", help="claim with the images, for prepare_data at /data")
    options = parser.parse_args()
    if options.output is None and (options.profile or options.images_claim):
        parser.error("name the OUTPUT: the committed pipelines belong to no cluster")
    if options.output is not None and options.output.suffix not in {".yaml", ".yml"}:
        parser.error(f"{options.output}: expected a name that ends with .yaml")
    try:
        if options.output is None:
            for name in PIPELINES:
                compile_to(COMPILED / f"{name}.yaml", name, Placement())
            return 0
        place = Placement(options.profile, options.images_claim)
        compile_to(options.output, options.pipeline, place)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return UserError.exit_code
    if options.pipeline == "pretrain" and place.of_jobs_alone:
        keys = ", ".join(f"cluster.{key}" for key in place.of_jobs_alone)
        print(f"note: without effect in pretrain, which starts no training job: {keys}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
