from hjepa.trainers.optim import create_optimizer
from hjepa.trainers.trainer import HJEPATrainer, TrainingResult

__all__ = ["HJEPATrainer", "TrainingResult", "create_optimizer"]
