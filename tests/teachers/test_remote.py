"""The teacher behind a service against the same teacher in this process."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from llmdistill.errors import UserError
from llmdistill.teachers.base import DenseTeacher
from llmdistill.teachers.connecting import connect
from llmdistill.teachers.local import LocalTeacher
from llmdistill.teachers.remote import RemoteTeacher
from llmdistill.texts import Prompt, Sampling, collate
from llmdistill.wire import protocol
from llmdistill.wire.blocks import decode, encode
from llmdistill.wire.bodies import pack_completions, unpack_completions
from tests.service.faulty import OTHER, Faulty
from tests.service.small import as_json
from tests.tiny import llama, tokenizer

VOCAB = 264
QUICK = {"timeout_s": 2.0, "backoff_s": 0.01, "max_backoff_s": 0.05, "cool_down_s": 0.02, "max_outage_s": 5.0}
# Sequences are batched otherwise than here: float32 sums in another order, up to 5e-6 apart.
CLOSE = {"rtol": 0, "atol": 2e-5}


@pytest.fixture(scope="module")
def local():
    return LocalTeacher(llama(2), tokenizer())


@pytest.fixture(scope="module")
def other():
    return LocalTeacher(llama(3), tokenizer())


@pytest.fixture
def service(local):
    with Faulty(local) as made:
        yield made


@pytest.fixture
def remote(service):
    made = RemoteTeacher(service.url, lossless=True, **QUICK)
    yield made
    made.close()


def rollout(count=7, seed=0):
    """Lengths all over the place, holes in some masks, a prompt alone, a completion alone."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(2, VOCAB, (n,), generator=generator).tolist()  # noqa: E731
    prompts, completions = [draw(3 + 5 * (i % 4)) for i in range(count)], [draw(2 + 7 * (i % 5)) for i in range(count)]
    if count > 3:
        completions[2], prompts[3] = [], []
    made = collate(prompts, completions, pad_id=0)
    holes = torch.rand(made.completion_mask.shape, generator=generator) < 0.3
    holes[::2] = False
    made.completion_mask[holes] = False
    return made


