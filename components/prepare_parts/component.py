"""Make one pod's share of a data set's shards."""

from kfp import dsl

from components.images import PREPARE_DATA


@dsl.component(base_image=PREPARE_DATA, install_kfp_package=False)
def prepare_parts(resolved: dsl.Input[dsl.Artifact], pod: int, pods: int) -> int:
    """Make one pod's share of a data set's shards.

    Args:
        resolved: Output of resolve_config.
        pod: Number of this one, from 0.
        pods: How many share the work.

    Returns:
        Its number, for which prepare_data waits.
    """
    from hjepa import steps

    steps.prepare_parts(resolved_path=resolved.path, pod=pod, pods=pods)
    return pod
