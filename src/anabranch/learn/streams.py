"""Streams to learn from: the field's synthetic generators, as cells, and real streams with drift.

A generator takes no input and gives `(x: f32[D], y: i32)`; its state is a key, a counter, and the world that drifts.

    >>> xs, ys = take(SEA(variant=0), 1000, jax.random.PRNGKey(0))
    >>> xs.shape, bool(((xs[:, 0] + xs[:, 1] > 8) == ys).all())
    ((1000, 3), True)

The distributions are those of River's `datasets.synth` and of MOA; the random numbers are not. Probabilities of noise
are exact, where River flips with probability noise − 0.01.
"""

from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from anabranch.cell import Cell, noise

Sample = tuple[Float[Array, " D"], Int[Array, ""]]


class StreamState(NamedTuple):
    """Where a generator is: events drawn, its source of chance, and what it draws from."""

    key: PRNGKeyArray
    t: Int[Array, ""]
    world: PyTree


class Generator(Cell):
    """A synthetic stream. Write `draw`, and `world` if the stream has anything to remember."""

    def world(self, key: PRNGKeyArray) -> PyTree:
        """What is drawn once, at the start."""
        return ()

    def draw(self, world: PyTree, key: PRNGKeyArray) -> tuple[PyTree, Sample]:
        """The next sample, and the world after it."""
        raise NotImplementedError(f"{type(self).__name__} is abstract: it defines no `draw`")

    def init(self, *, key: PRNGKeyArray | None = None) -> StreamState:
        """The stream's start.

        Raises:
            ValueError: without a key.
        """
        if key is None:
            raise ValueError(f"{type(self).__name__} is random: init needs a key")
        return StreamState(key, jnp.zeros((), jnp.int32), self.world(noise(key, 0, "world")))

    def step(self, state: StreamState, x: Any = None) -> tuple[StreamState, Sample]:
        world, sample = self.draw(state.world, noise(state.key, state.t, "draw"))
        return StreamState(state.key, state.t + 1, world), sample


def take(generator: Cell, length: int, key: PRNGKeyArray) -> tuple[Float[Array, "T D"], Int[Array, " T"]]:
    """The first `length` samples: xs f32[T, D] and ys i32[T]."""
    return _take(generator, length, key)


@eqx.filter_jit
def _take(generator, length, key):
    return jax.lax.scan(generator.step, generator.init(key=key), length=length)[1]


class SEA(Generator):
    """Three features uniform in [0, 10]; class 1 if the first two sum to more than 8, 9, 7 or 9.5 (`variant` 0 to 3).

    Street & Kim, "A streaming ensemble algorithm (SEA) for large-scale classification", KDD 2001.
    """

    variant: int = eqx.field(static=True, default=0)
    noise: float = 0.0
    """Probability that the label is flipped."""

    def __check_init__(self):
        _among(self, "variant", range(4))
        _share(self, "noise")

    def draw(self, world, key):
        a, b = jax.random.split(key)
        x = jax.random.uniform(a, (3,), maxval=10.0)
        y = x[0] + x[1] > (8.0, 9.0, 7.0, 9.5)[self.variant]
        return world, (x, (y ^ jax.random.bernoulli(b, self.noise)).astype(jnp.int32))


class LED(Generator):
    """The digit (10 classes) shown by a display of 7 segments, each read wrongly with probability `noise`.

    24 features in {0, 1}: the segments, then 17 random bits that mean nothing. `drift` = n of the segments have
    changed places with meaningless bits; join two such streams with `Drift` for a drift in time.

    Breiman et al., "Classification and regression trees", 1984.
    """

    noise: float = 0.1
    drift: int = eqx.field(static=True, default=0)

    def __check_init__(self):
        _among(self, "drift", range(8))
        _share(self, "noise")

    def world(self, key):
        first, second = jax.random.split(key)
        segment = (jnp.arange(self.drift) + jax.random.randint(first, (), 0, 7)) % 7
        other = 7 + (jnp.arange(self.drift) + jax.random.randint(second, (), 0, 17)) % 17
        return jnp.arange(24).at[segment].set(other).at[other].set(segment)

    def draw(self, world, key):
        digit, flips, bits = jax.random.split(key, 3)
        y = jax.random.randint(digit, (), 0, 10)
        segments = jnp.asarray(_SEGMENTS)[y] ^ jax.random.bernoulli(flips, self.noise, (7,))
        x = jnp.concatenate([segments, jax.random.bernoulli(bits, shape=(17,))])
        return world, (x[world].astype(jnp.float32), y)


