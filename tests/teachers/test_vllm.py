"""The vLLM teacher against transformers' log-softmax."""

from pathlib import Path

import numpy as np
import pytest
import torch

from llmdistill.compat import vllm_prompts
from llmdistill.errors import UserError
from llmdistill.models.vllm_requests import hidden_rows, scored_rows, scoring_params
from llmdistill.recipe.config import TeacherConfig
from llmdistill.teachers.fingerprint import template_hash, tokenizer_fingerprint, weights_fingerprint
from llmdistill.teachers.heads import stored_head
from llmdistill.teachers.local import LocalTeacher
from llmdistill.texts import Prompt, Sampling, collate
from tests.tiny import llama, tokenizer

pytest.importorskip("vllm", reason="the vllm extra is not installed")

from llmdistill.teachers.vllm import VLLMTeacher

VOCAB = 264
LONGEST = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher")
    llama(1, hidden=64, tied=False).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def teacher(folder):
    made = VLLMTeacher(folder, dtype="float32", max_top_k=VOCAB, max_model_len=LONGEST, kv_cache_gib=0.05)
    yield made
    made.close()


@pytest.fixture(scope="module")
def reference(folder):
    return LocalTeacher.load(TeacherConfig(model=folder, dtype="float32"))


def rollout():
    """Sequences of other lengths, one that fills the context exactly, a prompt alone, a completion alone."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(2, VOCAB, (n,), generator=generator).tolist()  # noqa: E731
    return collate([draw(3), draw(20), draw(40), draw(5), []], [draw(9), draw(1), draw(24), [], draw(6)], pad_id=0)


@pytest.mark.parametrize("top_k", [0, 5])
def test_ids_the_caller_chose_are_scored(teacher, reference, top_k):
    made, generator = rollout(), torch.Generator().manual_seed(1)
    chosen = torch.stack([torch.randperm(VOCAB, generator=generator)[:7] for _ in range(made.num_rows)])
    chosen[3, 2:] = -1
    exact = reference.score(made, top_k, chosen)
    for block, wanted in zip(teacher.score(made, top_k, chosen), exact, strict=True):
        assert block.header == wanted.header
        torch.testing.assert_close(block.token_logprobs, wanted.token_logprobs, rtol=0, atol=1e-4)
        torch.testing.assert_close(block.topk_logprobs, wanted.topk_logprobs, rtol=0, atol=1e-4)
        assert (block.topk_ids == wanted.topk_ids).float().mean() > 0.97 or not block.topk_ids.numel()
    listed = torch.cat([b.topk_ids for b in exact])
    for row, ids in zip(listed.tolist(), chosen.tolist(), strict=True):
        assert set(ids) - {-1} <= set(row) and len(set(row) - {-1}) == len([i for i in row if i >= 0])


def test_chosen_ids_survive_prompts_that_are_scored_in_chunks(folder, reference):
    """With a budget of 16 tokens a step the 64-token sequence is prefilled in four pieces."""
    made, generator = rollout(), torch.Generator().manual_seed(2)
    chosen = torch.randint(0, VOCAB, (made.num_rows, 1), generator=generator)
    small = VLLMTeacher(
        folder, dtype="float32", max_top_k=8, max_model_len=LONGEST, kv_cache_gib=0.05, max_num_batched_tokens=16
    )
    try:
        for block, wanted in zip(small.score(made, 0, chosen), reference.score(made, 0, chosen), strict=True):
            torch.testing.assert_close(block.topk_logprobs, wanted.topk_logprobs, rtol=0, atol=1e-4)
            torch.testing.assert_close(block.token_logprobs, wanted.token_logprobs, rtol=0, atol=1e-4)
    finally:
        small.close()


def test_no_more_logits_exist_at_one_time_than_fit_and_none_that_nobody_asks_for(folder, reference, monkeypatch):
    """Room for 4 rows, prompts of 3 to 40 tokens before what is scored, pieces of 16 tokens: vLLM's own path makes the
    logits of a whole piece, of prompts too."""
    made = rollout()
    monkeypatch.setattr(vllm_prompts, "CHUNK_BYTES", 4 * vllm_prompts.CELL_BYTES * VOCAB)
    small = VLLMTeacher(
        folder, dtype="float32", max_top_k=8, max_model_len=LONGEST, kv_cache_gib=0.05, max_num_batched_tokens=16
    )
    rows = []

    def watch(worker):
        model, compute = worker.model_runner.model, worker.model_runner.model.compute_logits

        def computed(hidden):
            rows.append(len(hidden))
            return compute(hidden)

        model.compute_logits = computed

    try:
        small.engine.llm.collective_rpc(watch)
        for block, wanted in zip(small.score(made, 5), reference.score(made, 5), strict=True):
            torch.testing.assert_close(block.topk_logprobs, wanted.topk_logprobs, rtol=0, atol=1e-4)
            torch.testing.assert_close(block.token_logprobs, wanted.token_logprobs, rtol=0, atol=1e-4)
    finally:
        small.close()
    sampled = 5 + 4  # a row for the token that vLLM draws behind each, and behind pieces of a prompt
    assert max(rows) <= 5 and made.num_rows <= sum(rows) <= made.num_rows + 4 * sampled


def test_hidden_states_are_those_that_the_head_is_applied_to(folder, reference):
    """In pieces of 16 tokens, beside requests for log-probs in the same steps."""
    made = rollout()
    small = VLLMTeacher(
        folder, dtype="float32", max_top_k=8, max_model_len=LONGEST, kv_cache_gib=0.05, max_num_batched_tokens=16
    )
    try:
        assert all(small.engine.llm.collective_rpc(vllm_prompts.gives_hidden))
        ids = [row[real].tolist() for row, real in zip(made.input_ids, made.attention_mask, strict=True)]
        at = [np.arange(max(1, len(one) - 9), len(one)) for one in ids]
        params = [
            scoring_params(len(one), places, 0 if hidden else 3, VOCAB, None, hidden=hidden)
            for one, places in zip(ids, at, strict=True)
            for hidden in (True, False)
        ]
        outputs = small.engine.score([one for one in ids for _ in range(2)], params)
        found = torch.cat([hidden_rows(out, places) for out, places in zip(outputs[::2], at, strict=True)])
        listed = [scored_rows(out, places, 3, VOCAB, None)[2] for out, places in zip(outputs[1::2], at, strict=True)]
    finally:
        small.close()
    whole = made.sequences(range(len(made)))
    whole.completion_mask[:] = False
    for mask, places in zip(whole.completion_mask, at, strict=True):
        mask[places] = True
    exact = reference.dense(whole)
    torch.testing.assert_close(found, exact.hidden_NH, rtol=1e-4, atol=1e-4)
    (logits,) = exact.chunk(slice(0, len(exact)), None)
    torch.testing.assert_close(torch.cat(listed), logits.log_softmax(-1).topk(3).values, rtol=0, atol=1e-4)


def test_the_head_in_a_checkpoint_is_the_models(folder, reference, tmp_path):
    for path, tied in ((Path(folder), False), (tmp_path, True)):
        if tied:
            llama(1, hidden=64, tied=True).save_pretrained(path)
            tokenizer().save_pretrained(path)
        model = LocalTeacher.load(TeacherConfig(model=str(path), dtype="float32"))
        head = stored_head(str(path))
        assert torch.equal(head.weight, model.head.linear.weight) and head.bias is None
        assert (head.logit_scale, head.softcap) == (model.head.logit_scale, model.head.softcap)


@pytest.mark.parametrize("top_k", [0, 1, 5, VOCAB])
def test_scores_are_those_of_the_full_softmax(teacher, reference, top_k):
    made = rollout()
    for block, exact in zip(teacher.score(made, top_k), reference.score(made, top_k), strict=True):
        assert block.positions == exact.positions
        assert block.header == exact.header  # evidence of either teacher may stand in for the other's
        assert block.topk_ids.shape == block.topk_logprobs.shape == exact.topk_ids.shape
        assert block.topk_ids.dtype == torch.int32
        torch.testing.assert_close(block.token_logprobs, exact.token_logprobs, rtol=0, atol=1e-4)
        torch.testing.assert_close(block.topk_logprobs, exact.topk_logprobs, rtol=0, atol=1e-4)
        assert (block.topk_logprobs.diff(dim=-1) <= 0).all()
        # equal up to the order of tokens that are nearly equally likely
        assert (block.topk_ids == exact.topk_ids).float().mean() > 0.97 or not block.topk_ids.numel()
        assert all(len(set(ids)) == top_k for ids in block.topk_ids.tolist())


def test_scores_leave_out_what_does_not_count(teacher):
    """Log-probs at the positions of the completion mask only, also when it has gaps."""
    made = rollout()
    made.completion_mask[0, 5] = False
    whole, gap = teacher.score(rollout(), 2)[0], teacher.score(made, 2)[0]
    keep = [i for i in range(len(whole.token_logprobs)) if i != 5 - whole.positions.start]
    assert torch.equal(gap.token_logprobs, whole.token_logprobs[keep])


def test_padding_on_the_left_changes_nothing(teacher):
    ids = rollout().sequences([0])
    shifted = collate([[0, 0] + ids.input_ids[0, :3].tolist()], [ids.input_ids[0, 3:].tolist()], pad_id=0)
    shifted.attention_mask[0, :2] = False
    (plain,), (left,) = teacher.score(ids, 3), teacher.score(shifted, 3)
    assert torch.equal(plain.topk_logprobs, left.topk_logprobs)
    assert left.positions == slice(plain.positions.start + 2, plain.positions.stop + 2)


def test_more_candidates_than_columns_or_than_loaded_for_are_refused(teacher, folder):
    with pytest.raises(UserError, match="top_k is 265; the teacher has 264"):
        teacher.score(rollout(), VOCAB + 1)
    narrow = VLLMTeacher(folder, dtype="float32", max_top_k=4, max_model_len=LONGEST, kv_cache_gib=0.05)
    assert narrow.score(rollout(), 4)[0].topk_ids.shape == (9, 4)
    with pytest.raises(UserError, match="max_top_k"):
        narrow.score(rollout(), 5)
    narrow.close()


def test_longer_sequences_than_loaded_for_are_refused(teacher):
    with pytest.raises(UserError, match="65 tokens"):
        teacher.score(collate([[5] * 60], [[6] * 5], pad_id=0), 1)


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(UserError, match="teacher.model"):
        VLLMTeacher(str(tmp_path / "none"))


def test_generates_what_the_model_generates(teacher, reference):
    prompts = [Prompt(list(range(5, 12)), ""), Prompt(list(range(50, 70)), "")]
    greedy = Sampling(8, temperature=0.0)
    ours, theirs = teacher.generate(prompts, greedy), reference.generate(prompts, greedy)
    assert torch.equal(ours.input_ids, theirs.input_ids) and ours.finish == theirs.finish


def test_both_engines_describe_the_teacher_alike(teacher, reference):
    assert teacher.info() == reference.info()
    assert teacher.info().eos_ids == (1,) and teacher.info().vocab_size == VOCAB


def test_fingerprints_tell_weights_vocabularies_and_templates_apart(folder):
    same = weights_fingerprint(folder)
    assert same == weights_fingerprint(llama(1, hidden=64, tied=False))
    assert same == weights_fingerprint(llama(1, hidden=64, tied=False).to(torch.bfloat16))
    assert same != weights_fingerprint(llama(2, hidden=64, tied=False))
    other = tokenizer()
    other.add_tokens(["<extra>"])
    assert tokenizer_fingerprint(tokenizer()) == tokenizer_fingerprint(tokenizer()) != tokenizer_fingerprint(other)
    assert template_hash(tokenizer(None)) is None
    assert template_hash(tokenizer("{{ 1 }}")) != template_hash(tokenizer())


def test_a_step_has_fewer_tokens_where_what_it_lists_would_not_fit():
    """[DESIGN] 152k log-probs a position are 1.8 MB; the usual 128 do not count beside 8 GB."""
    step, free = vllm_prompts.step_tokens, 8 << 30
    assert step(16384, free, 128, 151936) == 16384
    few = step(16384, free, 151936, 151936)
    chunk = vllm_prompts.chunk_rows(151936) * 151936 * vllm_prompts.CELL_BYTES
    assert 256 < few < 8192 and few * 151937 * vllm_prompts.ROW_BYTES + chunk <= free
    assert step(16384, 0, 151936, 151936) == 256 and step(100, 0, 5, 264) == 100
