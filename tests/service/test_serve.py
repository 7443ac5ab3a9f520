"""The command: what it refuses to start with, and a real process over vLLM and over transformers."""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save
from transformers import TrainerCallback

from llmdistill import DataConfig, OPDConfig, OPDTrainer, RolloutConfig
from llmdistill.cli import main
from llmdistill.errors import UserError
from llmdistill.models.generation import generate
from llmdistill.models.weights import named_weights
from llmdistill.recipe.config import TOKEN_ENV
from llmdistill.rollouts.remote import RemoteRollouts
from llmdistill.teachers.fingerprint import weights_fingerprint
from llmdistill.teachers.local import LocalTeacher
from llmdistill.teachers.remote import RemoteTeacher
from llmdistill.texts import Prompt, Sampling, collate
from llmdistill.texts.views import plain
from llmdistill.wire import protocol
from tests import tiny
from tests.service.inprocess import assert_same, blocks_of, stored
from tests.service.process import ServiceProcess

ENGINES = ["hf", pytest.param("vllm", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.saved(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module", params=ENGINES)
def server(request: Any, model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    allowed = tmp_path_factory.mktemp("weights")
    if request.param == "vllm":
        pytest.importorskip("vllm", reason="the vllm extra is not installed")
    options = ["--engine", request.param, "--dtype", "float32", "--max-model-len", "128", "--kv-cache-gib", "0.05"]
    options += ["--updatable", "--allow_weights", str(allowed)]
    options += ["--transfer", "gloo"] if request.param == "vllm" else []
    with ServiceProcess(model, *options, token="secret") as running:
        running.allowed = allowed  # type: ignore[attr-defined]
        yield running


def client(server: ServiceProcess) -> httpx.Client:
    return httpx.Client(base_url=server.url, headers={"Authorization": "Bearer secret"}, timeout=60)


SEQUENCES = [[40 + i, 60, *range(50, 54 + 2 * i)] for i in range(5)]
PROMPTS = [ids[:3] for ids in SEQUENCES]


def body(**changes: Any) -> dict[str, Any]:
    positions = [[2, len(ids)] for ids in SEQUENCES]
    return {"sequences": SEQUENCES, "positions": positions, "top_k": 8, "dtype": "float32", **changes}


def exact(llama: Any, top_k: int = 8, chosen: torch.Tensor | None = None) -> Any:
    rollout = collate([ids[:2] for ids in SEQUENCES], [ids[2:] for ids in SEQUENCES], pad_id=0)
    return LocalTeacher(llama, tiny.tokenizer()).score(rollout, top_k, chosen)


def greedy(http: httpx.Client, **more: Any) -> list[list[int]]:
    asked = {"prompts": PROMPTS, "sampling": {"max_new_tokens": 8, "temperature": 0}, **more}
    answer = http.post(protocol.GENERATE, json=asked)
    assert answer.status_code == 200, answer.text
    return [samples[0]["ids"] for samples in answer.json()["completions"]]


def greedily(llama: Any) -> list[list[int]]:
    drawn = generate(llama, [Prompt(p, "") for p in PROMPTS], Sampling(8, temperature=0), eos_ids=[1], pad_id=0)
    return [ids[m].tolist() for ids, m in zip(drawn.input_ids, drawn.completion_mask, strict=True)]


def test_the_process_scores_and_samples_as_transformers_does(server: ServiceProcess) -> None:
    llama = tiny.llama(1, hidden=64, tied=True)
    with client(server) as http:
        info = http.get(protocol.INFO).json()
        assert info["teacher"] == weights_fingerprint(server.model) and info["chosen_ids"] is True
        assert_same(blocks_of(http.post(protocol.SCORE, json=body()))[1], exact(llama), 1e-4)
        rows = sum(len(ids) - 2 for ids in SEQUENCES)
        chosen = torch.randint(0, 264, (rows, 1), generator=torch.Generator().manual_seed(0))
        split = [part.tolist() for part in chosen.split([len(ids) - 2 for ids in SEQUENCES])]
        found = blocks_of(http.post(protocol.SCORE, json=body(top_k=0, chosen=split)))[1]
        assert_same(found, exact(llama, 0, chosen), 1e-4)
        assert greedy(http) == greedily(llama)
        # seeded samples do not depend on how the call is split
        sampling = {"max_new_tokens": 8, "samples_per_prompt": 2, "seed": 9}
        whole = http.post(protocol.GENERATE, json={"prompts": PROMPTS, "sampling": sampling}).json()["completions"]
        part = {"prompts": PROMPTS[3:], "rows": [3, 4], "sampling": sampling}
        again = http.post(protocol.GENERATE, json=part).json()["completions"]
        assert [[s["ids"] for s in ss] for ss in again] == [[s["ids"] for s in ss] for ss in whole[3:]]


def test_a_trainer_sends_to_the_engine_itself(server: ServiceProcess) -> None:
    """By vLLM's weight-transfer API, and over HTTP where that fails: the same weights under the same name."""
    if "--transfer" not in server.options:
        with pytest.raises(
            UserError, match="takes weights by HTTP alone.*--transfer gloo, or --rollouts.transfer http"
        ):
            sent_to(server).sync(tiny.llama(2, hidden=64, tied=True), 0)
        return
    engine, model = sent_to(server), tiny.llama(2, hidden=64, tied=True)
    try:
        with client(server) as http:
            for step in (4, 5):
                engine.sync(model, step)
                assert engine._transfers is not None and engine._transfers._sender is not None
                info = http.get(protocol.INFO)
                assert info.json()["teacher"] == weights_fingerprint(model) and info.json()["policy_version"] == step
                assert info.headers["x-policy-version"] == str(step)
                assert greedy(http, teacher=weights_fingerprint(model)) == greedily(model)
                with torch.no_grad():
                    model.model.layers[0].mlp.down_proj.weight.mul_(-2)
            # another trainer takes the engine: the first one finds itself out, and makes a group of its own again
            other, theirs = sent_to(server), tiny.llama(3, hidden=64, tied=True)
            other.sync(theirs, 0)
            assert greedy(http) == greedily(theirs)
            engine.sync(model, 6)
            assert greedy(http) == greedily(model)
            # what the engine does not take in the middle of a push is told, and the push goes over HTTP
            for update in (None, {}):
                told = {"group": "no-group", "digest": "d", "policy_version": 7, "update": update}
                assert http.post(protocol.RECEIVE, json=told).json()["error"]["type"] == "group"
            assert other._transfers is not None
            other._transfers._fleet.start_weight_update = broken  # type: ignore[method-assign]
            other.sync(theirs, 8)
            assert other._transfers._sender is None and http.get(protocol.INFO).json()["policy_version"] == 8
            assert greedy(http) == greedily(theirs)
            unfit = {"group": "g", "backend": "gloo", "replica": 0, "init": {}, "shapes": {"model.norm.weight": [5]}}
            refused = http.post(protocol.JOIN, json=unfit)
            assert refused.status_code == 400 and "do not fit the model" in refused.text
            pushed = http.post(
                protocol.WEIGHTS, params={"policy_version": 9}, content=save(first_weights()), headers=TENSORS
            )
            assert pushed.status_code == 200, pushed.text
        other.close()
    finally:
        engine.close()


TENSORS = {"Content-Type": protocol.TENSORS_TYPE}


def first_weights() -> dict[str, torch.Tensor]:
    return stored(tiny.llama(1, hidden=64, tied=True))


def broken() -> None:
    raise RuntimeError("the network is gone")


def sent_to(server: ServiceProcess) -> RemoteRollouts:
    where: dict[str, Any] = {"token": "secret", "transfer": "gloo", "max_outage_s": 60.0}
    return RemoteRollouts(server.url, eos_ids=(1,), pad_id=0, **where)


def test_pushed_weights_are_those_that_answer(server: ServiceProcess) -> None:
    """Whole, in part, from a folder; and a refused push leaves what was there. Same prompts, so a stale prefix cache
    would show."""
    first, second = tiny.llama(1, hidden=64, tied=True), tiny.llama(2, hidden=64, tied=True)
    headers = {"Content-Type": protocol.TENSORS_TYPE}
    with client(server) as http:
        assert greedy(http) == greedily(first)
        data = save(stored(second))
        answer = http.post(protocol.WEIGHTS, params={"policy_version": 3}, content=data, headers=headers)
        assert answer.json() == {"teacher": weights_fingerprint(second), "policy_version": 3}, answer.text
        assert greedy(http) == greedily(second) != greedily(first)
        assert_same(blocks_of(http.post(protocol.SCORE, json=body()))[1], exact(second), 1e-4)
        refused = http.post(
            protocol.WEIGHTS,
            params={"policy_version": 4},
            content=save({"model.norm.weight": torch.zeros(5)}),
            headers=headers,
        )
        assert refused.status_code == 400
        assert greedy(http) == greedily(second)
        with torch.no_grad():
            second.model.layers[0].mlp.down_proj.weight.mul_(-2)
        part = {"model.layers.0.mlp.down_proj.weight": second.model.layers[0].mlp.down_proj.weight.detach()}
        answer = http.post(
            protocol.WEIGHTS, params={"policy_version": 5, "partial": "true"}, content=save(part), headers=headers
        )
        assert answer.status_code == 200, answer.text
        assert greedy(http) == greedily(second)
        folder = server.allowed / "v6"  # type: ignore[attr-defined]
        first.save_pretrained(folder)
        answer = http.post(protocol.WEIGHTS, json={"path": str(folder), "policy_version": 6})
        assert answer.json() == {"teacher": weights_fingerprint(server.model), "policy_version": 6}, answer.text
        assert greedy(http) == greedily(first)
        assert_same(blocks_of(http.post(protocol.SCORE, json=body()))[1], exact(first), 1e-4)


@pytest.mark.slow
def test_adapters_are_swapped_while_vllm_runs(model: str, tmp_path: Path) -> None:
    """And scores stay the base model's, with an adapter at work in the same steps. With more of them than are computed
    with at one time, and after the folders they came from have gone: each is read again when it comes back into use."""
    pytest.importorskip("vllm", reason="the vllm extra is not installed")
    from peft import LoraConfig, get_peft_model

    def adapted(seed: int) -> Any:
        torch.manual_seed(seed)
        config = LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        return get_peft_model(tiny.llama(1, hidden=64, tied=True), config)

    options = ["--dtype", "float32", "--max-model-len", "128", "--kv-cache-gib", "0.05", "--max_lora_rank", "8"]
    options += ["--max_adapters", "6"]
    with (
        ServiceProcess(model, *options, "--allow_weights", str(tmp_path), token="secret") as server,
        client(server) as http,
    ):
        plain = greedy(http)
        for seed in (1, 2):
            lora = adapted(seed)
            folder = tmp_path / f"lora{seed}"
            lora.save_pretrained(folder)
            answer = http.post(protocol.ADAPTERS, json={"name": "a", "path": str(folder)})
            assert answer.status_code == 200, answer.text
            assert greedy(http, adapter="a") == greedily(lora) != plain
            assert greedy(http) == plain
            with ThreadPoolExecutor(4) as pool:
                drawn = [pool.submit(greedy, http, adapter="a") for _ in range(3)]
                scored = pool.submit(http.post, protocol.SCORE, json=body())
            assert_same(blocks_of(scored.result())[1], exact(tiny.llama(1, hidden=64, tied=True)), 1e-4)
            assert all(d.result() == greedily(lora) for d in drawn)
        wanted = {"a": greedily(lora)}
        for seed in range(3, 8):  # six with the one above; four are computed with at one time
            lora = adapted(seed)
            folder = tmp_path / f"lora{seed}"
            lora.save_pretrained(folder)
            answer = http.post(protocol.ADAPTERS, json={"name": f"a{seed}", "path": str(folder)})
            assert answer.status_code == 200, answer.text
            wanted[f"a{seed}"] = greedily(lora)
        full = http.post(protocol.ADAPTERS, json={"name": "one-more", "path": str(folder)})
        assert full.status_code == 400 and full.json()["error"]["limit"] == 6
        for folder in tmp_path.glob("lora*"):
            shutil.rmtree(folder)
        for _ in range(2):
            for name, ids in wanted.items():
                assert greedy(http, adapter=name) == ids
        assert http.delete(protocol.ADAPTERS + "/a").status_code == 200


def test_a_stop_answers_what_is_there_and_leaves_nothing_behind(model: str) -> None:
    with ServiceProcess(model, "--engine", "hf", "--dtype", "float32", "--max-model-len", "250") as server:
        found: list[httpx.Response] = []
        asked = {"prompts": [[40, 41]] * 8, "sampling": {"max_new_tokens": 240, "temperature": 1}, "eos_ids": []}
        thread = threading.Thread(
            target=lambda: found.append(httpx.post(server.url + protocol.GENERATE, json=asked, timeout=60))
        )
        thread.start()
        while "llmdistill_requests_in_house 1.0" not in httpx.get(server.url + protocol.METRICS).text:
            time.sleep(0.01)
        assert server.terminate() == 0
        thread.join()
        assert found[0].status_code == 200 and len(found[0].json()["completions"]) == 8
        assert "".join(server.log).count("draining") == 1


@pytest.mark.slow
def test_tls_and_several_tokens(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that trusts the certificate and shows either token is served; one that does not sends nothing."""
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    made += ["-addext", "subjectAltName=IP:127.0.0.1", "-out", str(certificate), "-keyout", str(key)]
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    subprocess.run(made, check=True, capture_output=True)
    options = ["--engine", "hf", "--dtype", "float32", "--max-model-len", "64"]
    options += ["--tls_cert", str(certificate), "--tls_key", str(key)]
    with ServiceProcess(model, *options, token="old,new", certificate=str(certificate)) as server:
        with pytest.raises(UserError, match="gave no answer for 5 s: cannot connect: .*CERTIFICATE_VERIFY_FAILED"):
            RemoteTeacher(server.url, token="new", max_outage_s=5.0, on_status=lambda line: None).close()
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        for token in ("old", "new@127.0.0.1"):
            teacher = RemoteTeacher(server.url, token=token, max_outage_s=20)
            assert len(teacher.score(collate([[40, 41]], [[42, 43]], pad_id=0), 2)[0].token_logprobs) == 2
            teacher.close()
        with pytest.raises(UserError, match="HTTP 401"):
            RemoteTeacher(server.url, token="other", max_outage_s=20)


def test_answers_do_not_wait_for_acknowledgements(server: ServiceProcess) -> None:
    """Nagle's algorithm would add 40 ms to every request of a connection that is kept."""
    with client(server) as http:
        seconds = []
        for _ in range(30):
            started = time.monotonic()
            http.get(protocol.HEALTH)
            seconds.append(time.monotonic() - started)
    assert sorted(seconds)[15] < 0.02


def test_a_stop_does_not_wait_for_ever(model: str) -> None:
    options = ["--engine", "hf", "--dtype", "float32", "--max-model-len", "250", "--drain-s", "0.5"]
    with ServiceProcess(model, *options) as server:
        asked = {
            "prompts": [[40, 41]] * 250,
            "sampling": {"max_new_tokens": 240, "samples_per_prompt": 2},
            "eos_ids": [],
        }

        def ask() -> None:
            with contextlib.suppress(httpx.HTTPError):  # cut off, or told 503: either will do
                httpx.post(server.url + protocol.GENERATE, json=asked, timeout=60)

        threading.Thread(target=ask).start()
        while "llmdistill_requests_in_house 1.0" not in httpx.get(server.url + protocol.METRICS).text:
            time.sleep(0.01)
        started = time.monotonic()
        server.terminate()
        assert time.monotonic() - started < 15


@pytest.mark.slow
def test_what_is_particular_to_vllm(tmp_path: Path) -> None:
    """An untied head, an eos of the model's own, prompts that are computed in pieces, and an engine that dies."""
    pytest.importorskip("vllm", reason="the vllm extra is not installed")
    untied = tiny.llama(4, hidden=64, tied=False)
    untied.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    options = ["--dtype", "float32", "--max-model-len", "128", "--kv-cache-gib", "0.05", "--updatable"]
    with (
        ServiceProcess(str(tmp_path), *options, "--batch-tokens", "129", token="secret") as server,
        client(server) as http,
    ):
        before = blocks_of(http.post(protocol.SCORE, json=body()))[1]
        # a push without the output head, which is a matrix of its own here
        other = {n: t for n, t in named_weights(tiny.llama(5, hidden=64, tied=False)) if n != "lm_head.weight"}
        headers = {"Content-Type": protocol.TENSORS_TYPE}
        refused = http.post(protocol.WEIGHTS, params={"policy_version": 1}, content=save(other), headers=headers)
        assert refused.status_code == 400 and "lm_head.weight" in refused.text
        assert_same(blocks_of(http.post(protocol.SCORE, json=body()))[1], before)
        # only the ids of the request end a completion
        asked = {"prompts": PROMPTS * 20, "sampling": {"max_new_tokens": 60, "seed": 1}, "eos_ids": []}
        drawn = http.post(protocol.GENERATE, json=asked).json()["completions"]
        assert {s["finish"] for ss in drawn for s in ss} == {"length"} and any(
            1 in s["ids"] for ss in drawn for s in ss
        )
        # seeded samples of prompts that take several steps, in any company
        long = [[40 + i % 7, *range(50, 150)] for i in range(12)]
        sampling = {"max_new_tokens": 12, "seed": 3}
        together = http.post(protocol.GENERATE, json={"prompts": long, "sampling": sampling})
        assert together.status_code == 200, together.text
        alone = http.post(protocol.GENERATE, json={"prompts": long[7:8], "rows": [7], "sampling": sampling}).json()
        assert alone["completions"][0][0]["ids"] == together.json()["completions"][7][0]["ids"]
        for pid in server.children():
            os.kill(pid, 9)
        assert server.process is not None and server.process.wait(30) == 1  # nobody has to ask


@pytest.mark.slow
def test_a_killed_service_takes_its_engine_with_it(model: str) -> None:
    pytest.importorskip("vllm", reason="the vllm extra is not installed")
    options = ["--dtype", "float32", "--max-model-len", "64", "--kv-cache-gib", "0.05"]
    with ServiceProcess(model, *options) as server:
        httpx.post(
            server.url + protocol.GENERATE, json={"prompts": [[4]], "sampling": {"max_new_tokens": 2}}, timeout=60
        )
        children = server.children()
        assert children
        server.kill()
        end = time.monotonic() + 10
        while any(Path(f"/proc/{pid}").exists() for pid in children) and time.monotonic() < end:
            time.sleep(0.1)
        assert not any(Path(f"/proc/{pid}").exists() for pid in children)


@pytest.mark.slow
def test_when_the_engine_dies_the_service_says_so_and_ends(model: str) -> None:
    pytest.importorskip("vllm", reason="the vllm extra is not installed")
    options = ["--dtype", "float32", "--max-model-len", "64", "--kv-cache-gib", "0.05"]
    with ServiceProcess(model, *options) as server:
        asked = {"prompts": [[4]], "sampling": {"max_new_tokens": 2}}
        assert httpx.post(server.url + protocol.GENERATE, json=asked, timeout=60).status_code == 200
        for pid in server.children():
            os.kill(pid, 9)
        with contextlib.suppress(httpx.ConnectError):  # it may have noticed by itself, and be gone
            answer = httpx.post(server.url + protocol.GENERATE, json=asked, timeout=60)
            assert answer.status_code == 503 and answer.json()["error"]["type"] == "dead"
        assert server.process is not None and server.process.wait(30) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--host", "0.0.0.0"], ["--host 0.0.0.0", "LLMDISTILL_TOKEN"]),
        (["--host", "::"], ["--host ::", "LLMDISTILL_TOKEN"]),
        (["--host", "example.org"], ["example.org", "LLMDISTILL_TOKEN"]),
        (["--allow_weights", "/no/such/folder"], ["--allow_weights", "/no/such/folder"]),
        (["--topk", "3"], ["--topk", "--top_k"]),
        (["--updatable", "--max_lora_rank", "8"], ["--updatable", "--max_lora_rank", "either"]),
        (["--port", "many"], ["port", "many"]),
        (["--engine", "tgi"], ["engine", "tgi", "vllm"]),
        (["--model", "/no/such/model", "--engine", "hf"], ["/no/such/model"]),
        (["--model", "", "--engine", "hf"], ["--model"]),
    ],
)
def test_what_cannot_be_served_is_one_line(
    options: list[str], words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LLMDISTILL_TOKEN", raising=False)
    assert main(["serve", "--model", "somewhere", "--port", "0", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert all(word in error for word in words), error


def test_a_port_that_is_taken(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--model", model, "--port", str(port)]) == 2
    assert f"--port {port}" in capsys.readouterr().err


def test_rounds_are_made_ahead_by_a_service(
    server: ServiceProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text that is a step old, by the weights of that step: what the engine drew with is what they say."""
    monkeypatch.setenv(TOKEN_ENV, "secret")
    args = OPDConfig(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        estimator="sampled",
        rollouts=RolloutConfig(engine="remote", url=server.url, staleness=1, max_new_tokens=8),
    )
    trainer = OPDTrainer(
        tiny.llama(7, hidden=64),
        args,
        tiny.llama(2, hidden=64),
        train_dataset=tiny.rows(8, completion=False),
        processing_class=tiny.tokenizer(),
        data=DataConfig(max_prompt_tokens=60),
        preflight=False,
    )
    weights, rounds = [copy.deepcopy(trainer.model)], list[Any]()

    class Keeps(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            weights.append(copy.deepcopy(trainer.model))

    trainer.add_callback(Keeps())
    made = trainer.batches

    def seen(texts: Any, *args: Any, **kwargs: Any) -> Any:
        rounds.append(texts["main"].rollout)
        return made(texts, *args, **kwargs)

    monkeypatch.setattr(trainer, "batches", seen)
    trainer.train()
    trainer.close()
    assert [line["rollout/staleness"] for line in trainer.state.log_history if "loss" in line] == [0, 1, 1, 1]
    for rollout, then in zip(rounds, (0, 0, 1, 2), strict=True):
        view = plain(rollout)
        logits_BTV = weights[then].eval()(**view.inputs(), use_cache=False).logits
        own_N = view.rows(logits_BTV).log_softmax(-1).gather(1, view.targets[:, None]).squeeze(1)
        drawn_N = rollout.behavior_logprobs[:, 1:][rollout.completion_mask[:, 1:]]
        torch.testing.assert_close(drawn_N, own_N.detach(), rtol=0, atol=1e-3)
