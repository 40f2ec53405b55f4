"""Say which pods can share the work of preparing a data set."""

from kfp import dsl

from components.images import PREPARE_DATA


@dsl.component(base_image=PREPARE_DATA, install_kfp_package=False)
def plan_preparation(resolved: dsl.Input[dsl.Artifact], pods: int) -> list[int]:
    """Say which pods can share the work of preparing a data set.

    Args:
        resolved: Output of resolve_config.
        pods: How many there are.

    Returns:
        The numbers of those that have something to do, from 0.
    """
    from hjepa import steps

    return list(steps.plan_preparation(resolved_path=resolved.path, pods=pods))
