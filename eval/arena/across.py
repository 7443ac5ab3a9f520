"""The peers' trainer: student and teacher read one text in tokens of their own, and one of the losses of ``peers.py``.

The cross-entropy that the papers add stands beside it where they add one; the weights are theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import peers
import torch
import torch.nn.functional as F
from methods import Method, Row, Setting, built, composed, of_same, on_teacher_text, opd, rows_of, taid
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

from llmdistill.tokenization.align import align_chunks
from llmdistill.tokenization.token_bytes import table_of

ULD_WEIGHT = 1.5
KD_RATE = 0.5  # DSKD's, of the distillation against the cross-entropy
PROJECTOR_LR = 1e-3


@dataclass(frozen=True)
class Reading:
    """A text in one tokenizer: ids of the prompt, and of the completion with its end."""

    prompt: list[int]
    completion: list[int]


def reading(row: Row, tok: PreTrainedTokenizerBase) -> Reading:
    ids = [tok(row[part], add_special_tokens=False)["input_ids"] for part in ("prompt", "completion")]
    return Reading(list(ids[0]), [*ids[1], tok.eos_token_id])


@dataclass(frozen=True)
class Pairs:
    """Collates rows for both models. ``labels`` are transformers': the ids themselves, -100 off the completion."""

    student: PreTrainedTokenizerBase
    teacher: PreTrainedTokenizerBase

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        both = [[reading(row, tok) for row in rows] for tok in (self.student, self.teacher)]
        made: dict[str, Any] = {}
        for prefix, readings in zip(("", "teacher_"), both, strict=True):
            made.update({f"{prefix}{name}": tensor for name, tensor in padded(readings).items()})
        made["groups"] = [
            align_chunks(a.completion, b.completion, self.student, self.teacher) for a, b in zip(*both, strict=True)
        ]
        return made


def padded(readings: Sequence[Reading]) -> dict[str, Tensor]:
    width = max(len(r.prompt) + len(r.completion) for r in readings)
    made: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for r in readings:
        ids, rest = [*r.prompt, *r.completion], width - len(r.prompt) - len(r.completion)
        made["input_ids"].append([*ids, *[0] * rest])
        made["attention_mask"].append([*[1] * len(ids), *[0] * rest])
        made["labels"].append([*[-100] * len(r.prompt), *r.completion, *[-100] * rest])
    return {name: torch.tensor(values) for name, values in made.items()}


@dataclass(frozen=True)
class Read:
    """One model's reading of a batch: log-probs and ids of the completion's tokens, text by text."""

    logps: list[Tensor]  # [T, V] each
    ids: list[Tensor]  # [T]
    side: peers.Side


def read(model: PreTrainedModel, inputs: dict[str, Any], prefix: str) -> Read:
    ids, mask, labels = (inputs[f"{prefix}{name}"] for name in ("input_ids", "attention_mask", "labels"))
    out = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
    counted = labels[:, 1:] != -100
    rows = out.logits[:, :-1].float().log_softmax(-1)[counted].split(counted.sum(1).tolist())
    tokens = labels[:, 1:][counted].split(counted.sum(1).tolist())
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    side = peers.Side(out.hidden_states[-1][:, :-1], ids[:, :-1], labels[:, 1:], embeddings, head)
    return Read(list(rows), list(tokens), side)


class PeerTrainer(Trainer):
    """Trains by ``loss(trainer, student, teacher, groups)``, a sum over the batch, divided by the student's tokens."""

    def __init__(self, *args: Any, teacher: PreTrainedModel, tokenizers: Pairs, loss: PeerLoss, **kwargs: Any) -> None:
        super().__init__(*args, data_collator=tokenizers, **kwargs)
        self.teacher, self.tokenizers, self.loss = teacher, tokenizers, loss
        sizes = (m.config.hidden_size for m in (self.model, teacher))
        self.projectors = peers.Projectors(*sizes) if loss is dskd else None
        self.signal = [0, 0]  # tokens that hear of their own bytes; tokens

    @cached_property
    def words(self) -> tuple[list[str], list[str]]:
        """The tokens of both vocabularies as text, for edit distances."""
        found = [
            list(map(str, t.convert_ids_to_tokens(range(len(t)))))
            for t in (self.tokenizers.student, self.tokenizers.teacher)
        ]
        return found[0], found[1]

    @cached_property
    def nearest(self) -> Tensor:
        return peers.nearest_tokens(*self.words)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.projectors is not None and len(optimizer.param_groups) < 3:
            optimizer.add_param_group({"params": list(self.projectors.parameters()), "lr": PROJECTOR_LR})
        return optimizer

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        student = read(model, inputs, "")
        with torch.no_grad():
            teacher = read(self.teacher, inputs, "teacher_")
        return self.loss(self, student, teacher, inputs["groups"]) / sum(map(len, student.ids))

    def note(self, student: Tensor, teacher: Tensor, pairs: Sequence[tuple[int, int]]) -> None:
        """Counts the pairs of positions whose tokens cover the same bytes."""
        spans = []
        for tok, ids in ((self.tokenizers.student, student), (self.tokenizers.teacher, teacher)):
            lengths = torch.from_numpy(table_of(tok).lengths)[ids]
            spans.append(list(zip((lengths.cumsum(0) - lengths).tolist(), lengths.tolist(), strict=True)))
        self.signal[0] += sum(spans[0][i] == spans[1][j] for i, j in pairs)
        self.signal[1] += len(student)


