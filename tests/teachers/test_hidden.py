"""Hidden states instead of log-probs: as bytes, over the service, from disk; and what does not belong together."""

from __future__ import annotations

import asyncio
import socket
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn

from llmdistill.errors import UserError
from llmdistill.objectives.rows import HiddenRows
from llmdistill.recipe.config import TeacherConfig
from llmdistill.service.app import Service
from llmdistill.service.hf_engine import HFEngine
from llmdistill.service.limits import Limits
from llmdistill.service.routes import create_app
from llmdistill.teachers.base import DenseTeacher
from llmdistill.teachers.connecting import connect
from llmdistill.teachers.evidence import gather
from llmdistill.teachers.local import LocalTeacher
from llmdistill.teachers.remote import RemoteTeacher
from llmdistill.teachers.remote_hidden import HiddenRemoteTeacher
from llmdistill.teachers.stored import StoredTeacher
from llmdistill.teachers.stored_hidden import HiddenStoredTeacher
from llmdistill.texts import Rollout, collate
from llmdistill.wire.blocks import BlockError, decode, encode
from llmdistill.wire.hidden import (
    FORMS,
    HeadWeights,
    HiddenBlock,
    HiddenHeader,
    decode_hidden,
    encode_hidden,
    from_groups,
    pack_head,
    to_groups,
    unpack_head,
)
from tests.tiny import llama, tokenizer

VOCAB = 264


def teacher(seed: int = 1) -> LocalTeacher:
    return LocalTeacher(llama(seed, hidden=64), tokenizer())


def rollout() -> Rollout:
    draw = torch.Generator().manual_seed(0)
    ids = lambda n: torch.randint(2, VOCAB, (n,), generator=draw).tolist()  # noqa: E731
    made = collate([ids(3), ids(9), ids(20), ids(4)], [ids(7), ids(1), ids(12), []], pad_id=0)
    made.completion_mask[2, 24:26] = False  # tokens between that do not count
    return made


def block(n: int = 5, width: int = 100, seed: int = 0) -> HiddenBlock:
    hidden = torch.randn(n, width, generator=torch.Generator().manual_seed(seed)) * 7
    return HiddenBlock(slice(3, 3 + n), hidden.bfloat16(), HiddenHeader("t" * 16, "v" * 16, "h" * 16, width, 1000))


class TestBytes:
    def test_bfloat16_keeps_every_bit(self) -> None:
        made = block()
        found = decode_hidden(encode_hidden(made))
        assert found.header == made.header and found.positions == made.positions
        assert torch.equal(found.hidden.view(torch.int16), made.hidden.view(torch.int16))

    @pytest.mark.parametrize("width", [1, 63, 64, 65, 100])
    def test_int8_is_off_by_half_a_step_of_its_group(self, width: int) -> None:
        made = block(width=width)
        found = decode_hidden(encode_hidden(made, "int8"))
        scale, _ = to_groups(made.hidden.float())
        step = from_groups(scale, torch.ones(5, width))
        assert ((found.hidden - made.hidden.float()).abs() <= 0.501 * step).all()
        assert found.header == replace(made.header, form="int8") and found.hidden.dtype == torch.float32
        # what was read is written alike
        assert torch.equal(decode_hidden(encode_hidden(found)).hidden, found.hidden)

    def test_4224_bytes_a_token_at_4096_columns(self) -> None:
        """[METHODS-2026 9.7] 8,192 in bfloat16, 4,096 and 64 scales of 2 bytes in groups of 64."""
        sizes = {form: [len(encode_hidden(block(n, 4096), form)) for n in (1, 2)] for form in FORMS}
        assert {form: two - one for form, (one, two) in sizes.items()} == {"bfloat16": 8192, "int8": 4224}

    @pytest.mark.parametrize("form", FORMS)
    def test_whatever_is_wrong_with_the_bytes_is_one_error(self, form: Any) -> None:
        data = encode_hidden(block(3, 70), form)
        for cut in range(len(data)):
            with pytest.raises(BlockError):
                decode_hidden(data[:cut])
        for at in range(len(data)):
            changed = bytearray(data)
            changed[at] ^= 0x41
            with pytest.raises(BlockError):
                decode_hidden(changed)
            changed[-4:] = zlib.crc32(changed[:-4]).to_bytes(4, "little")
            with suppress(BlockError):  # some bytes are states
                decode_hidden(changed, max_positions=100, max_bytes=1 << 20)
        with pytest.raises(BlockError, match="accepted"):
            decode_hidden(data, max_positions=2)

    def test_the_two_kinds_name_each_other(self) -> None:
        (scored, *_) = teacher().score(rollout(), 4)
        with pytest.raises(BlockError, match="holds log-probs"):
            decode_hidden(encode(scored))
        with pytest.raises(BlockError, match="version 2"):
            decode(encode_hidden(block()))

    def test_what_is_no_number_is_not_sent(self) -> None:
        made = block()
        made.hidden[1, 2] = torch.nan
        with pytest.raises(ValueError, match="no number"):
            encode_hidden(made)

    def test_a_head_says_what_it_is(self) -> None:
        head = HeadWeights(torch.randn(10, 4), torch.randn(10), 0.5, 30.0)
        found = unpack_head(pack_head(head))
        assert found.fingerprint == head.fingerprint and (found.logit_scale, found.softcap) == (0.5, 30.0)
        assert torch.equal(found.weight, head.weight) and torch.equal(found.bias, head.bias)  # type: ignore[arg-type]
        other = replace(head, weight=head.weight + 1)  # its name is that of the first
        with pytest.raises(BlockError, match="says it is"):
            unpack_head(pack_head(other))
        with pytest.raises(BlockError):
            unpack_head(b"\xff" * 20)


