from hjepa.masks.multiblock import Masks, MultiBlockMasking

__all__ = ["Masks", "MultiBlockMasking"]