def picked(made, width=6):
    """[N, width] ids, some of them padding, some twice."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(-2, VOCAB, (made.num_rows, width), generator=generator).clamp(min=-1)
    ids[::3, 0] = ids[::3, 1]
    return ids


def assert_alike(blocks, exact, header=True):
    """Equal but for rounding; where two listed tokens are within it, they may have changed places."""
    for block, mine in zip(blocks, exact, strict=True):
        assert block.positions == mine.positions
        assert block.header == mine.header or not header
        torch.testing.assert_close(block.token_logprobs, mine.token_logprobs, **CLOSE)
        torch.testing.assert_close(block.topk_logprobs, mine.topk_logprobs, **CLOSE)
        assert block.topk_ids.shape == mine.topk_ids.shape and block.topk_ids.dtype == mine.topk_ids.dtype
        assert (block.topk_ids == mine.topk_ids).float().mean() > 0.9 or not block.topk_ids.numel()


def bodies(service, path=protocol.SCORE):
    return [as_json(seen) for seen in service.posts(path)]


# -------------------------------------------------------------------- scores


@pytest.mark.parametrize("top_k", [0, 1, 8, VOCAB])
def test_scores_are_those_of_the_embedded_teacher(remote, local, top_k):
    made = rollout()
    assert_alike(remote.score(made, top_k), local.score(made, top_k))


@pytest.mark.parametrize("top_k", [0, 5])
def test_ids_of_the_callers_choice_are_listed(remote, local, top_k):
    made = rollout()
    chosen = picked(made)
    blocks = remote.score(made, top_k, chosen)
    assert_alike(blocks, local.score(made, top_k, chosen))
    assert {b.header.support for b in blocks} == {"union" if top_k else "caller"}


def test_sixteen_bits_are_the_default_and_half_the_bytes(service, remote, local):
    made = rollout(20)
    short = RemoteTeacher(service.url, **QUICK)
    exact = local.score(made, 32)
    before = remote.bytes_received, short.bytes_received
    remote.score(made, 32)
    for block, mine in zip(short.score(made, 32), exact, strict=True):
        assert block.header.dtype == "float16"
        torch.testing.assert_close(block.token_logprobs, mine.token_logprobs, **CLOSE)
        torch.testing.assert_close(block.topk_logprobs, mine.topk_logprobs, rtol=1e-3, atol=1e-3)
    received = remote.bytes_received - before[0], short.bytes_received - before[1]
    assert 32 * 2 * made.num_rows < received[1] < 0.75 * received[0]
    short.close()


def test_only_the_span_of_a_mask_with_holes_is_asked_for(service, remote, local):
    made = collate([[5, 6, 7]], [[10, 11, 12, 13, 14, 15, 16]], pad_id=0)
    made.completion_mask[0] = torch.tensor([0, 0, 0, 0, 1, 0, 0, 1, 1, 0], dtype=torch.bool)
    (block,) = remote.score(made, 3)
    assert bodies(service)[0]["positions"] == [[4, 9]] and bodies(service)[0]["sequences"] == [
        made.input_ids[0].tolist()
    ]
    assert block.positions == slice(4, 9) and len(block.token_logprobs) == 3
    assert_alike([block], local.score(made, 3))


def test_nothing_counted_asks_nothing(service, remote):
    made = collate([[5, 6], [7]], [[], []], pad_id=0)
    blocks = remote.score(made, 4)
    assert [b.topk_ids.shape for b in blocks] == [(0, 4), (0, 4)] and not service.posts()


def test_sixty_four_sequences_are_split_by_every_limit(local):
    """In order, none above a limit, the longest first."""
    limits = {"sequences": 9, "positions": 60, "body_bytes": 1100}
    with Faulty(local, limits=limits) as service:
        teacher = RemoteTeacher(service.url, lossless=True, in_flight=1, **QUICK)
        made = rollout(64)
        assert_alike(teacher.score(made, 4), local.score(made, 4))
        for seen, body in zip(service.posts(), bodies(service), strict=True):
            assert len(seen.body) <= 1100 and 1 <= len(body["sequences"]) == len(body["positions"]) <= 9
            assert sum(stop - start for start, stop in body["positions"]) <= 60
        lengths = [len(ids) for body in bodies(service) for ids in body["sequences"]]
        assert lengths == sorted(lengths, reverse=True) and len(lengths) == 64 - made.row_counts.count(0)
        assert len(bodies(service)) < 30  # and what a request may hold is used
        teacher.close()


@pytest.mark.parametrize("with_chosen", [False, True])
def test_a_sequence_longer_than_a_request_comes_in_pieces(local, with_chosen):
    """Its positions, or with ids of one's choice its bytes, are more than the service takes."""
    limits = {"positions": 1000, "body_bytes": 700} if with_chosen else {"positions": 7}
    with Faulty(local, limits=limits) as service:
        teacher = RemoteTeacher(service.url, lossless=True, **QUICK)
        made = rollout(5)
        chosen = picked(made) if with_chosen else None
        assert_alike(teacher.score(made, 3, chosen), local.score(made, 3, chosen))
        assert len(service.posts()) > 5
        assert all(len(seen.body) <= limits.get("body_bytes", 1 << 20) for seen in service.posts())
        teacher.close()


def test_requests_are_spread_over_replicas(local):
    with Faulty(local) as one, Faulty(local) as two:
        teacher = RemoteTeacher(f"{one.url},{two.url}", lossless=True, **QUICK)
        made = rollout(16)
        assert_alike(teacher.score(made, 4), local.score(made, 4))
        assert len(one.posts()) >= 1 and len(two.posts()) >= 1
        teacher.close()