# Of the digits 0 to 9: top, top left, top right, middle, bottom left, bottom right, bottom.
_DIGITS = "1110111 0010010 1011101 1011011 0111010 1101011 1101111 1010010 1111111 1111011"
_SEGMENTS = np.array([[c == "1" for c in digit] for digit in _DIGITS.split()])


class RBFWorld(NamedTuple):
    """n moving clusters: where they are, where they go, and the class, width and frequency of each."""

    centre: Float[Array, "n D"]
    velocity: Float[Array, "n D"]
    label: Int[Array, " n"]
    spread: Float[Array, " n"]
    weight: Float[Array, " n"]


class RandomRBF(Generator):
    """Gaussian-like clouds around random centroids in the unit cube, each with a random class, spread and weight.

    With `speed` > 0 the first `drifting` centroids (all by default) move by that much per sample, each in its own
    direction, and turn back at the walls.
    """

    features: int = eqx.field(static=True, default=10)
    classes: int = eqx.field(static=True, default=2)
    centroids: int = eqx.field(static=True, default=50)
    speed: float = 0.0
    drifting: int | None = eqx.field(static=True, default=None)

    def world(self, key):
        n = self.centroids
        keys = jax.random.split(key, 5)
        velocity = jax.random.uniform(keys[1], (n, self.features))
        moves = jnp.arange(n) < (n if self.drifting is None else self.drifting)
        return RBFWorld(
            jax.random.uniform(keys[0], (n, self.features)),
            velocity / jnp.linalg.norm(velocity, axis=1, keepdims=True) * moves[:, None],
            jax.random.randint(keys[2], (n,), 0, self.classes),
            jax.random.uniform(keys[3], (n,)),
            jax.random.uniform(keys[4], (n,)),
        )

    def draw(self, world: RBFWorld, key):
        moved = world.centre + self.speed * world.velocity
        centre = jnp.clip(moved, 0.0, 1.0)
        world = world._replace(centre=centre, velocity=jnp.where(moved == centre, world.velocity, -world.velocity))
        which, way, far = jax.random.split(key, 3)
        i = jax.random.categorical(which, jnp.log(world.weight))
        direction = jax.random.uniform(way, (self.features,), minval=-1.0)
        offset = direction / jnp.linalg.norm(direction) * jax.random.normal(far) * world.spread[i]
        return world, (centre[i] + offset, world.label[i])


class Hyperplane(Generator):
    """Features uniform in [0, 1]; class 1 on the upper side of a hyperplane through the middle, Σwx ≥ ½Σw.

    With `magnitude` > 0 the first `drifting` weights move by it at every sample, each turning round with probability
    `turn`.

    Hulten, Spencer & Domingos, "Mining time-changing data streams", KDD 2001.
    """

    features: int = eqx.field(static=True, default=10)
    drifting: int = eqx.field(static=True, default=2)
    magnitude: float = 0.0
    noise: float = 0.05
    """Probability that the label is flipped."""
    turn: float = 0.1

    def __check_init__(self):
        _among(self, "drifting", range(self.features + 1))
        _share(self, "noise")
        _share(self, "turn")

    def world(self, key):
        """The weights, and the direction in which each moves."""
        return jax.random.uniform(key, (self.features,)), (jnp.arange(self.features) < self.drifting).astype(
            jnp.float32
        )

    def draw(self, world, key):
        weights, direction = world
        place, flip, turns = jax.random.split(key, 3)
        x = jax.random.uniform(place, (self.features,))
        y = (weights * (x - 0.5)).sum() >= 0
        y ^= jax.random.bernoulli(flip, self.noise)
        turned = jax.random.bernoulli(turns, self.turn, (self.features,))
        world = weights + self.magnitude * direction, jnp.where(turned, -direction, direction)
        return world, (x, y.astype(jnp.int32))


