"""Anabranch: models that live on streams.

One abstraction, the cell (`state, y = cell.step(state, x)`), many published methods under it, and one runtime that
takes any cell from a notebook to thousands of concurrent keyed streams.
"""

import os as _os

__version__ = "0.1.0"

# XLA's CPU backend compiles a loop as one function only when the loop touches little memory; per-event loops over the
# states of many keys are 3 to 5 times faster when it always does. The flag is read once, when JAX first runs something.
_LOOPS = "xla_cpu_small_while_loop_byte_threshold"
if _LOOPS not in _os.environ.get("XLA_FLAGS", ""):
    _os.environ["XLA_FLAGS"] = (
        _os.environ.get("XLA_FLAGS", "") + f" --xla_backend_extra_options={_LOOPS}=1000000000"
    ).strip()

from anabranch.cell import (  # noqa: E402
    Cell,
    Decision,
    Env,
    Event,
    Feedback,
    Learner,
    Maybe,
    Policy,
    noise,
)

__all__ = ["Cell", "Decision", "Env", "Event", "Feedback", "Learner", "Maybe", "Policy", "noise"]
