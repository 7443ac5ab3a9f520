"""How far the student is from the teacher on given sequences: per-token metrics with intervals over sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from accelerate.utils import gather_object
from torch import nn

from llmdistill.composition.method import Method
from llmdistill.composition.term import METRICS, AskKind
from llmdistill.errors import UserError
from llmdistill.models.heads import Head, head_of
from llmdistill.models.passes import metrics_at_head
from llmdistill.models.weights import gathered
from llmdistill.objectives.rows import TeacherRows
from llmdistill.ranks import on_every_rank
from llmdistill.record.intervals import bootstrap_ci
from llmdistill.teachers.base import DenseTeacher, Teacher, is_live, max_top_k, writes
from llmdistill.teachers.chunks import ChunkTeacher, Question
from llmdistill.teachers.evidence import Evidence, gather
from llmdistill.texts import Prompt, Rollout, Sampling, request_seed
from llmdistill.texts.batches import Passes
from llmdistill.texts.prompts import completed
from llmdistill.texts.views import in_context
from llmdistill.training.other_tokenizers import check_alignment

# What is asked of a remote teacher for measuring when the objective itself hears only sampled tokens.
UNLISTED_TOP_K = 64


@dataclass(frozen=True)
class Measurement:
    """Per-sequence sums of per-token metrics; B sequences."""

    sums: dict[str, list[float]]  # metric -> [B]
    tokens: list[int]  # [B] counted tokens

    def mean(self, metric: str) -> float:
        """Mean per token."""
        return sum(self.sums[metric]) / max(sum(self.tokens), 1)

    def interval(self, metric: str) -> tuple[float, float]:
        """95 % bootstrap interval of the mean per token, resampling sequences."""
        kept = [(total / n, n) for total, n in zip(self.sums[metric], self.tokens, strict=True) if n]
        return bootstrap_ci([k[0] for k in kept], [k[1] for k in kept]) if kept else (0.0, 0.0)

    def flat(self) -> dict[str, float]:
        """Metric name -> mean, ``…_low``, ``…_high``; and the number of tokens measured."""
        values: dict[str, float] = {"tokens": sum(self.tokens)}
        for metric in self.sums:
            low, high = self.interval(metric)
            values.update({metric: self.mean(metric), f"{metric}_low": low, f"{metric}_high": high})
        return values

    def part(self, span: slice) -> Measurement:
        """Some of the sequences."""
        return Measurement({name: values[span] for name, values in self.sums.items()}, self.tokens[span])

    def of_others(self) -> Measurement:
        """The estimate of the reverse KL as that of the forward KL, for text that is the teacher's or like it."""
        sums = {name: values for name, values in self.sums.items() if name != "reverse_kl"}
        return Measurement({"forward_kl": [-x for x in self.sums["reverse_kl"]], **sums}, self.tokens)

    def gathered(self, accelerator: Any) -> Measurement:
        """The sequences of all ranks together."""
        if accelerator.num_processes == 1:
            return self
        parts: list[Measurement] = gather_object([self])
        sums = {k: [x for p in parts for x in p.sums[k]] for k in self.sums}
        return Measurement(sums, [n for p in parts for n in p.tokens])


def question(teacher: Teacher, kind: AskKind, top_k: int) -> tuple[AskKind, int]:
    """What is asked of the teacher for measuring, given what the objective asks: never less, and what it can give."""
    if kind == "chunks":
        return "chunks", 0
    if kind == "full" or isinstance(teacher, DenseTeacher):
        return "full", 0
    listed = top_k or min(UNLISTED_TOP_K, max_top_k(teacher))
    return ("top_k", listed) if listed else ("sampled", 0)


def _answer(
    teacher: Teacher, rollout: Rollout, prompts: Sequence[Prompt], kind: AskKind, top_k: int, device: Any
) -> Evidence:
    if isinstance(teacher, ChunkTeacher):
        return teacher.chunks(rollout, prompts[: len(rollout)], Question(), device)
    assert kind != "chunks" and kind != "classes"  # with_chunks sees to it
    return gather(teacher, rollout, kind, top_k, device).to(device)


