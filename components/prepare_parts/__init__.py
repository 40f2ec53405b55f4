from components.prepare_parts.component import prepare_parts

__all__ = ["prepare_parts"]
