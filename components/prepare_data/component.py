"""Check every image once and store the data set as shards in S3."""

from kfp import dsl

from components.images import PREPARE_DATA


@dsl.component(base_image=PREPARE_DATA, install_kfp_package=False)
def prepare_data(
    resolved: dsl.Input[dsl.Artifact],
    dataset: dsl.Output[dsl.Dataset],
    pods: list[int] = [],  # noqa: B006 - KFP reads the default, nothing changes it
) -> None:
    """Check every image once and store the data set as shards in S3.

    Args:
        resolved: Output of resolve_config.
        dataset: Manifest of the data set: digest, shards with checksums, statistics, quarantine.
        pods: Those that have made parts of it before, for which this step waits; it makes what is missing.
    """
    import json

    from hjepa import steps

    steps.prepare_data(resolved_path=resolved.path, dataset_path=dataset.path)
    with open(dataset.path, encoding="utf-8") as file:
        manifest = json.load(file)
    dataset.metadata.update({key: manifest[key] for key in ("name", "digest", "uri")})
