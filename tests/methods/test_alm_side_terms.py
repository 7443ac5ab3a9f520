"""ALM's side terms in a trainer: hidden states where chunks end, tokens that both have, weights by gradient norms."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmdistill.composition.method import Measured
from llmdistill.errors import UserError
from llmdistill.methods.alm import in_nats
from llmdistill.objectives.alm import inverse_norm_weights
from llmdistill.teachers.local import LocalTeacher
from llmdistill.tokenization.align import align_chunks
from llmdistill.tokenization.token_bytes import table_of
from tests import tiny
from tests.methods import rounds
from tests.methods.test_chunks import by_hand, make, other_teacher, t_row, teacher_tokenizer, text
from tests.tokenization import vocabularies

ALM = partial(in_nats, temperature=100.0, divergence="binary_kl")
PLAIN = {"debias": False}


def states_by_hand(t: Any, given: Any, student: Any, layer: int) -> tuple[Tensor, Tensor]:
    """Of every chunk that a counted token follows: what the layer puts out at its last token, on both sides [C, H]."""
    judge = t.judges["teacher"]
    model, tok, own_tok = judge.teacher.model, judge.retokenizer.judge, t.encode.tokenizer
    found = []

    def states(model: Any, ids: list[int]) -> Tensor:
        kept = []
        hook = model.model.layers[layer].register_forward_hook(lambda module, inputs, output: kept.append(output))
        model(torch.tensor([ids]))
        hook.remove()
        return (kept[0][0] if isinstance(kept[0], tuple) else kept[0]).squeeze(0)

    for b, prompt in enumerate(given.prompts):
        tail = given.rollout.input_ids[b][given.rollout.attention_mask[b]].tolist()[len(prompt.ids) :]
        content = [i for i in tail if i != own_tok.eos_token_id]
        written = bytes(u for i in content for u in table_of(own_tok).units[i]).decode()
        head = vocabularies.encode(tok, tok.apply_chat_template(t_row(b), tokenize=False, add_generation_prompt=True))
        judged = [*vocabularies.encode(tok, written), *([tok.eos_token_id] if tail != content else [])]
        own, other = states(student, [*prompt.ids, *tail]), states(model, head + judged).detach()
        for a, c in align_chunks(tail, judged, own_tok, tok)[:-1]:
            found.append((own[len(prompt.ids) + a.stop - 1], other[len(head) + c.stop - 1]))
    student_C, teacher_C = (torch.stack(side) for side in zip(*found, strict=True))
    return student_C, teacher_C


@pytest.mark.parametrize("layers", [[-1], [0, 1]])
def test_hidden_states_by_hand(tmp_path: Path, layers: list[int]) -> None:
    student = tiny.llama(1)
    t = make(tmp_path, "alm", student=student, hidden_weight=0.7, hidden_layers=layers, **PLAIN)
    given, twin = text(t), copy.deepcopy(student)
    s, o = by_hand(t, given, twin, word_ends=False)
    pairs = [states_by_hand(t, given, twin, layer) for layer in layers]
    side = torch.stack([((own - other).square() / other.square().mean(0)).mean() for own, other in pairs]).mean()
    expected = ALM(s, o).mean() + 0.7 * side
    value, found = rounds.gradients(t, text(t, left=2, right=3))
    assert value == pytest.approx(float(expected.detach()), rel=1e-4) and float(side.detach()) > 0.1
    twin.zero_grad()
    expected.backward()
    rounds.assert_same(found, {n: p.grad for n, p in twin.named_parameters() if p.grad is not None}, 1e-4)
    for parts in (2, 4):
        other_value, again = rounds.gradients(t, text(t), parts)
        assert other_value == pytest.approx(value, rel=1e-5)
        rounds.assert_same(again, found, 5e-5)


def test_a_model_taught_by_what_it_was_has_no_loss(tmp_path: Path) -> None:
    student = tiny.llama(1)
    teacher = LocalTeacher(copy.deepcopy(student), tiny.tokenizer())
    t = make(tmp_path, "alm", student=student, teacher=teacher, hidden_weight=1.0, shared_weight=1.0)
    loss, found = rounds.gradients(t, text(t))
    assert abs(loss) < 1e-6 and all(float(g.abs().max()) < 2e-5 for g in found.values())


def test_another_width_takes_a_projector(tmp_path: Path) -> None:
    tok = teacher_tokenizer()
    model = tiny.llama(3, vocab=len(tok), hidden=48)
    model.generation_config.eos_token_id = tok.eos_token_id
    teacher = LocalTeacher(model, tok)
    with pytest.raises(UserError, match="of width 32 with those of teacher, 48 wide. Fix: a projector.*--hidden_proj"):
        make(tmp_path / "a", "alm", teacher=teacher, hidden_weight=1.0)
    t = make(tmp_path / "b", "alm", teacher=teacher, hidden_weight=1.0, hidden_projector=True)
    before = t.helpers["chunk_ends_0"].weight.detach().clone()
    t.train()
    assert before.shape == (48, 32) and not torch.equal(t.helpers["chunk_ends_0"].weight, before)


def test_tokens_that_both_have_stand_beside_chunks(tmp_path: Path) -> None:
    """The loss is the sum of both; what the added one is, tests/objectives/test_classes.py says."""
    for method, more in (("alm", PLAIN), ("chunk_opd", {})):
        alone, _ = rounds.gradients(t := make(tmp_path / method, method, **more), text(t))
        both = make(tmp_path / f"{method}-both", method, shared_weight=0.5, **more)
        value, found = rounds.gradients(both, text(both))
        assert value > alone + 0.05
        again, split = rounds.gradients(both, text(both), 4)
        assert again == pytest.approx(value, rel=1e-5)
        rounds.assert_same(split, found, 5e-5)


@pytest.mark.parametrize("parts", [1, 4])
def test_terms_are_weighed_by_the_norms_of_their_gradients(tmp_path: Path, parts: int) -> None:
    """After a step: own weight times 1 / norm over the sum, norms those of each term alone at the states it reads."""
    settings: dict[str, Any] = {"ce_weight": 0.5, "shared_weight": 2.0, "hidden_weight": 1.0, **PLAIN}
    shape = {"per_device_train_batch_size": 4 // parts, "gradient_accumulation_steps": parts, "max_steps": 1}
    t = make(tmp_path / "a", "alm", balance="gradients", rows=tiny.rows(4), **settings, **shape)
    assert [term.weight_now for term in t.method.terms] == pytest.approx([0.25, 0.5, 0.25, 0.125])
    heard: list[Measured] = []
    balance = t.method.schedules["balance"]
    update = balance.update
    balance.update = lambda measured: (heard.append(measured), update(measured))  # type: ignore[method-assign,func-returns-value,assignment]
    t.train()
    (measured,) = heard
    assert set(measured.norms) == {"chunks", "shared", "hidden", "cross_entropy"}
    assert list(balance.shares.values()) == pytest.approx(inverse_norm_weights(list(measured.norms.values())))
    fixed = make(tmp_path / "b", "alm", rows=tiny.rows(4), max_steps=1, **settings)
    fixed.train()  # logs every term's norm at weight x
    line = fixed.state.log_history[0]
    for term in fixed.method.terms:
        own = line[f"distill/{term.name}/grad_norm"] / term.weight_now
        assert measured.norms[term.name] == pytest.approx(own, rel=1e-3), term.name
    state = t._method_state().values()["schedules"]["balance"]
    assert state == {"shares": balance.shares}


def test_side_terms_without_weight_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="objective.balance is gradients, and there is one term"):
        make(tmp_path, "alm", balance="gradients")
    with pytest.raises(UserError, match="hidden_projector True, and hidden_weight 0"):
        make(tmp_path, "alm", hidden_projector=True)
    with pytest.raises(UserError, match="objective.hidden_weight is 0.5 and hidden_layers empty. Fix: --hidden_layers"):
        make(tmp_path, "alm", hidden_weight=0.5, hidden_layers=[])
    with pytest.raises(UserError, match="names layer 9"):
        make(tmp_path, "alm", hidden_weight=1.0, hidden_layers=[9], teacher=other_teacher())
