"""Environments of gymnasium, those of MuJoCo among them, as worlds on the host: `pip install anabranch[gym]`.

`anabranch.drive.play` steps such a world in Python and compiles the policy. The worlds of `classic` need no gymnasium
and are compiled as a whole.

    >>> world = GymEnv("CartPole-v1")
    >>> world.dim, world.n_actions, world.limit, world.box
    (4, 2, 500, None)
    >>> state = world.init(key=jax.random.PRNGKey(0))
    >>> state, feedback = world.step(state, 1)
    >>> float(feedback.reward), feedback.x.shape
    (1.0, (4,))
"""

from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Float

from anabranch.cell import Env, Feedback


class GymState(NamedTuple):
    """An environment of gymnasium, which changes in place, and what it shows."""

    env: Any
    x: Float[np.ndarray, " d"]


class GymEnv(Env):
    """`gymnasium.make(id, **options)`, which resets itself at the end of an episode, as the worlds of `classic` do.

    Observations are vectors. Actions are numbers from 0, or vectors in `box`. The state holds the environment itself:
    only the latest state can go on, and none can be saved.

    Raises:
        ImportError: if gymnasium is not installed.
        ValueError: if observations are not vectors, or actions neither numbers from 0 nor vectors.
    """

    host: ClassVar[bool] = True

    id: str = eqx.field(static=True)
    options: dict[str, Any] = eqx.field(static=True)
    dim: int = eqx.field(static=True)
    """The length of an observation."""
    n_actions: int = eqx.field(static=True)
    """How many discrete actions there are, or how many numbers an action has where they are continuous."""
    limit: int | None = eqx.field(static=True)
    """Steps after which an episode is cut."""
    box: tuple[np.ndarray, np.ndarray] | None
    """The range of continuous actions."""

    def __init__(self, id: str, **options: Any):
        self.id, self.options = id, options
        env = self.make()
        seen, acted = env.observation_space, env.action_space
        env.close()
        self.limit = env.spec.max_episode_steps if env.spec else None
        if seen.shape is None or len(seen.shape) != 1:
            raise ValueError(f"observations must be vectors, and those of {id} are {seen}")
        self.dim = seen.shape[0]
        if isinstance(acted, _gymnasium().spaces.Discrete) and acted.start == 0:
            self.n_actions, self.box = int(acted.n), None
        elif isinstance(acted, _gymnasium().spaces.Box) and len(acted.shape) == 1:
            self.n_actions, self.box = acted.shape[0], (acted.low, acted.high)
        else:
            raise ValueError(f"actions must be numbers from 0 or vectors, and those of {id} are {acted}")

    def make(self) -> Any:
        """A new environment."""
        return _gymnasium().make(self.id, **self.options)

    def init(self, *, key=None) -> GymState:
        key = jax.random.PRNGKey(0) if key is None else key
        env = self.make()
        x, _ = env.reset(seed=int(jax.random.randint(key, (), 0, 2**31 - 1)))
        return GymState(env, np.asarray(x, np.float32))

    def observe(self, state: GymState) -> Float[np.ndarray, " d"]:
        return state.x

    def step(self, state: GymState, x: Any) -> tuple[GymState, Feedback]:
        env, action = state.env, int(x) if self.box is None else np.asarray(x)
        last, reward, terminal, truncated, _ = env.step(action)
        last = np.asarray(last, np.float32)
        new = np.asarray(env.reset()[0], np.float32) if terminal or truncated else last
        ends = np.asarray(terminal, bool), np.asarray(truncated, bool)
        return GymState(env, new), Feedback(np.asarray(reward, np.float32), (), new, *ends, {"last_x": last})


def _gymnasium() -> Any:
    try:
        import gymnasium
    except ImportError:
        raise ImportError("gymnasium is not installed: pip install anabranch[gym]") from None
    return gymnasium
