"""Ray Serve: requests of bytes, batched in one replica that has the states of all streams."""

import argparse
import logging
import os
import signal

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--port", type=int, required=True)
parser.add_argument("--max-batch", type=int, default=1024)
parser.add_argument("--wait", type=float, default=0.005, help="seconds that a batch waits for more")
parser.add_argument("--optimized", type=int, default=1, help="Ray's own settings for throughput")
args = parser.parse_args()
os.environ["RAY_SERVE_THROUGHPUT_OPTIMIZED"] = str(args.optimized)  # read when Ray is imported

import ray  # noqa: E402
from ray import serve  # noqa: E402
from starlette.requests import Request  # noqa: E402
from starlette.responses import Response  # noqa: E402


@serve.deployment(num_replicas=1, max_ongoing_requests=4096, logging_config={"enable_access_log": False})
class Model:
    """64 bytes of input, then the name of the stream; answered with 64 bytes."""

    def __init__(self):
        from model import Batched

        self.batched = Batched()

    @serve.batch(max_batch_size=args.max_batch, batch_wait_timeout_s=args.wait)
    async def step(self, bodies: list[bytes]) -> list[bytes]:
        return self.batched([body[64:].decode() for body in bodies], [body[:64] for body in bodies])

    async def __call__(self, request: Request) -> Response:
        return Response(await self.step(await request.body()))


if __name__ == "__main__":
    ray.init("local", num_cpus=2, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": args.port}, logging_config={"enable_access_log": False})
    serve.run(Model.bind())
    print("ready", flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    serve.shutdown()
    ray.shutdown()