class Agrawal(Generator):
    """Loan applicants, and one of ten rules (`function` 0 to 9) that says which group they belong to.

    Nine features: salary, commission, age, education level (0 to 4), car maker (1 to 20), zip code (0 to 8), house
    value, years the house is owned, loan. `perturbation` = p then shifts each number by up to p times its range,
    within the range, without touching the label. Classes and ranges are River's; rule 4 is the paper's, which looks at
    the loan where River looks at the salary.

    Agrawal, Imielinski & Swami, "Database mining: a performance perspective", IEEE TKDE 5(6), 1993.
    """

    function: int = eqx.field(static=True, default=0)
    perturbation: float = 0.0

    def __check_init__(self):
        _among(self, "function", range(10))
        _share(self, "perturbation")

    def draw(self, world, key):
        keys = jax.random.split(key, 10)

        def uniform(i, low, high):
            return jax.random.uniform(keys[i], minval=low, maxval=high)

        def integer(i, low, high):
            return jax.random.randint(keys[i], (), low, high + 1).astype(jnp.float32)

        salary = uniform(0, 2e4, 15e4)
        commission = jnp.where(salary >= 75e3, 0.0, uniform(1, 1e4, 85e3))
        age, level, car, code = integer(2, 20, 80), integer(3, 0, 4), integer(4, 1, 20), integer(5, 0, 8)
        value = (8 - code) * 1e5 * uniform(6, 0.5, 1.5)
        years, loan = integer(7, 1, 30), uniform(8, 0.0, 5e5)
        y = _agrawal(self.function, salary, commission, age, level, value, years, loan)

        shift = self.perturbation * jax.random.uniform(keys[9], (6,), minval=-1.0)

        def perturb(i, number, low, high):
            return jnp.clip(number + shift[i] * (high - low), low, high)

        x = (
            perturb(0, salary, 2e4, 15e4),
            jnp.where(commission > 0, perturb(1, commission, 1e4, 85e3), 0.0),
            jnp.round(perturb(2, age, 20, 80)),
            level,
            car,
            code,
            perturb(3, value, (8 - code) * 0.5e5, (8 - code) * 1.5e5),
            jnp.round(perturb(4, years, 1, 30)),
            perturb(5, loan, 0, 5e5),
        )
        return world, (jnp.stack(x), y.astype(jnp.int32))


def _agrawal(function, salary, commission, age, level, value, years, loan):
    def by_age(young, middle, old):
        return jnp.where(age < 40, young, jnp.where(age < 60, middle, old))

    def within(number, low, high):
        return (low <= number) & (number <= high)

    earned = [within(salary, 5e4, 1e5), within(salary, 75e3, 125e3), within(salary, 25e3, 75e3)]
    studied = [level <= 1, within(level, 1, 3), level >= 2]
    income = salary + commission
    net = 2 * income / 3
    if function == 0:
        return (age < 40) | (age >= 60)
    if function == 1:
        return by_age(*earned)
    if function == 2:
        return by_age(*studied)
    if function == 3:
        return by_age(
            jnp.where(studied[0], within(salary, 25e3, 75e3), within(salary, 5e4, 1e5)),
            jnp.where(studied[1], within(salary, 5e4, 1e5), within(salary, 75e3, 125e3)),
            jnp.where(studied[2], within(salary, 5e4, 1e5), within(salary, 25e3, 75e3)),
        )
    if function == 4:
        return by_age(
            jnp.where(earned[0], within(loan, 1e5, 3e5), within(loan, 2e5, 4e5)),
            jnp.where(earned[1], within(loan, 2e5, 4e5), within(loan, 3e5, 5e5)),
            jnp.where(earned[2], within(loan, 3e5, 5e5), within(loan, 1e5, 3e5)),
        )
    if function == 5:
        return by_age(within(income, 5e4, 1e5), within(income, 75e3, 125e3), within(income, 25e3, 75e3))
    if function == 6:
        return net - loan / 5 - 2e4 <= 1
    if function == 7:
        return net - 5e3 * level - 2e4 <= 1
    if function == 8:
        return net - 5e3 * level - loan / 5 - 1e4 <= 1
    equity = jnp.where(years >= 20, value * (years - 20) / 10, 0.0)
    return net - 5e3 * level + equity / 5 - 1e4 <= 1


class Waveform(Generator):
    """21 points on a random mixture of two of three triangular waves, plus unit Gaussian noise; which two is the class.

    With `irrelevant`, 19 more features of pure noise.

    Breiman et al., "Classification and regression trees", 1984.
    """

    irrelevant: bool = eqx.field(static=True, default=False)

    def draw(self, world, key):
        which, share, spread = jax.random.split(key, 3)
        y = jax.random.randint(which, (), 0, 3)
        peaks = jnp.array([6, 14, 10])  # a wave is 6 high at its peak and falls to 0 on both sides
        waves = jnp.maximum(6 - jnp.abs(jnp.arange(21) - peaks[:, None]), 0)
        a, b = jnp.array([0, 0, 1])[y], jnp.array([1, 2, 2])[y]
        u = jax.random.uniform(share)
        x = jax.random.normal(spread, (40 if self.irrelevant else 21,))
        return world, (x.at[:21].add(u * waves[a] + (1 - u) * waves[b]), y)


