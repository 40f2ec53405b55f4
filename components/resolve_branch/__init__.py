from components.resolve_branch.component import resolve_branch

__all__ = ["resolve_branch"]
