"""Judge the frozen encoder beside an untrained one and raw pixels, and write the report."""

from kfp import dsl

from components.images import EVALUATE


@dsl.component(base_image=EVALUATE, install_kfp_package=False)
def evaluate(
    resolved: dsl.Input[dsl.Artifact],
    dataset: dsl.Input[dsl.Dataset],
    model: dsl.Input[dsl.Model],
    evaluation: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    confusion: dsl.Output[dsl.ClassificationMetrics],
    summary: dsl.Output[dsl.Markdown],
    report: dsl.Output[dsl.HTML],
) -> None:
    """Judge the frozen encoder beside an untrained one and raw pixels, and write the report.

    Args:
        resolved: Output of resolve_config.
        dataset: Output of prepare_data.
        model: Output of export_checkpoint.
        evaluation: The whole result, as JSON.
        metrics: The numbers that decide, for the run comparison of the KFP UI.
        confusion: Of the linear probe on all levels; empty without labels, or where there are more than 100 classes.
        summary: The table of probes and the links, to read in the KFP UI.
        report: One page with everything, for people.
    """
    from hjepa import steps

    result = steps.evaluate(
        resolved_path=resolved.path,
        dataset_path=dataset.path,
        model_path=model.path,
        evaluation_path=evaluation.path,
        summary_path=summary.path,
        report_path=report.path,
    )
    for name, value in result["decisive"].items():
        metrics.log_metric(name, value)
    if 0 < len(result.get("classes", ())) <= 100:
        confusion.log_confusion_matrix(result["classes"], result["confusion"])