class DriftState(NamedTuple):
    """The two streams of a `Drift`, and events drawn so far."""

    key: PRNGKeyArray
    t: Int[Array, ""]
    before: PyTree
    after: PyTree


class Drift(Cell):
    """One stream that turns into another: sample t comes from `after` with probability 1 / (1 + exp(−4 (t − p) / w)).

    t counts from 1, `position` = p is where both are equally likely, `width` = w about how long the change takes; w = 1
    is abrupt. Either stream advances only when it is drawn from. Nest them for several drifts.

    Raises:
        ValueError: if `width` is not positive.
    """

    before: Cell
    after: Cell
    position: int
    width: int = 1

    def __check_init__(self):
        if self.width < 1:
            raise ValueError(f"Drift: width must be at least 1, got {self.width}")

    def init(self, *, key: PRNGKeyArray | None = None) -> DriftState:
        if key is None:
            raise ValueError("Drift is random: init needs a key")
        before, after = self.before.init(key=noise(key, 0, "before")), self.after.init(key=noise(key, 0, "after"))
        return DriftState(key, jnp.zeros((), jnp.int32), before, after)

    def step(self, state: DriftState, x: Any = None) -> tuple[DriftState, Sample]:
        t = state.t + 1
        late = jax.random.bernoulli(
            noise(state.key, t, "which"), jax.nn.sigmoid(4.0 * (t - self.position) / self.width)
        )

        def draw_after(state):
            after, sample = self.after.step(state.after, None)
            return state._replace(after=after), sample

        def draw_before(state):
            before, sample = self.before.step(state.before, None)
            return state._replace(before=before), sample

        return jax.lax.cond(late, draw_after, draw_before, state._replace(t=t))


def elec2() -> tuple[np.ndarray, np.ndarray]:
    """Electricity market of New South Wales, 1996 to 1998: xs f32[45312, 8] in half-hours, ys i32[45312].

    The label says where the price goes against its mean of the last 24 hours; 1, the more frequent one, is down. Labels
    come in runs: repeating the last one is right 85.3 % of the time, so look at κ_T. Harries, "Splice-2", 1999.
    """
    return _load("elec2/elec2_data.dat", "elec2/elec2_label.dat")


def weather() -> tuple[np.ndarray, np.ndarray]:
    """Daily weather at Offutt Air Force Base, Nebraska, 50 years: xs f32[18159, 8], ys i32[18159], 1 is rain.

    Elwell & Polikar, "Incremental learning of concept drift in nonstationary environments", IEEE TNN 2011.
    """
    return _load("weather/NEweather_data.csv", "weather/NEweather_class.csv", ",")


def outdoor() -> tuple[np.ndarray, np.ndarray]:
    """40 garden objects filmed by a robot, approached ten times each: colour histograms xs f32[4000, 21], ys i32[4000].

    Losing, Hammer & Wersing, "Interactive online learning for obstacle classification on a mobile robot", IJCNN 2015.
    """
    return _load("outdoor/outdoorStream.data", "outdoor/outdoorStream.labels")


def _load(features: str, labels: str, delimiter: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    from anabranch import data

    root = Path(data.root())
    for file in (features, labels):
        if not (root / file).exists():
            raise FileNotFoundError(f"{root / file} is missing; it is public: vlosing/driftDatasets on GitHub")
    xs = np.loadtxt(root / features, np.float32, delimiter=delimiter)
    return xs, np.loadtxt(root / labels, np.float32).astype(np.int32)


def _among(cell: Cell, name: str, values: range) -> None:
    value = getattr(cell, name)
    if value not in values:
        raise ValueError(f"{type(cell).__name__}: {name} must be from {values[0]} to {values[-1]}, got {value}")


def _share(cell: Cell, name: str) -> None:
    value = getattr(cell, name)
    if isinstance(value, float | int) and not 0 <= value <= 1:
        raise ValueError(f"{type(cell).__name__}: {name} must be in [0, 1], got {value}")
