"""Ray's queue: an actor puts groups in, as arrays by column, another takes them out; one driver starts them.

ray_peer.py both SOCKET TOKENS SAMPLES TEXT_BYTES
"""

import os
import sys
import tempfile

os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}

import ray
from groups import as_arrays, check, columns, serve
from ray.util.queue import Queue

GROUPS_HELD = 64
STORE_BYTES = 256 * 1024**2


@ray.remote(num_cpus=0)
class Producer:
    def __init__(self, queue: Queue, tokens: int, samples: int, text_bytes: int) -> None:
        self.queue, self.group = queue, columns(tokens, samples, text_bytes)

    def turn(self, groups: int) -> None:
        for _ in range(groups):
            self.queue.put(as_arrays(self.group))


@ray.remote(num_cpus=0)
class Consumer:
    def __init__(self, queue: Queue, tokens: int, samples: int) -> None:
        self.queue, self.tokens, self.samples = queue, tokens, samples

    def turn(self, groups: int) -> None:
        for _ in range(groups):
            check(self.queue.get(), self.tokens, self.samples)


def main() -> None:
    tokens, samples, text_bytes = map(int, sys.argv[3:])
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:  # the paths of its sockets have to be short
        ray.init(
            num_cpus=1,
            include_dashboard=False,
            object_store_memory=STORE_BYTES,
            log_to_driver=False,
            _node_ip_address="127.0.0.1",
            _temp_dir=folder,
        )
        queue = Queue(GROUPS_HELD, actor_options={"num_cpus": 0})
        ends = [Producer.remote(queue, tokens, samples, text_bytes), Consumer.remote(queue, tokens, samples)]
        serve(lambda groups: ray.get([end.turn.remote(groups) for end in ends]))
        ray.shutdown()


main()
