"""A plain vLLM server as a teacher: an imitation of its answers always, the server itself in the slow tests."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest
import torch

from llmdistill.cli import main
from llmdistill.datagen.tables import write_rows
from llmdistill.errors import UserError
from llmdistill.models.generation import generate
from llmdistill.record.manifest import read_manifest
from llmdistill.teachers.base import max_top_k
from llmdistill.teachers.connecting import connect
from llmdistill.teachers.evidence import gather
from llmdistill.teachers.fingerprint import tokenizer_fingerprint
from llmdistill.teachers.local import LocalTeacher
from llmdistill.teachers.openai import COMPLETIONS, PlainVLLMTeacher
from llmdistill.teachers.remote import RemoteTeacher
from llmdistill.texts import Prompt, Sampling, collate
from tests.datagen.processes import PROCESSES
from tests.datagen.test_kills import command, kept, killed_when
from tests.service.faulty import FAULTS, Faulty
from tests.service.small import Answer, Seen, error
from tests.tiny import llama, tokenizer

VOCAB, LONGEST = 264, 64
QUICK = {"timeout_s": 1.0, "backoff_s": 0.01, "max_backoff_s": 0.05, "cool_down_s": 0.02, "max_outage_s": 5.0}
START_S = 600.0  # a machine may be very busy


class SmallVLLM:
    """What vLLM 0.32 answers to the requests of the client, over transformers. ``model`` and ``root`` may change."""

    def __init__(self, teacher, root, max_logprobs=64):
        self.teacher, self.model, self.root, self.max_logprobs = teacher, "tiny", root, max_logprobs

    def answer(self, seen: Seen) -> Answer:
        if seen.path == "/health":
            return Answer(200, b"", "text/plain")
        if seen.path == "/v1/models":
            return self._json({"data": [{"id": self.model, "root": self.root, "max_model_len": LONGEST}]})
        if seen.path != COMPLETIONS:
            return error(404, "Not Found")
        body = json.loads(seen.body)
        return self._scored(body) if body.get("prompt_logprobs") is not None else self._drawn(body)

    def _scored(self, body):
        k = body["prompt_logprobs"]
        if (VOCAB if k < 0 else k) > self.max_logprobs:
            return error(
                400, f"Requested prompt logprobs of {k}, which is greater than max allowed: {self.max_logprobs}"
            )
        choices = []
        for i, ids in enumerate(body["prompt"]):
            rows = [None]
            for logprobs, token in zip(self._logprobs(ids), ids[1:], strict=False):
                top = logprobs.topk(VOCAB if k < 0 else k)
                own = {str(token): {"logprob": logprobs[token].item(), "rank": 0, "decoded_token": "?"}}
                pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
                listed = {
                    str(t): {"logprob": lp, "rank": r, "decoded_token": "?"} for r, (t, lp) in enumerate(pairs, 1)
                }
                rows.append({**own, **listed})
            choices.append({"index": i, "prompt_token_ids": ids, "prompt_logprobs": rows, "token_ids": [5]})
        return self._json({"choices": choices[::-1]})  # whatever their order

    def _drawn(self, body):
        sampling = Sampling(body["max_tokens"], temperature=body["temperature"])
        made = generate(self.teacher.model, [Prompt(body["prompt"], "")], sampling, eos_ids=(1,), pad_id=0)
        ids = made.input_ids[0][made.completion_mask[0]].tolist()
        logprobs = {"token_logprobs": made.behavior_logprobs[0][made.completion_mask[0]].tolist()}
        choice = {"index": 0, "token_ids": ids, "logprobs": logprobs, "finish_reason": made.finish[0]}
        return self._json({"choices": [choice]})

    @torch.no_grad()
    def _logprobs(self, ids):
        return self.teacher.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)

    def _json(self, content):
        return Answer(200, json.dumps(content).encode())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("served")
    llama(1, hidden=64, tied=False).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def local(folder):
    return LocalTeacher(llama(1, hidden=64, tied=False), tokenizer())


@pytest.fixture
def server(local, folder):
    with Faulty(small=SmallVLLM(local, folder)) as made:
        yield made


@pytest.fixture
def teacher(server):
    made = PlainVLLMTeacher(server.url + "/v1", **QUICK)
    yield made
    made.close()


def rollout():
    """Holes in a mask, a sequence of the greatest length, a prompt alone, a completion alone."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(2, VOCAB, (n,), generator=generator).tolist()  # noqa: E731
    made = collate([draw(3), draw(20), draw(40), draw(5), []], [draw(9), draw(1), draw(23), [], draw(6)], pad_id=0)
    made.completion_mask[0, [4, 7]] = False
    return made


