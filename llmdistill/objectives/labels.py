"""The tokens of the data as targets, alone or mixed with the teacher's distribution."""

from torch import Tensor

from llmdistill.objectives.divergences import forward_kl
from llmdistill.objectives.sampler import token_logprobs
from llmdistill.objectives.selection import entropy


def cross_entropy(student_logits: Tensor, token_ids: Tensor) -> Tensor:
    """-log S(y) -> [n] in float32, for logits [n, V] and tokens y = token_ids [n]: fine-tuning on the data."""
    return -token_logprobs(student_logits, token_ids)


def mixed_target(
    student_logits: Tensor, teacher_logits: Tensor, token_ids: Tensor, *, xi: float, temperature: float = 1.0
) -> Tensor:
    """(1 - xi) (-log S(y)) + xi CE(T, S) -> [n]: cross-entropy with the target (1 - xi) onehot(y) + xi T.

    Self-distillation with ground truth (METHODS 5.4). xi is not clamped: past 1 the loss moves away from the labels,
    which undoes the fit to noisy ones, and has no lower bound. CE(T, S) = KL(T || S) + H(T) and is not 0 at S = T.
    temperature divides both logits in CE(T, S), without its square; labels are learned at temperature 1.
    """
    imitation = forward_kl(student_logits, teacher_logits, temperature=temperature)
    imitation = imitation + entropy(teacher_logits, temperature=temperature)
    if xi == 1.0:  # 0 * inf is NaN where the student excludes the label
        return imitation
    return (1.0 - xi) * cross_entropy(student_logits, token_ids) + xi * imitation
