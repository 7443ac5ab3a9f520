"""Weights by vLLM's transfer API: what is refused, and what is called of the installed vLLM where it takes CUDA to run.

Not run: nccl, nccl_m2n and ipc. tests/service/test_serve.py sends by gloo, which is the same but for the carrier.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest
import torch

from llmdistill.compat.vllm_senders import BACKENDS, from_json, in_json
from llmdistill.errors import UserError
from llmdistill.recipe.config import RolloutConfig
from llmdistill.rollouts.remote import RemoteRollouts
from llmdistill.rollouts.transfer import Fleet
from llmdistill.service.serve import check, parsed
from tests.rollouts.test_remote import QUICK, service_over
from tests.tiny import llama

pytest.importorskip("vllm", reason="the vllm extra is not installed")

from llmdistill.compat.vllm import imported_beside_training
from llmdistill.compat.vllm_senders import shards, whole_tensors


@pytest.mark.parametrize("name", BACKENDS)
def test_vllm_has_both_sides_of_every_backend(name: str) -> None:
    from vllm.distributed.weight_transfer import factory

    from llmdistill.compat.vllm_gloo import register

    register()
    for known in (factory.WeightTransferEngineFactory, factory.WeightTransferTrainerFactory):
        assert BACKENDS[name] in known._registry
    called = inspect.signature(factory.WeightTransferTrainerFactory.trainer_init).parameters
    assert list(called) == ["init_info", "client", "source"]


def test_senders_take_what_they_are_given() -> None:
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
    from vllm.distributed.weight_transfer.m2n_trainer import M2NTrainerInitInfo
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLWeightTransferUpdateInfo

    at: dict[str, Any] = {"rank": 0, "master_address": "127.0.0.1", "master_port": 1}
    assert NCCLTrainerInitInfo(**at, world_size=5).is_sender and not IPCTrainerInitInfo(rank=0).packed
    sharded = M2NTrainerInitInfo(**at, world_size=2 + 4, num_trainer_ranks=2, dst_mesh_dims=(2, 2))
    assert sharded.destination_mesh_dims == (2, 2)
    names = {field.name for field in dataclasses.fields(NCCLWeightTransferUpdateInfo)}
    assert names == {"names", "dtype_names", "shapes"}


def test_the_fleet_is_a_client_of_vllms_senders() -> None:
    from vllm.distributed.weight_transfer.base import VLLMWeightSyncClient

    assert isinstance(Fleet("nccl"), VLLMWeightSyncClient)
    for name in ("init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update"):
        theirs, ours = (inspect.signature(getattr(of, name)).parameters for of in (VLLMWeightSyncClient, Fleet))
        assert list(theirs) == list(ours)


def test_workers_of_replicas_have_ranks_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two replicas of two workers are ranks 1 to 4 behind the sender, by vLLM's own count of data-parallel copies."""
    from vllm.distributed.weight_transfer import nccl_common
    from vllm.v1.worker.gpu_worker import Worker

    from llmdistill.compat.vllm_receiving import join

    called = [inspect.signature(getattr(Worker, f"{name}_weight_transfer_engine")) for name in ("init", "shutdown")]
    assert [list(one.parameters) for one in called] == [["self", "init_info"], ["self"]]
    assert list(inspect.signature(Worker.update_weights).parameters) == ["self", "update_info"]
    seen = list[tuple[Any, ...]]()
    monkeypatch.setattr(nccl_common, "stateless_init_process_group", lambda *args, device: seen.append(args))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    info = nccl_common.NCCLWeightTransferInitInfo(master_address="a", master_port=1, rank_offset=1, world_size=5)

    class Engine:
        class parallel_config:
            data_parallel_index, world_size, rank = 0, 2, 0

    class OneWorker:
        weight_transfer_engine = Engine

        def shutdown_weight_transfer_engine(self) -> None:
            seen.append(("left",))

        def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
            told = nccl_common.NCCLWeightTransferInitInfo(**init_info)
            nccl_common.worker_init_process_group(told, Engine.parallel_config)  # type: ignore[arg-type]

    for replica in range(2):
        for rank in range(2):
            Engine.parallel_config.rank = rank
            join(OneWorker(), nccl_common.worker_init_payload(info), replica)
    assert [one for one in seen if one != ("left",)] == [("a", 1, rank, 5) for rank in (1, 2, 3, 4)]
    assert Engine.parallel_config.data_parallel_index == 0 and seen[0] == ("left",)


def test_what_is_sent_is_what_is_declared() -> None:
    model = llama(1)
    shapes = {name: (p.dtype, tuple(p.shape)) for name, p in model.named_parameters()}
    with imported_beside_training():
        source = whole_tensors(lambda: model.named_parameters(), shapes)  # type: ignore[arg-type, return-value]
        assert [(m.name, m.dtype, m.shape) for m in source.metadata()] == [(n, *rest) for n, rest in shapes.items()]
        assert [name for name, _ in source] == list(shapes)
        parts = shards(model, shapes, 1)
        assert [m.name for m in parts.metadata()] == [name for name, _ in parts] == list(shapes)
        assert parts.mesh().size == 1
        with pytest.raises(UserError, match="nccl_m2n.*'fused' of the checkpoint is none.*rollouts.transfer nccl"):
            shards(model, {**shapes, "fused": (torch.float32, (1,))}, 1)


def test_handles_travel_as_json_and_nothing_else_does() -> None:
    """As torch makes them of a tensor on a GPU (`torch.multiprocessing.reductions.reduce_tensor`)."""
    args = (torch.Tensor, torch.Size([2, 3]), (3, 1), 0, torch.storage.TypedStorage, torch.bfloat16, 1, b"handle", 512)
    handles = [{"GPU-1": (*args, 0, False, b"counter", 4, b"event", True)}]
    found = from_json(in_json(handles))
    assert found == handles and type(found[0]["GPU-1"]) is tuple
    for bad in ({"class": "system"}, {"dtype": "load"}, {"tuple": 3}, {"pickle": "gASV"}, {"bytes": "x", "tuple": []}):
        with pytest.raises(ValueError):
            from_json(bad)


def test_replicas_that_cannot_take_it_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with service_over() as one, service_over() as two:
        engine = RemoteRollouts([one.url, two.url], eos_ids=(1,), pad_id=0, transfer="nccl", **QUICK)
        with pytest.raises(UserError, match=f"transfer is nccl, and {one.url} takes weights by HTTP alone"):
            engine.sync(llama(1), 0)
        for service, workers in ((one, 1), (two, 2)):
            told = {**service.small._info(), "transfer": {"backend": "nccl", "workers": workers, "group": None}}
            monkeypatch.setattr(service.small, "_info", lambda told=told: told)
        with pytest.raises(UserError, match=r"the replicas have \[1, 2\] workers.*one --tensor_parallel for all"):
            engine.sync(llama(1), 0)
        engine.close()


REMOTE = {"engine": "remote", "url": "http://a:1"}


@pytest.mark.parametrize("more", [{"engine": "vllm"}, {**REMOTE, "staleness": 1}, {**REMOTE, "push_folder": "/tmp"}])
def test_settings_that_do_not_go_with_it(more: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="rollouts.transfer is 'nccl'"):
        RolloutConfig(transfer="nccl", **more)


@pytest.mark.parametrize("more", [["--engine", "hf", "--updatable"], [], ["--updatable", "--versions", "."]])
def test_a_service_that_cannot_take_it_says_so(more: list[str]) -> None:
    with pytest.raises(UserError, match="--transfer gloo is given; it is for --engine vllm with --updatable"):
        check(parsed(["--model", "m", "--transfer", "gloo", *more]), None)
