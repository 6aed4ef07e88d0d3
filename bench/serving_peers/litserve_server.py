"""LitServe: requests of JSON, batched into one worker process that has the states of all streams."""

import argparse
import base64

import litserve


class Api(litserve.LitAPI):
    """`{"stream": name, "x": base64}` to base64."""

    def setup(self, device):
        from model import Batched

        self.step = Batched()

    def decode_request(self, request, **kwargs):
        return request["stream"], base64.b64decode(request["x"])

    def batch(self, inputs):
        return inputs

    def predict(self, x, **kwargs):
        return self.step(*zip(*x))

    def unbatch(self, output):
        return output

    def encode_response(self, output, **kwargs):
        return base64.b64encode(output).decode()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--max-batch", type=int, default=1024)
    parser.add_argument("--wait", type=float, default=0.005, help="seconds that a batch waits for more")
    parser.add_argument("--fast-queue", type=int, default=1, help="ZeroMQ between the processes")
    args = parser.parse_args()
    api = Api(max_batch_size=args.max_batch, batch_timeout=args.wait)
    server = litserve.LitServer(api, accelerator="cpu", fast_queue=bool(args.fast_queue))
    server.run(host="127.0.0.1", port=args.port, num_api_servers=1, generate_client_file=False, log_level="warning")