def test_what_the_service_cannot_do_is_said_before_anything_is_sent(local):
    limits = {"top_k": 16, "sequence_tokens": 40, "new_tokens": 8}
    with Faulty(local, limits=limits, chosen_ids=False) as service:
        teacher = RemoteTeacher(service.url, **QUICK)
        for top_k, chosen, message in (
            (17, None, r"objective.top_k is 17; the service at http://\S+ lists at most 16 tokens"),
            (VOCAB + 1, None, f"objective.top_k is {VOCAB + 1}; the teacher has {VOCAB} logit columns"),
            (4, picked(rollout()), "the teacher's service cannot score them"),
        ):
            with pytest.raises(UserError, match=message):
                teacher.score(rollout(), top_k, chosen)
        with pytest.raises(UserError, match="a sequence has 41 tokens; the service at .* holds 40"):
            teacher.score(collate([[5] * 38], [[6, 7, 8]], pad_id=0), 4)
        with pytest.raises(UserError, match="rollouts.max_new_tokens is 9; the service at .* generates at most 8"):
            teacher.generate([Prompt([5, 6], "")], Sampling(9))
        with pytest.raises(UserError, match="is 8; .* the longest prompt makes that 41 tokens, it holds 40"):
            teacher.generate([Prompt([5] * 33, "")], Sampling(8))
        assert not [seen for seen in service.seen if seen.method == "POST"]
        teacher.close()


def test_chosen_ids_count_for_the_limit(local):
    with Faulty(local, limits={"top_k": 8}) as service:
        teacher = RemoteTeacher(service.url, **QUICK)
        with pytest.raises(UserError, match="top_k is 4 and 6 ids of the student's choice; .* lists at most 8"):
            teacher.score(rollout(), 4, picked(rollout()))
        teacher.close()


# -------------------------------------------------------------------- text and completions


def test_texts_are_scored_in_the_teachers_tokens(local):
    tok, texts = tokenizer(), ["five", "", "a longer answer: 42", "ok"]
    prompts = ["2+3=", [{"role": "user", "content": "hi"}], "what?", [{"role": "user", "content": "?"}]]
    with Faulty(local, limits={"sequences": 2}) as service:
        teacher = RemoteTeacher(service.url, lossless=True, **QUICK)
        scored = teacher.score_text(list(zip(prompts, texts, strict=True)), 4)
        assert len(service.posts(protocol.SCORE_TEXT)) >= 2
        teacher.close()
    for prompt, text, found in zip(prompts, texts, scored, strict=True):
        written = prompt if isinstance(prompt, str) else f"<user>{prompt[0]['content']}<assistant>"
        assert found.prompt_ids == tok(written)["input_ids"] and found.ids == tok(text)["input_ids"]
        assert "".join(text[a:b] for a, b in found.offsets) == text
    whole = collate([s.prompt_ids for s in scored], [s.ids for s in scored], pad_id=0)
    spans = [slice(len(s.prompt_ids), len(s.prompt_ids) + len(s.ids)) for s in scored]
    for found, exact, span in zip(scored, local.score(whole, 4), spans, strict=True):
        assert found.block.positions == span or not found.ids
        torch.testing.assert_close(found.block.topk_logprobs, exact.topk_logprobs, **CLOSE)


def prompts(count):
    return [Prompt(list(range(5, 8 + i)), "", domain=f"d{i}", row=40 + i) for i in range(count)]


