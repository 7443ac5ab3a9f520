"""What the papers say of one method against another, and what the arena measured: differences within a seed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Claim:
    """``better`` is said to end above ``worse`` on the track."""

    track: str
    better: str
    worse: str
    said: str
    equal: bool = False  # said to end level instead
    metric: str = "exact"


CLAIMS = (
    Claim("main", "fkl_teacher", "fkl_labels", "new prompts without labels are worth more than epochs over the labels"),
    Claim("main", "opd", "opd_labelled", "the same, on-policy"),
    Claim("main", "opd", "sft_labels", "on-policy distillation beats SFT on scarce labels"),
    Claim("main", "opd", "fkl_teacher", "on-policy beats distillation on the teacher's text (GKD, 2306.13649)"),
    Claim("main", "opd", "rkl_teacher", "the same, one objective: reverse KL on the student's text, on the teacher's"),
    Claim("main", "opd_fkl", "fkl_teacher", "the same, one objective: forward KL"),
    Claim("main", "fkl_teacher", "sft_teacher", "the teacher's distribution says more than its text"),
    Claim("main", "opd", "opd_sampled", "the whole vocabulary beats the sampled token"),
    Claim("main", "gkd", "opd", "JSD beats reverse KL on-policy (GKD: depends on the task)"),
    Claim("main", "skew_teacher", "fkl_teacher", "skew KL beats forward KL (DistiLLM, 2402.03898)"),
    Claim("main", "taid", "fkl_teacher", "TAID beats forward KL (2501.16937)"),
    Claim("main", "tip", "opd", "half of the tokens, picked, are as good as all (TIP, 2604.14084)", equal=True),
    Claim("main", "vopd", "opd_sampled", "a baseline helps the sampled token (vOPD, 2605.07865)"),
    Claim("main", "distillm2", "fkl_teacher", "two texts beat the teacher's alone (DistiLLM-2, 2503.07067)"),
    Claim("capacity", "taid", "fkl_teacher", "the same where the student is small, which is TAID's claim"),
    Claim("main", "akl_teacher", "fkl_teacher", "adaptive KL beats forward KL (2404.02657)"),
    Claim("main", "tv_teacher", "fkl_teacher", "total variation beats forward KL (2307.15190)"),
    Claim("main", "adaptive", "skew_teacher", "the student's text where it is needed beats none (DistiLLM's schedule)"),
    Claim("main", "exopd_1.25", "opd", "ExOPD: λ = 1.25 beats 1 (2602.12125)"),
    Claim("main", "exopd_1.5", "opd", "ExOPD: λ = 1.5 beats 1"),
    Claim("main", "opd", "exopd_0.5", "λ = 1 beats 0.5"),
    Claim("experts", "opd", "opd_one", "two experts by domain beat one for all"),
    Claim("experts", "exopd_1.25", "opd", "ExOPD merges experts better than λ = 1 (2602.12125)"),
    Claim("negatives", "redi", "sft_right", "wrong samples add to right ones (REDI, 2505.24850)"),
    Claim("negatives", "redi", "symmetric", "α = 0.8 beats 1 (REDI)"),
    Claim("negatives", "redi", "simpo", "REDI beats SimPO"),
    Claim("negatives", "redi", "dpo", "REDI beats DPO"),
    Claim("recovery", "opd", "fkl_teacher", "on-policy beats text of a teacher who repairs mistakes"),
    Claim("recovery", "opd", "rkl_teacher", "the same, one objective: reverse KL"),
    Claim("recovery", "opd_fkl", "fkl_teacher", "the same, one objective: forward KL"),
    Claim("recovery", "opd", "opd_fkl", "on-policy the reverse KL beats the forward KL"),
    Claim("recovery", "opd", "gkd_half", "all of the text on-policy beats half (GKD)"),
    Claim("recovery", "fkl_mistakes", "fkl_teacher", "seeing mistakes and their repairs, whoever made them"),
    Claim("recovery", "opd", "fkl_mistakes", "seeing one's own mistakes beats seeing others'"),
    Claim("recovery", "opd", "rkl_mistakes", "the same, one objective: reverse KL"),
    Claim(
        "recovery", "opd", "fkl_mistakes", "seeing one's own mistakes beats seeing others', sampled", metric="exact_t1"
    ),
    Claim("recovery", "opd", "sft_mistakes", "the same, SFT on others', sampled", metric="exact_t1"),
    Claim("recovery", "opd", "sft_mistakes", "the same, SFT on others', greedily"),
    Claim("recovery", "opd", "opd_fkl", "on-policy the reverse KL beats the forward KL, sampled", metric="exact_t1"),
    Claim("recovery", "opd", "opd_blind", "the teacher must know how to repair"),
    Claim("recovery", "opd", "opsa", "the teacher matters: a fixed negative advantage does not do it (2608.31046)"),
    Claim("recovery", "opd", "opd_sampled", "the whole vocabulary beats the sampled token"),
    Claim("recovery", "vopd", "opd_sampled", "a baseline helps the sampled token (vOPD, 2605.07865)"),
    Claim("recovery", "tip", "opd", "half of the tokens, picked, are as good as all (TIP, 2604.14084)", equal=True),
    Claim("recovery", "distillm2", "fkl_teacher", "two texts beat the teacher's alone (DistiLLM-2, 2503.07067)"),
    Claim("recovery", "opd", "returns", "per token beats returns"),
    Claim("recovery", "returns_half", "returns_fixed", "the less the KL behind a token weighs, the less it costs"),
    Claim("recovery_long", "opd", "fkl_teacher", "on-policy beats the teacher's text, at 900k tokens"),
    Claim("recovery_long", "opd", "fkl_mistakes", "the same against truth with mistakes"),
    Claim("recovery_six", "opd", "fkl_teacher", "on-policy beats the teacher's text where the guess can be learned"),
    Claim("recovery_six", "opd", "fkl_mistakes", "the same against truth with mistakes"),
    Claim("recovery_six", "opd", "fkl_mistakes", "the same, sampled", metric="exact_t1"),
    Claim("recovery_negatives", "redi_all", "sft_right", "REDI adds to right traces, with long right prefixes"),
    Claim("recovery_negatives", "redi_first", "redi_all", "the nearer to the error the penalty, the less it harms"),
    Claim("ways", "returns", "opd", "per-token reverse KL does not seek the mode across tokens; returns do"),
    Claim("ways", "returns", "opd", "the same: the share that takes the way it knows best", metric="best_way"),
    Claim("ways", "opd", "fkl_teacher", "on-policy beats the teacher's text, where it takes all ways"),
    *(
        Claim(
            "direction", name, "opd", f"ExOPD goes on along what rewards found: λ = {scale}, sampled", metric="exact_t1"
        )
        for name, scale in (("exopd_1.25", "1.25"), ("exopd_1.5", "1.5"), ("exopd_2", "2"))
    ),
    Claim(
        "direction", "opd", "rkl_teacher", "on-policy reaches a reinforced teacher sooner, sampled", metric="exact_t1"
    ),
    Claim("direction", "opd_reward", "opd_sampled", "a verified reward takes it further, sampled", metric="exact_t1"),
    *(
        claim
        for track in ("digits", "groups")
        for claim in (
            Claim(track, "alm", "uld", "another tokenizer: chunks of the same bytes beat places in the text (ULD)"),
            Claim(track, "alm", "sft_teacher", "another tokenizer: the teacher's word on its text adds to the text"),
            Claim(track, "alm", "same_kl", "and is worth as much as that of one with the student's tokens", equal=True),
            Claim(track, "h_kl", "alm", "classes beside chunks add to chunks (H-KL)"),
            Claim(track, "simct", "same_opd", "on-policy it is worth as much as OPD with the student's", equal=True),
            Claim(track, "simct", "opd_classes", "the chunk among its classes beats classes with chunks beside"),
            Claim(track, "simct", "chunk_opd", "and the credit of sampled chunks"),
        )
    ),
    Claim("told", "opsd", "sft_labels", "judging oneself by the solution beats copying it (OPSD)"),
    Claim("told", "opsd", "sft_labels", "the same, sampled", metric="exact_t1"),
    Claim("told", "context", "context_given", "context distillation: one's own text beats the solution's"),
    Claim("told", "sdpo", "opsa", "successes among one's own samples teach (SDPO)"),
    Claim("main", "opd", "trl", "our OPD and the peer's end at the same score", equal=True),
)


def claims_table(
    difference: Callable[[Claim, str], Any], title: Callable[[str], str], track: Callable[[str], str]
) -> list[list[str]]:
    """A row per claim that both methods have seeds for: who, tokens, time, what came out (read at equal tokens).

    ``difference(claim, axis)`` is a mean over seeds with its interval, or None.
    """
    rows = []
    for claim in CLAIMS:
        tokens, seconds = difference(claim, "tokens"), difference(claim, "cpu_seconds")
        if tokens is None or seconds is None:
            continue
        who = f"{title(claim.better)} − {title(claim.worse)}"
        rows.append([claim.said, f"{track(claim.track)}: {who}", *(d.percent(sign=True) for d in (tokens, seconds))])
        rows[-1].append(verdict(tokens.value, tokens.half, claim.equal))
    return rows


def verdict(value: float, half: float, equal: bool = False) -> str:
    """Whether the interval leaves zero out, and on which side."""
    if math.isnan(half) or abs(value) <= half:
        return "not told apart"
    if equal:
        return "**no**"
    return "yes" if value > 0 else "**the other way round**"
