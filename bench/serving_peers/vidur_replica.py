"""One replica in Vidur, for `bench/vidur.py`; runs in an environment that has what Vidur needs.

Reads `asked.json` in the folder in which it is started, and writes `answer.json`. Schedulers, events, requests and
metrics are Vidur's; only its predictor is replaced, by the formula of our `Fitted`.
"""

import atexit
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

asked = json.loads(Path("asked.json").read_text())
sys.path.insert(0, asked["path"])

from vidur.config import (  # noqa: E402
    ClusterConfig,
    MetricsConfig,
    ReplicaConfig,
    SarathiSchedulerConfig,
    SimulationConfig,
    TraceRequestGeneratorConfig,
    VllmSchedulerConfig,
)
from vidur.execution_time_predictor import ExecutionTimePredictorRegistry  # noqa: E402
from vidur.simulator import Simulator  # noqa: E402


class Predictor:
    """Milliseconds of an iteration: a prefill's constant or a decode's, the larger, and what their tokens take."""

    def __init__(self, **configs):
        self.prefill, self.decode = asked["prefill"], asked["decode"]

    def get_execution_time(self, batch, stage):
        constant = took = 0.0
        decodes = context = 0
        a, b, c = self.prefill
        for request, tokens in zip(batch.requests, batch.num_tokens):
            done = request.num_processed_tokens
            if request.is_prefill_complete:
                decodes += 1
                context += done - 1  # Vidur counts the token that is being fed
            else:
                constant = a
                took += b * tokens + c * tokens * (2 * done + tokens)
        if decodes:
            a, b, c = self.decode
            constant, took = max(constant, a), took + b * context + c * decodes
        seconds = (constant + took) / 1e3
        return SimpleNamespace(total_time=seconds, model_time=seconds)


kind = {"vllm": VllmSchedulerConfig, "sarathi": SarathiSchedulerConfig}[asked["scheduler"]]
metrics = MetricsConfig(write_metrics=False, enable_chrome_trace=False) if asked["bare"] else MetricsConfig()
config = SimulationConfig(
    cluster_config=ClusterConfig(
        replica_config=ReplicaConfig(model_name="meta-llama/Meta-Llama-3-8B", device="a100"),
        replica_scheduler_config=kind(**asked["sizes"]),
    ),
    request_generator_config=TraceRequestGeneratorConfig(trace_file="trace.csv", max_tokens=asked["longest"]),
    metrics_config=metrics,
)
key = config.execution_time_predictor_config.get_type()
ExecutionTimePredictorRegistry.unregister(key)
ExecutionTimePredictorRegistry.register(key, Predictor)

simulator = Simulator(config)
atexit.unregister(simulator._write_output)  # files and plots, which nobody reads here
requests = [event._request for _, event in simulator._event_queue]
start = time.perf_counter()
simulator.run()
seconds = time.perf_counter() - start
requests.sort(key=lambda request: request.id)
answer = {
    "seconds": seconds,
    "first": [float(request.prefill_completed_at) for request in requests],
    "last": [float(request.completed_at) for request in requests],
    "restarts": sum(request.num_restarts for request in requests),
}
Path("answer.json").write_text(json.dumps(answer))
