"""SIGKILL to Ray actors at random moments, while others join and leave; every answer equals that of one process.

`python tests/faults/ray_actor.py [KILLS]`
"""

import os
import random
import signal
import sys
import tempfile
import threading
import time

import numpy as np
import optax
import ray

from anabranch.cell import Event, Maybe
from anabranch.learn.linear import LogisticRegression, Scaled
from anabranch.run.keyed import Keyed
from anabranch.run.scale import Partitioned

KEYS, FEATURES, SIZE = 2_000, 8, 500


def killer(many: Partitioned, kills: int, done: list[float]) -> None:
    """Kill one of the actors every now and then, wherever it is in its work."""
    chance = random.Random(1)
    while len(done) < kills:
        try:
            pid = ray.get(chance.choice(many.actors).__ray_call__.remote(lambda _: os.getpid()))
            time.sleep(chance.uniform(0, 0.05))
            os.kill(pid, signal.SIGKILL)
            done.append(time.monotonic())
        except (ray.exceptions.RayActorError, ProcessLookupError):
            pass  # it was gone already
        time.sleep(chance.uniform(4, 10))  # a replacement needs some seconds


def main(kills: int) -> None:
    cell = Scaled(LogisticRegression(FEATURES, optax.sgd(0.05)))
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    rng, done, batches = np.random.default_rng(0), [], 0
    with tempfile.TemporaryDirectory() as folder:
        one, many = Keyed(cell, KEYS, threads=1), Partitioned(cell, KEYS, 3, folder=folder, every=7)
        thread = threading.Thread(target=killer, args=(many, kills, done), daemon=True)
        thread.start()
        while thread.is_alive() or batches % 100:
            keys = rng.integers(0, KEYS, SIZE)
            x = rng.normal(size=(SIZE, FEATURES)).astype(np.float32)
            events = Event(x, Maybe((x[:, 0] > 0).astype(np.float32), np.ones(SIZE, bool)), 1.0)
            np.testing.assert_array_equal(many(keys, events), one(keys, events))
            batches += 1
            if batches % 200 == 0:
                many.remove() if len(many.actors) > 3 else many.add()
        assert len(many) == len(one)
        many.close()
    print(f"{batches} micro-batches, {len(done)} kills, {len(one)} keys: all answers equal")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
