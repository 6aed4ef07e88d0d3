"""What `payment_routing.toml` serves: a bandit for each kind of payment, and an event as an example."""

import numpy as np

from anabranch.cell import Feedback, Maybe
from anabranch.combine import Ask, Outcome
from anabranch.decide.payment_routing import DiscountedUCB, PaymentRouter

GATEWAYS = 5


def router() -> PaymentRouter:
    """Chooses among five gateways; up to 128 outcomes of one kind of payment may be on their way."""
    return PaymentRouter(DiscountedUCB(GATEWAYS, gamma=0.995), capacity=128)


def event() -> Ask:
    """A transaction, an outcome, or both: 17 bytes over the wire, in the order of `GET /v2/models/payment_routing`."""
    feedback = Feedback(np.float32(0))
    return Ask(Maybe(np.ones(GATEWAYS, bool), np.array(True)), Maybe(Outcome(np.int32(0), feedback), np.array(False)))
