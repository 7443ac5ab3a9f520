"""Engines behind HTTP: the real service, a real vLLM server, and what goes over the wire."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console

from llmdistill.errors import UserError
from llmdistill.evals import Evaluation, evaluate
from llmdistill.evals.engines.base import Asked
from llmdistill.evals.engines.http import OpenAIEngine, in_threads
from llmdistill.evals.records import EvalFolder, Sample
from llmdistill.texts.rollout import Sampling
from tests.evals import made
from tests.service.process import ServiceProcess

QUIET = Console(file=io.StringIO())
QUICK: dict[str, Any] = {"timeout_s": 20.0, "max_outage_s": 2.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(made.model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def service(model: str) -> Iterator[ServiceProcess]:
    with ServiceProcess(model, "--engine", "hf", "--dtype", "float32", "--max-model-len", "250") as process:
        yield process


def scored(folder: Path, out: str, **settings: Any) -> Evaluation:
    done = evaluate(made.suite(folder), output_dir=str(folder / out), console=QUIET, **{**QUICK, **settings})
    assert isinstance(done, Evaluation)
    return done


def test_the_service_by_both_its_protocols(tmp_path: Path, model: str, service: ServiceProcess) -> None:
    remote = scored(tmp_path, "remote", engine="remote", url=service.url, tokenizer=model)
    assert remote.results["samples"] == 12 and remote.results["weights"]
    openai = scored(tmp_path, "openai", engine="openai", url=service.url, api="completions", tokenizer=model)
    assert openai.results["samples"] == 12
    samples = [EvalFolder(done.folder).samples() for done in (remote, openai)]
    for one in samples:
        assert all(0 < s.tokens <= 8 and (s.finish == "length") == (s.tokens == 8) for s in one)
    greedy = {"n": 1, "temperature": 0.0}
    texts = [
        {(s.problem, s.index): s.text for s in EvalFolder(scored(tmp_path, out, **greedy, **where).folder).samples()}
        for out, where in (
            ("remote-greedy", {"engine": "remote", "url": service.url, "tokenizer": model}),
            ("openai-greedy", {"engine": "openai", "url": service.url, "api": "completions", "tokenizer": model}),
            ("hf-greedy", {"engine": "hf", "model": model}),
        )
    ]
    assert texts[0] == texts[1] == texts[2]


def test_an_endpoint_that_dies_and_comes_back(tmp_path: Path, model: str) -> None:
    """What was drawn stays; the same command goes on from there and ends as an undisturbed run does."""
    with ServiceProcess(model, "--engine", "hf", "--dtype", "float32", "--max-model-len", "250") as process:
        where = {"engine": "remote", "url": process.url, "tokenizer": model, "concurrency": 1}
        whole = scored(tmp_path, "whole", **where)
        file = tmp_path / "cut" / "sums" / "samples" / "rank-0.jsonl"

        def kill() -> None:
            while not file.is_file() or file.read_bytes().count(b"\n") < 4:
                time.sleep(0.001)
            process.kill()

        threading.Thread(target=kill).start()
        with pytest.raises(UserError, match="gave no answer for 2 s"):
            scored(tmp_path, "cut", **where)
        kept = file.read_text().splitlines()
        assert 4 <= len(kept) < 12
        process.start()
        assert scored(tmp_path, "cut", **where).results == whole.results
        assert file.read_text().splitlines()[: len(kept)] == kept


def test_an_endpoint_is_asked_for_its_models_first(tmp_path: Path, model: str, service: ServiceProcess) -> None:
    with pytest.raises(UserError, match="the endpoint serves .*, not 'gpt'"):
        scored(tmp_path, "x", engine="openai", url=service.url, model="gpt", tokenizer=model, api="completions")
    with pytest.raises(UserError, match="cannot connect"):
        scored(tmp_path, "x", engine="remote", url="http://127.0.0.1:9", tokenizer=model, max_outage_s=0.5)
    with pytest.raises(UserError, match="template 'question-answer' is plain text"):
        scored(tmp_path, "x", engine="openai", url=service.url, template="question-answer")


class Chat:
    """An OpenAI chat endpoint that answers what it is told to, and remembers what it was asked."""

    def __init__(self, message: dict[str, Any], finish: str = "stop", status: list[int] | None = None) -> None:
        self.asked: list[dict[str, Any]] = []
        status = status or []
        chat = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._send(200, {"data": [{"id": "m", "max_model_len": 64}]})

            def do_POST(self) -> None:
                chat.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                choice = {"message": message, "finish_reason": finish}
                self._send(status.pop(0) if status else 200, {"choices": [choice], "usage": {"completion_tokens": 7}})

            def _send(self, code: int, body: dict[str, Any]) -> None:
                text = json.dumps(body).encode()
                self.send_response(code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def draw(self, asked: Asked, sampling: Sampling, stop: tuple[str, ...] = (), **options: Any) -> Sample:
        engine = OpenAIEngine(self.url, "", api="chat", concurrency=1, max_outage_s=5.0, **options)
        try:
            assert engine.context == 64
            return next(iter(engine.draw([asked], sampling, stop)))
        finally:
            engine.close()
            self.server.shutdown()


ASKED = Asked("p", 0, 5, ({"role": "user", "content": "1+1?"},), room=32)


def test_what_a_chat_endpoint_is_sent() -> None:
    chat = Chat({"content": "2"})
    sample = chat.draw(ASKED, Sampling(32, temperature=0.6, top_p=0.95, top_k=20), ("END",), thinking=False)
    assert sample == Sample("p", 0, "2", 7, "stop", 5)
    (body,) = chat.asked
    assert body == {
        **{"model": "m", "max_tokens": 32, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "seed": 5, "n": 1},
        **{"stop": ["END"], "messages": [{"role": "user", "content": "1+1?"}]},
        "chat_template_kwargs": {"enable_thinking": False},
        **{"min_p": 0.0, "repetition_penalty": 1.0},  # a vLLM server would take the checkpoint's
    }


def test_a_prefilled_turn_is_continued() -> None:
    chat = Chat({"content": "x"})
    chat.draw(Asked("p", 0, 5, ASKED.messages, prefill="```python\n", room=32), Sampling(32))
    assert chat.asked[0]["messages"][-1] == {"role": "assistant", "content": "```python\n"}
    assert chat.asked[0]["continue_final_message"] is True and chat.asked[0]["add_generation_prompt"] is False


def test_an_endpoint_that_knows_its_context_says_how_much_is_left(tmp_path: Path) -> None:
    """32,768 tokens asked of an endpoint that holds 64: it is not told a number that it would refuse."""
    chat = Chat({"content": "\\boxed{0}"})
    done = scored(tmp_path, "out", engine="openai", url=chat.url, max_new_tokens=32768, n=1)
    assert len(chat.asked) == 6 and all("max_tokens" not in body for body in chat.asked)
    assert json.loads((done.folder / "config.json").read_text())["room"]["shorter"] == 6


@pytest.mark.parametrize(
    ("message", "finish", "text"),
    [
        ({"content": "2", "reasoning_content": "one and one"}, "stop", "<think>one and one</think>2"),
        ({"content": None, "reasoning_content": "one and"}, "length", "<think>one and"),
        ({"content": "2", "reasoning": "hm"}, "stop", "<think>hm</think>2"),
        ({"content": None}, "stop", ""),
    ],
)
def test_reasoning_that_comes_apart_is_put_back(message: dict[str, Any], finish: str, text: str) -> None:
    assert Chat(message, finish).draw(ASKED, Sampling(32)).text == text


def test_a_busy_endpoint_is_asked_again() -> None:
    chat = Chat({"content": "2"}, status=[429, 503, 500])
    assert chat.draw(ASKED, Sampling(32), backoff_s=0.01).text == "2"
    assert len(chat.asked) == 4


def test_a_refusal_ends_it_with_the_servers_words() -> None:
    with pytest.raises(UserError, match="HTTP 400"):
        Chat({"content": "2"}, status=[400]).draw(ASKED, Sampling(32))


def test_an_endpoint_that_is_not_there_is_not_spoken_of_as_in_training(caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as taken:  # bound and not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with caplog.at_level("WARNING", "llmdistill"), pytest.raises(UserError) as caught:
            OpenAIEngine(url, "m", api="chat", concurrency=1, max_outage_s=0.2)
    assert "then run the same command again, which keeps what was drawn" in str(caught.value)
    assert "the evaluation waits" in caplog.text
    assert "training" not in str(caught.value) + caplog.text


def test_finished_samples_come_before_the_error() -> None:
    """Three workers: two finish, one fails. The two are not lost."""
    ready = threading.Barrier(3)

    def work(asked: Asked) -> Sample:
        ready.wait()
        if asked.problem == "1":
            time.sleep(0.2)
            raise UserError("no")
        return asked.sample("x", 1, "stop")

    results, items = [], [Asked(str(i), 0, 1, ()) for i in range(3)]
    with pytest.raises(UserError, match="no"):
        for sample in in_threads(work, items, 3):
            results.append(sample.problem)
    assert sorted(results) == ["0", "2"]


@pytest.mark.slow
def test_a_real_vllm_server(tmp_path: Path, model: str) -> None:
    """Chat (its template) and completions (ours) of vLLM's own server, greedy: the text of the hf engine."""
    pytest.importorskip("vllm", reason="the vllm extra is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", str(port)]
    command += ["--enforce-eager", "--dtype", "float32", "--max-model-len", "250", "--host", "127.0.0.1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment, start_new_session=True
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None
            try:
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.2)
        settings = {"n": 1, "temperature": 0.0, "engine": "openai", "url": url}
        found = [
            scored(tmp_path, "chat", **settings),
            scored(tmp_path, "completions", **settings, api="completions", tokenizer=model),
            scored(tmp_path, "hf", n=1, temperature=0.0, engine="hf", model=model),
        ]
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
    # the server holds back the bytes of a character that is not complete yet, and noise ends in such bytes
    texts = [{(s.problem, s.index): s.text.rstrip("\ufffd") for s in EvalFolder(f.folder).samples()} for f in found]
    assert texts[0] == texts[1] == texts[2] and len(texts[0]) == 6
