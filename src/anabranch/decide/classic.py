"""The classic control tasks as pure worlds: CartPole, Acrobot, MountainCar, Pendulum.

The dynamics, rewards, bounds and time limits are those of gymnasium (`CartPole-v1`, `Acrobot-v1`, `MountainCar-v0`,
`Pendulum-v1`); only the numbers drawn at a reset differ. A whole run of a policy is therefore one compiled scan, and
many seeds are one `vmap` of it (`anabranch.drive.play_seeds`).

At the end of an episode a world resets itself: `feedback.x` is the first observation of the next episode and
`feedback.info["last_x"]` the last one of this. Both are the same observation everywhere else.

    >>> world = CartPole()
    >>> state = world.init(key=jax.random.PRNGKey(0))
    >>> state, feedback = world.step(state, jnp.array(1))
    >>> float(feedback.reward), bool(feedback.terminal), world.observe(state).shape
    (1.0, False, (4,))
"""

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from anabranch.cell import Cell, Env, Feedback, noise, select


class ClassicState(NamedTuple):
    """A body and how far its episode is."""

    body: Float[Array, " n"]
    """Positions and velocities."""
    t: Int[Array, ""]
    """Steps of this episode so far."""
    episode: Int[Array, ""]
    """Episodes before this one: the counter of the noise."""
    key: PRNGKeyArray


class Classic(Env):
    """A body that is moved, observed, and drawn anew: subclasses give `reset`, `move` and `see`.

    Raises:
        ValueError: if `limit` is not positive.
    """

    limit: int = 500
    """Steps after which an episode is cut."""

    dim: ClassVar[int]
    """The length of an observation."""
    n_actions: ClassVar[int]
    """How many discrete actions there are, or how many numbers an action has where they are continuous."""
    box: ClassVar[tuple[float, float] | None] = None
    """The range of continuous actions."""

    def __check_init__(self):
        if self.limit < 1:
            raise ValueError(f"limit must be at least one step, got {self.limit}")

    def reset(self, key: PRNGKeyArray) -> Float[Array, " n"]:
        """A body at the start of an episode."""
        raise NotImplementedError(f"{type(self).__name__} is abstract: it defines no `reset`")

    def move(
        self, body: Float[Array, " n"], action: Array
    ) -> tuple[Float[Array, " n"], Float[Array, ""], Bool[Array, ""]]:
        """The body after one step, the reward, and whether the episode has come to its end."""
        raise NotImplementedError(f"{type(self).__name__} is abstract: it defines no `move`")

    def see(self, body: Float[Array, " n"]) -> Float[Array, " d"]:
        """The observation of a body."""
        return body

    def init(self, *, key=None) -> ClassicState:
        key = jax.random.PRNGKey(0) if key is None else key
        zero = jnp.zeros((), jnp.int32)
        return ClassicState(self.reset(noise(key, zero, "reset")), zero, zero, key)

    def observe(self, state: ClassicState) -> Float[Array, " d"]:
        return self.see(state.body)

    def step(self, state: ClassicState, x: Array) -> tuple[ClassicState, Feedback]:
        body, reward, terminal = self.move(state.body, x)
        on = ClassicState(body, state.t + 1, state.episode, state.key)
        truncated = on.t >= self.limit
        episode = state.episode + 1
        again = ClassicState(self.reset(noise(state.key, episode, "reset")), jnp.zeros_like(on.t), episode, state.key)
        new = select(terminal | truncated, again, on)
        info = {"last_x": self.see(body)}
        return new, Feedback(reward, x=self.observe(new), terminal=terminal, truncated=truncated, info=info)


class CartPole(Classic):
    """A pole on a cart that is pushed to the left (0) or right (1): 1 for every step until it falls or drives away.

    Barto, Sutton, Anderson: Neuronlike adaptive elements that can solve difficult learning control problems (1983).
    Body and observation: position (m), speed (m/s), angle (rad), angular speed (rad/s).
    """

    dim, n_actions = 4, 2

    def reset(self, key):
        return jax.random.uniform(key, (4,), minval=-0.05, maxval=0.05)

    def move(self, body, action):
        cart, pole, half_length, force, dt = 1.0, 0.1, 0.5, 10.0, 0.02
        x, v, angle, spin = body
        sin, cos, mass = jnp.sin(angle), jnp.cos(angle), cart + pole
        push = (jnp.where(action == 1, force, -force) + pole * half_length * spin**2 * sin) / mass
        angular = (9.8 * sin - cos * push) / (half_length * (4 / 3 - pole * cos**2 / mass))
        linear = push - pole * half_length * angular * cos / mass
        body = jnp.stack([x + dt * v, v + dt * linear, angle + dt * spin, spin + dt * angular])
        fallen = (jnp.abs(body[0]) > 2.4) | (jnp.abs(body[2]) > 12 * 2 * jnp.pi / 360)
        return body, jnp.ones((), body.dtype), fallen


