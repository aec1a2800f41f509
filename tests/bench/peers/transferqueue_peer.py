"""TransferQueue: an actor puts groups in, a row a sample, another takes batches and clears them; a driver starts both.

transferqueue_peer.py both SOCKET TOKENS SAMPLES TEXT_BYTES

A turn's groups are in before they are asked for: a request that has to wait for rows is looked at every 5 s only.
"""

import os
import sys
import tempfile

os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "TQ_LOGGING_LEVEL": "ERROR"}

import ray
import torch
import transfer_queue
from groups import NAMES, as_arrays, columns, looked_at, serve
from tensordict import TensorDict

PARTITION = "train"
GROUPS_A_READ = 32
STORE_BYTES = 256 * 1024**2
PROCESSES = 8


@ray.remote(num_cpus=1)
class Producer:
    def __init__(self, tokens: int, samples: int, text_bytes: int) -> None:
        transfer_queue.init()
        self.client, self.group = transfer_queue.get_client(), columns(tokens, samples, text_bytes)

    def turn(self, groups: int) -> None:
        for _ in range(groups):
            samples, arrays = len(self.group), as_arrays(self.group)
            rows = {name: torch.tensor(array).view(samples, -1) for name, array in arrays.items()}
            self.client.put(TensorDict(rows, batch_size=samples), partition_id=PARTITION)


@ray.remote(num_cpus=1)
class Consumer:
    def __init__(self, tokens: int, samples: int) -> None:
        transfer_queue.init()
        self.client, self.tokens, self.samples = transfer_queue.get_client(), tokens, samples

    def turn(self, groups: int) -> None:
        while groups:
            wanted = min(groups, GROUPS_A_READ)
            rows = self.client.get_meta(list(NAMES), wanted * self.samples, PARTITION, task_name="bench")
            data = self.client.get_data(rows)
            for name in NAMES[:3]:
                for column in data[name].unbind(0):
                    assert looked_at(column.numpy()) == self.tokens
            self.client.clear_samples(rows)
            groups -= wanted


def main() -> None:
    tokens, samples, text_bytes = map(int, sys.argv[3:])
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:  # the paths of its sockets have to be short
        ray.init(
            num_cpus=PROCESSES,
            include_dashboard=False,
            object_store_memory=STORE_BYTES,
            log_to_driver=False,
            _node_ip_address="127.0.0.1",
            _temp_dir=folder,
        )
        transfer_queue.init()
        ends = [Producer.remote(tokens, samples, text_bytes), Consumer.remote(tokens, samples)]
        serve(lambda groups: [ray.get(end.turn.remote(groups)) for end in ends])
        transfer_queue.close()
        ray.shutdown()


main()
