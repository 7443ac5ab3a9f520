"""Several teachers behind the one interface: each for its domains, or all of them as one mixture.

``RoutedTeacher``: every sequence is judged by the teacher of its domain (METHODS 2.4: one expert per domain).
``EnsembleTeacher``: every token is judged by the average of the teachers' distributions.

They nest: a route may lead to an ensemble. What a teacher elsewhere is asked, all such teachers are asked at once.

Teachers whose heads differ in width share a tokenizer all the same (see :mod:`~llmdistill.teachers.narrow`): each one's
distribution is that over the columns of the narrowest.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from queue import SimpleQueue
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llmdistill.errors import UserError
from llmdistill.objectives.rows import MixtureRows, RoutedRows
from llmdistill.teachers.base import DenseTeacher, Teacher, TeacherInfo, bytes_received, is_live, max_top_k
from llmdistill.teachers.listing import blocks_of, by_sequence, refuse_wider
from llmdistill.teachers.narrow import LogMass, cut, score_within
from llmdistill.texts import Prompt, Rollout, Sampling, request_seed
from llmdistill.wire.blocks import BlockHeader, ScoreBlock, Support
from llmdistill.wire.listing import merged, support_of

UNKNOWN_FIX = (
    "correct the domain (data.domain_column names its column), add it to a teacher's domains, or leave the domains of "
    "one teacher empty: it takes all others"
)
T = TypeVar("T")


class _Several:
    """What both have: members by name, one identity, one end."""

    members: dict[str, Teacher]
    _info: TeacherInfo
    # Set on an instance all of whose members are embedded: DenseTeacher is recognised by it.
    dense: Callable[[Rollout], Any]

    def info(self) -> TeacherInfo:
        return self._info

    @property
    def live(self) -> bool:
        """False when a member only replays what it has stored."""
        return all(is_live(teacher) for teacher in self.members.values())

    @property
    def scores_chosen(self) -> bool:
        return all(getattr(teacher, "scores_chosen", True) for teacher in self.members.values())

    @property
    def max_top_k(self) -> int:
        """As many as every member lists."""
        return min(self._info.vocab_size, *(max_top_k(teacher) for teacher in self.members.values()))

    @property
    def bytes_received(self) -> int | None:
        """Of all members elsewhere; None when every one is in this process."""
        counts = [bytes_received(teacher) for teacher in _distinct(self.members.values())]
        known = [count for count in counts if count is not None]
        return sum(known) if known else None

    def close(self) -> None:
        for teacher in _distinct(self.members.values()):
            teacher.close()

    def _all_dense(self) -> bool:
        return all(isinstance(teacher, DenseTeacher) for teacher in self.members.values())


class RoutedTeacher(_Several):
    """Each sequence goes to the teacher whose domains hold the sequence's; one teacher may take all other domains.

    Args:
        routes: name -> (teacher, its domains). No domains: the default, for every domain no other teacher has and for
            sequences without one.

    Raises:
        UserError: no teacher, two defaults, a domain of two teachers, or teachers whose tokenizers differ.
    """

    def __init__(self, routes: Mapping[str, tuple[Teacher, Sequence[str]]]) -> None:
        self.members = {name: teacher for name, (teacher, _) in routes.items()}
        self.domains: dict[str, str] = {}
        self.default: str | None = None
        for name, (_, domains) in routes.items():
            if not domains:
                if self.default is not None:
                    raise UserError(
                        f"teachers {self.default!r} and {name!r} have no domains; at most one can take all that is "
                        "left. Fix: give the other its domains."
                    )
                self.default = name
            for domain in domains:
                if self.domains.setdefault(domain, name) != name:
                    raise UserError(
                        f"domain {domain!r} belongs to teachers {self.domains[domain]!r} and {name!r}. Fix: take it "
                        "from one of them; to average them give both the same domains and a weight."
                    )
        infos = {name: teacher.info() for name, teacher in self.members.items()}
        routing = sorted((domains, infos[name].fingerprint) for name, domains in self._domains_of().items())
        self._info = _together(infos, " + ".join(infos), ("routed", routing))
        if self._all_dense():
            self.dense = self._dense

    def route(self, domain: str | None) -> str | None:
        """Name of the teacher for a domain, or None where there is none."""
        return self.default if domain is None else self.domains.get(domain, self.default)

    def score(self, rollout: Rollout, top_k: int, chosen: Tensor | None = None) -> list[ScoreBlock]:
        """One block per sequence, with the fingerprint of the teacher that scored it.

        Raises:
            UserError: a sequence of a domain nobody has, or whatever a member raises.
        """
        vocab = self._info.vocab_size
        refuse_wider(top_k, vocab)
        parts = self._split(_domains(rollout), "sequence")
        chosen_of = None if chosen is None else chosen.split(rollout.row_counts)

        def ask(name: str, index: list[int]) -> list[ScoreBlock]:
            mine = None if chosen_of is None else torch.cat([chosen_of[i] for i in index])
            return score_within(self.members[name], vocab, _whole_columns(rollout, index), top_k, mine)[0]

        found: dict[int, ScoreBlock] = {}
        for index, blocks in zip(parts.values(), self._ask(parts, ask), strict=True):
            found.update(zip(index, blocks, strict=True))
        return [found[i] for i in range(len(rollout))]

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Rollout:
        """Every prompt is completed by the teacher of its domain.

        Raises:
            UserError: a prompt of a domain nobody has.
        """
        parts = self._split([p.domain for p in prompts], "row", [p.row for p in prompts])
        rollouts = self._ask(parts, lambda name, at: self.members[name].generate([prompts[i] for i in at], sampling))
        n = sampling.samples_per_prompt
        places = [[i * n + j for i in index for j in range(n)] for index in parts.values()]
        return _joined(list(zip(places, rollouts, strict=True)))

    def _dense(self, rollout: Rollout) -> RoutedRows:
        """Rows that know whose they are: every teacher keeps its own head."""
        parts = self._split(_domains(rollout), "sequence") or {next(iter(self.members)): []}
        rows = torch.arange(rollout.num_rows).split(rollout.row_counts)
        none = torch.zeros(0, dtype=torch.int64)
        answers = self._ask(parts, lambda name, at: self.members[name].dense(rollout.sequences(at)))  # type: ignore[attr-defined]
        return RoutedRows(tuple(answers), tuple(torch.cat([none, *(rows[i] for i in at)]) for at in parts.values()))

    def _ask(self, parts: Mapping[str, list[int]], question: Callable[[str, list[int]], T]) -> list[T]:
        jobs = [(self.members[name], lambda name=name, at=at: question(name, at)) for name, at in parts.items()]
        return _ask_all(jobs)

    def _split(
        self, domains: Sequence[str | None], what: str, numbers: Sequence[int] | None = None
    ) -> dict[str, list[int]]:
        """Name -> ascending indices of what it is asked about."""
        parts: dict[str, list[int]] = {}
        for i, domain in enumerate(domains):
            if (name := self.route(domain)) is None:
                where = f"{what} {i if numbers is None else numbers[i]}"
                raise UserError(f"{where} {self.unknown(domain)}. Fix: {UNKNOWN_FIX}.")
            parts.setdefault(name, []).append(i)
        return parts

    def unknown(self, domain: str | None) -> str:
        """The end of a sentence that begins with what has such a domain."""
        has = "has no domain" if domain is None else f"has domain {domain!r}"
        known = "; ".join(f"{name!r} has {', '.join(domains)}" for name, domains in self._domains_of().items())
        return f"{has}, and no teacher takes it ({known})"

    def _domains_of(self) -> dict[str, list[str]]:
        return {name: sorted(d for d, owner in self.domains.items() if owner == name) for name in self.members}


class EnsembleTeacher(_Several):
    """The arithmetic mixture of the teachers' distributions at every position: p = sum_i w_i p_i.

    Args:
        members: (teacher, weight > 0); the weights are divided by their sum.
        names: of the members, for messages; by default what they call themselves.

    Raises:
        UserError: fewer than one member, a weight that is not positive, or teachers whose tokenizers differ.
    """

    def __init__(self, members: Sequence[tuple[Teacher, float]], names: Sequence[str] | None = None) -> None:
        labels = list(names or [teacher.info().name for teacher, _ in members])
        if len(set(labels)) < len(labels):
            labels = [f"{label} ({i})" for i, label in enumerate(labels)]
        self.members = dict(zip(labels, (teacher for teacher, _ in members), strict=True))
        for label, (_, weight) in zip(labels, members, strict=True):
            if not (weight > 0 and math.isfinite(weight)):
                raise UserError(f"the weight of teacher {label!r} is {weight}; in an ensemble it must be > 0")
        total = sum(weight for _, weight in members)
        self.weights = tuple(weight / total for _, weight in members)
        infos = {label: teacher.info() for label, teacher in self.members.items()}
        parts = sorted((infos[label].fingerprint, w) for label, w in zip(labels, self.weights, strict=True))
        title = " + ".join(f"{w:.3g} {label}" for label, w in zip(labels, self.weights, strict=True))
        self._info = _together(infos, title, ("ensemble", parts))
        if self._all_dense():
            self.dense = self._dense

    @property
    def max_top_k(self) -> int:
        """As many as every member lists, of its own and of all others' ids; 0 where one cannot be asked about those."""
        others, vocab = len(self.members) - 1, self._info.vocab_size
        if hasattr(self, "dense") or not others:
            return super().max_top_k
        limits = [min(max_top_k(teacher), vocab) for teacher in self.members.values()]
        if min(limits) == vocab:  # then nothing is asked about twice
            return vocab
        return min(limit if limit == vocab else limit // others for limit in limits) if self.scores_chosen else 0

    def score(self, rollout: Rollout, top_k: int, chosen: Tensor | None = None) -> list[ScoreBlock]:
        """One block per sequence; every listed log-prob, and every token's own, is the mixture's exactly.

        With embedded members the list is the mixture's own top-k (support "teacher"). Otherwise it is the likeliest
        ``top_k`` of the union of the members' lists, all of which every member is asked about (support "union"). A
        token outside the union is in no member's list, so its probability is at most sum_i w_i k_i, and so at most
        max_i k_i, where k_i is the probability of the last token member i lists. Hence the list is the mixture's own
        top-k wherever its last probability is at least that bound.

        Raises:
            UserError: a member cannot score ids it did not choose, or whatever else a member raises.
        """
        info = self._info
        refuse_wider(top_k, info.vocab_size)
        if hasattr(self, "dense"):
            return blocks_of(self._dense(rollout), rollout, top_k, chosen, info)
        token_lp, ids, lps = self._list_union(rollout, top_k, chosen)
        support: Support = "union" if top_k else support_of(top_k, chosen)
        header = BlockHeader(info.fingerprint, info.tokenizer, ids.shape[1], info.vocab_size, support=support)
        return by_sequence(rollout, token_lp, ids, lps, header)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Rollout:
        """Whole sequences: each is drawn from member i with probability w_i, so they are samples of sum_i w_i p_i(y),
        the mixture of the members' *sequence* distributions. At temperature 0 each is its member's greedy answer.

        (A text sampled token by token from the mixture that :meth:`score` speaks of would need all members at every
        token; its distribution is another one.) The choice depends on the seed, the prompt's index and the sample's.
        """
        n = sampling.samples_per_prompt
        # Sample -1 - j: no token is ever drawn with that number, so the choice is independent of what is then drawn.
        streams = [
            torch.Generator().manual_seed(request_seed(sampling.seed, i, -1 - j))
            for i in range(len(prompts))
            for j in range(n)
        ]
        edges = torch.tensor(self.weights, dtype=torch.float64).cumsum(0)
        drawn = [float(torch.rand((), generator=g, dtype=torch.float64)) for g in streams]
        owners = [min(int(torch.searchsorted(edges, u, right=True)), len(edges) - 1) for u in drawn]
        jobs, places = [], []
        for m, teacher in enumerate(self.members.values()):
            at = [i for i, owner in enumerate(owners) if owner == m]
            if not at:
                continue
            # A seed of its own: two members would else draw both their first samples with the same numbers.
            own = replace(sampling, samples_per_prompt=1, seed=request_seed(sampling.seed, -1, m))
            jobs.append((teacher, lambda t=teacher, at=at, own=own: t.generate([prompts[i // n] for i in at], own)))
            places.append(at)
        return _joined(list(zip(places, _ask_all(jobs), strict=True)))

    def _dense(self, rollout: Rollout) -> MixtureRows:
        jobs = [(t, lambda t=t: t.dense(rollout)) for t in self.members.values()]
        return MixtureRows(tuple(_ask_all(jobs)), self.weights)

    def _list_union(self, rollout: Rollout, top_k: int, chosen: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The same from what members elsewhere can say: their lists, then the union's ids where one lacks some."""
        names, teachers, vocab = list(self.members), list(self.members.values()), self._info.vocab_size
        answers, log_mass = zip(
            *_ask_all([(t, lambda t=t: score_within(t, vocab, rollout, top_k, chosen)) for t in teachers]),  # type: ignore[misc]
            strict=True,
        )
        token_lp = self._mixed([torch.cat([b.token_logprobs for b in blocks]) for blocks in answers])
        lists = [_by_id(blocks) for blocks in answers]
        union = _union([ids for ids, _ in lists])
        rests = {m: _without(union, ids) for m, (ids, _) in enumerate(lists) if not torch.equal(ids, union)}
        asked = [m for m, rest in rests.items() if bool((rest >= 0).any())]  # the others lack nothing but padding
        again = _ask_all(
            [(teachers[m], lambda m=m: self._ask_chosen(names[m], rollout, rests[m], log_mass[m])) for m in asked]  # type: ignore[misc]
        )
        more = {m: _by_id(blocks) for m, blocks in zip(asked, again, strict=True)}
        for m in rests:
            lists[m] = _completed(lists[m], more.get(m), union, names[m])
        mixed = self._mixed([lp for _, lp in lists]).masked_fill(union < 0, -torch.inf)
        if chosen is None and not top_k:
            return token_lp, union.int(), mixed
        best_lp, best = mixed.topk(min(top_k, mixed.shape[1]), dim=1)
        best_ids = union.gather(1, best)
        if chosen is None:
            return token_lp, best_ids.int(), best_lp
        at = torch.searchsorted(union, chosen.long().cpu()).clamp(max=union.shape[1] - 1)
        ids, lps = merged(best_ids, best_lp, chosen.cpu(), mixed.gather(1, at), vocab)
        return token_lp, ids, lps

    def _ask_chosen(self, name: str, rollout: Rollout, ids: Tensor, log_mass: LogMass | None) -> list[ScoreBlock]:
        teacher, vocab = self.members[name], self._info.vocab_size
        try:
            if log_mass is None:
                return score_within(teacher, vocab, rollout, 0, ids)[0]
            return cut(teacher.score(rollout, 0, ids), vocab, log_mass)
        except UserError as error:
            raise UserError(
                f"an ensemble asks every teacher about the others' likely tokens, and {name!r} refuses: {error}"
                + ("" if "engine hf" in str(error) else " Or: teacher.engine hf.")
            ) from error

    def _mixed(self, logprobs: Sequence[Tensor]) -> Tensor:
        weighted = [lp.float() + math.log(w) for lp, w in zip(logprobs, self.weights, strict=True)]
        return torch.stack(weighted).logsumexp(0)


def leaves(teacher: Teacher, name: str = "") -> list[tuple[str, Teacher]]:
    """(name, teacher) of every teacher that is no composition, in order; of one that is none: itself."""
    members: Mapping[str, Teacher] | None = getattr(teacher, "members", None)
    if members is None:
        return [(name or teacher.info().name, teacher)]
    return [leaf for key, member in members.items() for leaf in leaves(member, key)]


def _together(infos: Mapping[str, TeacherInfo], name: str, identity: object) -> TeacherInfo:
    """What several teachers are as one. Ids must mean the same to all; limits are the tightest, columns the fewest."""
    if not infos:
        raise UserError("there is no teacher. Fix: give at least one.")
    (first, head), *others = infos.items()
    for other, info in others:
        if info.tokenizer != head.tokenizer:
            raise UserError(
                f"teachers {first!r} and {other!r} have different tokenizers ({head.tokenizer} and {info.tokenizer}); "
                "an id would not mean the same to both. Fix: teachers of one model family."
            )
    templates = {info.template for info in infos.values()}
    return TeacherInfo(
        name=name,
        fingerprint=hashlib.blake2b(repr(identity).encode(), digest_size=8).hexdigest(),
        tokenizer=head.tokenizer,
        vocab_size=min(info.vocab_size for info in infos.values()),
        eos_ids=tuple(sorted({i for info in infos.values() for i in info.eos_ids})),
        context_length=min(info.context_length for info in infos.values()),
        template=templates.pop() if len(templates) == 1 else None,
    )


def _ask_all(jobs: Sequence[tuple[Teacher, Callable[[], T]]]) -> list[T]:
    """Every job's result. Those of teachers elsewhere run at once, in threads; the others here, one after the other.

    The models in this process share its cores or its GPU: several at a time would only need more memory.
    """
    apart = [i for i, (teacher, _) in enumerate(jobs) if is_elsewhere(teacher)]
    if not apart or len(jobs) == 1:
        return [job() for _, job in jobs]
    answers: SimpleQueue[tuple[int, Any, BaseException | None]] = SimpleQueue()

    def ask(i: int) -> None:
        try:
            answers.put((i, jobs[i][1](), None))
        except BaseException as error:  # raised again by the asking thread
            answers.put((i, None, error))

    for i in apart:  # daemons, not a pool: an interrupted process does not wait for answers on their way
        threading.Thread(target=ask, args=(i,), name="teacher", daemon=True).start()
    found: dict[int, T] = {i: job() for i, (_, job) in enumerate(jobs) if i not in apart}
    for _ in apart:
        i, answer, error = answers.get()  # as they come: one that failed is not kept waiting by one that retries
        if error is not None:
            raise error
        found[i] = answer
    return [found[i] for i in range(len(jobs))]


def is_elsewhere(teacher: Teacher) -> bool:
    """No part of it is in this process."""
    return all(bytes_received(leaf) is not None for _, leaf in leaves(teacher, "-"))


def _distinct(teachers: Iterable[Teacher]) -> list[Teacher]:
    """Two entries of a recipe may share one loaded model."""
    return list({id(teacher): teacher for teacher in teachers}.values())


def _domains(rollout: Rollout) -> Sequence[str | None]:
    return rollout.domain if rollout.domain is not None else (None,) * len(rollout)


def _whole_columns(rollout: Rollout, index: Sequence[int]) -> Rollout:
    """The sequences of ``index`` at the columns they have: a block's positions then need no shifting."""
    index, lp = list(index), rollout.behavior_logprobs
    return replace(
        rollout,
        input_ids=rollout.input_ids[index],
        attention_mask=rollout.attention_mask[index],
        completion_mask=rollout.completion_mask[index],
        behavior_logprobs=None if lp is None else lp[index],
        finish=tuple(rollout.finish[i] for i in index) if rollout.finish else (),
        domain=None if rollout.domain is None else tuple(rollout.domain[i] for i in index),
    )


def _joined(parts: Sequence[tuple[Sequence[int], Rollout]]) -> Rollout:
    """One rollout with every part's sequences at their places."""
    count, width = sum(len(at) for at, _ in parts), max(r.input_ids.shape[1] for _, r in parts)

    def whole(of: Callable[[Rollout], Tensor]) -> Tensor:
        result = of(parts[0][1]).new_zeros((count, width))  # what fills the padding is never read
        for at, rollout in parts:
            values = of(rollout)
            result[list(at)] = F.pad(values, (0, width - values.shape[1])).to(result)
        return result

    def listed_(of: Callable[[Rollout], Sequence[Any] | None]) -> list[Any] | None:
        if not all(of(rollout) for _, rollout in parts):
            return None
        values = {i: v for at, rollout in parts for i, v in zip(at, of(rollout) or (), strict=True)}
        return [values[i] for i in range(count)]

    drawn = all(rollout.behavior_logprobs is not None for _, rollout in parts)
    domains = listed_(lambda r: r.domain)
    return Rollout(
        whole(lambda r: r.input_ids),
        whole(lambda r: r.attention_mask),
        whole(lambda r: r.completion_mask),
        whole(lambda r: r.behavior_logprobs) if drawn else None,  # type: ignore[arg-type,return-value]
        finish=tuple(listed_(lambda r: r.finish) or ()),
        domain=None if domains is None else tuple(domains),
    )


def _by_id(blocks: Sequence[ScoreBlock]) -> tuple[Tensor, Tensor]:
    """Ids [N, K] int64 and log-probs [N, K] of all rows, ids ascending, padding (-1) first."""
    ids, order = torch.cat([b.topk_ids for b in blocks]).long().sort(dim=1)
    return ids, torch.cat([b.topk_logprobs for b in blocks]).float().gather(1, order)


def _union(lists: Sequence[Tensor]) -> Tensor:
    """Per row every id of any list once, [N, U], ascending, padding (-1) first."""
    ids = torch.cat(list(lists), 1).sort(dim=1).values
    again = torch.zeros_like(ids, dtype=torch.bool)
    again[:, 1:] = ids[:, 1:] == ids[:, :-1]
    return _narrow(ids.masked_fill(again, -1))


def _without(union: Tensor, ids: Tensor) -> Tensor:
    """Per row the ids of ``union`` that ``ids`` has not got; both ascending, as is the result."""
    if not ids.shape[1]:
        return union
    ids = ids.contiguous()
    at = torch.searchsorted(ids, union).clamp(max=ids.shape[1] - 1)
    return _narrow(union.masked_fill(ids.gather(1, at) == union, -1))


def _narrow(ids: Tensor) -> Tensor:
    """Sorted, without columns that are padding in every row; one column is kept."""
    ids = ids.sort(dim=1).values
    empty = int((ids < 0).sum(1).min()) if len(ids) else 0
    return ids[:, max(0, min(empty, ids.shape[1] - 1)) :].contiguous()


def _completed(
    known: tuple[Tensor, Tensor], more: tuple[Tensor, Tensor] | None, union: Tensor, name: str
) -> tuple[Tensor, Tensor]:
    """Ids and log-probs of all of ``union``: those a teacher listed itself, and those it was then asked for."""
    ids, lps = known
    if more is not None:
        ids, order = torch.cat([ids, more[0]], 1).sort(dim=1)
        lps = torch.cat([lps, more[1]], 1).gather(1, order)
    columns_ = slice(ids.shape[1] - union.shape[1], None)  # what comes before is padding
    if not torch.equal(ids[:, columns_], union):
        raise UserError(
            f"teacher {name!r} did not list the ids it was asked for; an ensemble needs them. Fix: teacher.engine hf, "
            "or a service that scores chosen ids."
        )
    return ids[:, columns_], lps[:, columns_]
