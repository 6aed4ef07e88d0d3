"""Non-stationary bandits that route payments.

Chaudhary, Rai, Gupta: Maximizing Success Rate of Payment Routing using Non-stationary Bandits (arXiv 2308.01028, 2023).
The index policies are those of Garivier, Moulines: On upper-confidence bound policies for switching bandit problems
(ALT 2011).

For each context of a payment (instrument, bank, …) a bandit sends every transaction to the processor most likely to
succeed now, while success rates drift and processors break; the outcome, 1 or 0, comes back later. The stream of one
context is transactions and outcomes; the state is 3k + 1 floats for k processors (the sliding window adds its ring),
the open tickets, and a counter. One cell serves one context; `Keyed(PaymentRouter(...))` serves thousands.

    >>> router = PaymentRouter(DiscountedUCB(3))
    >>> state = router.init(key=jax.random.PRNGKey(0))
    >>> state, route = router.step(state, router.ask(jnp.array([True, False, True])))
    >>> bool(route.valid), int(route.value.decision.action) in (0, 2)
    (True, True)
    >>> state, _ = router.step(state, router.tell(route.value.ticket, Feedback(1.0)))
    >>> float(state.policy.stats.n.sum())
    1.0
"""

from typing import TYPE_CHECKING, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from anabranch.cell import Decision, Env, Feedback, Maybe, Policy, noise
from anabranch.combine import Ask, Delayed, DelayedState, Outcome, Ticketed
from anabranch.decide.base import UCB1, ArmStats, Bandit, Thompson, earned, ucb

if TYPE_CHECKING:
    import pyarrow


class Request(NamedTuple):
    """A transaction, for bandits that forget by time."""

    eligible: Bool[Array, " k"]
    elapsed: Float[Array, ""]
    """Seconds since the previous transaction of the same context."""


class _Discounted(Bandit):
    """Statistics that fade: by `gamma` at every outcome or, given a `half_life` in seconds, by time.

    With a `half_life` observations are `Request`s and `gamma` is not used: contexts that see few transactions then
    forget as fast as busy ones.

    Raises:
        ValueError: if `gamma` is not in (0, 1] or `half_life` is not positive.
    """

    gamma: Float[Array, ""] | float = eqx.field(default=0.95, kw_only=True)
    half_life: float | None = eqx.field(default=None, kw_only=True)

    def __check_init__(self):
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma must be in (0, 1], got {self.gamma}")
        if self.half_life is not None and not self.half_life > 0:
            raise ValueError(f"half_life must be a positive number of seconds, got {self.half_life}")

    @property
    def like(self):
        return super().like if self.half_life is None else Request(super().like, jnp.zeros(()))

    def eligible(self, x):
        return x if self.half_life is None else x.eligible

    def act(self, state, x):
        if self.half_life is not None:
            state = state._replace(stats=state.stats.fade(x.elapsed / self.half_life))
        return super().act(state, x)

    def settle(self, stats, decision, reward):
        if self.half_life is None:
            stats = stats.fade(-jnp.log2(self.gamma))
        return super().settle(stats, decision, reward)


class DiscountedUCB(_Discounted, UCB1):
    """D-UCB: UCB1 on discounted counts.

    With N_i = Σ_s γ^(t-s) 1{I_s = i}, S_i likewise with rewards, n = Σ_i N_i: index S_i/N_i + bonus √(ln n / N_i). The
    paper's bonus 2B√ξ is √2 for rewards in [0, 1] (B = 1, ξ = 1/2) and explores too much in practice. Pulls are counted
    when made and rewards when known, so N_i in the bonus includes pending pulls.

    Arguments: `k` arms, `bonus`, and how to forget: `gamma` or `half_life`.
    """

    bonus: Float[Array, ""] | float = 0.2


class DiscountedThompson(_Discounted, Thompson):
    """Thompson sampling on discounted counts: all arms fade towards the prior Beta(1, 1), the one pulled included."""


class Ring(NamedTuple):
    """Statistics of the last outcomes."""

    counts: ArmStats
    arm: Int[Array, " window"]
    """int8; -1 where there is no outcome yet."""
    reward: Float[Array, " window"]
    head: Int[Array, ""]
    lap: Float[Array, " k"]
    """Sum of rewards since the head last passed 0. There it is all that the window holds, and replaces the running sum,
    so that rounding errors do not pile up."""

    def pull(self, arm: Int[Array, ""]) -> "Ring":
        return self._replace(counts=self.counts.pull(arm))

    @property
    def clock(self) -> Float[Array, ""]:
        return self.counts.clock


