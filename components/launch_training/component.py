"""Pretrain the encoder as a PyTorchJob or TrainJob over many nodes."""

from kfp import dsl

from components.images import TOOLS


@dsl.component(base_image=TOOLS, install_kfp_package=False)
def launch_training(
    resolved: dsl.Input[dsl.Artifact],
    dataset: dsl.Input[dsl.Dataset],
    checkpoint: dsl.Output[dsl.Model],
) -> None:
    """Pretrain the encoder as a PyTorchJob or TrainJob over many nodes.

    Args:
        resolved: Output of resolve_config; its section cluster says where and on what.
        dataset: Output of prepare_data.
        checkpoint: Manifest of the chosen checkpoint: its place in S3, checksum, step, metrics.
    """
    import json

    from hjepa import steps

    steps.launch_training(resolved_path=resolved.path, dataset_path=dataset.path, checkpoint_path=checkpoint.path)
    with open(checkpoint.path, encoding="utf-8") as file:
        manifest = json.load(file)
    checkpoint.metadata.update({key: manifest[key] for key in ("uri", "sha256", "step", "epoch", "images_seen")})
