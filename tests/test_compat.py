"""Contracts with unstable API of others: when an upgrade breaks one, this says which."""

import contextlib
import inspect
import json
import logging
import os
import pkgutil
import random
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import llmdistill
import llmdistill.compat
from llmdistill.compat import checkpoints as checkpoints_of_others
from llmdistill.compat import trainers
from llmdistill.compat.checkpoints import ASIDE, saved_aside
from llmdistill.compat.patching import environment, patched, random_state_kept
from llmdistill.compat.vllm import close_vllm, load_vllm
from llmdistill.compat.vllm_weights import push_weights, takes_partial_push
from llmdistill.models.weights import named_weights
from llmdistill.record.run_folder import RunFolder
from tests.tiny import llama

SETTINGS = dict(dtype="float32", seed=0, max_model_len=64, kv_cache_bytes=1 << 25)
# What vLLM may write into the environment: nothing here is read by launchers or other programs.
HARMLESS = ("VLLM_", "TORCHINDUCTOR_CACHE_DIR", "TORCHINDUCTOR_CPP_DYNAMIC_THREADS", "_TORCHINDUCTOR", "TRITON_",
            "TILELANG_", "AITER_", "PYTORCH_NVML", "KMP_", "PYTEST_")  # fmt: skip


def python(code, *launcher, **environment):
    """Runs code (or a launcher's command line) in a process of its own and returns what it printed."""
    command = list(launcher) or [sys.executable, "-c", code]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_importing_compat_imports_nothing_heavy():
    modules = [m.name for m in pkgutil.iter_modules(llmdistill.compat.__path__, "llmdistill.compat.")]
    assert len(modules) > 5
    code = (
        f"import sys, {', '.join(modules)}, llmdistill.models.weights; print({{m.split('.')[0] for m in sys.modules}})"
    )
    loaded = eval(python(code))
    assert not loaded & {"vllm", "trl", "peft", "deepspeed", "transformers", "accelerate"}


class Owner:
    inherited = "of the class"


def test_a_patched_attribute_is_put_back_as_it_was():
    owner = Owner()
    owner.own = "of the instance"
    for name in ("own", "inherited", "absent"):
        before = dict(vars(owner))
        with pytest.raises(ZeroDivisionError), patched(owner, name, "patched"):
            assert getattr(owner, name) == "patched"
            1 / 0  # noqa: B018
        assert vars(owner) == before
    assert owner.inherited == "of the class" and not hasattr(owner, "absent")


def test_patches_of_one_attribute_nest():
    owner = Owner()
    with patched(owner, "inherited", "outer"):
        with patched(owner, "inherited", "inner"):
            assert owner.inherited == "inner"
        assert owner.inherited == "outer"
    assert vars(owner) == {}


def test_environment_variables_are_put_back(monkeypatch):
    monkeypatch.setenv("LLMDISTILL_SET", "before")
    monkeypatch.delenv("LLMDISTILL_UNSET", raising=False)
    with pytest.raises(ZeroDivisionError), environment(LLMDISTILL_SET="inside", LLMDISTILL_UNSET="inside"):
        assert os.environ["LLMDISTILL_SET"] == os.environ["LLMDISTILL_UNSET"] == "inside"
        1 / 0  # noqa: B018
    assert os.environ["LLMDISTILL_SET"] == "before" and "LLMDISTILL_UNSET" not in os.environ


def test_production_code_imports_no_mock():
    files = Path(llmdistill.__file__).parent.rglob("*.py")
    imported = re.compile(r"^\s*((import|from) unittest\.mock|from unittest import .*mock)", re.M)
    assert not [file for file in files if imported.search(file.read_text())]


def process_state():
    """Whatever of the process an engine could change under the training's feet."""
    return {
        "torch rng": torch.random.get_rng_state().tolist(),
        "numpy rng": np.random.get_state()[1].tolist(),
        "python rng": random.getstate(),
        "threads": torch.get_num_threads(),
        "thread setter": torch.set_num_threads,
        "default dtype": torch.get_default_dtype(),
        "default device": str(torch.get_default_device()),
        "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "signal handlers": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
        "excepthook": sys.excepthook,
        "root logger": (logging.getLogger().level, list(logging.getLogger().handlers)),
        "affinity": sorted(os.sched_getaffinity(0)),
        "environment": {k: v for k, v in os.environ.items() if not k.startswith(HARMLESS)},
    }