PeerLoss = Callable[[PeerTrainer, Read, Read, Sequence[Any]], Tensor]


def cross_entropy(student: Read) -> Tensor:
    return sum((F.nll_loss(p, i, reduction="sum") for p, i in zip(student.logps, student.ids, strict=True)))  # type: ignore[return-value]


def uld(trainer: PeerTrainer, student: Read, teacher: Read, groups: Sequence[Any]) -> Tensor:
    """Cross-entropy and 1.5 times the sorted distance, position by position."""
    total = cross_entropy(student)
    for s, t, i, j in zip(student.logps, teacher.logps, student.ids, teacher.ids, strict=True):
        total = total + ULD_WEIGHT * peers.uld(s.exp(), t.exp()).sum()
        trainer.note(i, j, [(k, k) for k in range(min(len(i), len(j)))])
    return total


def gold(trainer: PeerTrainer, student: Read, teacher: Read, groups: Sequence[Any]) -> Tensor:
    """The sorted distance of merged groups, a text's mean for each of its tokens; the end of the text is no group."""
    total = student.logps[0].new_zeros(())
    for s, t, i, j, chunks in zip(student.logps, teacher.logps, student.ids, teacher.ids, groups, strict=True):
        own = [(range(a.start, a.stop), range(b.start, b.stop)) for a, b in chunks if a.stop < len(i)]
        total = total + len(i) * peers.gold(s.exp(), t.exp(), i, j, own)
        trainer.signal[0] += sum(len(a) for a, _ in own)
        trainer.signal[1] += len(i)
    return total


def dskd(trainer: PeerTrainer, student: Read, teacher: Read, groups: Sequence[Any]) -> Tensor:
    """Half the cross-entropy, and half of the three losses of the two spaces."""
    assert trainer.projectors is not None
    parts = peers.dskd_cma(student.side, teacher.side, trainer.projectors)
    return (1 - KD_RATE) * cross_entropy(student) + KD_RATE * sum(parts.values())  # type: ignore[return-value]


def min_ed(trainer: PeerTrainer, student: Read, teacher: Read, groups: Sequence[Any]) -> Tensor:
    """Half the cross-entropy, and half the forward KL between positions, and tokens, of least edit distance."""
    total = (1 - KD_RATE) * cross_entropy(student)
    for s, t, i, j in zip(student.logps, teacher.logps, student.ids, teacher.ids, strict=True):
        own, other = ([words[k] for k in ids.tolist()] for words, ids in zip(trainer.words, (i, j), strict=True))
        aligned = peers.min_ed_alignment(own, other)
        total = total + KD_RATE * peers.min_ed(s, t, aligned, trainer.nearest).sum()
        trainer.note(i, j, list(enumerate(aligned)))
    return total


def peer(loss: PeerLoss) -> Callable[[Setting], Trainer]:
    def build(s: Setting) -> Trainer:
        args = TrainingArguments(**s.arguments(remove_unused_columns=False))
        pairs = Pairs(s.tokenizer, s.teacher.tokenizer)  # type: ignore[attr-defined]
        more = {"train_dataset": rows_of(s, "fresh"), "teacher": s.teacher.model, "tokenizers": pairs, "loss": loss}  # type: ignore[attr-defined]
        return built(PeerTrainer, s, s.model, args, **more)

    return build


def aligned_share(trainer: Any) -> float | None:
    """The share of the bytes (of a peer: of the student's tokens) that heard what the teacher says of them."""
    if isinstance(trainer, PeerTrainer):
        return trainer.signal[0] / trainer.signal[1] if trainer.signal[1] else None
    shares = getattr(getattr(trainer, "judges", {}).get("teacher"), "shares", None)
    return shares.aligned_bytes / shares.bytes if shares is not None and shares.bytes else None


METHODS: dict[str, Method] = {
    "same_kl": on_teacher_text("forward KL, same tokenizer", of_same(taid("fresh", divergence="forward_kl"))),
    "same_opd": Method("OPD, same tokenizer", "fresh", "student", of_same(opd("fresh", "student"))),
    "alm": on_teacher_text("ALM", composed("alm")),
    "p_kl": on_teacher_text("P-KL", composed("p_kl")),
    "h_kl": on_teacher_text("H-KL", composed("h_kl")),
    "simct": Method("SimCT on-policy", "fresh", "student", composed("simct")),
    "opd_classes": Method("OPD in classes", "fresh", "student", opd("fresh", "student", view="classes")),
    "chunk_opd": Method("chunk credit on-policy", "fresh", "student", composed("chunk_opd")),
    "uld": on_teacher_text("ULD", peer(uld)),
    "gold": on_teacher_text("GOLD, bayesian", peer(gold)),
    "dskd": on_teacher_text("DSKD-CMA", peer(dskd)),
    "mined": on_teacher_text("MinED", peer(min_ed)),
}
