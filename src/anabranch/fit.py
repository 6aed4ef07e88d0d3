"""One trainer: gradient steps compiled in chunks, for one loss or for several parts that train against each other.

    >>> import jax, jax.numpy as jnp, optax
    >>> x = jnp.linspace(-1, 1, 64)
    >>> def loss(slope, batch, key):
    ...     return jnp.mean((slope * batch[0] - batch[1]) ** 2)
    >>> slope, history = fit(loss, jnp.zeros(()), (x, 3 * x), optax.sgd(0.5), 100, key=jax.random.PRNGKey(0))
    >>> round(float(slope), 4)
    3.0

Parts that train in turn, such as the two sides of a GAN, have a loss, an optimiser and a ratio each:

    fit({"critic": Part(critic_loss, optax.adam(2e-4), lambda m: m.critic),
         "generator": Part(generator_loss, optax.adam(1e-4), lambda m: m.generator, every=5)},
        model, batch, steps=10_000, key=key, ema=0.999)

How a gradient is computed can be chosen: `Backprop` is the plain way, and `learn` has others that save memory or need
no backward pass. Any of them stands where a loss does.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree
from rich.console import Console
from rich.progress import Progress

from anabranch.cell import noise

M = TypeVar("M")
Loss = Callable[[Any, Any, PRNGKeyArray], Float[Array, ""]]


class Backprop(eqx.Module):
    """A way to get the gradient of a loss: here reverse-mode differentiation, as JAX does it.

    >>> square = Backprop(lambda model, batch, key: jnp.sum(model**2))
    >>> value, gradient = square.value_and_grad(jnp.array([1.0, 2.0]), None, jax.random.PRNGKey(0))
    >>> float(value), gradient.tolist()
    (5.0, [2.0, 4.0])
    """

    loss: Loss = eqx.field(static=True)
    """`loss(model, batch, key) -> scalar`."""
    exact: ClassVar[bool] = True
    """False when the gradient is an estimate, or one by a rule of its own."""

    def value_and_grad(self, model: M, batch: Any, key: PRNGKeyArray) -> tuple[Float[Array, ""], M]:
        """The loss, and its gradient with respect to the floating-point arrays of the model; None for all else."""
        return eqx.filter_value_and_grad(self.loss)(model, batch, key)

    def memory(self, model: Any, batch: Any) -> int:
        """Bytes that the compiled gradient needs beyond its arguments and results, as the compiler counts them.

        Arrays of `model` and `batch` may be `jax.ShapeDtypeStruct`: nothing is run.
        """
        arrays, static = eqx.partition((model, batch), lambda x: hasattr(x, "shape"))

        def gradient(arrays, key):
            model, batch = eqx.combine(arrays, static)
            return eqx.filter(self.value_and_grad(model, batch, key), eqx.is_array)

        analysis: Any = jax.jit(gradient).lower(arrays, jax.random.PRNGKey(0)).compile().memory_analysis()
        return int(analysis.temp_size_in_bytes)


class Part(NamedTuple):
    """What trains together: the arrays that `where` picks from the model, by their own loss and optimiser."""

    loss: Loss | Backprop
    """`loss(model, batch, key) -> scalar`; the gradient reaches the arrays of this part only. Or a way to get it."""
    optimizer: optax.GradientTransformation
    where: Callable[[Any], Any] = lambda model: model
    """The subtree, or a tuple of subtrees, that trains; all else is frozen."""
    every: int = 1
    """Updated at the steps that this divides."""


class _Carry(NamedTuple):
    params: PyTree
    """All arrays of the model; None elsewhere."""
    opt: dict[str, PyTree]
    ema: PyTree
    losses: dict[str, Array]
    """Those of the current chunk."""


def fit(
    loss: Loss | Backprop | Mapping[str, Part],
    model: M,
    data: Callable[[PRNGKeyArray, Array], Any] | PyTree,
    optimizer: optax.GradientTransformation | None = None,
    steps: int = 1000,
    *,
    key: PRNGKeyArray,
    where: Callable[[M], Any] | None = None,
    batch_size: int | None = None,
    ema: float | None = None,
    validate: Callable[[M], Float[Array, ""]] | None = None,
    patience: int | None = None,
    check: int | None = None,
) -> tuple[M, dict[str, np.ndarray]]:
    """Train a model.

    Arguments:
        loss: `loss(model, batch, key) -> scalar` or a `Backprop`, or named parts, which are updated in the order given
            at each step.
        model: any pytree; its floating-point arrays train, whatever else it holds is left alone.
        data: `batch(key, i) -> batch`, traced; or arrays with a common leading axis, of which `batch_size` rows are
            drawn with replacement at each step (all rows, in order, without `batch_size`). `Epochs` is such a function
            that goes through arrays in shuffled passes.
        optimizer: for a single loss; parts have their own.
        steps: how many.
        where: for a single loss, the subtree or the tuple of subtrees that trains; all else is frozen.
        ema: decay of an average of the weights, without bias towards the first ones; the average is what is validated
            and returned.
        validate: `validate(model) -> scalar`, lower is better, asked before the first step and after every `check`
            steps; the best model seen is returned.
        patience: stop after so many checks without improvement.
        check: steps in one compiled chunk; a tenth of `steps` unless said.

    Returns:
        The model, and the history: the loss of every step under `"loss"` or the name of its part (NaN where the part
        was not updated), and with `validate` its values under `"validation"` and their steps under `"step"`.

    Raises:
        ValueError: arguments that do not fit together, or a part without any floating-point array.
        FloatingPointError: a loss is not finite; the message names the part and the step.
    """
    parts = _parts(loss, optimizer, where)
    check = max(1, -(-steps // 10)) if check is None else min(check, steps)
    if steps < 1 or check < 1:
        raise ValueError(f"steps and check must be at least 1, got steps={steps} and check={check}")
    if ema is not None and not 0 < ema < 1:
        raise ValueError(f"ema must lie between 0 and 1, got {ema}")
    if patience is not None and (validate is None or patience < 1):
        raise ValueError(f"patience counts checks of `validate` and must be at least 1, got {patience}")
    if callable(data) and batch_size is not None:
        raise ValueError("batch_size is for arrays; a function returns batches of the size it likes")

    model = jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, model)
    data = data if callable(data) else jax.tree.map(jnp.asarray, data)
    params, static = eqx.partition(model, eqx.is_array)
    opt = {name: part.optimizer.init(_split(part, params)[0]) for name, part in parts.items()}
    for name, part in parts.items():
        if not jax.tree.leaves(_split(part, params)[0]):
            raise ValueError(f"part {name!r} trains nothing: `where` picks no floating-point array")
    carry = _Carry(params, opt, params, {name: jnp.zeros(check) for name in parts})

    order = tuple(parts.items())  # a dict would come out of jit sorted by name
    history: dict[str, list] = {name: [] for name in parts} | ({"validation": [], "step": []} if validate else {})
    best, best_value, misses = params, jnp.inf, 0
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("fit", total=steps)
        for start in range(-check, steps, check):  # the first round only validates
            stop = min(start + check, steps)
            if start >= 0:
                carry = _chunk(order, static, data, batch_size, ema, key, jnp.int32(start), jnp.int32(stop), carry)
                for name, losses in carry.losses.items():
                    history[name].append(values := np.asarray(losses)[: stop - start])
                    due = np.arange(start, stop) % parts[name].every == 0
                    if (bad := np.flatnonzero(due & ~np.isfinite(values))).size:
                        raise FloatingPointError(f"{name} is {values[bad[0]]} at step {start + bad[0]}")
            if validate is not None:
                value = float(eqx.filter_jit(validate)(eqx.combine(carry.ema, static)))
                history["validation"].append(value)
                history["step"].append(stop)
                misses += 1
                if value < best_value:
                    best, best_value, misses = carry.ema, value, 0
                if patience is not None and misses >= patience:
                    break
            progress.update(task, completed=stop)
    return (
        eqx.combine(best if validate is not None else carry.ema, static),
        {name: np.concatenate(v) if name in parts and v else np.asarray(v) for name, v in history.items()},
    )


class Epochs(eqx.Module):
    """Batches that go through the rows of arrays again and again, shuffled anew for each pass.

    The rows that are left at the end of a pass, too few for a batch, are passed over in it.

        >>> batch = Epochs(jnp.arange(6), 2, jax.random.PRNGKey(0))
        >>> sorted(int(x) for i in range(3) for x in batch(jax.random.PRNGKey(1), i))
        [0, 1, 2, 3, 4, 5]

    Raises:
        ValueError: if there are fewer rows than `batch_size`.
    """

    arrays: PyTree
    batch_size: int = eqx.field(static=True)
    key: PRNGKeyArray

    def __init__(self, arrays: PyTree, batch_size: int, key: PRNGKeyArray):
        rows = len(jax.tree.leaves(arrays)[0])
        if not 0 < batch_size <= rows:
            raise ValueError(f"batch_size must be between 1 and the number of rows, {rows}, got {batch_size}")
        self.arrays, self.batch_size, self.key = jax.tree.map(jnp.asarray, arrays), batch_size, key

    def __call__(self, _: PRNGKeyArray, i: Array) -> Any:
        rows = len(jax.tree.leaves(self.arrays)[0])
        passes = rows // self.batch_size
        order = jax.random.permutation(noise(self.key, i // passes, "epoch"), rows)
        mine = jax.lax.dynamic_slice_in_dim(order, i % passes * self.batch_size, self.batch_size)
        return jax.tree.map(lambda x: x[mine], self.arrays)


def _is_none(x: Any) -> bool:
    return x is None


def _parts(loss: Any, optimizer: Any, where: Any) -> dict[str, Part]:
    if not isinstance(loss, Mapping):
        if optimizer is None:
            raise ValueError("a single loss needs an optimizer")
        return {"loss": Part(loss, optimizer) if where is None else Part(loss, optimizer, where)}
    if optimizer is not None or where is not None:
        raise ValueError("parts bring their own optimizer and `where`")
    for name, part in loss.items():
        if name in ("validation", "step", "batch") or part.every < 1:
            raise ValueError(f"part {name!r}: a reserved name, or every={part.every} below 1")
    if not loss:
        raise ValueError("there are no parts to train")
    return dict(loss)


def _split(part: Part, params: PyTree) -> tuple[PyTree, PyTree]:
    """What the part trains and what it leaves alone."""
    nothing = jax.tree.map(lambda _: False, params)
    mask = eqx.tree_at(part.where, nothing, replace_fn=lambda tree: jax.tree.map(lambda _: True, tree))
    return eqx.partition(params, jax.tree.map(lambda x, m: m and eqx.is_inexact_array(x), params, mask))


@eqx.filter_jit
def _chunk(parts, static, data, batch_size, ema, key, start, stop, carry):
    """Steps `start` to `stop`. The bounds are traced: all chunks of all calls with the same parts compile once."""

    def step(i, carry: _Carry) -> _Carry:
        batch = _batch(data, batch_size, noise(key, i, "batch"), i)
        params, opt, losses = carry.params, dict(carry.opt), dict(carry.losses)
        for name, part in parts:

            def update(params, opt, part=part, name=name):
                trained, frozen = _split(part, params)

                if isinstance(part.loss, Backprop):
                    whole = eqx.combine(trained, frozen, static)
                    loss, grads = part.loss.value_and_grad(whole, batch, noise(key, i, name))
                    grads = jax.tree.map(lambda x, g: None if x is None else g, trained, grads, is_leaf=_is_none)
                else:

                    def value(trained):
                        return part.loss(eqx.combine(trained, frozen, static), batch, noise(key, i, name))

                    loss, grads = jax.value_and_grad(value)(trained)
                updates, opt = part.optimizer.update(grads, opt, trained)
                return eqx.combine(optax.apply_updates(trained, updates), frozen), opt, loss.astype(jnp.float32)

            def skip(params, opt):
                return params, opt, jnp.float32(jnp.nan)

            if part.every == 1:
                params, opt[name], loss = update(params, opt[name])
            else:
                params, opt[name], loss = jax.lax.cond(i % part.every == 0, update, skip, params, opt[name])
            losses[name] = losses[name].at[i - start].set(loss)
        if ema is None:
            return _Carry(params, opt, params, losses)
        # The weights ema**age, normalised: a running mean at first, an exponential one later.
        rate = (1 - ema) / -jnp.expm1((i + 1) * math.log(ema))
        mean = jax.tree.map(lambda m, p: m + rate * (p - m) if eqx.is_inexact_array(p) else p, carry.ema, params)
        return _Carry(params, opt, mean, losses)

    return jax.lax.fori_loop(start, stop, step, carry)


def _batch(data, batch_size, key, i):
    if callable(data):
        return data(key, i)
    if batch_size is None:
        return data
    rows = jax.random.randint(key, (batch_size,), 0, jax.tree.leaves(data)[0].shape[0])
    return jax.tree.map(lambda x: x[rows], data)
