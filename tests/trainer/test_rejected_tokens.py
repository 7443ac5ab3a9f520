"""Which tokens of the rejected side a pair's loss pushes down: all, those after the divergence, the first divergent."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmdistill.errors import UserError
from llmdistill.recipe.data_config import DataConfig
from llmdistill.redi import REDIConfig
from llmdistill.texts.pairs import pair_encoder
from llmdistill.texts.prompts import Completion, PromptEncoder
from llmdistill.texts.turns import Turn
from tests import tiny
from tests.trainer.pair_cases import assert_same_gradients, loss_and_gradients, trainer

# The first two tokens are alike; every side ends with an eos.
ROW = {"prompt": "2+2=", "chosen": "abcd", "rejected": "abxyz"}


@pytest.mark.parametrize(
    ("mode", "counted"), [("after_divergence", "xyz<eos>"), ("first_divergent", "x"), ("all", "abxyz<eos>")]
)
def test_which_tokens_count(mode: str, counted: str) -> None:
    tok = tiny.tokenizer()
    pair = pair_encoder(tok, DataConfig(), rejected_tokens=mode)(ROW)
    assert tok.decode([t for t, c in zip(pair.rejected, pair.penalised(mode), strict=True) if c]) == counted
    assert all(pair.rejected_counts)  # of the whole side, which is what is divided by
    assert tok.decode(pair.rejected) == "abxyz<eos>" and tok.decode(pair.chosen) == "abcd<eos>"
    assert all(pair.chosen_counts)


@pytest.mark.parametrize("mode", ["after_divergence", "first_divergent"])
def test_the_gradient_is_of_these_tokens_alone_divided_by_the_whole_length(tmp_path: Path, mode: str) -> None:
    student = tiny.llama(1)
    t = trainer(tmp_path, student, rows=[ROW, {**ROW, "rejected": "aq"}], rejected_tokens=mode)
    pairs = t.train_dataset
    loss, gradients = loss_and_gradients(t, pairs)  # type: ignore[arg-type]

    def logps(ids: tuple[int, ...], prompt: list[int]) -> torch.Tensor:
        logits = student(torch.tensor([[*prompt, *ids]])).logits[0]
        return torch.stack([logits[len(prompt) + i - 1].log_softmax(-1)[token] for i, token in enumerate(ids)])

    student.zero_grad()
    expected = torch.tensor(0.0)
    for pair, start, end in zip(pairs, (2, 1), (6, 3), strict=True):  # type: ignore[arg-type]
        end = start + 1 if mode == "first_divergent" else end
        rejected = logps(pair.rejected, pair.prompt.ids)[start:end].sum() / len(pair.rejected)
        expected = expected + (0.8 * rejected - logps(pair.chosen, pair.prompt.ids).mean()) / 2
    expected.backward()
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=1e-4)
    measured = t.measure_heldout_pairs(pairs)  # type: ignore[arg-type]
    with torch.no_grad():
        whole = [logps(p.rejected, p.prompt.ids).mean().item() for p in pairs]  # type: ignore[union-attr]
    assert measured.rejected == pytest.approx(whole, abs=1e-5) != measured.penalised
    assert t._measured(pairs, "eval")["eval_loss"] == pytest.approx(expected.item(), abs=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("packing", [False, True])
def test_micro_batches_and_packing_change_nothing(tmp_path: Path, packing: bool) -> None:
    rows = [{**ROW, "rejected": text} for text in ("abxyz", "aq", "abcx", "zzzzzzz")]
    student = tiny.llama(1)
    t = trainer(tmp_path, student, rows=rows, rejected_tokens="first_divergent", packing=packing)
    loss, gradients = loss_and_gradients(t, t.train_dataset)  # type: ignore[arg-type]
    student.zero_grad()
    parts = [t.compute_loss(student, {"micro_batch": b}) for b in t.batches(t.draw(t.train_dataset), 3)]  # type: ignore[arg-type]
    sum(parts).backward()
    assert len(parts) == 3 and sum(parts).item() == pytest.approx(loss, rel=1e-5)
    assert_same_gradients(gradients, {n: p.grad for n, p in student.named_parameters()})


def test_a_side_that_only_stops_earlier_says_nothing_otherwise_once_it_is_cut() -> None:
    tok = tiny.tokenizer()
    row = {"prompt": "=", "chosen": "abcd", "rejected": "abcdefg"}
    pair = pair_encoder(tok, DataConfig(), rejected_tokens="first_divergent")(row)
    penalised = pair.penalised("first_divergent")
    assert tok.decode([pair.rejected[penalised.index(True)]]) == "e"  # where the other one ends
    short = {"prompt": "=", "chosen": "abcd", "rejected": "ab"}  # its eos is a token like others
    pair = pair_encoder(tok, DataConfig(), rejected_tokens="after_divergence")(short)
    assert pair.penalised("after_divergence") == (False, False, True)
    cut = {"prompt": "=", "chosen": "abcd", "rejected": "abc"}
    encode = pair_encoder(
        tok, DataConfig(completion_overlong="truncate"), rejected_tokens="first_divergent", max_completion_tokens=3
    )
    with pytest.raises(UserError, match="row 0: chosen and rejected are the same text"):
        encode.encode_all([cut], "data.train")


def test_a_side_that_says_nothing_otherwise_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    encode = pair_encoder(tiny.tokenizer(), DataConfig(), rejected_tokens="after_divergence")
    completion = PromptEncoder.completion

    def unclosed(self: PromptEncoder, turn: Turn, column: str, index: int) -> Completion:
        made = completion(self, turn, column, index)  # as a template without an end of turn leaves it
        return Completion(made.ids[:-1], made.counts[:-1])

    monkeypatch.setattr(PromptEncoder, "completion", unclosed)
    with pytest.raises(UserError, match="row 0: rejected is the beginning of chosen.*--rejected_tokens all"):
        encode({"prompt": "=", "chosen": "abcdef", "rejected": "abcd"})


def test_long_pairs_pass_the_preflight_and_train(tmp_path: Path) -> None:
    rows = [{"prompt": "=", "chosen": "ab" * 40, "rejected": "ab" * 30 + "x" * 20 + str(i)} for i in range(4)]
    t = trainer(tmp_path, rows=rows, rejected_tokens="first_divergent", max_steps=1)
    t.wants_preflight = True
    t.train()
    assert t.state.global_step == 1


def test_dpo_reads_whole_completions() -> None:
    with pytest.raises(UserError, match="rejected_tokens is first_divergent, and TRL's dpo"):
        REDIConfig(output_dir="x", method="dpo", rejected_tokens="first_divergent")
