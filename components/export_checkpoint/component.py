"""Export the encoder as safetensors and prove that it embeds as the training code does."""

from kfp import dsl

from components.images import EVALUATE


@dsl.component(base_image=EVALUATE, install_kfp_package=False)
def export_checkpoint(
    resolved: dsl.Input[dsl.Artifact],
    dataset: dsl.Input[dsl.Dataset],
    checkpoint: dsl.Input[dsl.Model],
    model: dsl.Output[dsl.Model],
) -> None:
    """Export the encoder as safetensors and prove that it embeds as the training code does.

    Args:
        resolved: Output of resolve_config.
        dataset: Output of prepare_data.
        checkpoint: Output of train.
        model: Manifest of the export: its place in S3, digest, levels, preprocessing.
    """
    import json

    from hjepa import steps

    steps.export_checkpoint(
        resolved_path=resolved.path,
        dataset_path=dataset.path,
        checkpoint_path=checkpoint.path,
        model_path=model.path,
    )
    with open(model.path, encoding="utf-8") as file:
        manifest = json.load(file)
    model.metadata.update({"framework": "PyTorch", **{key: manifest[key] for key in ("uri", "digest")}})
