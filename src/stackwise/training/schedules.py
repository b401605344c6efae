"""The learning rate as a function of the step."""

import math

from stackwise.growth.phases import Schedule


def lr_ratio(schedule: Schedule, step: int) -> float:
    """Share of the peak learning rate at ``step`` (0-based, within the phase).

    Warm-up times decay: the warm-up (step + 1) / warmup_steps never gives 0, and a phase that starts within the run's
    decay warms up to the decayed rate. WSD: 2404.06395 §4.
    """
    warmup = min(1.0, (step + 1) / schedule.warmup_steps) if schedule.warmup_steps else 1.0
    length = schedule.decay_end - schedule.decay_start
    # The last step (decay_end − 1) is the first at min_ratio.
    progress = min(1.0, max(0.0, (step + 1 - schedule.decay_start) / length)) if length > 0 else 0.0
    fall = progress if schedule.shape == "linear" else 0.5 * (1.0 - math.cos(math.pi * progress))
    return warmup * (1.0 - (1.0 - schedule.min_ratio) * fall)
