"""The machine's own telemetry as a source: a small table at every tick, from psutil."""

import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator
from types import ModuleType

import pyarrow as pa

log = logging.getLogger("anabranch.machine")


def telemetry(every: float = 1.0) -> Iterator[pa.Table]:
    """What this machine is doing, for ever: one table at every tick, with one row a metric.

    The columns are `time` (float64), `metric` (string) and `value` (float64):

    | metric | |
    |---|---|
    | `cpu`, `cpu.0`, `cpu.1`, … | per cent busy since the last tick, of all cores and of each |
    | `memory`, `swap` | per cent in use |
    | `disk.read`, `disk.write` | bytes a second, of all disks |
    | `net.sent`, `net.received` | bytes a second, of all interfaces |
    | `load` | processes that run or wait to run, on average over a minute |
    | `processes` | that exist |
    | `temperature.CHIP.NUMBER` | degrees Celsius, where there are sensors |

    Time is in seconds since 1970 as the wall clock had it at the first tick, plus what has passed since on a clock that
    cannot be set: it only grows. The first table comes after one tick, since rates need two readings. A tick that
    cannot be kept is left out, not made up for. What this machine cannot tell is left out too, and logged once.

    As the source of a pipeline: `kind = "python"`, `call = "anabranch.run.machine:telemetry"`.

    Arguments:
        every: seconds between ticks.

    Raises:
        ValueError: if `every` is not positive.
        ImportError: if psutil is not installed.
    """
    if not 0 < every < math.inf:
        raise ValueError(f"every must be a positive number of seconds, got {every}")
    try:
        import psutil
    except ImportError:
        raise ImportError("telemetry needs psutil: pip install 'anabranch[machine]'") from None
    return _ticks(every, _groups(psutil))


def _ticks(every: float, groups: dict[str, Callable[[float], dict[str, float]]]) -> Iterator[pa.Table]:
    wall, began = time.time(), time.monotonic()
    failed: set[str] = set()

    def read(now: float) -> dict[str, float]:
        values: dict[str, float] = {}
        for name, group in groups.items():
            try:
                values |= group(now)
            except (OSError, RuntimeError, NotImplementedError) as error:  # no such device, or it may not be read
                if name not in failed:
                    log.warning("this machine does not tell its %s: %s", name, error)
                failed.add(name)
        return values

    read(began)
    due = began
    while True:
        due = max(due + every, time.monotonic())
        time.sleep(max(0.0, due - time.monotonic()))
        now = time.monotonic()
        values = read(now)
        at = pa.array([wall + now - began] * len(values), pa.float64())
        yield pa.table({"time": at, "metric": list(values), "value": pa.array(values.values(), pa.float64())})


def _groups(psutil: ModuleType) -> dict[str, Callable[[float], dict[str, float]]]:
    """What is read at a tick, by name: functions from the time in seconds to metrics."""
    disk, net = Rates(), Rates()

    def cpu(now: float) -> dict[str, float]:
        cores = psutil.cpu_percent(percpu=True)
        return {"cpu": statistics.fmean(cores)} | {f"cpu.{i}": core for i, core in enumerate(cores)}

    def disks(now: float) -> dict[str, float]:
        count = psutil.disk_io_counters()
        return {} if count is None else disk(now, {"disk.read": count.read_bytes, "disk.write": count.write_bytes})

    def network(now: float) -> dict[str, float]:
        count = psutil.net_io_counters()
        return {} if count is None else net(now, {"net.sent": count.bytes_sent, "net.received": count.bytes_recv})

    def temperatures(now: float) -> dict[str, float]:
        chips = psutil.sensors_temperatures() if hasattr(psutil, "sensors_temperatures") else {}
        return {
            f"temperature.{chip}.{i}": sensor.current
            for chip, sensors in chips.items()
            for i, sensor in enumerate(sensors)
        }

    return {
        "cpu": cpu,
        "memory": lambda now: {"memory": psutil.virtual_memory().percent},
        "swap": lambda now: {"swap": psutil.swap_memory().percent},
        "disks": disks,
        "network": network,
        "load": lambda now: {"load": psutil.getloadavg()[0]},
        "processes": lambda now: {"processes": len(psutil.pids())},
        "temperatures": temperatures,
    }


class Rates:
    """Counters that only grow, as rates.

    A counter that is less than before has wrapped or begun anew: what it has grown by is not known, so it has no rate
    this time.

    >>> rates = Rates()
    >>> rates(10.0, {"read": 500}), rates(12.0, {"read": 800}), rates(13.0, {"read": 20}), rates(14.0, {"read": 30})
    ({}, {'read': 150.0}, {}, {'read': 10.0})
    """

    def __init__(self):
        self._last: dict[str, tuple[float, int]] = {}

    def __call__(self, now: float, counters: dict[str, int]) -> dict[str, float]:
        """What each counter has grown by a second since it was last given; `now` is in seconds."""
        rates = {}
        for name, count in counters.items():
            then, before = self._last.get(name, (now, count))
            if count >= before and now > then:
                rates[name] = (count - before) / (now - then)
            self._last[name] = (now, count)
        return rates