@pytest.mark.parametrize("sampling", [Sampling(6, temperature=0.0), Sampling(6, samples_per_prompt=3, seed=5)])
def test_completions_are_those_of_the_embedded_teacher_however_they_are_split(local, sampling):
    exact = local.generate(prompts(9), sampling)
    with Faulty(local, limits={"sequences": 7}) as one, Faulty(local, limits={"sequences": 7}) as two:
        teacher = RemoteTeacher([one.url, two.url], **QUICK)
        drawn = teacher.generate(prompts(9), sampling)
        assert len(one.posts(protocol.GENERATE)) and len(two.posts(protocol.GENERATE))
        teacher.close()
    for name in ("attention_mask", "completion_mask"):
        assert torch.equal(getattr(drawn, name), getattr(exact, name))
    assert torch.equal(drawn.input_ids[drawn.attention_mask], exact.input_ids[exact.attention_mask])
    assert drawn.finish == exact.finish and drawn.domain == exact.domain
    torch.testing.assert_close(drawn.behavior_logprobs, exact.behavior_logprobs, **CLOSE)


def test_completions_carry_the_version_the_service_told(service, remote):
    service.small.policy_version = 17
    assert remote.generate(prompts(2), Sampling(2)).policy_version == 17


@pytest.mark.parametrize(
    "spoil",
    [
        lambda c: c.ids.pop() is c.logprobs.pop() is c.finish.pop(),
        lambda c: c.logprobs.__setitem__(0, c.logprobs[0][:-1]),
        lambda c: c.ids.__setitem__(0, np.arange(40)),
        lambda c: c.ids[0].__setitem__(0, VOCAB),
        lambda c: c.ids[0].__setitem__(0, -1),
        lambda c: c.logprobs[0].__setitem__(0, 0.5),
        lambda c: c.logprobs[0].__setitem__(0, np.nan),
        lambda c: c.settings.pop("policy_version"),
        lambda c: c.settings.update(policy_version="7"),
    ],
)
def test_completions_that_are_not_whole_or_of_no_vocabulary_are_asked_for_again(service, remote, spoil):
    exact, whole, times = remote.generate(prompts(2), Sampling(3)), service.small.answer, [1]

    def answer(seen):
        made = whole(seen)
        if seen.path == protocol.GENERATE and times and times.pop():
            given = unpack_completions(made.body)
            given = replace(given, ids=[a.copy() for a in given.ids], logprobs=[a.copy() for a in given.logprobs])
            spoil(given)
            if len(given.ids[0]) == 40:
                given.logprobs[0] = np.zeros(40)
            made.body = pack_completions(given.settings, given.ids, given.logprobs, given.finish)
        return made

    service.keeps, service.small.answer = False, answer
    assert torch.equal(remote.generate(prompts(2), Sampling(3)).input_ids, exact.input_ids)
    assert remote.transport.counters.retries == 1 and not times


@pytest.mark.parametrize("spoil", ["columns", "vocabulary", "rows", "blocks", "positions"])
def test_evidence_of_another_shape_than_was_asked_for_is_asked_for_again(service, remote, local, spoil):
    """A block with a valid checksum, from a service that is out of its mind."""
    made, whole, times = rollout(3), service.small.answer, [1]

    def answer(seen):
        answered = whole(seen)
        if seen.path == protocol.SCORE and times and times.pop():
            head, *frames = protocol.unpack_frames(answered.body)
            blocks = [decode(frame) for frame in frames]
            block = blocks[0]
            if spoil == "columns":
                narrow = replace(block.header, top_k=2)
                blocks[0] = replace(
                    block, topk_ids=block.topk_ids[:, :2], topk_logprobs=block.topk_logprobs[:, :2], header=narrow
                )
            elif spoil == "vocabulary":
                blocks[0] = replace(block, header=replace(block.header, vocab_size=2 * VOCAB))
            elif spoil == "rows":
                blocks[0] = replace(
                    block,
                    token_logprobs=block.token_logprobs[:-1],
                    topk_ids=block.topk_ids[:-1],
                    topk_logprobs=block.topk_logprobs[:-1],
                )
            elif spoil == "positions":
                span = block.positions
                blocks[0] = replace(block, positions=slice(span.start + 1, span.stop + 1))
            else:
                blocks.pop()
            answered.body = protocol.pack_frames([bytes(head), *(encode(b, "float32") for b in blocks)])
        return answered

    service.keeps, service.small.answer = False, answer
    assert_alike(remote.score(made, 4), local.score(made, 4))
    assert remote.transport.counters.retries == 1 and not times


