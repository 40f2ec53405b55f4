"""Probe the frozen encoder beside an untrained one and raw pixels."""

from kfp import dsl

from components.images import EVALUATE


@dsl.component(base_image=EVALUATE, install_kfp_package=False)
def evaluate(
    resolved: dsl.Input[dsl.Artifact],
    dataset: dsl.Input[dsl.Dataset],
    model: dsl.Input[dsl.Model],
    evaluation: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    summary: dsl.Output[dsl.Markdown],
) -> None:
    """Probe the frozen encoder beside an untrained one and raw pixels.

    Args:
        resolved: Output of resolve_config.
        dataset: Output of prepare_data.
        model: Output of export_checkpoint.
        evaluation: The whole result, as JSON.
        metrics: The same numbers, for the run comparison of the KFP UI.
        summary: The table of probes, to read in the KFP UI.
    """
    import json

    from hjepa import steps

    values = steps.evaluate(
        resolved_path=resolved.path, dataset_path=dataset.path, model_path=model.path, evaluation_path=evaluation.path
    )
    for name, value in values.items():
        metrics.log_metric(name, value)
    with open(evaluation.path, encoding="utf-8") as file:
        table = json.load(file)["table"]
    columns = list(table[0])
    rows = [[row.get(column, "") for column in columns] for row in table]
    rows = [[f"{value:.3f}" if isinstance(value, float) else str(value) for value in row] for row in rows]
    with open(summary.path, "w", encoding="utf-8") as file:
        file.writelines("| " + " | ".join(line) + " |\n" for line in [columns, ["---"] * len(columns), *rows])