@torch.no_grad()
def measure(
    model: nn.Module,
    head: Head,
    teacher: Teacher,
    rollout: Rollout,
    *,
    vocab_size: int,
    chunk_tokens: int,
    batch_sequences: int,
    kind: AskKind = "full",
    top_k: int = 0,
    counted: Sequence[bool] | None = None,
    teacher_rollout: Rollout | None = None,
    prompts: Sequence[Prompt] = (),
) -> Measurement:
    """reverse_kl, forward_kl, top1_agreement, acceptance and entropy of ``model`` against ``teacher`` on ``rollout``.

    Of a teacher that lists no tokens only the k1 estimate of reverse_kl, and entropy.

    ``kind`` and ``top_k`` say what is asked of a teacher that does not live in this process; the KLs of its top-k and
    tail are lower bounds.
    ``teacher_rollout`` is what the teacher reads instead: the same completions in another context.
    ``prompts`` are those of the sequences, for a teacher in chunks, of whom there is the k1 estimate too.
    ``counted[b]`` false leaves sequence b out (it only kept the ranks in step).
    """
    asked_kind, asked_top_k = question(teacher, kind, top_k)
    device = head.linear.weight.device

    def judged() -> Iterator[tuple[Rollout, TeacherRows]]:
        start = 0
        read = Passes(batch_sequences).of(rollout if teacher_rollout is None else teacher_rollout, device)
        for part, teacher_part in zip(Passes(batch_sequences).of(rollout, device), read, strict=True):
            asked = (teacher, teacher_part, prompts[start:], asked_kind, asked_top_k, device)
            yield part, on_every_rank(partial(_answer, *asked))
            start += len(part)

    values = metrics_at_head(
        model, head, judged(), METRICS[asked_kind], chunk_tokens=chunk_tokens, vocab_size=vocab_size
    )
    tokens = rollout.row_counts
    sums = {name: [float(v.sum()) for v in values_N.split(tokens)] for name, values_N in values.items()}
    keep = range(len(tokens)) if counted is None else [i for i, c in enumerate(counted) if c]
    return Measurement({k: [v[i] for i in keep] for k, v in sums.items()}, [tokens[i] for i in keep])


class Measurable(Protocol):
    """What of a trainer is needed for measuring its student."""

    accelerator: Any
    args: Any
    data_config: Any
    method: Method
    model: Any
    model_wrapped: Any
    state: Any
    rollout_engine: Any
    pad_id: int
    vocab_size: int

    @property
    def teacher(self) -> Teacher: ...

    def forward_model(self) -> nn.Module: ...

    def samples_of_now(self, prompts: Sequence[Prompt], sampling: Sampling) -> Rollout:
        """What the student writes with the weights of now."""
        ...

    def readable(self, rollout: Rollout, prompts: Sequence[Prompt]) -> Rollout: ...


