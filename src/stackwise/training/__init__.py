from stackwise.growth.rack_builder import ProgressiveRackBuilder
from stackwise.training.sources import ProgressiveDataLoader
from stackwise.training.trainers import ArchitectureTrainer, ProgressiveTrainer

__all__ = ["ArchitectureTrainer", "ProgressiveDataLoader", "ProgressiveRackBuilder", "ProgressiveTrainer"]
