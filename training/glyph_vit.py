"""Trains `models/glyph_vit.py` to read letters as the fonts of matplotlib draw them, moved, bent, blurred and noisy.

About eight minutes on two cores. Needs `pip install 'anabranch[viz]'`. No digit is drawn.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Float, PRNGKeyArray
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

from anabranch import noise
from anabranch.fit import fit
from anabranch.learn.base import cross_entropy
from anabranch.models.glyph_vit import LETTERS, GlyphViT

SIDE = 48
"""Pixels of a drawn letter, of which the longer side takes 40."""
BATCH, STEPS = 64, 3000


def draw(letter: str, font: ImageFont.FreeTypeFont) -> np.ndarray:
    """One letter, f32[SIDE, SIDE], in the middle and as large as fits."""
    left, top, right, bottom = map(int, font.getbbox(letter))
    page = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(page).text((-left, -top), letter, 255, font)
    scale = 40 / max(page.size)
    page = page.resize([max(1, round(side * scale)) for side in page.size], Image.Resampling.LANCZOS)
    whole = Image.new("L", (SIDE, SIDE))
    whole.paste(page, ((SIDE - page.width) // 2, (SIDE - page.height) // 2))
    return np.asarray(whole, np.float32) / 255


def glyphs() -> tuple[np.ndarray, np.ndarray, list[Path]]:
    """All letters in all fonts that have them: images f32[n, SIDE, SIDE], classes i32[n], and the font files."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    files = [p for p in sorted(folder.glob("*.ttf")) if p.name.startswith(("DejaVu", "STIXGeneral", "cmr10", "cmss10"))]
    images, classes, used = [], [], []
    for file in files:
        known = FT2Font(str(file)).get_charmap()
        font = ImageFont.truetype(file, 96)
        # The display font has a frame instead of most letters, and does not say so.
        mine = [letter for letter in LETTERS if ord(letter) in known and "Display" not in file.name]
        images += [draw(letter, font) for letter in mine]
        classes += [LETTERS.index(letter) for letter in mine]
        used += [file] if mine else []
    return np.stack(images), np.array(classes, np.int32), used


def write(glyph: Float[Array, "side side"], key: PRNGKeyArray) -> Float[Array, "28 28"]:
    """A drawn letter as somebody might have written it."""
    turn, stretch, shift, bend, blur, grain, ink = (noise(key, i, "write") for i in range(7))
    angle, shear = jax.random.uniform(turn, (2,), minval=-0.3, maxval=0.3)
    wide, high = jax.random.uniform(stretch, (2,), minval=1.6, maxval=2.7)  # pixels of the drawing to one of the image
    across = jnp.array([[jnp.cos(angle), jnp.sin(angle) + shear], [-jnp.sin(angle), jnp.cos(angle)]])
    grid = jnp.stack(jnp.meshgrid(jnp.arange(28.0), jnp.arange(28.0), indexing="ij")) - 13.5
    field = jax.image.resize(jax.random.normal(bend, (2, 4, 4)), (2, 28, 28), "cubic")
    place = jnp.tensordot(across * jnp.array([[high], [wide]]), grid, 1) + 1.5 * field
    moved = (SIDE - 1) / 2 + 3 * jax.random.normal(shift, (2, 1, 1))
    image = map_coordinates(glyph, list(place + moved), order=1)
    radius = jax.random.uniform(blur, minval=0.3, maxval=1.2)
    kernel = jax.nn.softmax(-(jnp.arange(-2.0, 3) ** 2) / (2 * radius**2))
    image = jax.scipy.signal.convolve(image, kernel[:, None] * kernel, mode="same")
    gain, level = jax.random.uniform(ink, (2,), minval=jnp.array([1.0, 0.0]), maxval=jnp.array([3.0, 0.1]))
    return jnp.clip(gain * image + level * jax.random.normal(grain, image.shape), 0, 1)


def train(key: PRNGKeyArray) -> tuple[GlyphViT, dict[str, Any]]:
    """The network, and its accuracy on letters drawn anew from the same fonts."""
    images, classes, files = glyphs()
    drawn, labels = jnp.asarray(images), jnp.asarray(classes)

    def batch(key: PRNGKeyArray, i: Array) -> tuple[Array, Array]:
        rows = jax.random.randint(noise(key, i, "rows"), (BATCH,), 0, len(labels))
        return jax.vmap(write)(drawn[rows], jax.random.split(noise(key, i, "write"), BATCH)), labels[rows]

    rate = optax.warmup_cosine_decay_schedule(0, 1.5e-3, STEPS // 10, STEPS)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.05))
    net = GlyphViT(key=noise(key, 0, "weights"))
    net, history = fit(cross_entropy, net, batch, optimizer, STEPS, key=noise(key, 0, "train"), check=50)
    read = jax.jit(lambda i: jnp.mean(jnp.argmax(jax.vmap(net)(batch(key, i)[0]), -1) == batch(key, i)[1]))
    accuracy = float(np.mean([read(i) for i in range(10)]))
    info = {"letters": len(LETTERS), "drawings": len(classes), "steps": STEPS, "batch": BATCH, "accuracy": accuracy}
    return net, info | {"loss": float(history["loss"][-50:].mean()), "data": [str(file) for file in files]}
