"""The settings that front doors of token-level objectives share: divergence, estimator, data policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

from torch import Tensor

from llmdistill.composition.method import Method, Schedule
from llmdistill.composition.term import Ask, Mean, Support, Term
from llmdistill.objectives import divergences, policy, sparse
from llmdistill.objectives.clipped import clipped_samples, given_advantage, kl_advantage
from llmdistill.objectives.labels import cross_entropy, mixed_target
from llmdistill.recipe.config import DistillationConfig
from llmdistill.recipe.settings import PENALISED, Conflict, setting
from llmdistill.teachers.evidence import Kind
from llmdistill.texts import sources
from llmdistill.texts.sources import Only, Source

Divergence = Literal[
    "reverse_kl",
    "forward_kl",
    "jsd",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
    "adaptive_kl",
    "f_divergence",
]
SKEWED = ("skew_forward_kl", "skew_reverse_kl")
# The one parameter a divergence may have, and the setting that gives it.
PARAMETER = {
    "jsd": "beta",
    **dict.fromkeys(SKEWED, "alpha"),
    "adaptive_kl": "head_mass",
    "f_divergence": "name",
}


def _reader(*divergences: str) -> dict[str, tuple[str, ...]]:
    return {"divergence": divergences}


def _has_reward(settings: Any) -> bool:
    return bool(getattr(settings, "reward_weight", 0.0))


@dataclass
class TokenConfig(DistillationConfig):
    """Settings of a per-token divergence on sequences from anywhere, over ``DistillationConfig``."""

    divergence: Divergence = setting("reverse_kl", "what is minimised, per token")
    beta: float | None = setting(
        None,
        "jsd: weight of the teacher in the mixture (0: forward KL, 1: reverse KL)",
        at_least=0,
        at_most=1,
        read_by=_reader("jsd"),
    )
    alpha: float | None = setting(
        None,
        "skew_forward_kl, skew_reverse_kl: weight of the other side, default 0.1",
        at_least=0,
        at_most=1,
        read_by=_reader(*SKEWED),
    )
    head_mass: float | None = setting(
        None,
        "adaptive_kl: teacher mass of the head, default 0.5",
        at_least=0,
        at_most=1,
        read_by=_reader("adaptive_kl"),
    )
    name: str | None = setting(None, "f_divergence: which f", read_by=_reader("f_divergence"))
    estimator: Kind = setting("full", "full, top_k (with a tail bucket) or sampled")
    top_k: int = setting(64, "tokens listed by the top_k estimator", at_least=1, read_by={"estimator": ("top_k",)})
    support: Support = setting(
        "teacher",
        "whose likeliest tokens those are: teacher, student, or union (both lists)",
        read_by={"estimator": ("top_k",)},
    )
    loss_temperature: float = setting(1.0, "divides both logits in the loss; apart from rollouts.temperature", above=0)
    sequences: sources.Kind = setting("student", "text trained on: student, dataset, teacher, mixed or adaptive")
    student_fraction: float = setting(
        0.5,
        "mixed: share of steps on the student's own samples (GKD's lambda)",
        at_least=0,
        at_most=1,
        read_by={"sequences": ("mixed",)},
    )
    off_policy: sources.OffPolicy = setting(
        "dataset",
        "mixed, adaptive: the other text, dataset or teacher",
        read_by={"sequences": ("mixed", "adaptive")},
    )
    replay_size: int = setting(
        1000,
        "adaptive: student samples remembered by each process",
        at_least=1,
        read_by={"sequences": ("adaptive",)},
    )
    adaptive_eps: float = setting(
        0.1,
        "adaptive: rise of the validation loss that calls for more of them, nats",
        read_by={"sequences": ("adaptive",)},
    )
    importance_cap: float | None = setting(
        None,
        "weigh sampled tokens by min(student/sampler, cap); 0: no. Unset: 5 for estimator sampled and for a reward on "
        "stale text, else 0",
        at_least=0,
    )
    clip: float | None = setting(
        None,
        "sampled tokens, in place of importance_cap: PPO's loss, ratios to the sampler up to 1 + clip and down to "
        "1 - clip; 0: no. Unset: 0.2 where num_iterations is above 1, else 0",
        at_least=0,
        below=1,
    )
    dual_clip: float = setting(3.0, "clip: the loss of a token with advantage A < 0 is at most -A dual_clip", above=1)
    mean: Mean = setting(
        "token", "token: mean over all counted tokens; sequence: over sequences of their means; batch: of their sums"
    )
    ce_weight: float = setting(
        0.0, "weight of the cross-entropy on the rows' own completions beside the divergence", at_least=0
    )
    xi: float | None = setting(
        None,
        "one target (1 - xi) one-hot + xi teacher in place of divergence and ce_weight (dataset; may exceed 1)",
        at_least=0,
    )

    conflicts: ClassVar[tuple[Conflict, ...]] = (
        Conflict(
            lambda s: PARAMETER.get(s.divergence) in ("beta", "name") and getattr(s, PARAMETER[s.divergence]) is None,
            "objective.divergence {divergence} needs objective.beta for jsd, objective.name for f_divergence",
            "--beta 0.5, or --objective.name jensen_shannon",
        ),
        Conflict(
            lambda s: s.xi is not None and s.ce_weight,
            "objective.xi is {xi} and objective.ce_weight {ce_weight}; xi is one target for both",
            "leave ce_weight out",
        ),
        Conflict(
            lambda s: s.xi is not None and (s.estimator != "full" or s.sequences != "dataset"),
            "objective.xi mixes the dataset's tokens with whole distributions, and objective.estimator is {estimator}, "
            "objective.sequences {sequences}",
            "--estimator full --sequences dataset",
        ),
        Conflict(
            lambda s: s.estimator == "sampled" and s.divergence != "reverse_kl",
            "objective.estimator sampled estimates the reverse KL, objective.divergence is {divergence}",
            "--estimator full or top_k, or --method sampled_f for other divergences from sampled tokens",
        ),
        Conflict(
            lambda s: s.estimator == "sampled" and s.loss_temperature != 1,
            "objective.loss_temperature is {loss_temperature}; the teacher's log-probs of sampled tokens are those of "
            "temperature 1",
            "use 1, or --estimator full",
        ),
        Conflict(
            lambda s: s.estimator == "sampled" and s.sequences != "student",
            "objective.sequences is {sequences}, and objective.estimator sampled needs tokens that the student drew",
            "--estimator full or top_k",
        ),
        Conflict(
            lambda s: s.importance_cap and s.estimator != "sampled" and not getattr(s, "reward_weight", 0.0),
            "objective.importance_cap is {importance_cap}, and objective.estimator {estimator} weighs no sampled "
            "tokens",
            "leave it out, or --estimator sampled",
        ),
        Conflict(
            lambda s: s.clip and s.estimator != "sampled" and not _has_reward(s),
            "objective.clip is {clip}, and objective.estimator {estimator} weighs no sampled tokens",
            "leave it out, or --estimator sampled",
        ),
        Conflict(
            lambda s: s.dual_clip != 3 and not s.clipped,
            "objective.dual_clip is {dual_clip}, and nothing is clipped",
            "leave it out, or --clip 0.2",
        ),
        Conflict(
            lambda s: s.clip and s.importance_cap,
            "objective.clip is {clip} and objective.importance_cap {importance_cap}; both bound the same ratio",
            "leave one out",
        ),
        Conflict(
            lambda s: s.old_text and not (s.cap or s.clipped) and (s.estimator == "sampled" or _has_reward(s)),
            "objective.importance_cap is {cap}, with rollouts.staleness {rollouts.staleness} and "
            "objective.num_iterations {num_iterations}: tokens that older weights drew have no gradient of the "
            "student's own without their importance weights",
            "leave importance_cap out",
        ),
        Conflict(
            lambda s: s.rollouts.temperature == 0 and (s.estimator == "sampled" or s.cap),
            "rollouts.temperature is 0, and sampled tokens are weighed by the probability they were drawn with",
            "--rollouts.temperature 1, or estimator full without importance_cap",
        ),
        Conflict(
            lambda s: PENALISED.when(s) and (s.estimator == "sampled" or s.cap or getattr(s, "reward_weight", 0.0)),
            PENALISED.message,
            f"{PENALISED.fix}, or estimator full or top_k without reward_weight and importance_cap",
        ),
        Conflict(
            lambda s: s.estimator == "top_k" and s.loss_temperature != 1,
            "objective.loss_temperature is {loss_temperature}; top-k evidence of a full softmax cannot be tempered "
            "exactly",
            "use 1, or --estimator full",
        ),
        Conflict(
            lambda s: s.sequences == "adaptive" and s.eval_strategy == "no",
            "objective.sequences adaptive moves with the validation loss, and train.eval_strategy is no",
            "--eval_strategy steps --eval_steps N, with data.heldout",
        ),
    )

    @property
    def cap(self) -> float:
        """The cap of the importance weights that is in force; 0: none."""
        if self.importance_cap is None:
            return 5.0 if self.estimator == "sampled" or (self.old_text and _has_reward(self)) else 0.0
        return self.importance_cap

    @property
    def clipped(self) -> float:
        """The bound of PPO's ratio that is in force; 0: none."""
        sampled = self.estimator == "sampled" or _has_reward(self)
        default = 0.2 if sampled and self.num_iterations > 1 and self.importance_cap is None else 0.0
        return default if self.clip is None else self.clip

    @property
    def old_text(self) -> bool:
        """Text is trained on that older weights wrote."""
        return self.rollouts.staleness > 0 or self.num_iterations > 1

    @property
    def listed(self) -> int:
        """Tokens of evidence per position."""
        return self.top_k if self.estimator == "top_k" else 0

    def divergence_loss(self) -> Callable[..., Tensor]:
        """The per-token function of the estimator; sampled estimates the reverse KL only."""
        if self.estimator == "sampled":
            return partial(policy.sampled_token, **self.sampler)
        module = divergences if self.estimator == "full" else sparse
        parameter = PARAMETER.get(self.divergence)
        kwargs = {parameter: getattr(self, parameter)} if parameter and getattr(self, parameter) is not None else {}
        return partial(getattr(module, self.divergence), temperature=self.loss_temperature, **kwargs)

    def term(self, loss: Callable[..., Tensor], judges: Sequence[str] = ("teacher",), **term_options: Any) -> Term:
        """The term of the divergence: ``loss`` over what the judges say, weighed where its tokens were sampled."""
        sampled = self.estimator == "sampled"
        term = Term(
            "divergence",
            loss,
            tuple(Ask(judge, self.estimator) for judge in judges),
            top_k=self.listed,
            support=self.support,
            mean=self.mean,
            on_student=sampled,
            **term_options,
        )
        if not sampled:
            return term
        scale, tau = getattr(self, "reward_scale", 1.0), float(self.sampler["temperature"])
        return self.of_old_text(term, partial(kl_advantage, scale=scale, temperature=tau))

    def of_old_text(self, term: Term, advantage: Callable[..., Tensor]) -> Term:
        """The term on sampled tokens, with the ratio of the student of now to the policy that drew them."""
        if not self.clipped:
            return term.importance_weighted(self.cap, **self.sampler)
        loss = clipped_samples(advantage, clip=self.clipped, dual_clip=self.dual_clip, **self.sampler)
        return replace(term, loss=loss, reads=(*term.reads, "tokens", "behavior"))

    def composition(
        self, divergence: Term, source: Source | None = None, schedules: Mapping[str, Schedule] | None = None
    ) -> Method:
        """The divergence with what these settings put beside it, on the text that they name."""
        texts, terms = {"main": self.source(source)}, [divergence]
        if self.xi is not None:  # in place of the divergence, whose schedules would wait for its losses
            loss = partial(mixed_target, xi=self.xi, temperature=self.loss_temperature)
            term = Term("mixed_target", loss, (Ask("teacher"),), ("tokens",), mean=self.mean, vanishes=False)
            return Method((term,), texts)
        if self.ce_weight:
            text = "main" if texts["main"].uses == {"dataset"} else "labels"
            texts.setdefault(text, Only("dataset", optional=True))
            terms.append(
                Term("cross_entropy", cross_entropy, (), ("tokens",), text, weight=self.ce_weight, mean=self.mean)
            )
        return Method(tuple(terms), texts, schedules or {})

    def reward_term(self, weight: float) -> Term:
        """The task reward as policy gradient on the sampled tokens, weighed as they are."""
        loss = partial(policy.policy_gradient, **self.sampler)
        term = Term("reward", loss, (), ("tokens", "advantage"), weight=weight, on_student=True)
        return self.of_old_text(term, given_advantage)

    def source(self, source: Source | None = None) -> Source:
        """Where the text comes from: what the settings name, or a source of one's ``own`` instead.

        Raises:
            UserError: as :func:`~llmdistill.texts.sources.checked_source`.
        """
        if source is not None:
            of_student = "objective.estimator sampled" if self.estimator == "sampled" else ""
            return sources.checked_source(source, type(self).__name__, of_student)
        return sources.make_source(
            self.sequences,
            student_fraction=self.student_fraction,
            off_policy=self.off_policy,
            replay_size=self.replay_size,
            adaptive_eps=self.adaptive_eps,
        )