def assert_scores_are_those_of(local, teacher, top_k, atol):
    made = rollout()
    for block, exact in zip(teacher.score(made, top_k), local.score(made, top_k), strict=True):
        assert block.positions == exact.positions and block.header == exact.header
        assert block.topk_ids.shape == exact.topk_ids.shape and block.topk_ids.dtype == torch.int32
        torch.testing.assert_close(block.token_logprobs, exact.token_logprobs, rtol=0, atol=atol)
        torch.testing.assert_close(block.topk_logprobs, exact.topk_logprobs, rtol=0, atol=atol)
        gaps = (exact.topk_logprobs[:, :-1] - exact.topk_logprobs[:, 1:] > 2 * atol).all(1)
        assert torch.equal(block.topk_ids[gaps][:, :-1], exact.topk_ids[gaps][:, :-1])  # rows without near ties


def assert_samples_like(local, teacher):
    prompts = [Prompt(list(range(5, 12)), "", domain="a"), Prompt(list(range(50, 70)), "", domain="b")]
    ours, theirs = teacher.generate(prompts, Sampling(8, temperature=0.0)), local.generate(prompts, Sampling(8, 0.0))
    assert torch.equal(ours.input_ids, theirs.input_ids) and ours.finish == theirs.finish
    assert ours.domain == ("a", "b")
    torch.testing.assert_close(ours.behavior_logprobs, theirs.behavior_logprobs, rtol=0, atol=2e-4)


@pytest.mark.parametrize("top_k", [0, 1, 5, 64])
def test_scores_are_those_of_the_embedded_teacher(local, teacher, top_k):
    assert_scores_are_those_of(local, teacher, top_k, 1e-5)


def test_the_whole_vocabulary_if_the_server_allows_it(local, folder):
    with Faulty(small=SmallVLLM(local, folder, max_logprobs=VOCAB)) as server:
        teacher = PlainVLLMTeacher(server.url, **QUICK)
        assert_scores_are_those_of(local, teacher, VOCAB, 1e-5)
        teacher.close()


def test_the_folder_it_serves_tells_who_it_is(local, teacher):
    told, exact = teacher.info(), local.info()
    assert (told.fingerprint, told.tokenizer, told.template) == (exact.fingerprint, exact.tokenizer, exact.template)
    assert (told.name, told.vocab_size, told.eos_ids) == ("tiny", VOCAB, (1,))
    assert told.context_length == LONGEST - 1  # a token is generated after what is scored


def test_without_the_folder_a_tokenizer_is_needed_and_the_name_stands_for_the_weights(server, local, folder):
    server.small.root = "/only/there"
    with pytest.raises(UserError, match="server of '/only/there', which is no folder or cached model here"):
        PlainVLLMTeacher(server.url, **QUICK)
    made = PlainVLLMTeacher(server.url, tokenizer=tokenizer(), **QUICK)
    named = PlainVLLMTeacher(server.url, tokenizer=folder, **QUICK)
    for told in (made.info(), named.info()):
        assert told.tokenizer == tokenizer_fingerprint(tokenizer()) and told.eos_ids == (1,)
        assert len(told.fingerprint) == 16 and told.fingerprint != local.info().fingerprint
    assert made.info().vocab_size == len(tokenizer()) and named.info().vocab_size == VOCAB
    made.close()
    named.close()


def test_what_it_cannot_give_is_said(server, teacher):
    short = collate([[5]], [[6]], pad_id=0)
    for act, message in (
        (lambda: teacher.score(short, 4, torch.tensor([[7]])), "a plain vLLM server cannot score them"),
        (lambda: teacher.score(short, VOCAB + 1), f"the teacher has {VOCAB} logit columns"),
        (lambda: teacher.score(short, 65), "objective.top_k is 65; .*start the server with --max-logprobs 65"),
        (lambda: teacher.score(collate([[5] * 60], [[6] * 4], pad_id=0), 1), "has 64 tokens; .* scores 63"),
        (lambda: teacher.generate([Prompt([5] * 60, "")], Sampling(5)), "makes that 65 tokens, .* holds 64"),
        (lambda: PlainVLLMTeacher(server.url, model="else", **QUICK), "model is 'else'; the server serves tiny"),
    ):
        with pytest.raises(UserError, match=message):
            act()


