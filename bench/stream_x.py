"""Stream Q(λ) on CartPole, transitions a second, against the same algorithm in PyTorch; and what each technique is for.

Theirs is how it is usually written: gymnasium's CartPole, statistics in NumPy, a network and its traces in PyTorch, one
transition after the other in Python. Ours is agent and world in one compiled scan, for one seed and for 30 side by
side. Both update the same network by the same rule: before the clock starts, PyTorch learns from 500 transitions of
ours, and its weights must end within 1e-4 of ours. They start half dense there: a first layer without any weight, which
five inputs get at the paper's sparsity, stretches rounding errors from 3e-8 to 0.1. They run in turns.

Then, with the seeds side by side, CartPole with one technique taken away at a time: median return of the last tenth.
`python bench/stream_x.py [--smoke]` writes `bench/results/stream_x.json`.
"""

import argparse
import time

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import torch

from anabranch import noise
from anabranch.decide.classic import CartPole, EpisodeReturn
from anabranch.decide.stream_x import StreamQ
from anabranch.decide.traced import Net, ObGD
from anabranch.drive import play, play_seeds
from common import in_turn, ratio, spread, timed, write

GAMMA, LAM, KAPPA, HIDDEN, LIMIT, EXPLORE = 0.99, 0.8, 2.0, 32, 500, 5_000


class Running:
    """Mean and variance of what has been seen."""

    def __init__(self, shape: tuple[int, ...] = ()):
        self.n, self.mean, self.p = 0, np.zeros(shape), np.zeros(shape)

    def scale(self, x: np.ndarray | float) -> np.ndarray:
        """Take x in, and give the standard deviation."""
        self.n += 1
        before = x - self.mean
        self.mean = self.mean + before / self.n
        self.p = self.p + before * (x - self.mean)
        return np.sqrt((self.p / (self.n - 1) if self.n > 1 else np.ones_like(self.p)) + 1e-8)


class Peer:
    """Stream Q(λ) in PyTorch."""

    def __init__(self, net: Net):
        """Arguments: net: the initial weights."""
        self.layers = [
            torch.tensor(np.array(leaf), requires_grad=True) for pair in zip(net.weights, net.biases) for leaf in pair
        ]
        self.traces = [torch.zeros_like(p) for p in self.layers]
        self.seen, self.returns, self.total, self.clock, self.t = Running((4,)), Running(), 0.0, 0, 0
        self.rng = np.random.default_rng(0)

    def q(self, x: torch.Tensor) -> torch.Tensor:
        for weight, bias in zip(self.layers[:-2:2], self.layers[1:-2:2]):
            x = torch.nn.functional.linear(x, weight, bias)
            x = torch.nn.functional.leaky_relu(torch.nn.functional.layer_norm(x, x.shape))
        return torch.nn.functional.linear(x, self.layers[-2], self.layers[-1])

    def look(self, x: np.ndarray) -> torch.Tensor:
        scale = self.seen.scale(x)
        x = np.append((x - self.seen.mean) / scale, max(self.clock - 1, 0) / LIMIT - 0.5)
        return torch.tensor(x, dtype=torch.float32)

    def act(self, x: torch.Tensor) -> tuple[int, bool]:
        self.t += 1
        with torch.no_grad():
            best = int(self.q(x).argmax())
        epsilon = max(1 - 0.99 * self.t / EXPLORE, 0.01)
        action = int(self.rng.integers(2)) if self.rng.random() < epsilon else best
        return action, action == best

    def learn(
        self, x: torch.Tensor, action: int, greedy: bool, reward: float, last: np.ndarray, stop: bool
    ) -> torch.Tensor:
        """Learn from one transition; gives the next input."""
        self.total = self.total * GAMMA * (not stop) + reward
        reward /= float(self.returns.scale(self.total))
        self.clock += 1
        after = self.look(last)
        with torch.no_grad():
            goal = reward + GAMMA * (not stop) * self.q(after).max()
        value = self.q(x)[action]
        gradient = torch.autograd.grad(value, self.layers)
        delta = float(goal - value.detach())
        norm = 0.0
        for z, g in zip(self.traces, gradient):
            z.mul_(GAMMA * LAM).add_(g)
            norm += float(z.abs().sum())
        step = 1 / max(1.0, KAPPA * max(abs(delta), 1.0) * norm)
        with torch.no_grad():
            for p, z in zip(self.layers, self.traces):
                p.add_(z, alpha=step * delta)
                if stop or not greedy:
                    z.zero_()
        if stop:
            self.clock = 0
        return after


