"""The configuration of a StackWise model for transformers."""

from typing import Any

from transformers import PretrainedConfig


class StackWiseModelConfig(PretrainedConfig):
    """``rack`` holds the shape of the model: the fields of ``RackSpec``."""

    model_type = "stackwise"

    def __init__(self, rack: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.rack = rack
        if rack is not None:
            self.vocab_size = rack["vocab_size"]
            self.hidden_size = rack["d_model"]
            self.num_hidden_layers = sum(len(stack) for stack in rack["stacks"])
            kwargs["tie_word_embeddings"] = False  # a tied Rack has one matrix, and nothing to tie
        kwargs.setdefault("use_cache", False)
        super().__init__(**kwargs)
