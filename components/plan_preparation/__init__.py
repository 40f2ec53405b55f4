from components.plan_preparation.component import plan_preparation

__all__ = ["plan_preparation"]