@pytest.mark.parametrize("limit", [20, 64, VOCAB])
def test_it_says_how_many_tokens_the_server_lists(local, folder, limit):
    """The server tells nobody; asked for more than it lists, once, it does."""
    with Faulty(small=SmallVLLM(local, folder, max_logprobs=limit)) as server:
        teacher = PlainVLLMTeacher(server.url, **QUICK)
        assert not server.posts(COMPLETIONS)
        assert [max_top_k(teacher) for _ in range(3)] == [limit] * 3
        (asked,) = server.posts(COMPLETIONS)
        assert json.loads(asked.body)["prompt"] == [[0]]  # a prompt without log-probs: no answer of a megabyte
        asked = min(64, max_top_k(teacher))
        assert teacher.score(rollout(), asked)[0].topk_ids.shape[1] == asked
        teacher.close()


def test_the_full_estimator_is_refused_by_its_own_name(teacher):
    """Not as objective.top_k, which nobody has set."""
    with pytest.raises(UserError, match=r"estimator is full; teacher 'tiny' lists at most 64 of its 264 .*--top_k 64"):
        gather(teacher, rollout(), "full", 0)


def test_a_refusal_for_another_reason_is_no_limit(server, teacher):
    server.small.model = "gone"
    server.small._scored = lambda body: error(400, "The model `tiny` does not exist")
    with pytest.raises(UserError, match="does not exist"):
        max_top_k(teacher)


def test_samples_are_requests_with_seeds_of_their_own(server, local, teacher):
    assert_samples_like(local, teacher)
    server.seen.clear()
    drawn = teacher.generate([Prompt([5, 6, 7], ""), Prompt([8, 9], "")], Sampling(3, samples_per_prompt=3, seed=2))
    bodies = [json.loads(seen.body) for seen in server.posts(COMPLETIONS)]
    assert len(drawn) == 6 and len({body["seed"] for body in bodies}) == 6
    assert drawn.behavior_logprobs is not None
    # the server's log-probs are of softmax(logits): of another distribution they would be wrong, so there are none
    for sampling in (Sampling(3, temperature=0.5), Sampling(3, top_p=0.9), Sampling(3, top_k=5)):
        assert teacher.generate([Prompt([5, 6], "")], sampling).behavior_logprobs is None


@pytest.mark.parametrize("fault", [f for f in FAULTS if f != "stall"])
def test_faults_change_nothing(server, local, teacher, fault):
    server.next(fault)
    assert_scores_are_those_of(local, teacher, 3, 1e-5)
    assert teacher.transport.counters.retries == (fault != "slow")


def test_another_model_on_the_port_stops_the_run(server, teacher):
    short = collate([[5]], [[6]], pad_id=0)
    teacher.score(short, 1)
    server.small.root = "/another/model"
    server.next("503", "503", "503")  # out, and asked again who it is
    with pytest.raises(UserError, match="root was .* and is now '/another/model'"):
        teacher.score(short, 1)


def test_connect_knows_a_plain_server(server):
    teacher = connect(server.url, lossless=True, **QUICK)
    assert isinstance(teacher, PlainVLLMTeacher)
    teacher.close()


def test_connect_waits_for_either(local, server):
    server.stop()
    with pytest.raises(UserError, match=r"teacher \S+ gave no answer for 0.2 s"):
        connect(server.url, **{**QUICK, "max_outage_s": 0.2}, on_status=lambda line: None)
    lines = []

    def told(line):
        lines.append(line)
        if len(lines) == 1:
            service.start()

    with Faulty(local) as service:
        service.stop()
        teacher = connect(service.url, **QUICK, on_status=told)
        assert isinstance(teacher, RemoteTeacher) and "cannot connect" in lines[0] and "is back" in lines[1]
        teacher.close()


# -------------------------------------------------------------------- the server itself


