"""`CreditTrainer` and `CreditConfig`: the only part of rltok that imports trl."""

from rltok.trainers.config import CreditConfig
from rltok.trainers.credit_trainer import CreditTrainer

__all__ = ["CreditConfig", "CreditTrainer"]
