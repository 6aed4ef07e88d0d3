"""All flights that left New York in 2013: will this one arrive more than 15 minutes late?

Each flight is asked about twice: when it is due to leave, and when it has left and its delay at the gate is known. The
label becomes known when it lands; a flight that is cancelled or diverted never gets one.
"""

from collections.abc import Iterator

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Array, Float

from anabranch import Learner, data
from anabranch.learn.linear import LogisticRegression, Scaled, adagrad

LATE = 15
"""Minutes."""


def events() -> pa.Table:
    """Two rows a flight, `schedule` and `departure`, in event-time order.

    A flight that leaves early is asked about at its scheduled time both times, first without its delay: that it has
    left already must not give it away.
    """
    table = data.flights()
    n = table.num_rows
    times = data.flight_times(table)
    number = lambda name: table[name].to_numpy().astype(np.float64)
    dep, arr = number("dep_delay"), number("arr_delay")
    never = np.full(n, np.nan)
    landed = np.where(np.isnan(arr), np.nan, times["landed"])
    day = (times["scheduled"] // 86_400).astype(np.int64)
    common = {
        "flight": np.arange(n),
        "aircraft": table["tailnum"].fill_null("unknown"),
        "origin": table["origin"],
        "dest": table["dest"],
        "route": pc.binary_join_element_wise(table["origin"], table["dest"], "-"),
        "carrier": table["carrier"],
        "number": table["flight"],
        "clock": number("hour") + number("minute") / 60,
        "weekday": ((day + 4) % 7).astype(np.float64),
        "distance": number("distance"),
        "late": np.where(np.isnan(arr), np.nan, arr > LATE),
        "landed": landed,
    }
    # What states learn from a landing, they learn once: from the second question.
    schedule = {
        "time": times["scheduled"],
        "moment": ["schedule"] * n,
        "dep_delay": never,
        "arr_delay": never,
        "gain": never,
    }
    left = {
        "time": np.maximum(times["left"], times["scheduled"]), "moment": ["departure"] * n, "dep_delay": dep,
        "arr_delay": arr, "gain": arr - dep,
    }  # fmt: skip
    second = pa.table({**left, **common}).filter(pa.array(~np.isnan(dep)))
    both = pa.concat_tables([pa.table({**schedule, **common}), second])
    departs = np.r_[np.zeros(n), np.ones(second.num_rows)]
    return both.take(pa.array(np.lexsort((both["flight"].to_numpy(), departs, both["time"].to_numpy()))))


class Shapes(Learner):
    """A learner on the inputs and on what a straight line cannot say of three of them.

    The last three inputs are the clock (hours), the weekday and the delay at the gate (minutes; NaN before departure);
    they are joined by the daily and weekly waves, and by the part of the delay beyond each of some knots.
    """

    learner: Learner
    knots: tuple[float, ...] = eqx.field(static=True)

    def _shape(self, x: Float[Array, " D"]) -> Float[Array, " E"]:
        rest, (clock, weekday, delay) = x[:-3], (x[-3], x[-2], x[-1])
        day, week = 2 * jnp.pi * clock / 24, 2 * jnp.pi * weekday / 7
        waves = jnp.stack([f(k * a) for a in (day, week) for k in (1, 2) for f in (jnp.sin, jnp.cos)])
        hinges = jnp.clip(delay - jnp.array(self.knots), 0, 30)
        return jnp.concatenate([rest, waves, hinges, jnp.clip(delay, -20, 180)[None]])

    def init(self, *, key=None):
        return self.learner.init(key=key)

    def predict(self, state, x):
        return self.learner.predict(state, self._shape(x))

    def learn(self, state, x, target, weight=1.0):
        return self.learner.learn(state, self._shape(x), target, weight)


def model(features: int, lr: float = 0.02) -> Learner:
    """Logistic regression on running-standardised shapes of the inputs."""
    knots = (-10, -5, 0, 5, 10, 15, 20, 25, 30, 40, 50, 60, 90)
    return Shapes(Scaled(LogisticRegression(features - 3 + 8 + len(knots) + 1, adagrad(lr))), knots)


# The same questions, answered another way.

Answers = Iterator[tuple[str, np.ndarray, np.ndarray, np.ndarray]]


def _labelled(table: pa.Table) -> Iterator[tuple[str, pa.Table]]:
    moments = np.array(table["moment"].to_pylist())
    landed = ~np.isnan(table["late"].to_numpy())
    for moment in ("schedule", "departure"):
        yield moment, table.filter(pa.array(landed & (moments == moment)))


def base_rate(table: pa.Table) -> Answers:
    """base rate so far"""
    for moment, rows in _labelled(table):
        time, known, late = (rows[name].to_numpy() for name in ("time", "landed", "late"))
        order = np.argsort(known, kind="stable")
        count = np.searchsorted(known[order], time, side="right")
        yield moment, time, late, (np.r_[0, np.cumsum(late[order])][count] + 0.25) / (count + 1)


def river_logistic(table: pa.Table) -> Answers:
    """River, online logistic"""
    from river import compose, linear_model, optim, preprocessing

    names = ("carrier", "origin", "dest")
    for moment, rows in _labelled(table):
        pipeline = compose.TransformerUnion(
            compose.Select(*names) | preprocessing.OneHotEncoder(),
            compose.Discard(*names) | preprocessing.StandardScaler(),
        ) | linear_model.LogisticRegression(optim.AdaGrad(0.05))
        time, known, late = (rows[name].to_numpy() for name in ("time", "landed", "late"))
        numbers = ["clock", "weekday", "distance"] + (["dep_delay"] if moment == "departure" else [])
        xs = rows.select([*numbers, *names]).to_pylist()
        # Labels come when the flight has landed: one list of questions and labels in the order of time.
        order = np.lexsort((np.repeat([0, 1], len(time)), np.r_[known, time]))
        told, n = np.full(len(time), 0.5), len(time)
        for i in order.tolist():
            if i < n:
                pipeline.learn_one(xs[i], bool(late[i]))
            else:
                told[i - n] = pipeline.predict_proba_one(xs[i - n]).get(True, 0.5)
        yield moment, time, late, told


def monthly_refit(table: pa.Table) -> Answers:
    """logistic, refitted monthly"""
    from sklearn.compose import make_column_transformer
    from sklearn.linear_model import LogisticRegression as Batch
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    names = ["carrier", "origin", "dest"]
    for moment, rows in _labelled(table):
        time, known, late = (rows[name].to_numpy() for name in ("time", "landed", "late"))
        numbers = ["clock", "weekday", "distance"] + (["dep_delay"] if moment == "departure" else [])
        frame = rows.select([*numbers, *names]).to_pandas()
        month = time.astype("datetime64[s]").astype("datetime64[M]")
        told = np.full(len(time), 0.5)
        for start in np.unique(month)[1:]:
            past, now = known < start.astype("datetime64[s]").astype(np.int64), month == start
            columns = make_column_transformer(
                (StandardScaler(), numbers), (OneHotEncoder(handle_unknown="ignore"), names)
            )
            fitted = make_pipeline(columns, Batch(max_iter=300)).fit(frame[past], late[past])
            told[now] = fitted.predict_proba(frame[now])[:, 1]
        yield moment, time, late, told
