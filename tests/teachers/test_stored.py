"""The stored teacher in front of a real one: the same answers, each asked for once."""

from dataclasses import replace

import pytest
import torch

from llmdistill.errors import UserError
from llmdistill.objectives import sparse
from llmdistill.teachers.block_store import BlockStore
from llmdistill.teachers.evidence import gather
from llmdistill.teachers.local import LocalTeacher
from llmdistill.teachers.stored import StoredTeacher
from llmdistill.texts import Prompt, Sampling, collate
from llmdistill.wire.blocks import decode, encode
from tests.tiny import llama, tokenizer

VOCAB = 264
FIELDS = ("token_logprobs", "topk_ids", "topk_logprobs")


class Recorded(LocalTeacher):
    """The embedded teacher, and how many sequences it was asked to score in each call."""

    def __init__(self, seed=2):
        super().__init__(llama(seed), tokenizer())
        self.asked = []
        self.closed = False

    def score(self, rollout, top_k, chosen=None):
        self.asked.append(len(rollout))
        return super().score(rollout, top_k, chosen)

    def close(self):
        self.closed = True


@pytest.fixture
def teacher():
    return Recorded()


def rollout(lengths=((3, 9), (20, 1), (4, 24), (2, 6)), seed=0):
    """Prompts and completions of random tokens, of the lengths given."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(2, VOCAB, (n,), generator=generator).tolist()  # noqa: E731
    drawn = [(draw(p), draw(c)) for p, c in lengths]
    return collate([p for p, _ in drawn], [c for _, c in drawn], pad_id=0)


def same(found, expected):
    assert [b.positions for b in found] == [b.positions for b in expected]
    assert [replace(b.header, dtype="") for b in found] == [replace(b.header, dtype="") for b in expected]
    return all(torch.equal(getattr(a, f), getattr(b, f)) for a, b in zip(found, expected, strict=True) for f in FIELDS)


class TestNumbers:
    def test_float32_is_the_wrapped_teacher_bit_for_bit(self, tmp_path, teacher):
        stored, made = StoredTeacher(tmp_path, teacher, "float32"), rollout()
        exact = LocalTeacher.score(teacher, made, 8)
        assert same(stored.score(made, 8), exact)
        assert same(StoredTeacher(tmp_path).score(made, 8), exact)

    def test_float16_is_one_passage_through_the_codec(self, tmp_path, teacher):
        """The first epoch already sees what later ones will."""
        stored, made = StoredTeacher(tmp_path, teacher), rollout()
        once = [decode(encode(block, "float16")) for block in LocalTeacher.score(teacher, made, 8)]
        epochs = [stored.score(made, 8), stored.score(made, 8), StoredTeacher(tmp_path).score(made, 8)]
        assert all(same(epoch, once) for epoch in epochs)
        assert not same(epochs[0], LocalTeacher.score(teacher, made, 8))
        assert {block.header.dtype for block in epochs[0]} == {"float16"}

    @pytest.mark.parametrize("k", [1, 8, 64])
    @pytest.mark.parametrize("divergence", [sparse.forward_kl, sparse.reverse_kl, sparse.jsd])
    def test_bucket_divergences_move_by_less_than_a_thousandth_of_a_nat(self, tmp_path, teacher, divergence, k):
        """Of every token, for another model as the student."""
        made = rollout([(3, 60)] * 8)
        student = LocalTeacher(llama(1), tokenizer())
        logits = gather(student, made, "full", 0).chunk(slice(None), VOCAB)[0]
        exact, found = (gather(t, made, "top_k", k) for t in (teacher, StoredTeacher(tmp_path, teacher)))
        values = [divergence(logits, *rows.chunk(slice(None), VOCAB)) for rows in (exact, found)]
        assert (values[0] - values[1]).abs().max() < 1e-3

    def test_the_whole_distribution(self, tmp_path, teacher):
        made = rollout()
        exact = teacher.dense(made).chunk(slice(None), VOCAB)[0].log_softmax(-1)
        found = gather(StoredTeacher(tmp_path, teacher), made, "full", 0).chunk(slice(None), VOCAB)[0]
        torch.testing.assert_close(found, exact, rtol=0, atol=2**-11)


class TestHits:
    def test_each_sequence_is_asked_for_once(self, tmp_path, teacher):
        """Within a call, over calls, and whatever stands beside it in the batch."""
        stored, made = StoredTeacher(tmp_path, teacher), rollout()
        first = stored.score(made.sequences([0, 2, 0]), 4)
        assert same([first[0]], [first[2]])
        assert teacher.asked == [2] and (stored.hits, stored.misses) == (0, 3)
        again = stored.score(made, 4)
        assert teacher.asked == [2, 2] and (stored.hits, stored.misses) == (2, 5)
        assert same([again[0], again[2]], first[:2])
        stored.score(made.sequences([3, 2, 1]), 4)
        assert teacher.asked == [2, 2] and (stored.hits, stored.misses) == (5, 5)

    @pytest.mark.parametrize("k", [0, 1, 5, 8])
    def test_fewer_columns_are_cut_from_more(self, tmp_path, teacher, k):
        stored, made = StoredTeacher(tmp_path, teacher, "float32"), rollout()
        stored.score(made, 8)
        found = stored.score(made, k)
        assert teacher.asked == [4]
        assert same(found, LocalTeacher.score(teacher, made, k))
        assert {block.header.top_k for block in found} == {k}

    def test_more_columns_are_asked_for_and_replace_the_fewer(self, tmp_path, teacher):
        stored, made = StoredTeacher(tmp_path, teacher, "float32"), rollout()
        for k in (2, 8, 2, 8, VOCAB, 8):
            assert same(stored.score(made, k), LocalTeacher.score(teacher, made, k))
        assert teacher.asked == [4, 4, 4]
        assert same(StoredTeacher(tmp_path).score(made, VOCAB), LocalTeacher.score(teacher, made, VOCAB))

    def test_float16_does_for_float32_only_the_other_way_round(self, tmp_path, teacher):
        made = rollout()
        StoredTeacher(tmp_path, teacher, "float16").score(made, 4)
        exact = StoredTeacher(tmp_path, teacher, "float32").score(made, 4)
        assert teacher.asked == [4, 4] and same(exact, LocalTeacher.score(teacher, made, 4))
        only = tmp_path / "float32"
        StoredTeacher(only, teacher, "float32").score(made, 4)
        assert same(StoredTeacher(only, teacher, "float16").score(made, 4), exact)
        assert teacher.asked == [4, 4, 4]

    def test_padding_changes_nothing_and_counting_other_tokens_does(self, tmp_path, teacher):
        """A key is the tokens and which of them count: not where the batch has its padding."""
        stored, made = StoredTeacher(tmp_path, teacher), rollout()
        (block,) = stored.score(made.sequences([0]), 4)
        (wide,) = stored.score(replace(made, finish=()), 4)[:1]
        assert same([block], [wide])
        ids = made.input_ids[0, :12].tolist()
        left = collate([[0, 0, *ids[:3]], [9] * 13], [ids[3:], [9]], pad_id=0)
        left.attention_mask[0, :2] = False
        asked = len(teacher.asked)
        (shifted,) = stored.score(left.sequences([0]), 4)
        assert len(teacher.asked) == asked and shifted.positions == slice(3, 12)
        shifted, _ = stored.score(left, 4)
        assert teacher.asked[asked:] == [1]  # the other one
        assert shifted.positions == slice(5, 14) and same([replace(shifted, positions=block.positions)], [block])

        StoredTeacher(tmp_path / "left", teacher).score(left, 4)
        (again,) = StoredTeacher(tmp_path / "left").score(made.sequences([0]), 4)
        torch.testing.assert_close(again.topk_logprobs, block.topk_logprobs, rtol=0, atol=2**-11)
        kept = BlockStore(tmp_path / "left")
        assert {kept.get(key).positions.start for key in kept} == {3, 13}  # as without padding

        hole, asked = rollout(), len(teacher.asked)
        hole.completion_mask[0, 5] = False
        (gap,) = stored.score(hole.sequences([0]), 4)
        assert len(teacher.asked) == asked + 1
        assert torch.equal(gap.topk_ids, block.topk_ids[[0, 1, 3, 4, 5, 6, 7, 8]])
        (again,) = StoredTeacher(tmp_path).score(hole.sequences([0]), 4)
        assert same([again], [gap])

    def test_the_completions_tokens_are_part_of_the_key_what_follows_them_is_not(self, tmp_path, teacher):
        stored, made = StoredTeacher(tmp_path, teacher), rollout()
        stored.score(made.sequences([0]), 2)
        other = rollout().sequences([0])
        other.input_ids[0, 11] += 1 if other.input_ids[0, 11] < VOCAB - 1 else -1
        stored.score(other, 2)
        assert teacher.asked == [1, 1]
        other.completion_mask[0, 11] = False
        once = rollout().sequences([0])
        once.completion_mask[0, 11] = False
        assert same(stored.score(other, 2), stored.score(once, 2))
        assert teacher.asked == [1, 1, 1]

    def test_sequences_without_counted_tokens_are_nobodys_business(self, tmp_path, teacher):
        stored, made = StoredTeacher(tmp_path, teacher, "float32"), rollout([(3, 0), (4, 2), (5, 0)])
        assert same(stored.score(made, 3), LocalTeacher.score(teacher, made, 3))
        assert teacher.asked == [1] and (stored.hits, stored.misses) == (0, 1)
        assert same(stored.score(made.sequences([0, 2]), 3), LocalTeacher.score(teacher, made.sequences([0, 2]), 3))
        assert teacher.asked == [1]

    def test_what_another_process_appends_is_found(self, tmp_path, teacher):
        reader, made = StoredTeacher(tmp_path, teacher), rollout()
        StoredTeacher(tmp_path, Recorded()).score(made, 4)
        reader.score(made, 4)
        assert teacher.asked == [] and reader.hits == 4

    def test_280_bytes_a_token_on_disk(self, tmp_path, teacher):
        """V = 264: 9 bits an id, so 207 bytes at K = 64 where V = 151,936 takes 279; a sequence adds 146."""
        made = rollout([(3, 200)] * 4)
        StoredTeacher(tmp_path, teacher).score(made, 64)
        used = sum(file.stat().st_size for file in tmp_path.glob("shard-*"))
        assert used == 800 * (4 + 72 + 126 + 5) + 4 * (74 + 68 + 4) - 4 * 4


class TestWithout:
    """A store with no teacher behind it."""

    @pytest.fixture
    def stored(self, tmp_path, teacher):
        StoredTeacher(tmp_path, teacher).score(rollout(), 4)
        return StoredTeacher(tmp_path)

    def test_it_knows_whose_it_is(self, stored, teacher, tmp_path):
        assert stored.info() == teacher.info()
        assert not stored.live and StoredTeacher(tmp_path, teacher).live

    def test_what_is_missing_is_said(self, stored, tmp_path):
        mixed = rollout([(3, 9), (20, 1), (4, 24), (2, 6), (5, 7), (6, 3)])
        known = rollout()
        assert torch.equal(mixed.input_ids[:4], known.input_ids)
        with pytest.raises(UserError, match=r"lacks 2 of 6 sequences .*sequence 4 \(7 tokens from 5\)\. Fix"):
            stored.score(mixed, 4)
        with pytest.raises(UserError, match=r"lacks 4 of 4 .* at top_k 5 .*stored at top_k 4 in float16\)\. Fix"):
            stored.score(known, 5)
        with pytest.raises(UserError, match=r"in float32, .*stored at top_k 4 in float16\)\. Fix"):
            StoredTeacher(tmp_path, dtype="float32").score(known, 4)

    def test_it_generates_nothing_and_scores_no_chosen_ids(self, stored):
        with pytest.raises(UserError, match="cannot generate.*Fix"):
            stored.generate([Prompt([5, 6], "")], Sampling(max_new_tokens=2))
        made = rollout()
        with pytest.raises(UserError, match="cannot score ids of the student's choice.*Fix"):
            stored.score(made, 2, torch.zeros(made.num_rows, 1, dtype=torch.long))

    def test_no_store(self, tmp_path):
        with pytest.raises(UserError, match="nowhere holds no stored teacher.*Fix"):
            StoredTeacher(tmp_path / "nowhere")

    def test_a_damaged_block(self, stored, tmp_path):
        (file,) = tmp_path.glob("*.blocks")
        data = bytearray(file.read_bytes())
        data[100] ^= 1
        file.write_bytes(data)
        with pytest.raises(UserError, match=r"shard-00000.blocks is damaged at byte 0: .*checksum"):
            stored.score(rollout(), 4)


def flip(file, at):
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def assert_close(blocks, others):
    """Scored in other company: float32 sums in another order, and 16 bits round."""
    for block, other in zip(blocks, others, strict=True):
        torch.testing.assert_close(block.token_logprobs, other.token_logprobs, rtol=0, atol=1e-4)
        torch.testing.assert_close(block.topk_logprobs, other.topk_logprobs, rtol=0, atol=1e-3)


class TestDamaged:
    """With a teacher behind the store nothing that is damaged stops a run."""

    @pytest.mark.parametrize("at", [0, 30, 100])  # a record's magic, its checksum, its block
    @pytest.mark.parametrize("index", [True, False])
    def test_a_damaged_block_is_scored_anew_with_a_warning(self, tmp_path, teacher, at, index):
        filled = StoredTeacher(tmp_path, teacher)
        exact = filled.score(rollout(), 4)
        filled.store.close()
        flip(tmp_path / "shard-00000.blocks", at)
        if not index:
            (tmp_path / "shard-00000.index").unlink()
        asked = len(teacher.asked)
        with pytest.warns(
            UserWarning, match="shard-00000.blocks is damaged at byte 0.* It is (scored anew|passed over)"
        ):
            again = StoredTeacher(tmp_path, teacher)
            assert_close(again.score(rollout(), 4), exact)
        assert len(teacher.asked) == asked + 1 and (again.hits, again.misses) == (3, 1)
        again.store.close()
        if index:  # else the damage stays where it is, and only a teacher gets past it
            assert_close(StoredTeacher(tmp_path).score(rollout(), 4), exact)

    def test_a_shard_that_is_gone_is_scored_anew(self, tmp_path, teacher):
        stored = StoredTeacher(tmp_path, teacher)
        exact = stored.score(rollout(), 4)
        (tmp_path / "shard-00000.blocks").unlink()
        with pytest.warns(UserWarning, match="shard-00000.blocks is gone.* scored anew"):
            assert_close(stored.score(rollout(), 4), exact)

    @pytest.mark.parametrize("content", ["", '{"name": "a"', "{}"])
    def test_a_damaged_description_is_written_anew_by_its_own_teacher_only(self, tmp_path, teacher, content):
        StoredTeacher(tmp_path, teacher).score(rollout(), 4)
        (tmp_path / "info.json").write_text(content)
        with pytest.raises(UserError, match="info.json is .*Fix: "):
            StoredTeacher(tmp_path)
        with pytest.raises(UserError, match="info.json is .*Fix: "):
            StoredTeacher(tmp_path, Recorded(seed=3))
        with pytest.warns(UserWarning, match="is written anew"):
            assert StoredTeacher(tmp_path, teacher).info() == teacher.info()
        assert StoredTeacher(tmp_path).info() == teacher.info()


def test_of_two_teachers_that_claim_a_store_at_one_time_one_wins(tmp_path):
    """Both see it empty; the one that writes second is refused, and writes nothing."""
    first, second = Recorded(seed=1), Recorded(seed=3)
    store = StoredTeacher(tmp_path / "a", first).store.__class__(tmp_path / "b")
    looks = iter([None])
    look = store.info

    def info():  # the other one claims the store between our look and our write
        return next(looks) if not (tmp_path / "b" / "info.json").exists() and not claim() else look()

    def claim():
        StoredTeacher(tmp_path / "b", first)
        return False

    store.info = info
    with pytest.raises(UserError, match=f"holds evidence of .*{first.info().fingerprint}"):
        store.claim(second.info())
    assert StoredTeacher(tmp_path / "b").info() == first.info()


class TestBehind:
    def test_chosen_ids_and_sampling_are_the_teachers(self, tmp_path, teacher):
        stored, made = StoredTeacher(tmp_path, teacher), rollout()
        chosen = torch.arange(made.num_rows * 2).remainder(VOCAB).view(-1, 2)
        assert same(stored.score(made, 2, chosen), LocalTeacher.score(teacher, made, 2, chosen))
        assert len(stored.store) == 0 and (stored.hits, stored.misses) == (0, 0)
        prompts, sampling = [Prompt([5, 6, 7], "")], Sampling(max_new_tokens=4, seed=3)
        assert torch.equal(stored.generate(prompts, sampling).input_ids, teacher.generate(prompts, sampling).input_ids)

    def test_closing_closes_the_teacher(self, tmp_path, teacher):
        StoredTeacher(tmp_path, teacher).close()
        assert teacher.closed

    def test_another_teachers_store(self, tmp_path, teacher):
        StoredTeacher(tmp_path, teacher)
        other = Recorded(seed=3)
        prints = (teacher.info().fingerprint, other.info().fingerprint)
        with pytest.raises(UserError, match=rf"holds evidence of .*{prints[0]}.*; this is .*{prints[1]}.*Fix"):
            StoredTeacher(tmp_path, other)
        other_words = replace(teacher.info(), tokenizer="0" * 16)
        with pytest.raises(UserError, match=rf"{teacher.info().tokenizer}.*{'0' * 16}"):
            StoredTeacher(tmp_path).store.claim(other_words)

    def test_a_teacher_that_changes_is_noticed(self, tmp_path, teacher):
        """New weights under a running service, for example: nothing of them is stored."""
        stored = StoredTeacher(tmp_path, teacher)
        stored.score(rollout(), 2)
        before = teacher.info().fingerprint
        with torch.no_grad():
            teacher.model.get_input_embeddings().weight.mul_(2)
        teacher._info = None
        with pytest.raises(UserError, match=rf"{teacher.info().fingerprint}.*{before}.*changed.*Fix"):
            stored.score(rollout(seed=1), 2)
        assert len(stored.store) == 4

    def test_limits(self, tmp_path, teacher):
        with pytest.raises(UserError, match=f"top_k is {VOCAB + 1}; the teacher has {VOCAB} logit columns"):
            StoredTeacher(tmp_path, teacher).score(rollout(), VOCAB + 1)
        with pytest.raises(UserError, match="bfloat16"):
            StoredTeacher(tmp_path, teacher, "bfloat16")
