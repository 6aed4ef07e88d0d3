"""The model of `this_machine.toml`: an anomaly scorer over the one input of its stage."""

from anabranch.combine import Chain, Map
from anabranch.learn.anomaly import AnomalyLikelihood


def scorer(**options) -> Chain:
    """The scorer, shown the value of an event."""
    return Chain(Map(lambda event: event.x[0]), AnomalyLikelihood(**options))
