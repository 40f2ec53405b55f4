from components.compare_branches.component import compare_branches

__all__ = ["compare_branches"]
