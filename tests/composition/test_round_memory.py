"""What a round's evidence takes: once on the host, and on the device that trains no more than a micro-batch's share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmdistill import Ask, Term
from llmdistill.composition.batch import Text
from llmdistill.objectives import divergences
from llmdistill.objectives.rows import HiddenRows, SparseRows
from llmdistill.teachers.evidence import gather
from llmdistill.teachers.local import LocalTeacher
from llmdistill.texts import Prompt, Rollout, collate
from tests import tiny
from tests.composition.test_terms import trainer as composed
from tests.methods import rounds

TOKENS = 40


class Alive(TorchDispatchMode):
    """Bytes of the tensors that operations make and that are still there: of one device, the most at any time."""

    def __init__(self, device: str = "cpu", least: int = 0) -> None:
        super().__init__()
        self.device, self.least = device, least
        self.there: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == self.device:
                storage = tensor.untyped_storage()
                if storage.nbytes() >= self.least and storage._cdata not in self.there:
                    self.there[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                    self.peak = max(self.peak, self.now())
        return out

    def now(self) -> int:
        self.there = {key: pair for key, pair in self.there.items() if not pair[0].expired()}
        return sum(size for _, size in self.there.values())


def texts(sequences: int) -> Rollout:
    made = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 30, (sequences, TOKENS), generator=made).tolist()
    return collate([x[:4] for x in ids], [x[4:] for x in ids], pad_id=0)


def peak(work: Callable[[], Any], least: int) -> int:
    with Alive(least=least) as alive:
        kept = work()
    assert kept is not None
    return alive.peak


def test_a_round_of_hidden_rows_is_there_once() -> None:
    """The difference of two rounds is that of their rows: once, and not as pieces and joined."""
    teacher = LocalTeacher(tiny.llama(1, layers=1), tiny.tokenizer(), batch_tokens=TOKENS)
    of_row = teacher.head.linear.in_features * 4
    few, many = (peak(lambda n=n: gather(teacher, texts(n), "full", 0), of_row * 36) for n in (26, 39))
    more = (39 - 26) * (TOKENS - 4) * of_row
    assert more <= many - few <= 1.2 * more


@pytest.mark.parametrize("kind", ["full", "top_k"])
def test_what_waits_for_its_micro_batch_is_on_the_host(kind: str) -> None:
    teacher = LocalTeacher(tiny.llama(1), tiny.tokenizer())
    rows = gather(teacher, texts(4), kind, 3)
    assert isinstance(rows, HiddenRows | SparseRows) and len(rows) == 4 * (TOKENS - 4)
    with Alive("meta") as alive:
        for a in range(0, len(rows), 36):
            rows[a : a + 36].to("meta")
        largest = alive.peak
    with Alive("meta") as alive:
        rows[0:36].to("meta")
    assert 0 < largest == alive.peak  # one sequence's share at a time


def micro_batches(trainer: Any, sequences: int, parts: int, *names: str) -> list[Any]:
    """Of a round in which every sequence has as many tokens; its texts are alike."""
    made = texts(sequences)
    prompts = [Prompt(ids[:4].tolist(), "", row=i) for i, ids in enumerate(made.input_ids)]
    return trainer.batches({name: Text(made, prompts) for name in names}, parts)  # type: ignore[no-any-return]


def test_the_device_holds_a_micro_batch_whatever_the_round(tmp_path: Path) -> None:
    """Rounds of two and of twelve passes, each brought to a device (torch's without memory) in turn."""
    t, found = rounds.make(tmp_path, "entropy_aware"), {}
    for parts in (2, 12):
        with Alive("meta") as alive:
            for batch in micro_batches(t, 2 * parts, parts, "main"):
                batch.to("meta")
        found[parts] = alive.peak
    assert 0 < found[12] == found[2]


def test_micro_batches_of_several_texts_are_views_of_the_round(tmp_path: Path) -> None:
    t = composed(tmp_path, (Term("kl", divergences.reverse_kl, (Ask("teacher"),), text=("a", "b")),))
    batches = micro_batches(t, 8, 4, "a", "b")
    stored = {rows.hidden_NH.untyped_storage().data_ptr() for b in batches for s in b.slices for rows in _hidden(s)}
    assert len(stored) == 2


def _hidden(s: Any) -> list[HiddenRows]:
    found, left = [], [s.evidence]
    while left:
        rows = left.pop()
        left += getattr(rows, "parts", ())
        found += [rows] if isinstance(rows, HiddenRows) else []
    return found
