"""Bytes that are no score block: refused by name, never a crash, and without memory that the bytes do not pay for."""

import struct
import tracemalloc

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llmdistill.wire.blocks import BlockError, decode, encode
from tests.service.fuzz_blocks import sealed, survives
from tests.service.test_blocks import anything, block_of, blocks, random_logits

FIELDS = struct.Struct("<4sHBBIIIIId")  # magic, version, flags, support, start, stop, n, K, V, temperature
NAMES = ["magic", "version", "flags", "support", "start", "stop", "n", "k", "vocab", "temperature"]


def with_header(data, **changes):
    fields = dict(zip(NAMES, FIELDS.unpack_from(data), strict=True)) | changes
    return sealed(FIELDS.pack(*(fields[name] for name in NAMES)) + data[FIELDS.size : -4])


def valid(dtype="float16", k=3):
    return encode(block_of(random_logits(4, 9), k), dtype)


class TestDecodeRefuses:
    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (b"", "0 bytes"),
            (valid()[:30], "30 bytes"),
            (b"x" * 200, "starts with"),
            (valid()[:-1], "checksum"),
            (valid()[:40] + b"!" + valid()[41:], "checksum"),
            (with_header(valid(), version=2), "version 2; version 1 is read"),
            (valid() + b"\0", "checksum"),
            (sealed(valid()[:-4] + b"\0"), "there are"),
            (sealed(valid()[:-5]), "there are"),
            (with_header(valid(), flags=4), "flags"),
            (with_header(valid(), support=3), "support"),
            (with_header(valid(), flags=3), "padding"),  # 4 bits an id in either form
            (with_header(valid(), start=10), "counted tokens"),
            (with_header(valid(), n=3), "there are"),
            (with_header(valid(), n=0), "counted tokens"),
            (with_header(valid(), k=10), "top_k is 10 and vocab_size 9"),
            (with_header(valid(), vocab=0), "vocab_size 0"),
            (with_header(valid(), vocab=1 << 31), "vocab_size"),
            (with_header(valid(), vocab=10, k=4), "there are"),
            (with_header(valid(), temperature=float("nan")), "temperature"),
            (with_header(valid(), temperature=-1.0), "temperature"),
            (sealed(valid()[:36] + b"\xff" + valid()[37:-4]), "fingerprint"),
            (sealed(valid()[:37] + b"\xff" + valid()[38:-4]), "UTF-8"),
        ],
    )
    def test_bytes_that_are_no_block(self, data, message):
        with pytest.raises(BlockError, match=message):
            decode(data)

    @pytest.mark.parametrize("dtype", ["float16", "float32"])
    @pytest.mark.parametrize("k", [3, 9])
    @pytest.mark.parametrize("value", [float("nan"), 0.5])
    def test_log_probs_that_are_none(self, dtype, k, value):
        """In the tokens' own, and in the listed ones: the row's top, or the first of its float32 values."""
        data = valid(dtype, k)[:-4]
        own = FIELDS.size + 2 + 32
        listed = own + 4 * 4 + (6 if k == 3 else 0)  # 12 ids of 4 bits
        for at in (own, listed):
            with pytest.raises(BlockError, match="not a number"):
                decode(sealed(data[:at] + struct.pack("<f", value) + data[at + 4 :]))

    def test_rows_out_of_order_or_with_wrong_ids(self):
        data = bytearray(valid()[:-4])
        ids = FIELDS.size + 2 + 32 + 16
        assert [data[ids] & 15, data[ids] >> 4] == block_of(random_logits(4, 9), 3).topk_ids[0, :2].tolist()
        for low, high, message in ((9, 1, "id 9"), (1, 1, "twice")):
            changed = bytearray(data)
            changed[ids] = low | high << 4
            with pytest.raises(BlockError, match=message):
                decode(sealed(changed))
        codes = len(data) - 4 * 2 * 2
        changed = bytearray(data)
        changed[codes : codes + 4] = changed[codes + 2 : codes + 4] + changed[codes : codes + 2]
        with pytest.raises(BlockError, match="order"):
            decode(sealed(changed))
        changed = bytearray(data)
        changed[codes - 1] = 25  # the last row's exponent
        with pytest.raises(BlockError, match="exponent"):
            decode(sealed(changed))

    def test_what_nobody_writes(self):
        """One block, one encoding: no bits after the last id, no flag for nothing, no row without its top."""
        body = bytearray(encode(block_of(random_logits(3, 9), 3))[:-4])
        body[FIELDS.size + 2 + 32 + 12 + 4] |= 0x80  # 9 ids of 4 bits
        with pytest.raises(BlockError, match="bits after the last id"):
            decode(sealed(body))
        ids = torch.tensor([[1, 2, 3]] * 4)
        block = block_of(-torch.arange(9.0).expand(4, 9), 3, ids)
        with pytest.raises(BlockError, match="declares padding and has none"):
            decode(with_header(encode(block), flags=2))
        body = bytearray(encode(block_of(-torch.arange(9.0).expand(4, 9), 9), "float16")[:-4])
        body[-18] += 1  # code of id 0 in the last row
        with pytest.raises(BlockError, match="without its likeliest token"):
            decode(sealed(body))

    def test_limits_of_the_reader(self):
        data = encode(block_of(random_logits(4, 9), 3))
        assert len(decode(data, max_positions=4, max_bytes=4 * 4 + 4 * 3 * 8).token_logprobs) == 4
        with pytest.raises(BlockError, match="4 positions; at most 3"):
            decode(data, max_positions=3)
        with pytest.raises(BlockError, match="112 bytes of tensors; at most 111"):
            decode(data, max_bytes=111)

    @pytest.mark.parametrize("limits", [{}, {"max_positions": 1 << 33, "max_bytes": 1 << 70}])
    @pytest.mark.parametrize("dtype", ["float16", "float32"])
    @pytest.mark.parametrize(
        "declared",
        [
            dict(n=1 << 20, stop=5 + (1 << 20)),
            dict(n=(1 << 32) - 6, stop=(1 << 32) - 1),
            dict(n=1 << 20, stop=5 + (1 << 20), k=1 << 30, vocab=(1 << 31) - 1),
            dict(n=1 << 12, stop=5 + (1 << 12), k=151936, vocab=151936),
            dict(n=1 << 20, stop=5 + (1 << 20), k=0),
        ],
    )
    def test_declared_gigabytes_are_not_allocated(self, dtype, declared, limits):
        """Also for a reader without limits: what is declared has to be there. Errors themselves take a few kB."""
        data = with_header(valid(dtype), **declared)
        tracemalloc.start()
        with pytest.raises(BlockError, match="there are|accepted"):
            decode(data, **limits)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1 << 16


