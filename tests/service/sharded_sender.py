"""Two ranks with a student in shards, which send it to a service: run by torchrun, with the service's url."""

from __future__ import annotations

import sys

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from llmdistill.rollouts.remote import RemoteRollouts
from llmdistill.teachers.fingerprint import weights_fingerprint
from tests import tiny

torch.distributed.init_process_group("gloo")
rank, mesh = torch.distributed.get_rank(), init_device_mesh("cpu", (2,))
engine = RemoteRollouts(sys.argv[1], eos_ids=(1,), pad_id=0, transfer="gloo", timeout_s=120.0, max_outage_s=200.0)
model = tiny.llama(7, hidden=64, tied=True)
twin = tiny.llama(7, hidden=64, tied=True)
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
for step in range(2):
    engine.sync(model, step)  # the first one compares log-probs with the student's
    assert engine._fingerprint == weights_fingerprint(twin), "other weights came"
    assert engine._transfers is not None and engine._transfers._sender is not None
    with torch.no_grad():
        for of in (model, twin):
            of.model.layers[0].mlp.down_proj.weight.mul_(-2)
engine.close()
print(f"rank {rank}: both pushes came", flush=True)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
