from hjepa.losses.hierarchical import HierarchicalLoss
from hjepa.losses.sigreg import sigreg
from hjepa.losses.vicreg import vicreg

__all__ = ["HierarchicalLoss", "sigreg", "vicreg"]
