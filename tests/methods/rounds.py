"""Hand-made rounds for trainers of the methods, and the logits of their rows, one unpadded sequence at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmdistill import MethodTrainer, methods
from llmdistill.composition.batch import Text
from llmdistill.recipe.config import RolloutConfig
from llmdistill.recipe.data_config import DataConfig
from llmdistill.texts import Prompt, Rollout, collate
from tests import tiny

# (prompt, completion, context, log-probs the engine drew the completion with): all lengths differ, two end without eos
SEQUENCES = [
    ([5, 6, 7, 8], [9, 10, 1], [2, 5, 6, 7, 8, 40, 41], [-1.0, -2.0, -0.5]),
    ([11, 12], [13, 14, 15, 16, 17], None, [-3.0, -1.0, -2.5, -4.0, -0.2]),
    ([20] * 9, [1], [20, 21, 22], [-0.1]),
    ([30, 31, 32], [33, 34], [30, 31, 32, 33, 50], [-6.0, -0.7]),
]
CONTEXT = "privileged"


def prompts(rows: Sequence[Any] = SEQUENCES) -> list[Prompt]:
    return [
        Prompt(list(p), "", row=i, contexts={} if context is None else {CONTEXT: tuple(context)})
        for i, (p, _, context, _) in enumerate(rows)
    ]


def rollout(rows: Sequence[Any] = SEQUENCES, *, sampled: bool = True) -> Rollout:
    parts = [r[0] for r in rows], [r[1] for r in rows]
    return collate(*parts, pad_id=0, behavior_logprobs=[r[3] for r in rows] if sampled else None)


def padded(text: Rollout, left: int, right: int) -> Rollout:
    """The same sequences with more padding, filled with an id that is a word elsewhere."""

    def pad(tensor: Tensor | None, value: float = 0) -> Any:
        return None if tensor is None else torch.nn.functional.pad(tensor, (left, right), value=value)

    ids, real, counted = pad(text.input_ids, 77), pad(text.attention_mask), pad(text.completion_mask)
    return replace(
        text,
        input_ids=ids,
        attention_mask=real,
        completion_mask=counted,
        behavior_logprobs=pad(text.behavior_logprobs),
    )


def text(rows: Sequence[Any] = SEQUENCES, *, left: int = 0, right: int = 0, **known: Any) -> Text:
    return Text(padded(rollout(rows), left, right), prompts(rows), **known)


def make(
    folder: Path,
    method: str,
    *,
    student: Any = None,
    teacher: Any = None,
    context: str = "",
    data: DataConfig | None = None,
    rows: Any = None,
    sampling: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
    **settings: Any,
) -> MethodTrainer:
    """A trainer of a method of the package on tiny models."""
    shared = {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "logging_steps": 1,
        "rollouts": RolloutConfig(**{"max_new_tokens": 5, **(sampling or {})}),
    }
    args = methods.config_class(method)(output_dir=str(folder / "run"), **{**shared, **settings})
    return MethodTrainer(
        student or tiny.llama(1),
        args,
        teacher or tiny.llama(2),
        train_dataset=tiny.rows(8) if rows is None else rows,
        processing_class=tiny.tokenizer(),
        data=data,
        contexts={"teacher": context} if context else None,
        **(trainer or {}),
    )


def gradients(t: Any, texts: Any, parts: int = 1) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a round, summed over its micro-batches as an optimizer step sums them."""
    t.model.zero_grad()
    t.model.train()
    total = 0.0
    for batch in t.batches(texts if isinstance(texts, dict) else {"main": texts}, parts):
        loss = t.compute_loss(t.model, {"micro_batch": batch})
        loss.backward()
        total += float(loss.detach())
    return total, {n: p.grad.clone() for n, p in t.model.named_parameters() if p.grad is not None}


def logits(model: Any, rows: Sequence[Any] = SEQUENCES, *, in_context: bool = False) -> list[Tensor]:
    """Of every sequence, those that predict its completion [n, V] in float64, whatever stood before it."""
    found = []
    for prompt, completion, context, _ in rows:
        before = list(context) if in_context and context is not None else list(prompt)
        out = model(torch.tensor([before + list(completion)])).logits[0]
        found.append(out[len(before) - 1 : len(before) - 1 + len(completion)].double())
    return found


def logps(model: Any, rows: Sequence[Any] = SEQUENCES, temperature: float = 1.0, **where: Any) -> list[Tensor]:
    return [(x / temperature).log_softmax(-1) for x in logits(model, rows, **where)]


def tokens(rows: Sequence[Any] = SEQUENCES) -> list[Tensor]:
    return [torch.tensor(r[1]) for r in rows]


def drawn(rows: Sequence[Any] = SEQUENCES) -> list[Tensor]:
    """Log-probs of the completions under who drew them."""
    return [torch.tensor(r[3], dtype=torch.float64) for r in rows]


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of log-probs [n, V] -> [n]."""
    return (p.exp() * (p - q)).sum(-1)


def pick(logp: Tensor, ids: Tensor) -> Tensor:
    return torch.stack([row[i] for row, i in zip(logp, ids, strict=True)])


def assert_agree(t: Any, texts: Any, model: Any, expected: Tensor, *, tolerance: float = 2e-5) -> None:
    """Loss and every parameter's gradient of the trainer, and of a scalar made by hand of ``model``'s logits."""
    loss, found = gradients(t, texts)
    model.zero_grad()
    expected.backward()
    by_hand = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    value = float(expected.detach())
    assert abs(loss - value) <= tolerance * max(1.0, abs(value))
    assert_same(found, by_hand, tolerance)


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    scale = max(float(g.abs().max()) for g in b.values())
    assert scale > 1e-4  # something is learned
    for name in a.keys() | b.keys():  # where there is none it is 0
        apart = a[name] - b[name] if name in a and name in b else a.get(name, b.get(name))
        assert apart is not None and float(apart.abs().max()) <= tolerance * scale, name