@contextmanager
def served(engine: Any, **limits: int) -> Iterator[str]:
    """The service on a port, in a thread."""
    listening = socket.create_server(("127.0.0.1", 0))
    service = Service(engine, Limits(sequence_tokens=128, **limits))
    server = uvicorn.Server(uvicorn.Config(create_app(service), log_level="warning", lifespan="off"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def rounded(exact: HiddenRows, form: str) -> torch.Tensor:
    hidden = exact.hidden_NH
    return hidden.bfloat16().float() if form == "bfloat16" else from_groups(*to_groups(hidden))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("positions", [1 << 17, 5])
def test_rows_over_the_service_are_those_of_the_embedded_teacher_rounded(form: Any, positions: int) -> None:
    """In one request, and where sequences are longer than one may be. The head comes as it is."""
    local, made = teacher(), rollout()
    exact = local.dense(made)
    with served(HFEngine(teacher()), positions=positions) as url:
        remote: Any = connect(url, hidden=form)
        try:
            assert isinstance(remote, DenseTeacher) and remote.scores_chosen and remote.max_top_k == VOCAB
            rows: Any = gather(remote, made, "full", 0)
            assert isinstance(rows, HiddenRows) and len(rows) == made.num_rows
            step = 0.06 if form == "int8" else 0.02  # batches differ in the last bit, which may round the other way
            torch.testing.assert_close(rows.hidden_NH, rounded(exact, form), atol=step, rtol=0)
            assert torch.equal(rows.lm_head.weight, exact.lm_head.weight) and rows.lm_head.weight.dtype == torch.float32
            (theirs,), (mine,) = rows.chunk(slice(0, 9), None), exact.chunk(slice(0, 9), None)
            assert (theirs.log_softmax(-1) - mine.log_softmax(-1)).abs().max() < 2 * step
            for one, other in zip(remote.score(made, 3), local.score(made, 3), strict=True):
                assert one.positions == other.positions
                torch.testing.assert_close(one.topk_logprobs, other.topk_logprobs, atol=2 * step, rtol=0)
        finally:
            remote.close()


def test_states_of_another_head_stop_the_run() -> None:
    engine, other = HFEngine(teacher()), teacher(2)
    with served(engine) as url:
        remote = HiddenRemoteTeacher(url, form="bfloat16")
        engine.head = HFEngine(other).head  # type: ignore[method-assign]
        with pytest.raises(UserError, match=r"belong to output head .* here is head .* Fix: states and head of one"):
            remote.dense(rollout())
        remote.close()


def test_a_service_without_hidden_states_is_refused_at_the_start() -> None:
    engine: Any = HFEngine(teacher())
    engine.head = lambda: None
    with served(engine) as url:
        with pytest.raises(UserError, match=r"gives no hidden states. Fix: serve it with --engine hf"):
            HiddenRemoteTeacher(url, form="int8")
        plain = RemoteTeacher(url)  # log-probs it has
        assert len(plain.score(rollout(), 2)) == 4
        plain.close()


@pytest.mark.parametrize("form", FORMS)
def test_a_store_gives_back_what_it_was_given(tmp_path: Path, form: Any) -> None:
    local, made = teacher(), rollout()
    through = HiddenStoredTeacher(tmp_path, local, form=form)
    first = through.dense(made)
    torch.testing.assert_close(first.hidden_NH, rounded(local.dense(made), form), atol=1e-6, rtol=0)
    assert (through.hits, through.misses) == (0, 3)
    again = through.dense(made.sequences([2, 0, 3, 1]))
    assert (through.hits, through.misses) == (3, 3) and len(again) == made.num_rows
    through.close()
    alone = HiddenStoredTeacher(tmp_path, form=form)
    assert isinstance(alone, DenseTeacher) and not alone.live
    rows = alone.dense(made)
    assert torch.equal(rows.hidden_NH, first.hidden_NH)
    assert torch.equal(rows.lm_head.weight, local.head.linear.weight)
    chosen = torch.randint(0, VOCAB, (made.num_rows, 3))
    assert [b.header.support for b in alone.score(made, 2, chosen)] == ["union"] * 4
    other = collate([[5, 6]], [[7, 8, 9]], pad_id=0)
    with pytest.raises(UserError, match=f"lacks hidden states in {form} of 1 of 1 sequences"):
        alone.dense(other)
    with pytest.raises(UserError, match="lacks"):
        HiddenStoredTeacher(tmp_path, form=next(f for f in FORMS if f != form)).dense(made)


def test_a_store_is_of_one_kind(tmp_path: Path) -> None:
    local, made = teacher(), rollout()
    states, listed = tmp_path / "states", tmp_path / "listed"
    HiddenStoredTeacher(states, local, form="int8").dense(made)
    StoredTeacher(listed, local).score(made, 4)
    for behind in (None, local):
        with pytest.raises(UserError, match="holds hidden states .* Fix: set teacher.hidden"):
            StoredTeacher(states, behind)
        with pytest.raises(UserError, match="holds log-probs .* Fix: leave teacher.hidden out"):
            HiddenStoredTeacher(listed, behind, form="int8")
    # a shard of the other kind, under the key that is asked for
    mixed = HiddenStoredTeacher(states, form="int8")
    key = next(iter(mixed.store))
    mixed.store.append(key, encode(local.score(made, 200)[0], "float32"))
    with pytest.raises(UserError, match="a block of log-probs where hidden states are needed"):
        mixed.store.states(key)


def test_a_store_has_the_head_of_its_states(tmp_path: Path) -> None:
    local, other, made = teacher(), teacher(2), rollout()
    HiddenStoredTeacher(tmp_path, local, form="bfloat16").dense(made)
    file = tmp_path / "head.safetensors"
    own = file.read_bytes()
    file.write_bytes(pack_head(HeadWeights(other.head.linear.weight.detach())))
    with pytest.raises(UserError, match="belong to output head"):
        HiddenStoredTeacher(tmp_path, form="bfloat16").dense(made)
    with pytest.raises(UserError, match="has output head .* this teacher's is"):
        HiddenStoredTeacher(tmp_path, local, form="bfloat16")
    for damage in (own[:-5], own[:100]):
        file.write_bytes(damage)
        with pytest.raises(UserError, match="cannot be read"):
            HiddenStoredTeacher(tmp_path, form="bfloat16")
    file.unlink()
    with pytest.raises(UserError, match="is not there"):
        HiddenStoredTeacher(tmp_path, form="bfloat16")
    HiddenStoredTeacher(tmp_path, local, form="bfloat16")  # its teacher puts it back
    assert unpack_head(file.read_bytes()).fingerprint == unpack_head(own).fingerprint


def test_settings_that_nothing_reads_are_refused() -> None:
    with pytest.raises(UserError, match=r"teacher.hidden is 'int8'; it must be empty without teacher.url"):
        TeacherConfig(model="here", hidden="int8")
    with pytest.raises(UserError, match="teacher.lossless"):
        TeacherConfig(url="http://127.0.0.1:1", hidden="int8", lossless=True)
    assert TeacherConfig(stored="folder", hidden="bfloat16").hidden == "bfloat16"