class SlidingWindowUCB(Bandit):
    """SW-UCB: UCB1 on the last `window` outcomes of the context.

    Index S_i/N_i + bonus √(ln min(t, window) / N_i), with pending pulls counted as in `DiscountedUCB`.

    Raises:
        ValueError: if `window` is not positive, or there are more than 127 arms.
    """

    window: int = eqx.field(default=200, static=True)
    bonus: Float[Array, ""] | float = 0.2

    def __check_init__(self):
        if self.window < 1:
            raise ValueError(f"window must be positive, got {self.window}")
        if self.k > 127:
            raise ValueError(f"arms are kept as int8: k must be at most 127, got {self.k}")

    def init(self, *, key=None):
        state = super().init(key=key)
        empty = jnp.full(self.window, -1, jnp.int8), jnp.zeros(self.window)
        return state._replace(stats=Ring(state.stats, *empty, jnp.zeros((), jnp.int32), jnp.zeros(self.k)))

    def index(self, state, key):
        return ucb(state.stats.counts, self.bonus)

    def settle(self, stats, decision, reward):
        counts, head = stats.counts, stats.head
        pending = counts.fade(1 / self.window)  # pulls that never get an outcome must not stay pending for ever
        counts = pending._replace(n=counts.n, s=counts.s).settle(decision.action, reward, decision.aux)
        new = (jnp.arange(self.k) == decision.action).astype(jnp.float32)
        old = (jnp.arange(self.k) == stats.arm[head]).astype(jnp.float32)
        full_lap = head == self.window - 1
        lap = stats.lap + new * reward
        return Ring(
            counts=counts._replace(n=counts.n - old, s=jnp.where(full_lap, lap, counts.s - old * stats.reward[head])),
            arm=stats.arm.at[head].set(decision.action.astype(jnp.int8)),
            reward=stats.reward.at[head].set(reward),
            head=jnp.where(full_lap, 0, head + 1),
            lap=jnp.where(full_lap, 0.0, lap),
        )


class PaymentRouter(Delayed):
    """The cell of one context: a bandit, and tickets for the outcomes that are on their way.

    Steps on `Ask(Maybe(x), Maybe(Outcome(ticket, Feedback(reward))))` and gives `Maybe(Ticketed(ticket, decision))`;
    make the events with `ask(x)` and `tell(ticket, Feedback(reward))`. The route is not valid where no transaction was
    asked for and where no processor is eligible: such a transaction gets no ticket and goes to the rules' default.
    Report a timeout as a failure; a success that arrives after it is ignored, and counted in `state.ignored`.

    `Keyed(PaymentRouter(DiscountedUCB(5)), capacity=1000)` routes the payments of a thousand contexts.
    """

    policy: Bandit  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, policy: Bandit, capacity: int = 64):
        super().__init__(policy, capacity, like=policy.like)

    def step(self, state: DelayedState, x: Ask) -> tuple[DelayedState, Maybe[Ticketed]]:
        served = x.x.valid & self.policy.eligible(x.x.value).any()
        return super().step(state, Ask(Maybe(x.x.value, served), x.outcome))


class Routing(Policy):
    """A router as the player of a `PaymentSimulator`: one round is one event, its action the processor or -1."""

    router: PaymentRouter

    def init(self, *, key=None):
        return self.router.init(key=key)

    def act(self, state, x: Ask):
        state, route = self.router.step(state, x)
        arm = jnp.where(route.valid, route.value.decision.action, -1)
        return state, Decision(arm, route.value.decision.logp, route.value.ticket)


class FlightsState(NamedTuple):
    """The next flight of a `FlightsEnv`, and its source of chance."""

    t: Int[Array, ""]
    key: PRNGKeyArray