class HeldOut:
    """The held-out measurement of a trainer: which texts, and the student's metrics on them.

    ``student``: its own fresh samples at temperature 1. ``teacher``: the teacher's samples, drawn once. A teacher that
    only replays what was stored knows neither text: then ``dataset``, the held-out rows' own completions, and nothing
    where they have none or the store has not got them.
    """

    def __init__(self, trainer: Measurable) -> None:
        self.trainer = trainer
        self.tell: Callable[[str], None] = lambda doing: None  # of what takes a while, to whoever waits for it
        self._prompts: list[list[int]] = []  # of all ranks; what is remembered is about these
        self._teacher_text: Rollout | None = None
        self._lacking: str | None = None  # what keeps them from being measured

    def measure(self, prompts: Sequence[Prompt]) -> dict[str, Measurement]:
        """Name of the text -> the sequences of all ranks."""
        t = self.trainer
        self._about(prompts)
        world, rank = t.accelerator.num_processes, t.accelerator.process_index
        # Every rank makes the same number of forward passes (ZeRO-3 gathers parameters in them): the last ones repeat.
        per_rank = -(-len(prompts) // world)
        index = range(rank * per_rank, (rank + 1) * per_rank)
        local_prompts = [prompts[min(i, len(prompts) - 1)] for i in index]
        counted = [i < len(prompts) for i in index]
        measured = {}
        for name, rollout in self._texts(local_prompts).items():
            # Before train() there is no engine to gather what ZeRO-3 sharded while loading.
            sharded = list(t.model.parameters()) if t.model_wrapped is t.model else []
            teacher_rollout, has_context = self._in_context(rollout, local_prompts)
            whose = {"student": "the student's own", "teacher": "the teacher's"}.get(name, "the dataset's")
            self.tell(f"student and teacher side by side on {whose} {len(prompts)} texts")
            with t.accelerator.autocast(), gathered(sharded):
                measured[name] = measure(
                    t.forward_model(),
                    head_of(t.model),
                    t.teacher,
                    rollout,
                    vocab_size=t.vocab_size,
                    chunk_tokens=t.args.chunk_tokens,
                    batch_sequences=t.args.per_device_eval_batch_size,
                    kind=t.method.asked.kind,
                    top_k=t.method.top_k,
                    counted=[c and h for c, h in zip(counted, has_context, strict=True)],
                    teacher_rollout=teacher_rollout,
                    prompts=local_prompts,
                ).gathered(t.accelerator)
            check_alignment(t, {"teacher": t.teacher})  # type: ignore[arg-type]
            if t.method.asked.kind == "chunks" and name == "dataset":  # log T - log S of what others wrote
                measured[name] = measured[name].of_others()
        return measured

    def _texts(self, prompts: Sequence[Prompt]) -> dict[str, Rollout]:
        t = self.trainer
        if not is_live(t.teacher):
            return {} if self._reason(prompts) else {"dataset": completed(prompts, t.pad_id)}
        if t.method.asked.kind == "chunks" and t.method.uses == {"dataset"} and all(p.completion for p in prompts):
            return {"dataset": completed(prompts, t.pad_id)}
        if t.data_config.text_column:  # a document has no prompt that anybody could answer
            return {"dataset": completed(prompts, t.pad_id)}
        # At temperature 1, untruncated: the divergence is an expectation under the student itself.
        seed = request_seed(t.args.seed, -1, t.accelerator.process_index)
        sampling = Sampling(t.args.rollouts.max_new_tokens, seed=seed)
        self.tell(f"the student writes answers to {len(self._prompts)} held-out prompts")
        student_samples = t.readable(on_every_rank(lambda: t.samples_of_now(prompts, sampling)), prompts)
        if not writes(t.teacher):
            return {"student": student_samples}
        if self._teacher_text is None:
            self.tell("and so does the teacher")
            self._teacher_text = t.readable(on_every_rank(lambda: t.teacher.generate(prompts, sampling)), prompts)
        return {"student": student_samples, "teacher": self._teacher_text}

    def _in_context(self, rollout: Rollout, prompts: Sequence[Prompt]) -> tuple[Rollout | None, list[bool]]:
        """The sequences as the teacher is asked about them in training, and which of them it can be asked about."""
        context = self.trainer.method.asked.context
        if not any(context in p.contexts for p in prompts):
            return None, [True] * len(prompts)
        teacher_rollout, has_context = in_context(rollout, prompts, context, self.trainer.pad_id)
        return teacher_rollout, has_context.tolist()

    def lacking(self, prompts: Sequence[Prompt]) -> str:
        """Why a teacher that is not live cannot judge these rows, or nothing. Every rank has the same answer."""
        self._about(prompts)
        return self._reason(prompts)

    def _about(self, prompts: Sequence[Prompt]) -> None:
        """Forgets what is known of other prompts. Of all ranks': they must agree on what there is to do together."""
        if (ids := [p.ids for p in prompts]) != self._prompts:
            self._prompts, self._teacher_text, self._lacking = ids, None, None

    def _reason(self, prompts: Sequence[Prompt]) -> str:
        t = self.trainer
        if self._lacking is None:
            reason = "" if all(p.completion for p in prompts) else "they have no completions of their own"
            if not reason:
                try:
                    kind, top_k = question(t.teacher, t.method.asked.kind, t.method.top_k)
                    _answer(t.teacher, completed(prompts, t.pad_id), prompts, kind, top_k, "cpu")
                except UserError as error:
                    reason = str(error)
            reasons = gather_object([reason]) if t.accelerator.num_processes > 1 else [reason]
            self._lacking = next(filter(None, reasons), "")
        return self._lacking