def agree(agent: StreamQ, steps: int = 500) -> float:
    """The largest difference of a weight, once PyTorch has learned from the transitions of ours."""
    key = jax.random.PRNGKey(1)
    result = play(agent, CartPole(), steps, key=key)
    assert result.ticks is not None
    ticks = jax.tree.map(np.asarray, result.ticks)
    peer = Peer(agent.init(key=noise(key, 0, "player")).q.net)
    x = peer.look(ticks.x[0])
    for t in range(steps):
        feedback, decision = ticks.feedback, ticks.decision
        stop = bool(feedback.terminal[t] or feedback.truncated[t])
        x = peer.learn(
            x,
            int(decision.action[t]),
            bool(decision.aux.greedy[t]),
            float(feedback.reward[t]),
            feedback.info["last_x"][t],
            stop,
        )
        if stop:
            x = peer.look(feedback.x[t])
    net = result.state["policy"].q.net
    leaves = [leaf for pair in zip(net.weights, net.biases) for leaf in pair]
    return max(float(np.abs(np.asarray(a) - b.detach().numpy()).max()) for a, b in zip(leaves, peer.layers))


def theirs(agent: StreamQ, steps: int) -> float:
    """Seconds for so many transitions, in PyTorch."""
    env = gymnasium.make("CartPole-v1")
    peer = Peer(agent.init(key=jax.random.PRNGKey(0)).q.net)
    start = time.perf_counter()
    x = peer.look(env.reset(seed=0)[0])
    for _ in range(steps):
        action, greedy = peer.act(x)
        last, reward, terminal, truncated, _ = env.step(action)
        x = peer.learn(x, action, greedy, float(reward), last, terminal or truncated)
        if terminal or truncated:
            x = peer.look(env.reset()[0])
    return time.perf_counter() - start


class SGD(ObGD):
    """TD(λ) with a fixed learning rate, `alpha`."""

    def update(self, trace, memory, delta):
        return jax.tree.map(lambda z: self.alpha * delta * z, trace), memory


def ablation(agent: StreamQ, steps: int, keys: jax.Array) -> dict[str, float]:
    """Median return of the last tenth, with one technique taken away at a time."""
    without = {
        "nothing": {},
        "sparse initialisation": {"sparsity": 0.0},
        "layer normalisation": {"layernorm": False},
        "normalised observations and scaled rewards": {"normalised": False},
        "bounded steps (SGD 1e-3)": {"rule": SGD(alpha=1e-3)},
        "traces": {"lam": 0.0},
    }
    found = {}
    for name, options in without.items():
        fields = {"limit": LIMIT, "explore": agent.explore, "hidden": HIDDEN} | options
        meters = {"return": EpisodeReturn(steps - steps // 10)}
        variant = StreamQ(CartPole.dim, CartPole.n_actions, **fields)
        found[name] = float(np.median(play_seeds(variant, CartPole(), steps, keys, meters=meters).scores["return"]))
        print(f"without {name}: {found[name]:.0f}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    steps, few, seeds, repeats = (2_000, 200, 3, 1) if args.smoke else (100_000, 3_000, 30, 5)
    torch.set_num_threads(1)  # networks of this size are slower on two
    agent = StreamQ(CartPole.dim, CartPole.n_actions, hidden=HIDDEN, limit=LIMIT, explore=EXPLORE)
    difference = agree(eqx.tree_at(lambda a: a.sparsity, agent, 0.5))
    assert difference <= 1e-4, f"PyTorch ends {difference:.2g} away from ours"

    keys = jnp.stack([jax.random.PRNGKey(i) for i in range(seeds)])
    # All of the state comes back: what nobody asks for would not be computed.
    run = eqx.filter_jit(lambda keys, n: play_seeds(agent, CartPole(), n, keys).state)
    runs = {
        "ours, 1 seed": lambda: steps / timed(lambda: jax.block_until_ready(run(keys[:1], steps)))[1],
        f"ours, {seeds} seeds": lambda: seeds * steps / timed(lambda: jax.block_until_ready(run(keys, steps)))[1],
        "PyTorch": lambda: few / theirs(agent, few),
    }
    for warm_up in runs.values():
        warm_up()
    rates = in_turn(runs, repeats)
    found = {name: {"transitions/s": spread(values)} for name, values in rates.items()}
    for name in list(runs)[:2]:
        found[name]["over PyTorch"] = ratio(rates[name], rates["PyTorch"])
    for name, one in found.items():
        print(f"{name}: {one}", flush=True)
    record = {"difference of weights": difference, "found": found, "median return": ablation(agent, steps, keys[:5])}
    if not args.smoke:
        print(write("stream_x", record, "anabranch", "jax", "torch", "gymnasium"))


if __name__ == "__main__":
    main()
