"""Cells that only the task "recovery" has: halves of both texts, text with mistakes, controls, penalties."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from methods import Method, Setting, built, composed, dpo, exopd, of_same, opd, rows_of, sft, taid
from recovery_task import TOKENS
from transformers import Trainer

from llmdistill.redi import REDIConfig, REDITrainer

# Of methods whose best rate on seed 0 (run.py --lr, greedy and sampled added up) is more than 2 points above 1e-3; of
# penalties and what they are measured against, the best.
RATES: dict[str, float] = {
    "context": 0.0003,
    "context_given": 0.003,
    "dpo_traces": 0.0001,
    "entropy_aware": 0.0003,
    "fkl_mistakes": 0.01,
    "fkl_teacher": 0.003,
    "gkd": 0.003,
    "gkd_half": 0.003,
    "opd": 0.003,
    "opd_fkl": 0.003,
    "opd_sampled": 0.0003,
    "opsd": 0.003,
    "redi_after": 0.0003,
    "redi_all": 0.0003,
    "redi_first": 0.0003,
    "returns_fixed": 0.0003,
    "rkl_mistakes": 0.003,
    "sampled_f": 0.0003,
    "sdpo": 0.0003,
    "sdpo_fixed": 0.0003,
    "sft_labels": 0.003,
    "sft_mistakes": 0.0003,
    "sft_noised": 0.0003,
    "sft_right": 0.0003,
    "sft_teacher": 0.003,
    "taid": 0.003,
    "tip": 0.003,
}


def half(title: str, **objective: Any) -> Method:
    """GKD: each step on the student's text or on the teacher's, as often."""
    build = opd("fresh", "mixed", student_fraction=0.5, off_policy="dataset", **objective)
    return Method(f"GKD half, {title}", "fresh", "student", build)


def penalised(rejected_tokens: str) -> Callable[[Setting], Trainer]:
    """REDI, its penalty on a part of the rejected side."""

    def build(s: Setting) -> Trainer:
        args = REDIConfig(**s.ours(), rejected_tokens=rejected_tokens)
        return built(REDITrainer, s, s.model, args, train_dataset=rows_of(s, "pairs"))

    return build


def of_fixed_length(discount: float) -> Method:
    """Returns in texts none of which ends before its forty steps: there is no end to flee to from what comes later.

    The last place is the end's: without it no end is taught, and the best of traces goes on for ever.
    """
    build = composed("returns", rollouts={"ignore_eos": True, "max_new_tokens": TOKENS}, discount=discount)
    return Method(f"returns, γ = {discount:g}, fixed length", "fresh", "student", build)


def of_mistakes(title: str, build: Callable[[Setting], Trainer]) -> Method:
    return Method(f"{title} on truth with mistakes", "mistakes", "labels", build)


METHODS: dict[str, Method] = {
    "gkd_half": half("JSD", divergence="jsd", beta=0.5),
    "gkd_half_rkl": half("reverse KL"),
    "gkd_half_fkl": half("forward KL", divergence="forward_kl"),
    "fkl_mistakes": of_mistakes("forward KL", taid("mistakes", divergence="forward_kl")),
    "rkl_mistakes": of_mistakes("reverse KL", taid("mistakes", divergence="reverse_kl")),
    "sft_mistakes": of_mistakes("SFT", sft("mistakes")),
    "returns_fixed": of_fixed_length(0.9),
    "returns_half": of_fixed_length(0.5),
    "opd_blind": Method("OPD, teacher without mistakes", "fresh", "student", of_same(opd("fresh", "student"))),
    "exopd_2": exopd(2.0),
    "redi_all": Method("REDI, all of the rejected", "pairs", "verified", penalised("all")),
    "redi_after": Method("REDI, after the divergence", "pairs", "verified", penalised("after_divergence")),
    "redi_first": Method("REDI, first divergent token", "pairs", "verified", penalised("first_divergent")),
    "dpo_traces": Method("DPO on traces", "pairs", "verified", dpo(1.0, beta=0.1)),
}
