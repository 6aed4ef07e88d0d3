"""Mirror speculative decoding: the draft guesses the next window while the model still verifies this one.

Bhendawade et al., "Mirror Speculative Decoding: Breaking the Serial Barrier in LLM Inference", arXiv 2510.13161, 2025.
After some of its layers the model leaves by an exit: at each place of the window, the tokens that it is likeliest to
say there itself. For each place and token the draft goes on as if that were the correction, while the model does its
other layers. If the correction is one of those foreseen, the next window is there when verification ends; if not, the
draft starts anew. What is said does not depend on any of this.

    >>> decoder, xs = example()
    >>> state, said = eqx.filter_jit(decoder.step)(decoder.init(), xs[0])
    >>> said.tokens.shape, state.window.tokens.shape, state.hit.dtype
    ((3,), (2,), dtype('bool'))

The stream of the cell is a text; one step is one round. The parts of a round are methods, `lower`, `branches`, `upper`
and `end`: `step` runs them in one program, `Overlapped` runs `branches` beside `upper` in a thread of its own.
`mirror_plan` says how long rounds take if model and draft have a device each.

The paper's draft is a language model of its own. Ours may be one that reads the model's features
(`heads.FeatureDraft`): those of this window are not there yet when it goes on, so that it uses its own in their place,
and guesses a little worse after a hit than after a miss. How the paper trains the exit is not said; ours is
`heads.Exit`, or nothing. Where a branch would correct a guess by the same guess, it is given to the next token.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from anabranch.branch import branch
from anabranch.cell import Cell, noise
from anabranch.decode.drafts import Draft, Drafted, NGram, Rule
from anabranch.decode.heads import Exit, Frequent, Heads
from anabranch.decode.speculation import Emitted, read_prompt, rule_of, settle, within
from anabranch.models.llama import Config, Decoder, Llama, Session
from anabranch.plan import Op, Plan, PlanBuilder


class Mirrored(NamedTuple):
    """One text, and what was guessed of it."""

    session: Session
    """All of it but the last token has been read by the model."""
    draft: Any
    window: Drafted
    """The guesses for the next round."""
    hit: Bool[Array, ""]
    """Whether they were made while the model verified the last ones."""
    last: Int[Array, ""]
    round: Int[Array, ""]
    key: PRNGKeyArray


class Half(NamedTuple):
    """A round when the model is at its exit."""

    h: Float[Array, "W+1 d"]
    memory: tuple[Any, ...]
    foreseen: Int[Array, "W+1 k"]
    """Tokens that may come at each place of the window, and after it."""


class MirrorDecoder(Cell):
    """A model and a draft that works beside it: each step says some tokens of one text. The input is not looked at.

    `begin` gives it a prompt; without one the text starts with token 0.

    Arguments:
        exit_layer: layers before the exit; fewer leave the draft more time, and foresee worse.
        window: tokens that are guessed in a round, γ.
        foreseen: tokens that are tried at each place, κ.
        heads: a trained exit, and the frequent tokens among which it chooses; without, the unembedding as it is.
        temperature: at which tokens are drawn; 0 takes the likeliest.

    Raises:
        ValueError: if a size is out of range, or the heads have no exit after this layer.
    """

    smooth = False
    target: Decoder
    draft: Draft
    exit: Exit | None
    frequent: Frequent
    exit_layer: int = eqx.field(static=True)
    window: int = eqx.field(static=True)
    foreseen: int = eqx.field(static=True)
    temperature: float = eqx.field(static=True)

    def __init__(
        self,
        target: Decoder,
        draft: Draft,
        exit_layer: int,
        window: int = 4,
        foreseen: int = 1,
        heads: Heads | None = None,
        temperature: float = 0.0,
    ):
        ids = jnp.arange(target.config.vocab) if heads is None else heads.ids
        for name, value, low, high in (
            ("exit_layer", exit_layer, 1, len(target.layers) - 1),
            ("window", window, 1, target.size - 1),
            ("foreseen", foreseen, 1, len(ids) - 1),
        ):
            if not low <= value <= high:
                raise ValueError(f"{name} must be from {low} to {high}, got {value}")
        if temperature < 0:
            raise ValueError(f"temperature must not be negative, got {temperature}")
        self.target, self.draft, self.exit_layer = target, draft, exit_layer
        self.exit = None if heads is None else heads.exit(exit_layer)
        self.frequent = Frequent.of(target, ids)
        self.window, self.foreseen, self.temperature = window, foreseen, temperature

    @property
    def rule(self) -> Rule:
        """How a token is drawn."""
        return rule_of(self.temperature)

    def init(self, *, key: PRNGKeyArray | None = None) -> Mirrored:
        rng = jax.random.PRNGKey(0) if key is None else key
        return self._begun(jnp.zeros(1, jnp.int32), jnp.int32(1), rng)

    def begin(self, state: Mirrored, prompt: Int[Array, " T"], n: Int[Array, ""] | int) -> Mirrored:
        """Read the first n of T tokens, n at least 1, as the beginning of the text."""
        return self._begun(prompt, jnp.asarray(n, jnp.int32), state.key)

    def _begun(self, prompt: Int[Array, " T"], n: Int[Array, ""], key: PRNGKeyArray) -> Mirrored:
        session, draft = read_prompt(self.target, self.draft, prompt, n)
        zero = jnp.int32(0)
        return Mirrored(
            session, draft, self.anew(draft, key, zero), jnp.array(False), prompt[n - 1].astype(jnp.int32), zero, key
        )

    def anew(self, draft: Any, key: PRNGKeyArray, round: Int[Array, ""]) -> Drafted:
        """The guesses of a draft that starts after verification."""
        return self.draft.propose(draft, noise(key, round, "draft"), self.window, self.rule)

    def step(self, state: Mirrored, x: Any = None) -> tuple[Mirrored, Emitted]:
        half = self.lower(state)
        windows = self.branches(state, half.foreseen)
        h, memory = self.upper(state, half)
        state, said = self.end(state, h, memory, half.foreseen, windows)
        window = branch(
            state.hit, lambda state: state.window, lambda state: self.anew(state.draft, state.key, state.round), state
        )
        return state._replace(window=window), said

    def lower(self, state: Mirrored) -> Half:
        """The layers before the exit, and what is foreseen there."""
        xs = jnp.concatenate([state.last[None], state.window.tokens])
        positions = state.session.length + jnp.arange(len(xs))
        h = self.target.embedding[xs]
        h, memory = self.target.run_layers(h, state.session.memory, positions, 0, self.exit_layer)
        logits = self.frequent(h if self.exit is None else self.exit(h))
        refused = jnp.append(state.window.tokens, -1)[:, None] == self.frequent.ids
        _, best = lax.top_k(jnp.where(refused, -jnp.inf, logits), self.foreseen)
        return Half(h, memory, self.frequent.ids[best])

    def upper(self, state: Mirrored, half: Half) -> tuple[Float[Array, "W+1 d"], tuple[Any, ...]]:
        """The other layers."""
        positions = state.session.length + jnp.arange(self.window + 1)
        return self.target.run_layers(half.h, half.memory, positions, self.exit_layer)

    def branches(self, state: Mirrored, foreseen: Int[Array, "W+1 k"]) -> Drafted:
        """The guesses if the text goes on with r of this window and then with a foreseen token, for all of these."""

        def along(draft, token):
            after = self.draft.follow(draft, token)
            return after, after

        _, after = lax.scan(along, state.draft, state.window.tokens)
        after = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), state.draft, after)

        def one(draft, token, i):
            key = noise(noise(state.key, state.round, "branch"), i)
            return self.draft.propose(self.draft.follow(draft, token), key, self.window, self.rule)

        numbers = jnp.arange(foreseen.size).reshape(foreseen.shape)
        return jax.vmap(jax.vmap(one, (None, 0, 0)))(after, foreseen, numbers)

    def end(
        self,
        state: Mirrored,
        h: Float[Array, "W+1 d"],
        memory: tuple[Any, ...],
        foreseen: Int[Array, "W+1 k"],
        windows: Drafted,
    ) -> tuple[Mirrored, Emitted]:
        """Verify; where the correction was foreseen (`hit`) the next window is the one made for it."""
        length = state.session.length
        drafted, room = within(state.window, length, self.target.size)
        key = noise(state.key, state.round, "verify")
        said = settle(key, drafted, self.target.logits(h), self.rule, room)
        at = jnp.maximum(said.n - 1, 0)
        same = foreseen[at] == said.tokens[at]
        window = jax.tree.map(lambda x: x[at, jnp.argmax(same)], windows)
        last = jnp.where(room, said.tokens[at], state.last)
        draft = self.draft.read(state.draft, said.tokens, h, said.n)
        session = Session(memory, length + said.n)
        return Mirrored(session, draft, window, same.any() & room, last, state.round + 1, state.key), said


class Overlapped:
    """Runs a `MirrorDecoder` with the draft in a thread of its own, so that two cores may work at a time.

    The compiled parts run outside of Python's lock. The state that `step` is given is used up.
    """

    def __init__(self, decoder: MirrorDecoder):
        arrays, rest = eqx.partition(decoder, eqx.is_array)
        whole = lambda arrays: eqx.combine(arrays, rest)
        self.arrays = arrays
        held = lambda memory, state: state._replace(session=state.session._replace(memory=memory))
        self.lower = jax.jit(lambda arrays, m, state: whole(arrays).lower(held(m, state)), donate_argnums=1)
        self.upper = jax.jit(lambda arrays, m, state, half: whole(arrays).upper(state, half._replace(memory=m)),
                             donate_argnums=1)  # fmt: skip
        self.branches = jax.jit(lambda arrays, state, foreseen: whole(arrays).branches(state, foreseen))
        self.end = jax.jit(lambda arrays, *args: whole(arrays).end(*args), donate_argnums=3)
        self.anew = jax.jit(lambda arrays, *args: whole(arrays).anew(*args))
        self.thread = ThreadPoolExecutor(1)

    def step(self, state: Mirrored) -> tuple[Mirrored, Emitted]:
        """One round; the same as that of the cell."""
        arrays, memory = self.arrays, state.session.memory
        state = state._replace(session=state.session._replace(memory=()))
        half = self.lower(arrays, memory, state)
        memory, half = half.memory, half._replace(memory=())
        side = self.thread.submit(lambda: jax.block_until_ready(self.branches(arrays, state, half.foreseen)))
        h, memory = self.upper(arrays, memory, state, half)
        jax.block_until_ready(h)
        state, said = self.end(arrays, state, h, memory, half.foreseen, side.result())
        if not bool(state.hit):
            state = state._replace(window=self.anew(arrays, state.draft, state.key, state.round))
        return state, said

    def close(self) -> None:
        """End the thread."""
        self.thread.shutdown()


class Times(NamedTuple):
    """Seconds of the parts of a round."""

    lower: float
    upper: float
    """With verification."""
    branches: float
    anew: float
    """To read what was said and to guess from there."""


def mirror_plan(times: Times, hits: Sequence[bool]) -> Plan:
    """Rounds on two lanes, the model's and the draft's, of which each hit or missed; a window must be there first.

    A hit leaves the draft's reading of what was said for the time of the next `lower`; here it is part of `branches`.
    """
    b = PlanBuilder(name="mirror")
    model, draft = b.lane(0), b.lane(1)
    window = b.add(Op.DECODE, draft, times.anew, micro=-1)
    for i, hit in enumerate(hits):
        lower = b.add(Op.PREFILL, model, times.lower, stage=0, micro=i, after=[window])
        branches = b.add(Op.DECODE, draft, times.branches, micro=i, after=[lower])
        upper = b.add(Op.PREFILL, model, times.upper, stage=1, micro=i, after=[lower])
        window = branches
        if not hit:
            window = b.add(Op.DECODE, draft, times.anew, micro=i, after=[upper])
    return b.build()


def example() -> tuple[MirrorDecoder, Int[Array, " T"]]:
    """A text of a tiny model, with n-grams as draft."""
    sizes = Config(vocab=11, width=16, layers=3, heads=4, kv_heads=2, hidden=24)
    target = Decoder(Llama(sizes, key=jax.random.PRNGKey(0)), size=64)
    return MirrorDecoder(target, NGram(64), exit_layer=2, window=2, foreseen=2), jnp.arange(12)