# -------------------------------------------------------------------- whose answers they are


def test_it_describes_the_teacher_it_asks(remote, local):
    assert remote.info() == local.info() and remote.live and not isinstance(remote, DenseTeacher)


def test_a_service_that_comes_back_with_other_weights_stops_the_run(service, remote, local, other):
    service.small.teacher = other  # the request names the weights it expects: 409
    message = f"weights {other.info().fingerprint}, this run began with {local.info().fingerprint}.*--resume"
    with pytest.raises(UserError, match=message):
        remote.score(rollout(), 4)
    with pytest.raises(UserError, match=message):
        remote.generate(prompts(1), Sampling(2))


def test_evidence_that_names_other_weights_stops_the_run(service, remote, local):
    service.next("other_weights")
    with pytest.raises(UserError, match=f"weights {OTHER}, this run began with {local.info().fingerprint}"):
        remote.score(rollout(1), 4)


def test_a_replica_with_other_weights_is_found_at_the_start(local, other):
    with (
        Faulty(local) as one,
        Faulty(other) as two,
        pytest.raises(UserError, match="service restarted with other weights, or its replicas differ"),
    ):
        RemoteTeacher([one.url, two.url], **QUICK)


def test_a_replica_with_another_tokenizer_is_found_at_the_start(local):
    tok = tokenizer()
    tok.add_tokens(["<extra>"])
    with (
        Faulty(local) as one,
        Faulty(LocalTeacher(llama(2), tok)) as two,
        pytest.raises(UserError, match="differ: tokenizer [0-9a-f]{16}, this run began with"),
    ):
        RemoteTeacher([one.url, two.url], **QUICK)


def test_a_replica_with_other_weights_is_found_when_it_comes_late(local, other):
    with Faulty(local) as one, Faulty(other) as late:
        late.stop()
        teacher = RemoteTeacher([one.url, late.url], **QUICK)
        teacher.score(rollout(1), 1)
        late.start()
        with pytest.raises(UserError, match=f"weights {other.info().fingerprint}"):
            for _ in range(200):
                teacher.score(rollout(1), 1)
        teacher.close()


def test_another_protocol_is_refused(local, monkeypatch):
    with Faulty(local) as service:
        monkeypatch.setattr("tests.service.small.protocol.PROTOCOL_VERSION", 9)
        with pytest.raises(UserError, match="speaks protocol 9, this llmdistill 3"):
            RemoteTeacher(service.url, **QUICK)


def test_it_waits_for_a_service_that_is_starting(local):
    """Nothing on the port at first, then a process that loads its model."""
    lines = []

    def told(line):
        lines.append(line)
        if len(lines) == 1:
            service.start()
        elif "HTTP 503: starting" in line:
            service.small.ready = True

    with Faulty(local, ready=False) as service:
        service.stop()
        teacher = RemoteTeacher(service.url, **QUICK, status_every_s=0.1, on_status=told)
        assert "cannot connect" in lines[0] and any("HTTP 503: starting" in line for line in lines)
        assert "is back after" in lines[-1] and len(teacher.score(rollout(2), 1)) == 2
        teacher.close()


def test_a_service_that_never_starts_is_given_up(local):
    with Faulty(local, ready=False) as service, pytest.raises(UserError, match="gave no answer for 0.2 s: HTTP 503"):
        RemoteTeacher(service.url, **{**QUICK, "max_outage_s": 0.2}, on_status=lambda line: None)


def test_connect_knows_our_service(service, local):
    teacher = connect(service.url, lossless=True, **QUICK)
    assert isinstance(teacher, RemoteTeacher) and teacher.dtype == "float32"
    teacher.close()