class TestFuzz:
    @settings(anything, max_examples=300)
    @given(data=st.binary(max_size=300), magic=st.booleans())
    def test_any_bytes(self, data, magic):
        survives(data)
        survives(sealed((b"LDSB\x01\x00" if magic else b"") + data))

    @settings(anything, max_examples=600)
    @given(block=blocks(), data=st.data())
    def test_changed_blocks_with_a_checksum_that_fits(self, block, data):
        body = bytearray(encode(block)[:-4])
        assert survives(sealed(body))
        for _ in range(data.draw(st.integers(1, 3))):
            # the header is small beside the arrays, and the more interesting
            at = data.draw(st.one_of(st.integers(0, 40), st.integers(0, len(body) - 1))) % len(body)
            body[at] = data.draw(st.one_of(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]), st.integers(0, 255)))
        cut = data.draw(st.one_of(st.just(len(body)), st.integers(0, len(body))))
        survives(sealed(body[:cut]))

    @anything
    @given(block=blocks(), data=st.data())
    def test_a_changed_byte_is_noticed(self, block, data):
        body = bytearray(encode(block))
        at = data.draw(st.integers(0, len(body) - 1))
        new = data.draw(st.integers(0, 255))
        assume(body[at] != new)
        body[at] = new
        with pytest.raises(BlockError):
            decode(body)
