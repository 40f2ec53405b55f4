"""Pretrain the encoder, or go on from the run's last checkpoint."""

from kfp import dsl

from components.images import TRAIN


@dsl.component(base_image=TRAIN, install_kfp_package=False)
def train(
    resolved: dsl.Input[dsl.Artifact], dataset: dsl.Input[dsl.Dataset], checkpoint: dsl.Output[dsl.Model]
) -> None:
    """Pretrain the encoder, or go on from the run's last checkpoint.

    Args:
        resolved: Output of resolve_config.
        dataset: Output of prepare_data.
        checkpoint: Manifest of the chosen checkpoint: its place in S3, checksum, step, metrics.
    """
    import json

    from hjepa import entrypoint

    # One rank per GPU of this pod; with one GPU or none it is steps.train itself.
    entrypoint.train_here(resolved_path=resolved.path, dataset_path=dataset.path, checkpoint_path=checkpoint.path)
    with open(checkpoint.path, encoding="utf-8") as file:
        manifest = json.load(file)
    checkpoint.metadata.update({key: manifest[key] for key in ("uri", "sha256", "step", "epoch", "images_seen")})
