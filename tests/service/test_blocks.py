"""Score blocks as bytes: what comes back, what it costs, what is not written. Hostile bytes: test_hostile_blocks."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmdistill.objectives import sparse
from llmdistill.wire.blocks import BlockHeader, ScoreBlock, decode, encode

INF = float("inf")
anything = settings(max_examples=150, deadline=None, derandomize=True)


def block_of(logits_nV, k, ids=None, **header):
    """Evidence of rows of logits: their likeliest k, or the given ids. The tokens themselves are column 0."""
    logprobs = logits_nV.float().log_softmax(-1)
    listed, ids = logprobs.topk(k) if ids is None else (logprobs.gather(1, ids), ids)
    n, vocab = logits_nV.shape
    made = BlockHeader("0123456789abcdef", "fedcba9876543210", k, vocab, **header)
    positions = slice(5, 5 + n) if n else slice(0, 0)
    return ScoreBlock(positions, logprobs[:, 0].clone(), ids.int(), listed, made)


def random_logits(n, vocab, *, seed=0, scale=3.0):
    return torch.randn(n, vocab, generator=torch.Generator().manual_seed(seed)) * scale


@st.composite
def blocks(draw):
    """Any block there may be: no row, no column, all columns, gaps in the positions, padding, -inf, ties."""
    vocab = draw(st.sampled_from([1, 2, 3, 7, 8, 9, 255, 256, 257, 1024]))
    k = draw(st.one_of(st.integers(0, min(vocab, 20)), st.just(vocab)))
    n = draw(st.integers(0, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    logits = torch.randn(n, vocab, generator=generator) * draw(st.sampled_from([0.0, 0.01, 1.0, 5.0, 40.0]))
    if draw(st.booleans()):  # ties
        logits = logits.round()
    if draw(st.booleans()):  # impossible tokens
        logits[torch.rand(n, vocab, generator=generator) < 0.3] = -INF
        logits[:, -1] = 0.0
    block = block_of(
        logits,
        k,
        support=draw(st.sampled_from(["teacher", "caller", "union"])),
        dtype=draw(st.sampled_from(["float16", "float32"])),
        temperature=draw(st.sampled_from([1.0, 0.7, 3.0])),
    )
    if draw(st.booleans()):  # padding
        kept = torch.randint(0, k + 1, (n, 1), generator=generator)
        pad = torch.arange(k) >= kept
        block.topk_ids[pad], block.topk_logprobs[pad] = -1, -INF
    start, gap = draw(st.integers(0, 9)), draw(st.integers(0, 3)) if n > 1 else 0
    names = draw(st.lists(st.text(max_size=20), min_size=2, max_size=2))
    header = replace(block.header, teacher=names[0], tokenizer=names[1])
    return replace(block, positions=slice(start, start + n + gap), header=header)


def in_canonical_order(block):
    """Ties by ascending id, as they come back where all ids are listed; otherwise the order is kept."""
    if block.header.top_k != block.header.vocab_size or bool((block.topk_ids < 0).any()):
        return block
    by_id = torch.empty_like(block.topk_logprobs).scatter_(1, block.topk_ids.long(), block.topk_logprobs)
    logprobs, ids = by_id.sort(dim=1, descending=True, stable=True)
    return replace(block, topk_ids=ids.int(), topk_logprobs=logprobs)


def bits(tensor):
    return tensor.contiguous().view(torch.int32)


class TestRoundTrip:
    @anything
    @given(block=blocks())
    def test_float32_keeps_every_bit(self, block):
        found, expected = decode(encode(block, "float32")), in_canonical_order(block)
        assert found.header == replace(block.header, dtype="float32")
        assert found.positions == block.positions
        for name in ("token_logprobs", "topk_ids", "topk_logprobs"):
            assert torch.equal(bits(getattr(found, name)), bits(getattr(expected, name))), name

    @anything
    @given(block=blocks())
    def test_float16_keeps_ids_order_and_infinities_and_moves_log_probs_by_its_bound(self, block):
        """2**-12 nats for rows that span up to 16 nats, twice that for each doubling, and 128 nats at most."""
        found, expected = decode(encode(block, "float16")), in_canonical_order(block)
        assert found.header == replace(block.header, dtype="float16")
        assert torch.equal(bits(found.token_logprobs), bits(block.token_logprobs))
        assert found.topk_logprobs.shape == expected.topk_logprobs.shape
        if not found.topk_ids.numel():
            return
        dense = block.header.top_k == block.header.vocab_size and bool((block.topk_ids >= 0).all())
        if not dense:
            assert torch.equal(found.topk_ids, block.topk_ids)
        by_id = [
            torch.full((len(b.topk_ids), block.header.vocab_size + 1), -INF, dtype=torch.float64).scatter(
                1, b.topk_ids.long() + 1, b.topk_logprobs.double()
            )
            for b in (found, expected)
        ]
        assert torch.equal(by_id[0].isinf(), by_id[1].isinf())
        assert (found.topk_logprobs[:, :-1] >= found.topk_logprobs[:, 1:]).all()
        exact = expected.topk_logprobs.double()
        span = (exact[:, :1] - exact.masked_fill(exact.isneginf(), INF).amin(1, keepdim=True).clamp(max=0)).clamp(0)
        bound = 2.0**-16 * (span.nan_to_num(0, 0, 0).clamp(min=1e-3) * 1.0001).log2().ceil().exp2() + 2e-6
        wrong = (by_id[0] - by_id[1]).nan_to_num(0).abs()
        assert (wrong[(span < 127).squeeze(1)] <= bound[(span < 127).squeeze(1)]).all()

    @anything
    @given(block=blocks())
    def test_what_was_read_is_written_alike(self, block):
        """A second hop (service to disk) changes no code: at most the last bit of a row's top."""
        once = decode(encode(block, "float16"))
        twice = decode(encode(once, "float16"))
        assert torch.equal(once.topk_ids, twice.topk_ids)
        torch.testing.assert_close(once.topk_logprobs, twice.topk_logprobs, rtol=2**-22, atol=2**-22)

    @pytest.mark.parametrize("vocab", [2, 200, 1 << 24, 1 << 25, (1 << 25) + 1, 1 << 26, (1 << 31) - 1])
    @pytest.mark.parametrize("padding", [False, True])
    def test_ids_of_any_width(self, vocab, padding):
        """From 1 bit to 31, the last id among them; odd counts, so that the last group is not full."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, vocab, (11, 1), generator=generator, dtype=torch.int32)
        ids[4] = vocab - 1
        block = block_of(torch.zeros(11, 4), 1)
        if padding:
            ids[3], block.topk_logprobs[3] = -1, -INF
        block = replace(block, topk_ids=ids, header=replace(block.header, vocab_size=vocab))
        data = encode(block)
        assert torch.equal(decode(data).topk_ids, ids)
        assert len(data) == 74 + 11 * 8 + -(-11 * (vocab - 1 + padding).bit_length() // 8)

    def test_the_header_says_the_dtype_unless_told(self):
        block = block_of(random_logits(2, 9), 3, dtype="float16")
        assert decode(encode(block)).header.dtype == "float16"
        assert decode(encode(block, "float32")).header.dtype == "float32"

    def test_far_below_the_likeliest_is_cut_to_128_nats(self):
        """Also where float16 ends and where a masked logit sits; what is impossible stays so."""
        logprobs = torch.tensor([[-0.5, -100.0, -7e4, -1e9, -INF]])
        block = replace(block_of(torch.zeros(1, 6), 5), topk_logprobs=logprobs)
        found = decode(encode(block, "float16")).topk_logprobs[0]
        assert found[:2].tolist() == pytest.approx([-0.5, -100.0], abs=2**-9)
        assert found[2:4].tolist() == pytest.approx([-128.5, -128.5], abs=2**-7)
        assert found[4] == -INF

    def test_a_rounding_above_zero_is_zero(self):
        block = replace(block_of(torch.zeros(1, 2), 1), topk_logprobs=torch.tensor([[1e-7]]))
        assert decode(encode(block)).topk_logprobs.tolist() == [[0.0]]

    def test_the_whole_vocabulary_costs_no_ids(self):
        """2 bytes a token of the vocabulary, 5 a row, 4 for the row's own token; 74 around them."""
        block = block_of(random_logits(7, 500), 500)
        assert len(encode(block, "float16")) == 7 * (2 * 500 + 9) + 74
        assert len(encode(block, "float32")) == 7 * (4 * 500 + 4) + 74


