"""Which method: the five lines of README and docs/methods.md. Words by hand; the figures are read from the cells."""

from guide import Shown

DECISION: tuple[tuple[str, tuple[Shown, ...]], ...] = (
    (
        "**Long traces, mistakes that stay, a teacher that can repair them**: OPD with the reverse KL on the "
        "student's own text: {} points against the forward KL on the teacher's text, which leaves the student "
        "worse than it was.",
        (Shown("recovery", "opd", "fkl_teacher"),),
    ),
    (
        "**The same, and the student cannot be sampled**: text with mistakes and their repairs, whoever made "
        "them. Greedily SFT on it is as good (OPD {} points against it), sampled at temperature 1 it is not (OPD "
        "{}). Never the teacher's clean text alone: its loss falls while the student gets worse.",
        (Shown("recovery", "opd", "sft_mistakes"), Shown("recovery", "opd", "sft_mistakes", "exact_t1")),
    ),
    (
        "**Short answers with one right way**: SFT or forward KL on the teacher's traces, for as many new prompts "
        "as can be had ({} points against epochs on 200 labels). Being on-policy wins nothing there ({}).",
        (Shown("main", "sft_teacher", "sft_labels"), Shown("main", "opd", "fkl_teacher")),
    ),
    (
        "**A teacher that has never seen mistakes, or none**: not on-policy. OPD from such a teacher, and a fixed "
        "negative advantage without one, end at 0 % ({} and {} against OPD).",
        (Shown("recovery", "opd_blind", "opd"), Shown("recovery", "opsa", "opd")),
    ),
    (
        "**Many right ways, of which one will do**: returns (discount .9) in texts of known length; every student "
        "then takes the way it knows best ({} points against per-token OPD). In long free text they teach to end at "
        "once; with discount .5 they do not. Several teachers merge by OPD ({} against one for all). Wrong traces "
        "beside right ones: no penalty, or one on the first wrong token alone ({} against SFT on the right ones; on "
        "all of the wrong side {}). The guide has all else.",
        (
            Shown("ways", "returns", "opd"),
            Shown("experts", "opd", "opd_one"),
            Shown("recovery_negatives", "redi_first", "sft_right"),
            Shown("recovery_negatives", "redi_all", "sft_right"),
        ),
    ),
)
