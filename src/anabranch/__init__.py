"""Anabranch: models that live on streams.

One abstraction, the cell (`state, y = cell.step(state, x)`), many published methods under it, and one runtime that
takes any cell from a notebook to thousands of concurrent keyed streams.
"""

import os as _os

__version__ = "0.1.0"

# Per-event loops over small states are what this library runs most. By default XLA's CPU backend compiles a loop as one
# function only if it touches little memory, and unrolls short vectors into scalars before it has seen that they are
# vectors. With these flags such loops are 2 to 5 times faster; loops over vectors of two or three numbers, as in the
# adaptive forest, lose up to a third. The flags are read once, when JAX first runs something.
_OPTIONS = "xla_cpu_small_while_loop_byte_threshold=1000000000,xla_cpu_disable_loop_unrolling=true"
if "xla_backend_extra_options" not in _os.environ.get("XLA_FLAGS", ""):
    _os.environ["XLA_FLAGS"] = (_os.environ.get("XLA_FLAGS", "") + f" --xla_backend_extra_options={_OPTIONS}").strip()

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
