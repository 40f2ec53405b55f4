"""Compare the branches of a sweep in one report, and hand the best one on."""

from kfp import dsl

from components.images import EVALUATE


@dsl.component(base_image=EVALUATE, install_kfp_package=False)
def compare_branches(
    resolved_sweep: dsl.Input[dsl.Artifact],
    sweep: dsl.Input[dsl.Artifact],
    dataset: dsl.Input[dsl.Dataset],
    evaluations: dsl.Input[list[dsl.Artifact]],
    comparison: dsl.Output[dsl.Artifact],
    resolved: dsl.Output[dsl.Artifact],
    model: dsl.Output[dsl.Model],
    evaluation: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    summary: dsl.Output[dsl.Markdown],
    report: dsl.Output[dsl.HTML],
) -> None:
    """Compare the branches of a sweep in one report, and hand the best one on.

    Args:
        resolved_sweep: Output resolved of resolve_sweep.
        sweep: Output sweep of resolve_sweep.
        dataset: Output of prepare_data.
        evaluations: Of every branch, for which this step waits; it reads them from S3.
        comparison: The whole result, as JSON.
        resolved: Of the best branch.
        model: Of the best branch.
        evaluation: Of the best branch, with the number of branches that it was chosen from.
        metrics: The primary metric of every branch.
        summary: The comparison, to read in the KFP UI.
        report: One page with the comparison, for people.
    """
    from hjepa import steps

    result = steps.compare_branches(
        resolved_sweep_path=resolved_sweep.path,
        sweep_path=sweep.path,
        dataset_path=dataset.path,
        comparison_path=comparison.path,
        resolved_path=resolved.path,
        model_path=model.path,
        evaluation_path=evaluation.path,
        summary_path=summary.path,
        report_path=report.path,
    )
    for row in result["branches"]:
        metrics.log_metric(row["name"], row["value"])