def changed(before):
    after = process_state()
    return [name for name in before if before[name] != after[name]]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """An updatable engine, and what loading it changed in the process."""
    pytest.importorskip("vllm", reason="the vllm extra is not installed")
    folder = tmp_path_factory.mktemp("model")
    llama(0, hidden=64).save_pretrained(folder)
    before = process_state()
    llm = load_vllm(str(folder), updatable=True, max_logprobs=5, **SETTINGS)
    yield llm, changed(before), str(folder)
    close_vllm(llm)
    close_vllm(llm)


def draw(llm, **sampling):
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=6, detokenize=False, logprobs=0, flat_logprobs=True, **sampling)
    (output,) = llm.generate([{"prompt_token_ids": [5, 6, 7]}], params, use_tqdm=False)
    return output.outputs[0]


def assert_engine_is(llm, model):
    ours = draw(llm, temperature=0.0)
    ids = torch.tensor([[5, 6, 7, *ours.token_ids]])
    with torch.no_grad():
        logprobs = model(input_ids=ids).logits.log_softmax(-1)[0, 2:-1]
    exact = logprobs.gather(1, ids[0, 3:, None]).squeeze(1)
    torch.testing.assert_close(torch.tensor(ours.logprobs.logprobs), exact, rtol=0, atol=2e-4)


def test_loading_leaves_the_process_as_it_was(loaded):
    assert loaded[1] == []


def test_generating_and_pushing_leave_the_process_as_it_was(loaded):
    llm, model = loaded[0], llama(1, hidden=64)
    before = process_state()
    push_weights(llm, named_weights(model))
    draw(llm, temperature=0.0)
    with random_state_kept():
        draw(llm, temperature=1.0, seed=5)
    assert changed(before) == []
    draw(llm, temperature=1.0, seed=5)  # when this leaves the state alone, random_state_kept is needed no longer
    assert changed(before) == ["torch rng"]


def test_the_group_of_the_engine_does_not_make_accelerate_distributed(loaded):
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    assert torch.distributed.is_initialized()
    kept = dict(PartialState._shared_state)
    try:
        PartialState._reset_state()
        assert PartialState(cpu=True).distributed_type == DistributedType.NO
        assert PartialState().num_processes == 1
    finally:
        PartialState._reset_state()
        PartialState._shared_state.update(kept)


def test_updatable_engines_keep_plain_weights(loaded):
    """The premise of the fast push: load_weights works on a live engine, every parameter is there."""
    llm = loaded[0]
    assert takes_partial_push(llm)
    sizes = llm.collective_rpc(lambda worker: [p.numel() for p in worker.get_model().parameters()])[0]
    assert min(sizes) > 0
    packed = llm.collective_rpc(lambda w: [n for n, m in w.get_model().named_modules() if "cpu_linear" in vars(m)])[0]
    assert len(packed) == 2 * 4 + 2  # qkv, o, gate_up and down of two layers, embedding, head


def test_an_incomplete_push_is_an_error(loaded):
    pairs = [(n, t) for n, t in named_weights(llama(1, hidden=64)) if "layers.1.mlp" not in n]
    with pytest.raises(RuntimeError, match="layers.1.mlp"):
        push_weights(loaded[0], pairs)


def test_vllms_own_reload_still_needs_the_head(loaded):
    """The path for GPUs, and the trap it has on a CPU: without the extra pair the tied packed head stays old."""
    llm, model = load_vllm(loaded[2], **SETTINGS), llama(2, hidden=64)
    try:
        assert not takes_partial_push(llm)
        with pytest.raises(ValueError, match="complete"):
            push_weights(llm, named_weights(model), partial=True)
        push_weights(llm, ((n, t) for n, t in named_weights(model) if n != "lm_head.weight"))
        with pytest.raises(AssertionError):  # when this stops raising, vLLM has mended the trap
            assert_engine_is(llm, model)
        push_weights(llm, named_weights(model))
        assert_engine_is(llm, model)
    finally:
        close_vllm(llm)