class Acrobot(Classic):
    """Two links that hang from a joint; torque -1, 0 or 1 (actions 0, 1, 2) between them is to swing the tip up.

    Sutton: Generalization in reinforcement learning: successful examples using sparse coarse coding (NeurIPS 1996),
    with the equations of the book of Sutton and Barto. -1 for every step until the tip is one link above the joint.
    Body: two angles (rad), two angular speeds (rad/s). Observation: cosine and sine of each angle, the speeds.
    """

    dim, n_actions = 6, 3

    def reset(self, key):
        return jax.random.uniform(key, (4,), minval=-0.1, maxval=0.1)

    def move(self, body, action):
        torque, dt = action - 1.0, 0.2
        a = self.flow(body, torque)
        b = self.flow(body + dt / 2 * a, torque)
        c = self.flow(body + dt / 2 * b, torque)
        d = self.flow(body + dt * c, torque)
        body = body + dt / 6 * (a + 2 * b + 2 * c + d)
        angles = (body[:2] + jnp.pi) % (2 * jnp.pi) - jnp.pi
        most = jnp.array([4.0, 9.0], body.dtype) * jnp.pi
        body = jnp.concatenate([angles, jnp.clip(body[2:], -most, most)])
        up = -jnp.cos(body[0]) - jnp.cos(body[0] + body[1]) > 1
        return body, jnp.where(up, 0.0, -1.0).astype(body.dtype), up

    def flow(self, body: Float[Array, "4"], torque: Float[Array, ""]) -> Float[Array, "4"]:
        """The time derivative of the body: links of 1 kg, 1 m and 1 kg m², each with its mass in the middle."""
        first, second, v, w = body
        d1 = 0.25 + (1 + 0.25 + jnp.cos(second)) + 2
        d2 = 0.25 + 0.5 * jnp.cos(second) + 1
        phi2 = 0.5 * 9.8 * jnp.cos(first + second - jnp.pi / 2)
        phi1 = -0.5 * w * (w + 2 * v) * jnp.sin(second) + 1.5 * 9.8 * jnp.cos(first - jnp.pi / 2) + phi2
        dw = (torque + d2 / d1 * phi1 - 0.5 * v**2 * jnp.sin(second) - phi2) / (0.25 + 1 - d2**2 / d1)
        return jnp.stack([v, w, -(d2 * dw + phi1) / d1, dw])

    def see(self, body):
        first, second, v, w = body
        return jnp.stack([jnp.cos(first), jnp.sin(first), jnp.cos(second), jnp.sin(second), v, w])


class MountainCar(Classic):
    """A car too weak for its hill: push left (0), not (1), right (2); -1 for every step until it is on top.

    Moore: Efficient memory-based learning for robot control (1990). Body and observation: position, speed.
    """

    limit: int = 200
    dim, n_actions = 2, 3

    def reset(self, key):
        position = jax.random.uniform(key, (), minval=-0.6, maxval=-0.4)
        return jnp.stack([position, jnp.zeros_like(position)])

    def move(self, body, action):
        x, v = body
        v = jnp.clip(v + 0.001 * (action - 1) - 0.0025 * jnp.cos(3 * x), -0.07, 0.07)
        x = jnp.clip(x + v, -1.2, 0.6)
        v = jnp.where((x <= -1.2) & (v < 0), 0.0, v)
        return jnp.stack([x, v]), -jnp.ones((), body.dtype), (x >= 0.5) & (v >= 0)


class Pendulum(Classic):
    """A pendulum to be held up by a torque in [-2, 2] Nm; it costs angle² + .1 speed² + .001 torque², and never ends.

    The action is a vector of one number. Body: angle from upright (rad), speed (rad/s). Observation: cosine, sine,
    speed.
    """

    limit: int = 200
    dim, n_actions = 3, 1
    box = (-2.0, 2.0)

    def reset(self, key):
        return jax.random.uniform(key, (2,), minval=-1.0, maxval=1.0) * jnp.array([jnp.pi, 1.0])

    def move(self, body, action):
        angle, spin = body
        torque = jnp.clip(action[0], -2, 2)
        off = (angle + jnp.pi) % (2 * jnp.pi) - jnp.pi
        cost = off**2 + 0.1 * spin**2 + 0.001 * torque**2
        spin = jnp.clip(spin + 0.05 * (15 * jnp.sin(angle) + 3 * torque), -8, 8)
        return jnp.stack([angle + 0.05 * spin, spin]), -cost, jnp.zeros((), bool)

    def see(self, body):
        return jnp.stack([jnp.cos(body[0]), jnp.sin(body[0]), body[1]])


class EpisodeReturn(Cell):
    """Meter: the mean return of the episodes that end in round `start` or later.

    Where none does, the return so far of the episode that is running.
    """

    start: int = 0

    def init(self, *, key=None):
        return jnp.zeros((), jnp.int32), jnp.zeros(()), jnp.zeros(()), jnp.zeros((), jnp.int32)

    def step(self, state, x):
        t, running, total, n = state
        feedback = x[0].feedback
        running = running + feedback.reward
        stop = jnp.asarray(feedback.terminal) | feedback.truncated
        counts = stop & (t >= self.start)
        total, n = jnp.where(counts, total + running, total), n + counts
        state = t + 1, jnp.where(stop, 0.0, running), total, n
        return state, self.value(state)

    def value(self, state) -> Float[Array, ""]:
        _, running, total, n = state
        return jnp.where(n > 0, total / jnp.maximum(n, 1), running)
