"""What a student is scored on along its run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from models import EOS_ID, PAD_ID, accuracy, answers, as_prompt
from task import Problem, heldout, longest
from transformers import PreTrainedModel

from llmdistill.models.generation import generate
from llmdistill.models.heads import head_of
from llmdistill.teachers.base import Teacher
from llmdistill.texts import Prompt, Rollout, Sampling
from llmdistill.training.measure import Measurement, measure


@dataclass
class Exact:
    """Exact match, greedy, on problems nobody trained on; of each operation apart where there are two."""

    problems: Sequence[Problem]

    def __call__(self, model: PreTrainedModel) -> dict[str, float]:
        solved = [p.solved_by(t) for p, t in zip(self.problems, answers(model, self.problems), strict=True)]
        found = {"exact": sum(solved) / len(solved)}
        operations = sorted({p.operation for p in self.problems})
        for operation in operations if len(operations) > 1 else ():
            of_it = [s for s, p in zip(solved, self.problems, strict=True) if p.operation == operation]
            found[f"exact{operation}"] = sum(of_it) / len(of_it)
        return found


@dataclass
class Sampled:
    """The same of samples at temperature 0.6, as REDI's paper scores; and at 1, the student's whole distribution."""

    problems: Sequence[Problem]

    def __call__(self, model: PreTrainedModel) -> dict[str, float]:
        return {f"exact_t{t:g}": accuracy(model, self.problems, temperature=t, seed=14) for t in (0.6, 1.0)}


def distance(student: PreTrainedModel, other: Teacher, text: Rollout) -> Measurement:
    """KL of every sequence of ``text``, both directions, summed over its tokens."""
    columns = student.config.vocab_size
    return measure(
        student, head_of(student), other, text, vocab_size=columns, chunk_tokens=4096, batch_sequences=len(text)
    )


def per_sequence(measured: Measurement, metric: str) -> float:
    """Mean over sequences of the sum over tokens: the sequence-level KL when the text is drawn from its first side."""
    return sum(measured.sums[metric]) / len(measured.tokens)


@dataclass
class ToTeacher:
    """Nats a token from the teacher on held-out problems: forward KL on its text, reverse KL on the student's."""

    teacher: Teacher
    problems: Sequence[Problem]

    def __post_init__(self) -> None:
        self.prompts = [as_prompt(p) for p in self.problems]
        self.text = self.teacher.generate(self.prompts, Sampling(longest(), seed=11))

    def __call__(self, model: PreTrainedModel) -> dict[str, float]:
        own = generate(model, self.prompts, Sampling(longest(), seed=12), eos_ids=(EOS_ID,), pad_id=PAD_ID)
        return {
            "forward_kl": distance(model, self.teacher, self.text).mean("forward_kl"),
            "reverse_kl": distance(model, self.teacher, own).mean("reverse_kl"),
        }


@dataclass
class Hacking:
    """Sequence-level distances to the teacher (proxy) and to the oracle (golden), nats a sequence (2502.02671).

    ``proxy_train`` is measured on the teacher's text for the prompts that the offline student is trained on, the other
    two on held-out prompts: forward KL on text of the one that is compared with.
    """

    teacher: Teacher
    oracle: Teacher
    trained_on: Sequence[Prompt]
    samples: int = 192

    def __post_init__(self) -> None:
        test = [as_prompt(p) for p in heldout(self.samples)]
        sampling = Sampling(longest(), seed=13)
        self.texts = {
            "proxy_train": (self.teacher, self.teacher.generate(self.trained_on[: self.samples], sampling)),
            "proxy": (self.teacher, self.teacher.generate(test, sampling)),
            "golden": (self.oracle, self.oracle.generate(test, sampling)),
        }

    def __call__(self, model: PreTrainedModel) -> dict[str, float]:
        return {
            name: per_sequence(distance(model, other, text), "forward_kl") for name, (other, text) in self.texts.items()
        }