class TestSize:
    def test_280_bytes_a_token_at_64_of_151936(self):
        """4 for the token, 64 ids of 18 bits, 63 codes, 5 for the top; 74 bytes for a block of 256 tokens."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.stack([torch.randperm(151936, generator=generator)[:64] for _ in range(256)])
        rows = block_of(random_logits(256, 70), 64)
        block = replace(rows, topk_ids=ids.int(), header=replace(rows.header, vocab_size=151936))
        data = encode(block, "float16")
        assert len(data) == 256 * (4 + 144 + 126 + 5) + 74
        assert len(data) / 256 <= 280
        assert torch.equal(decode(data).topk_ids, block.topk_ids)


def teacher_rows(kind):
    """[100, 5000] logits; the tail of the near-one-hot rows goes down to 5e-6."""
    logits = random_logits(100, 5000, seed=1)
    if kind == "flat":
        return logits / 6
    if kind == "uniform":
        return logits * 0
    if kind == "power law":
        return logits / 3 - 2 * torch.arange(1, 5001).log()
    if kind == "near one-hot":
        best = torch.linspace(14, 22, 100)
        return (logits / 1.5).scatter(1, torch.full((100, 1), 7), best[:, None])
    return logits


def student_rows(kind, teacher, ids):
    """The same, close, as far as another language, or nearly certain of a token the teacher lists."""
    noise = random_logits(*teacher.shape, seed=2, scale=1.0)
    if kind == "certain":
        column = torch.arange(len(ids)) % ids.shape[1]
        return noise.scatter(1, ids.gather(1, column[:, None]), 15.0)
    return {"same": teacher, "close": teacher + 0.1 * noise, "smooth": teacher * 0.7, "far": noise * 3}[kind]


@pytest.mark.parametrize("k", [1, 8, 64])
@pytest.mark.parametrize("kind", ["peaked", "flat", "uniform", "power law", "near one-hot"])
class TestDivergences:
    def test_the_tail_survives(self, kind, k):
        """1 - sum(exp(...)) is derived, not stored: it keeps the precision that float32 log-probs give it."""
        block = block_of(teacher_rows(kind), k)
        found = decode(encode(block, "float16"))
        exact, rounded = (1 - b.topk_logprobs.double().exp().sum(1) for b in (block, found))
        assert (exact - rounded).abs().max() < 3e-7
        assert rounded.min() > -1e-7

    def test_the_tail_survives_padding_and_impossible_tokens(self, kind, k):
        block = block_of(teacher_rows(kind), k)
        block.topk_logprobs[::2, k // 2 + 1 :] = -INF
        block.topk_ids[::4, k // 2 + 1 :] = -1
        found = decode(encode(block, "float16"))
        exact, rounded = (1 - b.topk_logprobs.double().exp().sum(1) for b in (block, found))
        assert (exact - rounded).abs().max() < 3e-7

    @pytest.mark.parametrize("student", ["same", "close", "smooth", "far", "certain"])
    def test_float16_moves_no_divergence_by_a_thousandth_of_a_nat(self, kind, k, student):
        """The largest difference of any row; 0.5e-3 here, so that other seeds have room.

        In float64, and in float32 where the tail is above 1e-3: float32's own 1e-7 in 1 - sum(exp(...)) is
        a relative error of the tail, which a smaller tail would show as nats.
        """
        teacher = teacher_rows(kind)
        block = block_of(teacher, k)
        logits = student_rows(student, teacher, block.topk_ids.long())
        short, lossless = (decode(encode(block, dtype)) for dtype in ("float16", "float32"))
        wide = 1 - block.topk_logprobs.double().exp().sum(1) > 1e-3
        for divergence in (sparse.forward_kl, sparse.reverse_kl, sparse.jsd):
            for z, rows in ((logits.double(), slice(None)), (logits, wide)):
                exact, moved, same = (divergence(z, b.topk_ids, b.topk_logprobs) for b in (block, short, lossless))
                assert torch.equal(exact, same)
                assert (moved - exact)[rows].abs().max() < 5e-4


def test_divergences_over_the_whole_vocabulary():
    """All 5,000 listed, more cells than are worked on at a time: float16 codes against float32, forward KL."""
    block, student = block_of(random_logits(60, 5000), 5000), random_logits(60, 5000, seed=2)
    found = decode(encode(block, "float16"))
    values = [sparse.forward_kl(student, b.topk_ids, b.topk_logprobs) for b in (block, found)]
    assert 0 < (values[0] - values[1]).abs().max() < 5e-4


class TestFormat:
    """What version 1 wrote is read forever: the bytes, field by field as the module says, and the values in them."""

    NAMES = "04" + b"feed".hex() + "04" + b"beef".hex()
    OWN = "000000bf 000050c0"  # -0.5, -3.25

    @pytest.mark.parametrize(
        ("dtype", "flags", "listed", "crc"),
        [
            # tops -0.25 and -0.5, exponents 15 and 15, codes (1.75 * 2**15, none), (2**15, none)
            ("float16", "03", "000080be 000000bf 0f 0f 00e0 ffff 0080 ffff", "eb143aa4"),
            ("float32", "02", "000080be 000000c0 000080ff 000000bf 0000c0bf 000080ff", "e5c3e171"),
        ],
    )
    def test_a_padded_block(self, dtype, flags, listed, crc):
        """Positions 7 to 10 with a gap, K = 3 of V = 5, ids + 1 in 3 bits: 5 1 3, 2 4 0, lowest bit first."""
        fields = f"0100 {flags} 02 07000000 0a000000 02000000 03000000 05000000 000000000000f83f"
        data = bytes.fromhex(f"{b'LDSB'.hex()} {fields} {self.NAMES} {self.OWN} cd44 00 {listed} {crc}")
        block = ScoreBlock(
            slice(7, 10),
            torch.tensor([-0.5, -3.25]),
            torch.tensor([[4, 0, 2], [1, 3, -1]], dtype=torch.int32),
            torch.tensor([[-0.25, -2.0, -INF], [-0.5, -1.5, -INF]]),
            BlockHeader("feed", "beef", 3, 5, dtype, 1.5, "union"),
        )
        self.check(block, data)

    def test_a_whole_vocabulary(self):
        """V = 3: codes in the order of ids, (1.75, 2.75, 0) * 2**14 and (1.0, 0, none) * 2**15."""
        fields = "0100 01 00 01000000 03000000 02000000 03000000 03000000 000000000000f03f"
        listed = "000080be 000000bf 0e 0f 0070 00b0 0000 0080 0000 ffff"
        data = bytes.fromhex(f"{b'LDSB'.hex()} {fields} {self.NAMES} {self.OWN} {listed} 6c04850c")
        block = ScoreBlock(
            slice(1, 3),
            torch.tensor([-0.5, -3.25]),
            torch.tensor([[2, 0, 1], [1, 0, 2]], dtype=torch.int32),
            torch.tensor([[-0.25, -2.0, -3.0], [-0.5, -1.5, -INF]]),
            BlockHeader("feed", "beef", 3, 3, "float16"),
        )
        self.check(block, data)

    def check(self, block, data):
        found = decode(data)
        assert (found.positions, found.header) == (block.positions, block.header)
        for name in ("token_logprobs", "topk_ids", "topk_logprobs"):
            assert torch.equal(getattr(found, name), getattr(block, name))
        assert encode(block) == data


class TestEncodeRefuses:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (dict(topk_ids=torch.tensor([[1, 2, 9]] * 4)), r"topk_ids are 1 to 9.*\[-1, 9\)"),
            (dict(topk_ids=torch.tensor([[1, -2, 3]] * 4)), "topk_ids are -2"),
            (dict(topk_ids=torch.tensor([[1, 2, 1]] * 4)), "twice"),
            (dict(topk_ids=torch.tensor([[1, -1, 2]] * 4)), "padding"),
            (dict(topk_ids=torch.tensor([[1, 2, -1]] * 4)), "padding"),
            (
                dict(topk_ids=torch.tensor([[1, -1, 2]] * 4), topk_logprobs=torch.tensor([[-1, -INF, -INF]] * 4)),
                "padding",
            ),
            (dict(topk_ids=torch.zeros(4, 2)), "shape"),
            (dict(topk_ids=torch.zeros(4, 3)), "integers"),
            (dict(topk_logprobs=torch.tensor([[-2.0, -1.0, -3.0]] * 4)), "order"),
            (dict(topk_logprobs=torch.tensor([[-1.0, float("nan"), -3.0]] * 4)), "nan"),
            (dict(topk_logprobs=torch.tensor([[0.01, -1.0, -3.0]] * 4)), "at most 0"),
            (dict(token_logprobs=torch.tensor([float("nan")] * 4)), "token_logprobs"),
            (dict(token_logprobs=torch.zeros(5)), "5 counted tokens at positions 5 to 9"),
            (dict(positions=slice(5, 8)), "4 counted tokens at positions 5 to 8"),
            (dict(positions=slice(None, 4)), "slice"),
            (dict(positions=slice(0, 8, 2)), "slice"),
            (dict(version=2), "version"),
            (dict(support="both"), "support"),
            (dict(dtype="bfloat16"), "dtype"),
            (dict(temperature=0.0), "temperature"),
            (dict(temperature=INF), "temperature"),
            (dict(vocab_size=2), "top_k is 3 and vocab_size 2"),
            (dict(top_k=2), "shape"),
            (dict(teacher="x" * 256), "255"),
        ],
    )
    def test_what_is_no_block(self, change, message):
        block = block_of(random_logits(4, 9), 3)
        of_header = {name: value for name, value in change.items() if hasattr(block.header, name)}
        of_block = {name: value for name, value in change.items() if name not in of_header}
        with pytest.raises(ValueError, match=message):
            encode(replace(block, **of_block, header=replace(block.header, **of_header)))

    def test_a_whole_vocabulary_with_an_id_twice(self):
        """No ids are written for it, so a missing one would come back as garbage. In the last of many rows."""
        block = block_of(random_logits(1000, 300), 300)
        block.topk_ids[-1, 5] = block.topk_ids[-1, 6]
        with pytest.raises(ValueError, match="twice"):
            encode(block)
