"""Add a version to the MLflow model registry and decide whether it becomes champion."""

from kfp import dsl

from components.images import TOOLS


@dsl.component(base_image=TOOLS, install_kfp_package=False)
def register_model(
    resolved: dsl.Input[dsl.Artifact],
    model: dsl.Input[dsl.Model],
    evaluation: dsl.Input[dsl.Artifact],
    registration: dsl.Output[dsl.Artifact],
    decision: dsl.Output[dsl.Markdown],
) -> None:
    """Add a version to the MLflow model registry and decide whether it becomes champion.

    Args:
        resolved: Output of resolve_config.
        model: Output of export_checkpoint.
        evaluation: Output of evaluate.
        registration: Name, version, alias, and the reason for the alias.
        decision: The same, to read in the KFP UI.
    """
    from hjepa import steps

    result = steps.register_model(
        resolved_path=resolved.path,
        model_path=model.path,
        evaluation_path=evaluation.path,
        registration_path=registration.path,
    )
    registration.metadata.update({key: result[key] for key in ("name", "version", "alias")})
    with open(decision.path, "w", encoding="utf-8") as file:
        file.write("**{name}** version {version}: `{alias}`. {reason}\n\n[{url}]({url})\n".format(**result))
