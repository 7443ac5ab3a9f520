"""A Ray cluster of two nodes on this machine, for tests: says its address, then does what its input says.

``kill`` ends the second node, ``headless`` the first.
"""

from __future__ import annotations

import sys

from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
second = cluster.add_node(num_cpus=1)
print(cluster.address, flush=True)
for line in sys.stdin:
    if line.strip() == "kill":
        cluster.remove_node(second, allow_graceful=False)
    elif line.strip() == "headless":
        cluster.head_node.kill_raylet()
        cluster.head_node.kill_gcs_server()
    print("done", flush=True)
