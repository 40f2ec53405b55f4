"""Validate every branch of a sweep, check S3 and MLflow, and open the MLflow run that holds the branches."""

from typing import Any

from kfp import dsl

from components.images import TOOLS


@dsl.component(base_image=TOOLS, install_kfp_package=False)
def resolve_sweep(
    resolved: dsl.Output[dsl.Artifact],
    sweep: dsl.Output[dsl.Artifact],
    summary: dsl.Output[dsl.Markdown],
    sets: list[Any],
    config: str = "default",
    overrides: list[str] = [],  # noqa: B006 - KFP reads the default, nothing changes it
    data_name: str = "",
    data_root: str = "",
    storage_uri: str = "",
    storage_endpoint_url: str = "",
    tracking_uri: str = "",
    registered_model: str = "",
    champion_margin: str = "",
    gpus: str = "",
    profile: str = "",
    pipeline_ui: str = "",
    run: str = "",
    job: str = "",
) -> list[str]:
    """Validate every branch of a sweep, check S3 and MLflow, and open the MLflow run that holds the branches.

    Args:
        resolved: The configuration that all branches start from and the sweep's identity, as JSON.
        sweep: The branches: names, runs and configurations, as JSON.
        summary: The branches and the sweep's page in MLflow, to read in the KFP UI.
        sets: One set of overrides per branch, each a list of section.key=value or {"name": ..., "set": [...]}.
        config: Name of a packaged configuration, or YAML text.
        overrides: Settings in the form section.key=value for all branches; the sets outrank them.
        data_name: Data set to use; empty keeps what the configuration says.
        data_root: Folder of its images; empty keeps what the configuration says.
        storage_uri: S3 bucket and prefix; empty keeps what the configuration says.
        storage_endpoint_url: S3 endpoint; empty keeps what the configuration says.
        tracking_uri: MLflow server; empty keeps what the configuration says.
        registered_model: Name in the model registry; empty keeps what the configuration says.
        champion_margin: Rise of the primary metric that makes a champion; empty keeps what the configuration says.
        gpus: Of each branch's training; empty keeps what the configuration says.
        profile: The cluster's profile as YAML, a section cluster alone; overrides outrank it.
        pipeline_ui: Address of the KFP UI, for the link from the MLflow runs; empty writes none.
        run: Name of the sweep; a name used before resumes that sweep. Empty takes the id of the KFP run.
        job: Id of the KFP run, which is unique.

    Returns:
        The names of the branches.
    """
    from hjepa import steps

    settings = {
        "data.name": data_name,
        "data.root": data_root,
        "storage.uri": storage_uri,
        "storage.endpoint_url": storage_endpoint_url,
        "tracking.uri": tracking_uri,
        "tracking.registered_model": registered_model,
        "tracking.champion_margin": champion_margin,
        "cluster.gpus_per_node": gpus,
    }
    opened = steps.resolve_sweep(
        config=config,
        overrides=overrides,
        settings=settings,
        sets=sets,
        profile=profile,
        run=run or job,
        job=job,
        pipeline_ui=pipeline_ui,
        resolved_path=resolved.path,
        sweep_path=sweep.path,
    )
    resolved.metadata.update({key: opened[key] for key in ("name", "mlflow_run_id", "mlflow_url", "uri")})
    with open(summary.path, "w", encoding="utf-8") as file:
        file.write("Sweep **{name}**: [MLflow]({mlflow_url}), stored in `{uri}`\n\n".format(**opened))
        file.writelines(f"- {branch}\n" for branch in opened["branches"])
    return list(opened["branches"])
