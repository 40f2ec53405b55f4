from hjepa.losses.hierarchical import HierarchicalLoss

__all__ = ["HierarchicalLoss"]