def test_closing_one_engine_leaves_the_other_running(loaded):
    """Teacher and rollouts may both be vLLM; vLLM's shutdown would take down the groups of both."""
    first, model = loaded[0], llama(3, hidden=64)
    close_vllm(load_vllm(loaded[2], **SETTINGS))
    push_weights(first, named_weights(model))
    assert_engine_is(first, model)


def test_what_vllm_refuses_is_a_user_error(loaded, tmp_path):
    from llmdistill.errors import UserError

    with pytest.raises(UserError, match="cannot load") as caught:
        load_vllm(str(tmp_path / "none"), **SETTINGS)
    assert "\n" not in str(caught.value)


def checkpointing(model):
    """What every checkpointing layer calls, with its arguments."""
    layers = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    return [(type(m).__name__, m._gradient_checkpointing_func) for m in layers]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize(
    "arguments", [{"use_reentrant": False}, {"use_reentrant": True}, {"preserve_rng_state": False}]
)
def test_after_generation_the_model_checkpoints_as_before(arguments, fails):
    from accelerate import Accelerator

    from llmdistill.compat.models import generation_ready

    model = llama(0).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
    before = checkpointing(model)
    assert before and all(function.keywords.items() >= arguments.items() for _, function in before)
    with contextlib.suppress(ZeroDivisionError), generation_ready(model, Accelerator(cpu=True)) as ready:
        assert ready is model and not ready.is_gradient_checkpointing and not checkpointing(model)
        if fails:
            1 / 0  # noqa: B018
    assert checkpointing(model) == before