@pytest.fixture(scope="module")
def url(folder):
    """``vllm serve`` of the tiny model, in float32."""
    pytest.importorskip("vllm", reason="the vllm extra is not installed")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ["--model", folder, "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port)]
    options += ["--enforce-eager", "--dtype", "float32", "--max-logprobs", "64", "--max-model-len", str(LONGEST)]
    if not torch.cuda.is_available():
        options += ["--kv-cache-memory-bytes", str(1 << 28)]
    env = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *options]
    server = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end, ready = time.monotonic() + START_S, False
        while not ready and time.monotonic() < end and server.poll() is None:
            time.sleep(0.5)
            with contextlib.suppress(httpx.HTTPError):
                ready = httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200
        assert ready, "vLLM's server did not start"
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(60)


@pytest.mark.slow
def test_vllms_own_server_says_what_transformers_says(url, local):
    """float32 on both sides: log-probs differ by rounding only."""
    teacher = connect(url)
    assert isinstance(teacher, PlainVLLMTeacher)
    assert max_top_k(teacher) == 64
    for top_k in (0, 1, 5, 64):
        assert_scores_are_those_of(local, teacher, top_k, 2e-4)
    assert_samples_like(local, teacher)
    drawn = [teacher.generate([Prompt([5, 6, 7], "")], Sampling(6, samples_per_prompt=4, seed=s)) for s in (1, 1, 2)]
    assert torch.equal(drawn[0].input_ids, drawn[1].input_ids)
    assert not torch.equal(drawn[0].input_ids, drawn[2].input_ids)
    counted = drawn[0].completion_mask
    with torch.no_grad():
        logprobs = local.model(drawn[0].input_ids).logits.float().log_softmax(-1)[:, :-1]
    exact = logprobs.gather(2, drawn[0].input_ids[:, 1:, None]).squeeze(2)
    assert (exact - drawn[0].behavior_logprobs[:, 1:])[counted[:, 1:]].abs().max() < 2e-4
    with pytest.raises(UserError, match="objective.top_k is 65; .*--max-logprobs 65"):
        teacher.score(rollout(), 65)
    teacher.close()


@pytest.mark.slow
def test_the_longest_sequence_is_scored_and_one_more_refused(url, local):
    teacher = PlainVLLMTeacher(url)
    longest = collate([[7] * 40], [[9] * (LONGEST - 41)], pad_id=0)
    (block,), (exact,) = teacher.score(longest, 4), local.score(longest, 4)
    torch.testing.assert_close(block.topk_logprobs, exact.topk_logprobs, rtol=0, atol=2e-4)
    with pytest.raises(UserError, match="has 64 tokens; the server at .* scores 63"):
        teacher.score(collate([[7] * 40], [[9] * (LONGEST - 40)], pad_id=0), 4)
    teacher.close()


@pytest.mark.slow
def test_traces_of_vllms_own_server_survive_kill_9(url, tmp_path):
    """The client dies in the middle and goes on: what was kept is not asked again, and the file is that of one that was
    not disturbed. One call at a time: the rounding of log-probs depends on the company."""
    write_rows(tmp_path / "p.jsonl", [{"prompt": f"{n}+{n}", "answer": str(2 * n)} for n in range(8)])
    role = ["--teacher", url, "--teacher.concurrency", "1"]
    words = ["generate", "--prompts", str(tmp_path / "p.jsonl"), "--n", "2", "--max_new_tokens", "24", *role]
    assert main([*words, "--out", str(tmp_path / "calm.jsonl")]) == 0
    out = tmp_path / "killed.jsonl"
    process = PROCESSES.Process(target=command, args=([*words, "--out", str(out)],))
    process.start()
    killed_when(process, lambda: len(kept(out)) >= 5)
    before = (tmp_path / "killed.jsonl.calls" / "calls.jsonl").read_bytes()
    assert process.exitcode == -signal.SIGKILL and not out.exists() and 5 <= len(kept(out)) < 16
    assert main([*words, "--out", str(out)]) == 0
    after = (tmp_path / "killed.jsonl.calls" / "calls.jsonl").read_bytes()
    assert after.startswith(before[: before.rfind(b"\n") + 1]) and len(after.splitlines()) == 16
    assert out.read_bytes() == (tmp_path / "calm.jsonl").read_bytes()
    probes = read_manifest(out).details["probes"]["teacher"]
    assert len(probes["logprobs"]) == 2 and all(x <= 0 for row in probes["logprobs"] for x in row)
