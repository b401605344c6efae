from stackwise.training.trainers import ArchitectureTrainer

__all__ = ["ArchitectureTrainer"]
