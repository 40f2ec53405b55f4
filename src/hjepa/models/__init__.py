from hjepa.models.encoder import HierarchicalEncoder
from hjepa.models.hjepa import Forward, HJEPAModel, MaskTensors, build_encoder, merge_cells
from hjepa.models.predictor import Predictor
from hjepa.models.vit import VisionTransformer

__all__ = [
    "Forward",
    "HJEPAModel",
    "HierarchicalEncoder",
    "MaskTensors",
    "Predictor",
    "VisionTransformer",
    "build_encoder",
    "merge_cells",
]