def test_an_adapted_model_learns_through_checkpoints_after_generation():
    """The frozen embeddings' output still asks for a gradient: without it reentrant checkpoints give none."""
    from accelerate import Accelerator
    from peft import LoraConfig, get_peft_model

    from llmdistill.compat.models import generation_ready

    model = get_peft_model(llama(0), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with generation_ready(model, Accelerator(cpu=True)):
        pass
    model(input_ids=torch.tensor([[5, 6, 7]])).logits.square().mean().backward()
    grads = [p.grad for n, p in model.named_parameters() if "lora_B" in n]
    assert grads and all(g is not None and g.any() for g in grads)


def trainer(folder, **settings):
    """transformers' own trainer of a line through one number."""
    from transformers import Trainer, TrainingArguments

    class Line(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, x):
            return {"loss": (self.weight * x).square().mean()}

    common = dict(per_device_train_batch_size=1, report_to="none", use_cpu=True, disable_tqdm=True, save_steps=1)
    args = TrainingArguments(str(folder), max_steps=4, **common, **settings)
    rows = [{"x": torch.ones(1)}] * 4
    return Trainer(Line(), args, train_dataset=rows, eval_dataset=rows)


def checkpoints(folder):
    return sorted(p.name for p in folder.glob("checkpoint-*"))


@pytest.mark.parametrize("in_background", [False, True])
def test_a_checkpoint_is_written_aside_and_old_ones_stay_until_it_is_whole(tmp_path, in_background):
    checked, beside, made = [], [], trainer(tmp_path, save_total_limit=1)
    finished = saved_aside(made, lambda: checked.append(checkpoints(tmp_path)), in_background=in_background)
    trainers.beside_random_states(
        made, lambda folder: beside.append((sorted(os.listdir(folder)), checkpoints(tmp_path)))
    )
    made.train()
    finished()
    steps = [f"checkpoint-{step}" for step in range(1, 5)]
    assert checked == [[], *([step] for step in steps[:3])]
    for (written, there), before in zip(beside, checked, strict=True):
        assert "rng_state.pth" in written and "trainer_state.json" not in written  # that is written last
        assert there == before
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-4"]
    assert {"model.safetensors", "optimizer.pt", "trainer_state.json"} <= set(os.listdir(tmp_path / "checkpoint-4"))


def test_training_goes_on_while_a_checkpoint_reaches_the_disk(tmp_path, monkeypatch):
    from transformers import TrainerCallback

    goes_on, put, there = threading.Event(), checkpoints_of_others._put_in_place, []
    monkeypatch.setattr(checkpoints_of_others, "_put_in_place", lambda *paths: (goes_on.wait(), put(*paths)))

    class Next(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:  # the first checkpoint is not there before this
                there.append(checkpoints(tmp_path))
                goes_on.set()

    made = trainer(tmp_path)
    made.add_callback(Next())
    finished = saved_aside(made, lambda: None, in_background=True)
    made.train()
    finished()
    assert there == [[]] and checkpoints(tmp_path) == [f"checkpoint-{step}" for step in range(1, 5)]


def test_what_fails_behind_training_is_raised_before_the_next_checkpoint(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints_of_others, "_put_in_place", fail)
    made = trainer(tmp_path)
    saved_aside(made, lambda: None, in_background=True)
    with pytest.raises(OSError, match="No space left"):
        made.train()
    assert made.state.global_step == 2 and checkpoints(tmp_path) == []


@pytest.mark.parametrize("failing", ["check", "write"])
def test_what_fails_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path, failing):
    made = trainer(tmp_path, save_total_limit=1)

    def fail(*_):
        if made.state.global_step == 3:
            raise OSError(28, "No space left on device")

    saved_aside(made, fail if failing == "check" else lambda: None)
    if failing == "write":
        trainers.beside_random_states(made, fail)
    with pytest.raises(OSError, match="No space left"):
        made.train()
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-2"]
    resumed = trainer(tmp_path, save_total_limit=1)
    saved_aside(resumed, lambda: None)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4 and sorted(os.listdir(tmp_path)) == ["checkpoint-4"]


def test_what_a_killed_run_left_aside_is_no_checkpoint_and_goes(tmp_path):
    left = tmp_path / ASIDE / "checkpoint-9"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half of")
    (tmp_path / "checkpoint-2").mkdir()  # as transformers alone leaves one
    (tmp_path / "checkpoint-2" / "optimizer.pt").write_bytes(b"half of")
    assert RunFolder(tmp_path).newest_checkpoint() is None
    made = trainer(tmp_path)
    saved_aside(made, lambda: None)
    made.train()
    assert sorted(os.listdir(tmp_path)) == [f"checkpoint-{step}" for step in range(1, 5)]
    assert (tmp_path / "checkpoint-2" / "trainer_state.json").is_file()


def test_the_best_checkpoint_is_named_where_it_will_be(tmp_path):
    best = {
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "eval_strategy": "steps",
        "label_names": ["x"],
    }
    made = trainer(tmp_path, save_total_limit=2, learning_rate=0.0, eval_steps=1, **best)
    saved_aside(made, lambda: None)
    made.train()
    first = str(tmp_path / "checkpoint-1")  # no other is better
    assert made.state.best_model_checkpoint == first
    for name in checkpoints(tmp_path):
        assert json.loads((tmp_path / name / "trainer_state.json").read_text())["best_model_checkpoint"] == first
    assert checkpoints(tmp_path) == ["checkpoint-1", "checkpoint-4"]  # the best, and the last to resume from


def test_a_resumed_run_goes_on_at_the_present_rate(tmp_path):
    """Linear decay over four steps: after three, a quarter of the rate is left, of the one that is now given."""
    from transformers import TrainerCallback

    trainer(tmp_path, learning_rate=1e-2).train()
    made, rates = trainer(tmp_path, learning_rate=4e-3), []

    class Rates(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
            rates.append(optimizer.param_groups[0]["lr"])

    made.add_callback(Rates())
    trainers.resume_at_present_rate(made)
    assert trainers.first_step(made) == 0
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert trainers.first_step(made) == 3
    assert rates == pytest.approx([1e-3])


TWO_RANKS = """
import torch
from accelerate import Accelerator
from llmdistill.texts import Prompt, Sampling
from llmdistill.rollouts.vllm import VLLMRollouts
from tests.test_compat import assert_engine_is
from tests.tiny import llama

accelerator = Accelerator(cpu=True)
rank, model = accelerator.process_index, llama(1, hidden=64)
assert accelerator.num_processes == 2
wrapped = torch.nn.parallel.DistributedDataParallel(llama(0, hidden=64))
engine = VLLMRollouts(wrapped, eos_ids=(1,), pad_id=0, dtype="float32", max_model_len=64, kv_cache_gib=0.05)
engine.sync(torch.nn.parallel.DistributedDataParallel(model), 1)
for i in range(1 + 2 * rank):  # each rank its own number of calls, prompts and lengths
    engine.generate([Prompt([5 + rank] * (3 + rank), "")] * (1 + i), Sampling(4 + 9 * rank))
assert_engine_is(engine.engine.llm, model)
engine.close()
total = torch.ones(1) * (rank + 1)
torch.distributed.all_reduce(total)  # the training's group has survived
print(f"sum {total.item()}\\n", end="", flush=True)
"""


@pytest.mark.slow
def test_every_rank_has_an_engine_of_its_own(tmp_path):
    pytest.importorskip("vllm", reason="the vllm extra is not installed")
    (tmp_path / "ranks.py").write_text(TWO_RANKS)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29719"]
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    printed = python("", *torchrun, str(tmp_path / "ranks.py"), ACCELERATE_USE_CPU="true", PYTHONPATH=here)
    assert printed.count("sum 3.0") == 2


def test_the_group_goes_with_the_last_engine_and_one_left_open_does_not_spoil_the_exit(tmp_path):
    """In a process of its own: in this one other tests may have an engine open."""
    pytest.importorskip("vllm", reason="the vllm extra is not installed")
    llama(0, hidden=64).save_pretrained(tmp_path)
    code = (
        "import os; os.dup2(1, 2)\n"
        "from torch.distributed import is_initialized\n"
        "from llmdistill.compat.vllm import close_vllm, load_vllm\n"
        f"load = lambda: load_vllm({str(tmp_path)!r}, **{SETTINGS})\n"
        "first, second = load(), load()\n"
        "close_vllm(first)\n"
        "one_left = is_initialized()\n"
        "close_vllm(second)\n"
        "print('group', one_left, is_initialized())\n"
        "left_open = load()\n"
        "print('loaded', is_initialized())"
    )
    printed = python(code)
    assert printed.split("\n")[-3:] == ["group True False", "loaded True", ""]
    assert "Triton not available" not in printed, "a library's remark that a user can do nothing about"


def test_uvicorn_tells_its_protocol_of_every_connection_and_answer() -> None:
    """What ``compat/uvicorn.py`` hangs on to; tests/service/test_connections.py sees it work."""
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    for name in ("connection_made", "on_response_complete", "connection_lost"):
        assert callable(getattr(AutoHTTPProtocol, name))
    assert "response_complete" in Path(inspect.getfile(AutoHTTPProtocol)).read_text()
    assert "self.cycle" in Path(inspect.getfile(AutoHTTPProtocol)).read_text()


def test_an_optimizers_empty_group_keeps_its_settings() -> None:
    """torch's distributed checkpoint, which FSDP2 is loaded with, leaves one before others without any."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model = torch.nn.Linear(2, 2)
    groups = [{"params": [model.weight]}, {"params": [], "weight_decay": 0.5}, {"params": [model.bias], "lr": 0.2}]
    optimizer = torch.optim.AdamW(groups, lr=0.1)  # as of an adapter, and of a helper at a rate of its own
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state, settings = get_optimizer_state_dict(model, optimizer), [dict(group) for group in optimizer.param_groups]
    load = lambda checkpoint: set_optimizer_state_dict(model, optimizer, state)  # noqa: E731
    trainer = SimpleNamespace(optimizer=optimizer, _load_optimizer_and_scheduler=load)
    load(None)
    assert "betas" not in optimizer.param_groups[1]
    optimizer.param_groups[1].update(settings[1])
    trainers.keep_empty_groups(trainer)
    trainer._load_optimizer_and_scheduler(None)
    assert [set(group) for group in optimizer.param_groups] == [set(group) for group in settings]
    assert (optimizer.param_groups[1]["weight_decay"], optimizer.param_groups[2]["lr"]) == (0.5, 0.2)
    optimizer.step()
