"""What `listen.toml` serves: a voice activity detector that keeps a noise floor for each stream."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from anabranch import Cell

RATE, FRAME = 16_000, 160
BINS = FRAME + 1
"""Of the spectrum of two frames: one each 50 Hz."""
FIRST = 10
"""Frames at the beginning of a stream that are taken for noise."""
SNR = 10**1.5
"""How much louder than the noise speech is taken to be where there is some: 15 dB, the paper's."""


class Heard(NamedTuple):
    """What is said of a frame."""

    level: Float[Array, ""]
    """Decibels below the loudest, a full-scale square wave."""
    score: Float[Array, ""]
    """Mean log-likelihood ratio of speech against noise; below 0 it is noise."""
    active: Bool[Array, ""]
    """Somebody speaks, or has within the last `hangover` frames."""
    frequency: Float[Array, ""]
    """The strongest above the noise floor, in Hz; 0 while nobody speaks."""


class ListenerState(NamedTuple):
    """Where the stream has come to, and what its noise is like."""

    n: Int[Array, ""]
    before: Float[Array, " frame"]
    """The last frame: spectra overlap by half."""
    noise: Float[Array, " bins"]
    """Power of the noise."""
    presence: Float[Array, " bins"]
    """Smoothed probability that there is speech."""
    silent: Int[Array, ""]
    """Frames since the score was last above the threshold."""


class Listener(Cell):
    """A voice activity detector: Sohn's likelihood ratio over Gerkmann and Hendriks' noise floor.

    x is i16[160], 10 ms at 16 kHz. In each bin the probability of speech follows from how far the power is above the
    noise, at a fixed prior ratio; the noise floor follows the power as far as there is none. The decision is on the
    mean of the bins' log-likelihood ratios. A sound that stays as it is becomes noise within seconds: what is detected
    is what changes, be it a voice or not.

    Sohn, Kim & Sung, "A statistical model-based voice activity detection", IEEE Signal Processing Letters 6, 1999.
    Gerkmann & Hendriks, "Unbiased MMSE-based noise power estimation with low complexity and low tracking delay", IEEE
    Transactions on Audio, Speech, and Language Processing 20, 2012.
    """

    threshold: float = 0.0
    """Of the score."""
    hangover: int = 8
    """Frames for which it stays active: voices pause within words."""

    def init(self, *, key=None) -> ListenerState:
        zeros = jnp.zeros(BINS)
        return ListenerState(jnp.int32(0), jnp.zeros(FRAME), zeros, zeros, jnp.int32(self.hangover))

    def step(self, state: ListenerState, x: Int[Array, " frame"]) -> tuple[ListenerState, Heard]:
        frame = x.astype(jnp.float32) / 32768
        both = jnp.concatenate([state.before, frame]) * jnp.hanning(2 * FRAME)
        power = jnp.abs(jnp.fft.rfft(both)) ** 2 + 1e-9  # of digital silence too there is a logarithm
        n = state.n + 1
        early = n <= FIRST
        noise = jnp.where(early, state.noise + (power - state.noise) / n, state.noise)

        ratio = jnp.minimum(power / noise, 1e3)
        likelihood = ratio * SNR / (1 + SNR) - jnp.log1p(SNR)  # log of p(power | speech) / p(power | noise)
        speech = jax.nn.sigmoid(likelihood)
        presence = 0.9 * state.presence + 0.1 * speech
        speech = jnp.where(presence > 0.99, jnp.minimum(speech, 0.99), speech)  # a floor that is stuck gets loose
        floor = 0.8 * noise + 0.2 * (speech * noise + (1 - speech) * power)

        score = likelihood.mean()
        loud = (score > self.threshold) & ~early
        silent = jnp.where(loud, 0, state.silent + 1)
        active = silent <= self.hangover
        level = 10 * jnp.log10(jnp.mean(frame**2) + 1e-10)
        strongest = jnp.argmax(power / noise) * (RATE / (2 * FRAME))
        heard = Heard(level, score, active & ~early, jnp.where(active & ~early, strongest, 0.0))
        return ListenerState(n, frame, jnp.where(early, noise, floor), presence, silent), heard
