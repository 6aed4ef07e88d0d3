import jax
import jax.numpy as jnp
import numpy as np

from anabranch.cell import Cell
from anabranch.cost import Cost, cost, nbytes


class Matmul(Cell):
    weight: jax.Array

    def init(self, *, key=None):
        return {"last": jnp.zeros((8, 64)), "n": jnp.int32(0), "seen": jnp.zeros(3, bool)}

    def step(self, state, x):
        return {**state, "last": x}, x @ self.weight


def test_a_matmul_costs_what_the_textbook_says():
    found = cost(Matmul(jnp.ones((64, 32))), jnp.ones((8, 64)))
    assert found.state_bytes == 8 * 64 * 4 + 4 + 3
    assert found.flops == 2 * 8 * 64 * 32
    operands = 4 * (8 * 64 + 64 * 32 + 8 * 32)
    assert operands <= found.bytes <= operands + 3 * found.state_bytes  # and what carries the state through


def test_every_iteration_of_a_loop_and_the_dearer_branch_count():
    def repeat(weight, x, length, **options):
        return jax.lax.scan(lambda h, _: (h @ weight, None), x, None, length=length, **options)[0]

    class Repeat(Matmul):
        def step(self, state, x):
            return state, repeat(self.weight, x, 10)

    class Unrolled(Matmul):
        def step(self, state, x):
            return state, repeat(self.weight, x, 10, unroll=5)

    class Nested(Matmul):
        def step(self, state, x):
            return state, jax.lax.fori_loop(0, 4, lambda i, h: jax.jit(repeat, static_argnums=2)(self.weight, h, 3), x)

    class Either(Matmul):
        def step(self, state, x):
            y = jax.lax.cond(state["n"] > 0, lambda: repeat(self.weight, x, 6), lambda: repeat(self.weight, x, 2))
            return state, y

    once = 2 * 8 * 64 * 64
    for cell, times in ((Repeat, 10), (Unrolled, 10), (Nested, 12), (Either, 6)):
        flops = cost(cell(jnp.ones((64, 64))), jnp.ones((8, 64))).flops
        assert times * once <= flops <= times * once + 200, cell.__name__


def test_shapes_are_enough():
    shapes = jax.ShapeDtypeStruct((8, 64), jnp.float32)
    assert cost(Matmul(jnp.ones((64, 32))), shapes).flops == 2 * 8 * 64 * 32


def test_host_cells_have_a_state_and_nothing_compiled():
    class Host(Matmul):
        host = True

        def init(self, *, key=None):
            return {"a": np.zeros(5, np.float64), "n": 3}

    assert cost(Host(jnp.ones(1)), jnp.ones(1)) == Cost(40, None, None, None)


def test_state_bytes_count_keys():
    assert nbytes({"k": jax.random.key(0), "r": jax.random.split(jax.random.key(0, impl="rbg"), 3)}) == 8 + 3 * 16


def test_units_are_readable():
    assert str(Cost(40, 1_500_000.0, 2048.0, 0)) == "state 40 B, 1.5 MFLOP a step, 2 KiB moved, 0 B temporary"
    assert "? FLOP" in str(Cost(3 * 2**30, None, None, None)) and "3 GiB" in str(Cost(3 * 2**30, None, None, None))
