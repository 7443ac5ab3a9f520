"""SDPO: the student's samples, judged by the student that has seen another sample's success."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmdistill.methods.sdpo import sibling
from llmdistill.recipe.data_config import DataConfig
from llmdistill.teachers.student import StudentTeacher
from tests import tiny
from tests.methods import rounds

HAVE = [i for i, row in enumerate(rounds.SEQUENCES) if row[2] is not None]


def bucketed_jsd(s: Tensor, q: Tensor, beta: float, k: int) -> Tensor:
    """Of one position, over the student's k likeliest tokens and one bucket for the rest."""
    top = sorted(range(len(s)), key=lambda v: -float(s[v].detach()))[:k]
    rest = [v for v in range(len(s)) if v not in top]
    a = torch.cat([s[top], s[rest].logsumexp(0)[None]])
    b = torch.cat([q[top], q[rest].logsumexp(0)[None]])
    m = (beta * b.exp() + (1 - beta) * a.exp()).log()
    return beta * rounds.kl(b, m) + (1 - beta) * rounds.kl(a, m)


@pytest.mark.parametrize(
    ("settings", "beta", "k", "cap"),
    [({"top_k": 9}, 0.5, 9, 2.0), ({"top_k": 20, "beta": 0.7, "importance_cap": 0.0}, 0.7, 20, 0.0)],
)
def test_loss_and_gradients_equal_the_formula(
    tmp_path: Path, settings: dict[str, Any], beta: float, k: int, cap: float
) -> None:
    """The judge's log-probs are of the student's list; the weight is min(S_now / S_then, cap)."""
    student, judge = tiny.llama(1), tiny.llama(1).requires_grad_(False)
    more: dict[str, Any] = {"teacher": StudentTeacher("ema", 0.95), "context": rounds.CONTEXT}
    more["sampling"] = {"samples_per_prompt": 2}
    t = rounds.make(tmp_path, "sdpo", student=student, **more, **settings)
    s, q = rounds.logps(student), rounds.logps(judge, in_context=True)
    losses = []
    for i in HAVE:
        y, behavior = rounds.tokens()[i], rounds.drawn()[i]
        value = torch.stack([bucketed_jsd(a, b, beta, k) for a, b in zip(s[i], q[i], strict=True)])
        ratio = (rounds.pick(s[i], y).detach() - behavior).exp()
        losses.append(value * (ratio.clamp(max=cap) if cap else 1.0))
    rounds.assert_agree(t, rounds.text(), student, torch.cat(losses).mean())


def test_the_ratio_is_that_of_what_the_sampler_drew_from(tmp_path: Path) -> None:
    """Engines report log-probs after top_k and top_p: unchanged weights have ratio 1, also for a truncated sampler."""
    sampling = {"top_k": 5, "samples_per_prompt": 2, "temperature": 0.7}
    settings: dict[str, Any] = {"teacher": tiny.llama(2), "sampling": sampling}
    losses = []
    for cap in (0.0, 2.0):
        t = rounds.make(tmp_path, "sdpo", importance_cap=cap, **settings)
        losses.append(rounds.gradients(t, t.draw(t.train_dataset[:4])["main"])[0])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_sibling_is_the_first_other_success() -> None:
    def numbers(rewards: list[float] | None) -> list[int | None]:
        given = sibling({}, ["0", "1", "2", "3"], rewards)
        return [None if g is None else int(g.split("\n\n")[1]) for g in given]

    assert numbers([0, 1, 0, 1]) == [1, 3, 1, 1]
    assert numbers([0, 1, 0, 0]) == [1, None, 1, 1]  # its own success teaches it nothing
    assert numbers([0, 0.4, 0, 0]) == numbers(None) == [None] * 4


def test_a_round_without_a_success_has_no_loss_and_one_with_a_success_has(tmp_path: Path) -> None:
    """Samples without a sibling are left out; where that is all of them the step is 0, and no number is NaN."""
    found = {}
    for name, reward in {"none": [0.0, 0.0], "one": [1.0, 0.0]}.items():
        t = rounds.make(
            tmp_path / name,
            "sdpo",
            teacher=StudentTeacher("ema", 0.95),
            context="sibling",
            data=DataConfig(contexts={"sibling": "llmdistill.methods.sdpo:sibling"}),
            sampling={"samples_per_prompt": 2},
            top_k=20,
            trainer={"reward": lambda prompts, written, r=reward: r * (len(written) // 2)},
        )
        t.train()
        found[name] = [(x["loss"], x["grad_norm"]) for x in t.state.log_history if "loss" in x]
    assert found["none"] == [(0.0, 0.0)] * 2
    assert all(loss > 0 and norm > 0 for loss, norm in found["one"])
