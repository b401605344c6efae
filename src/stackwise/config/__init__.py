from stackwise.config.base import ArchitectureConfig, ModelConfig, StackWiseConfig

__all__ = ["ArchitectureConfig", "ModelConfig", "StackWiseConfig"]
