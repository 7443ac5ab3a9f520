"""What is measured on held-out rows: names, units, and which way is better."""

from __future__ import annotations

from dataclasses import dataclass

NATS, SHARE = "nats/token", "share of tokens"


@dataclass(frozen=True)
class Metric:
    name: str
    label: str
    unit: str
    better: int  # 1: higher, -1: lower, 0: neither
    meaning: str


METRICS = (
    Metric("reverse_kl", "Reverse KL", NATS, -1, "KL(student, teacher): punishes what the teacher would not say"),
    Metric("forward_kl", "Forward KL", NATS, -1, "KL(teacher, student): punishes what the student leaves out"),
    Metric("top1_agreement", "Top-1 agreement", SHARE, 1, "student and teacher have the same likeliest token"),
    Metric("acceptance", "Acceptance", SHARE, 1, "1 − total variation: drafts a speculative decoder would keep"),
    Metric("same_answer", "Same answer", "share of prompts", 1, "the first sentence has the teacher’s very words"),
    Metric(
        "near_answer", "Near answer", "share of prompts", 1, "it adds to the question nearly what the teacher’s adds"
    ),
    Metric("entropy", "Student entropy", NATS, 0, "how spread the student's distribution is"),
    Metric("margin", "Margin", "nats/token", 1, "chosen minus rejected, each the mean log-prob of its tokens"),
    Metric("accuracy", "Ranked right", "share of pairs", 1, "the chosen side is the likelier one per token"),
    Metric("chosen_logp", "Chosen", "nats/token", 1, "mean log-prob of the correct side"),
    Metric("rejected_logp", "Rejected", "nats/token", -1, "mean log-prob of the wrong side"),
    Metric("tail_mass", "Tail mass", "probability", 0, "the teacher's probability outside its listed top-k"),
)

OTHER_METRICS = frozenset({"nats", "masked_ce"})  # of masked diffusion, which the page shows by their names alone

# Whether more of a metric is better.
GREATER_IS_BETTER = {m.name: m.better > 0 for m in METRICS if m.better} | dict.fromkeys(
    (*OTHER_METRICS, "tail_mass"), False
)

# What an evaluation measures on: the first part of a metric's name, as in eval_student/reverse_kl.
HELDOUT_TEXTS = ("student", "teacher", "dataset", "redi", "bound", "t15", "t50", "t90")
