"""Each token from the longest context, against one pass a token."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from stackwise.errors import UserError
from stackwise.evaluation.sliding import SlidingContext
from stackwise.model.architecture import create_simple_rack
from stackwise.objectives.scoring import validate_samples

V, T = 23, 7
TOKENS = np.random.default_rng(0).integers(0, V, 31)


def scored(stride):
    rack = create_simple_rack(2, 1, 26, 19, 13, V, attention_mode="causal").eval()
    sliding = SlidingContext(TOKENS, T, stride)
    return rack, validate_samples(rack, sliding, np.arange(len(sliding.starts)), sliding.windows, batch_size=3)


@pytest.mark.parametrize("stride", [1, 3, 7])
def test_every_token_but_the_first_is_predicted_once_from_enough_before_it(stride):
    rack, found = scored(stride)
    assert found.tokens == len(TOKENS) - 1
    expected, context = 0.0, 0
    for target in range(1, len(TOKENS)):
        # The window that first reaches the target: it begins at a multiple of the stride, or ends with the text.
        start = min(-(-max(0, target - T) // stride) * stride, len(TOKENS) - 1 - T)
        ids = torch.from_numpy(TOKENS[start:target])[None]
        expected += float(F.cross_entropy(rack(ids)[0, -1].detach(), torch.tensor(TOKENS[target])))
        if target >= T:
            context = min(context or T, target - start)
    assert context == T - stride + 1
    assert found.loss == pytest.approx(expected / 30, rel=1e-5)


def test_a_stride_beyond_the_window_is_refused():
    with pytest.raises(UserError, match="--context-stride: 8 must be from 1 to 7"):
        SlidingContext(TOKENS, T, 8)
