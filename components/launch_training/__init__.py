from components.launch_training.component import launch_training

__all__ = ["launch_training"]
