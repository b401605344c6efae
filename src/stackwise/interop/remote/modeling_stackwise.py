"""A StackWise model for transformers: the Rack, and nothing else of StackWise."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput, MaskedLMOutput, SequenceClassifierOutput

from stackwise.interop.remote.configuration_stackwise import StackWiseModelConfig
from stackwise.model.rack import Rack
from stackwise.model.reading import Reading
from stackwise.model.spec import RackSpec
from stackwise.ops.pooling import pool


class StackWisePreTrainedModel(PreTrainedModel):
    config_class = StackWiseModelConfig
    base_model_prefix = "rack"
    accepts_loss_kwargs = False  # the loss is a mean over one batch; Trainer divides it by the batches it accumulates

    def __init__(self, config: StackWiseModelConfig) -> None:
        super().__init__(config)
        assert config.rack is not None, "the config has the model's shape"
        self.rack = Rack(RackSpec.from_dict(config.rack))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """All values come from the checkpoint."""

    def get_input_embeddings(self) -> nn.Module:
        return self.rack.embedding

    def _hidden(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """(B, T, C): what the head reads."""
        return self.rack(Reading(input_ids, None if attention_mask is None else attention_mask.bool()))

    def _logits(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        return self.rack(input_ids, None if attention_mask is None else attention_mask.bool())


class StackWiseModel(StackWisePreTrainedModel):
    """The hidden states that the head reads."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=self._hidden(input_ids, attention_mask))


class StackWiseForCausalLM(StackWisePreTrainedModel, GenerationMixin):
    """``labels`` are the inputs, −100 where nothing counts; they are shifted here."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput:
        logits = self._logits(input_ids, attention_mask)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The whole sequence each time: there is no cache here."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}


class StackWiseForMaskedLM(StackWisePreTrainedModel):
    """``labels`` are −100 where nothing is predicted."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        logits = self._logits(input_ids, attention_mask)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)
        return MaskedLMOutput(loss=loss, logits=logits)


class StackWiseForSequenceClassification(StackWisePreTrainedModel):
    """The first ``num_labels`` rows of the head read the last real token, or the mean over all (``pooling``).

    ``labels`` are classes, or numbers where ``problem_type`` is regression.
    """

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        hidden = self._hidden(input_ids, attention_mask)
        mask = None if attention_mask is None else attention_mask.bool()
        logits = self.rack.logits(pool(hidden, mask, self.config.pooling), classes=self.config.num_labels)
        loss = None
        if labels is not None and self.config.problem_type == "regression":
            loss = F.mse_loss(logits.squeeze(-1).float(), labels.float())
        elif labels is not None:
            loss = F.cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)
