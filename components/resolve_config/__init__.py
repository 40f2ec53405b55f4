from components.resolve_config.component import resolve_config

__all__ = ["resolve_config"]
