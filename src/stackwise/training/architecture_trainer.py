from stackwise.runs.trainers import ArchitectureTrainer

__all__ = ["ArchitectureTrainer"]