class FlightsEnv(Env):
    """Real drift: the airlines of one route as processors that succeed when the flight is on time.

    A request on a day goes to an airline and is answered by one of that airline's flights of the day, drawn at random:
    1 if it arrived at most 15 minutes late, else 0, cancelled flights included. The outcome of every airline is on
    record, so the replay is unbiased. Airlines that do not fly on the day are not eligible; on days with fewer than two
    none is, there is nothing to choose. `FlightsEnv.routes(table)` stacks all routes on a leading axis for `jax.vmap`.
    """

    rates: Float[Array, "days k"]
    """Share of the airline's flights of the day that were on time; 0 where it is not eligible."""
    flown: Bool[Array, "days k"]
    per_day: int = eqx.field(default=10, static=True)

    @classmethod
    def routes(cls, table: "pyarrow.Table", per_day: int = 10) -> tuple["FlightsEnv", list[str], list[list[str]]]:
        """All routes on which two airlines compete on some day, their names, and the airlines behind their arms.

        Takes the columns year, month, day, carrier, origin, dest and arr_delay (minutes, null if cancelled).
        """

        def column(name):
            return table[name].to_numpy(zero_copy_only=False)

        dates = [column(name).astype(int) for name in ("year", "month", "day")]
        months = (dates[0] - 1970).astype("datetime64[Y]").astype("datetime64[M]") + (dates[1] - 1)
        day = (months.astype("datetime64[D]") + (dates[2] - 1)).astype(int)
        day -= day.min()
        on_time = table["arr_delay"].cast("float64").fill_null(np.inf).to_numpy() <= 15
        names, route = np.unique([f"{a}-{b}" for a, b in zip(column("origin"), column("dest"))], return_inverse=True)
        carriers, carrier = np.unique(column("carrier").astype(str), return_inverse=True)
        flights, good = np.zeros((2, len(names), day.max() + 1, len(carriers)))
        np.add.at(flights, (route, day, carrier), 1)
        np.add.at(good, (route, day, carrier), on_time)
        flights[(flights > 0).sum(-1) < 2] = 0
        kept = flights.any((1, 2))
        names, flights, good = names[kept], flights[kept], good[kept]
        # Renumber the arms of each route: its own airlines first, so that k is the most any route has.
        own = flights.any(1)
        k = own.sum(-1).max()
        arms = np.argsort(~own, axis=-1, kind="stable")[:, :k]
        flights, good = (np.take_along_axis(a, arms[:, None], axis=-1) for a in (flights, good))
        rates = np.where(flights > 0, good / np.maximum(flights, 1), 0.0)
        env = cls(jnp.asarray(rates, jnp.float32), jnp.asarray(flights > 0), per_day)
        return env, names.tolist(), [carriers[a[:n]].tolist() for a, n in zip(arms, own.sum(-1))]

    def init(self, *, key=None):
        return FlightsState(jnp.zeros((), jnp.int32), jax.random.PRNGKey(0) if key is None else key)

    def day(self, state: FlightsState) -> Int[Array, ""]:
        return jnp.minimum(state.t // self.per_day, self.rates.shape[0] - 1)

    def observe(self, state):
        return self.flown[self.day(state)]

    legal = observe

    def oracle(self, state):
        return self.rates[self.day(state)]

    def step(self, state, x):
        on_time = jax.random.uniform(noise(state.key, state.t)) < earned(self.oracle(state), x)
        new = FlightsState(state.t + 1, state.key)
        end = new.t >= self.per_day * self.rates.shape[0]
        return new, Feedback(on_time.astype(jnp.float32), x=self.observe(new), truncated=end)


class SimulatorState(NamedTuple):
    """Transactions so far, and the outcomes on their way."""

    event: Int[Array, ""]
    reward: Float[Array, " capacity"]
    """Outcomes on their way, by ticket modulo capacity."""
    key: PRNGKeyArray


class PaymentSimulator(Env):
    """One day of transactions of one context, with late outcomes: a world for `Routing`.

    The observation is the next event, an `Ask`: transaction i, to be answered with a processor, or the outcome of
    ticket i. A round is one event, so the day of n transactions has 2 n rounds; in the rounds of outcomes the action is
    -1. `PaymentSimulator.day(seed)` makes the contexts of a day, stacked on a leading axis for `jax.vmap`.
    """

    rates: Float[Array, "minutes k"]
    """The success rate of each processor in each minute."""
    minute: Int[Array, " n"]
    """When each transaction is made."""
    timely: Bool[Array, " n"]
    """Whether its outcome comes before the timeout; if not, the timeout reports a failure."""
    order: Int[Array, " 2n"]
    """The events in order of time: i < n is transaction i, n + i its outcome."""
    capacity: int = eqx.field(default=64, static=True)

    @classmethod
    def day(
        cls, seed: int, contexts: int = 200, transactions: int = 5000, k: int = 5, *, capacity: int = 64
    ) -> "PaymentSimulator":
        """A day of `transactions` in each of `contexts`, over `k` processors.

        Base success rates .80 to .92 per context and processor, with an Ornstein-Uhlenbeck drift of standard deviation
        .03 and relaxation time 3 h. Outages hit a processor in all contexts at once: on average four a day, each 5 to
        30 minutes long, success .1. Load follows the hour (1 to 9 between night and noon). An outcome takes log-normal
        time, median 20 s, σ = 1; after 300 s it times out.

        Raises:
            ValueError: if more than `capacity` outcomes of a context are on their way at once.
        """
        rng, minutes, seconds = np.random.default_rng(seed), 24 * 60, 24 * 3600
        rates = np.empty((contexts, minutes, k))
        drift = rng.normal(0, 0.03, (contexts, k))
        base = rng.uniform(0.80, 0.92, (contexts, k))
        keep = np.exp(-1 / 180)
        for t in range(minutes):
            rates[:, t] = base + drift
            drift = keep * drift + np.sqrt(1 - keep**2) * rng.normal(0, 0.03, (contexts, k))
        rates = rates.clip(0.01, 0.99)
        for processor in range(k):
            for start in rng.integers(0, minutes, rng.poisson(4)):
                rates[:, start : start + rng.integers(5, 31), processor] = 0.1
        hours = np.linspace(0, seconds, 1 + minutes)
        load = 1 - 0.8 * np.cos(2 * np.pi * hours / seconds)
        share = np.cumsum(load) - load[0]
        made = np.sort(np.interp(rng.uniform(0, share[-1], (contexts, transactions)), share, hours), axis=-1)
        late = rng.lognormal(np.log(20), 1.0, made.shape)
        order = np.argsort(np.concatenate([made, made + np.minimum(late, 300)], axis=-1), axis=-1, kind="stable")
        flying = np.cumsum(order < transactions, axis=-1) - (order - transactions)  # transactions made since ticket i
        most = flying[order >= transactions].max()
        if most > capacity:
            raise ValueError(f"{most} outcomes are on their way at once: more than capacity = {capacity}")
        minute = np.minimum(made // 60, minutes - 1).astype(np.int16)
        return cls(
            jnp.asarray(rates, jnp.float32), jnp.asarray(minute), jnp.asarray(late <= 300), jnp.asarray(order), capacity
        )

    def init(self, *, key=None):
        key = jax.random.PRNGKey(0) if key is None else key
        return SimulatorState(jnp.zeros((), jnp.int32), jnp.zeros(self.capacity), key)

    def _event(self, state: SimulatorState) -> tuple[Int[Array, ""], Bool[Array, ""]]:
        """The transaction that the current event is about, and whether it is being made now."""
        n = self.minute.shape[0]
        event = self.order[state.event]
        return event % n, event < n

    def observe(self, state):
        i, made = self._event(state)
        outcome = Outcome(i, Feedback(state.reward[i % self.capacity]))
        return Ask(Maybe(jnp.ones(self.rates.shape[-1], bool), made), Maybe(outcome, ~made))

    def oracle(self, state):
        return self.rates[self.minute[self._event(state)[0]]]

    def step(self, state, x):
        i, made = self._event(state)
        success = jax.random.uniform(noise(state.key, i)) < earned(self.oracle(state), x)
        slot, coming = i % self.capacity, (success & self.timely[i]).astype(jnp.float32)
        reward = state.reward.at[slot].set(jnp.where(made, coming, state.reward[slot]))
        new = SimulatorState(state.event + 1, reward, state.key)
        return new, Feedback(jnp.where(made, coming, 0.0), truncated=new.event >= self.order.shape[0])


def example() -> tuple[PaymentRouter, Ask]:
    """A router of three processors, and 40 events: transactions, and outcomes that come five events later."""
    n, k = 40, 3
    rng = np.random.default_rng(0)
    never = np.zeros(n, bool)
    rewards = rng.integers(0, 2, n).astype(np.float32)
    outcome = Outcome(np.arange(n, dtype=np.int32) - 5, Feedback(rewards, terminal=never, truncated=never))
    x = Maybe(rng.uniform(size=(n, k)) < 0.8, rng.uniform(size=n) < 0.9)
    return PaymentRouter(DiscountedUCB(k), capacity=8), Ask(x, Maybe(outcome, np.arange(n) > 5))
