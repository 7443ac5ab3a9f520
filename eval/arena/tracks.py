"""The tracks: which students, teachers, labels and budgets, and which methods meet there.

The numbers are the regime, and the regime decides what a table can say; how they were chosen is in RESULTS.md.
A cell is a track, a method and a seed. The seed decides the start's weights, the labelled problems, the order of the
data and the sampling; the teachers and the fresh problems are the same for all.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import direction
import recovery_models
import recovery_task
import told
import ways
from clock import Budget, Charge, Curve, Score
from entries import METHODS
from methods import Data, Setting, noised
from models import CACHE, GROUPED, TOKENIZER, Size, as_prompt, tokenizer_of
from recovery_methods import RATES
from recovery_scores import Recovery
from scores import Exact, Hacking, Sampled, ToTeacher
from task import GROUP, heldout, longest, problems
from teachers import RECIPE, sample, start, teacher
from transformers import PreTrainedTokenizerBase

from llmdistill.teachers.local import LocalTeacher
from llmdistill.teachers.mixture import RoutedTeacher

STUDENT = Size(48, 2, 4, 128)  # 56 thousand weights
SMALL = Size(24, 2, 2, 64)  # 14 thousand
TOKENS_A_SEQUENCE = 31  # about
SCORED = 500  # held-out problems


@dataclass(frozen=True)
class Track:
    """A regime. ``needs`` are the teachers by name; ``starts_on`` is what the common start is trained on."""

    title: str
    methods: tuple[str, ...]
    budget: Budget
    student: Size = STUDENT
    needs: tuple[str, ...] = ("addition",)
    operations: tuple[str, ...] = ("+",)
    labels: int = 200
    start_steps: int = 600
    start_lr: float = 6e-3
    start_band: tuple[float, float] = (0.2, 0.3)  # of exact match: a start outside is drawn again
    lr: float = 1e-3
    batch: int = 64
    fresh: int = 20_000  # prompts without labels
    fixed: int = 200  # prompts of the offline set
    seeds: tuple[int, ...] = (0, 1, 2)
    metric: str = "exact"
    group: int = 0  # across tokenizers: digits of the student's longest token, and the other for the teacher
    size: int = 0  # of the task "recovery": its digits; 0: the task of columns
    pairs: int = 0  # of that task: right traces beside wrong ones
    swept: bool = False  # every method has its own learning rate, see recovery_methods.RATES
    direction: int = 0  # number of the recipe by which the teacher is made of the start, see direction.py

    def key(self) -> str:
        """Changes with anything that a result depends on; a result of another key is measured again."""
        recipe = [recovery_models.RECIPE, recovery_models.STARTS] if self.size else RECIPE
        settings = {**asdict(self), "recipe": recipe, **dict.fromkeys(("methods", "seeds", "title"))}
        del settings["swept"]  # a result says its learning rate itself
        # results from before there were two tokenizers, or two tasks
        for name in ("group", "size", "pairs", "direction"):
            if not settings[name]:
                del settings[name]
        if not self.budget.points:
            del settings["budget"]["points"]
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]

    def start_key(self, seed: int) -> str:
        """The same for tracks with the same start."""
        parts = [asdict(self.student), self.labels, self.operations, self.start_steps, self.start_lr, self.start_band]
        parts += [self.group] if self.group else []
        parts += [] if self.labels else [self.needs, self.fresh]  # trained on the teacher's right samples
        return f"start-{hashlib.sha256(json.dumps([*parts, RECIPE]).encode()).hexdigest()[:12]}-{seed}"

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The student's."""
        return GROUPED if self.group > 1 else TOKENIZER

    def smaller(self, share: float) -> Track:
        """The main track at a share of its budget and with a teacher sooner trained, for a first look."""
        budget = replace(
            self.budget, tokens=int(self.budget.tokens * share), cpu_seconds=self.budget.cpu_seconds * share
        )
        return replace(self, budget=budget, needs=("quick",), fresh=4000)


RECOVERY = Track(
    "Recovery",
    (),
    Budget(300_000, 15.0, points=(1 / 3, 1.0)),
    student=recovery_models.STUDENT,
    labels=0,
    batch=16,
    seeds=(0, 1, 2, 3, 4),
    size=recovery_task.SIZE,
    fresh=6000,
)

ACROSS = (
    *("sft_teacher", "same_kl", "alm", "p_kl", "h_kl", "simct", "opd_classes", "chunk_opd"),
    "same_opd",
    *("uld", "gold", "dskd", "mined", "sft_noised", "opsa"),
)

TRACKS = {
    "main": Track(
        "Scarce labels",
        (
            "sft_labels",
            "fkl_labels",
            "opd_labelled",
            "sft_teacher",
            "fkl_teacher",
            "fkl_noised",
            "jsd_teacher",
            "skew_teacher",
            "rkl_teacher",
            "taid",
            "tv_teacher",
            "akl_teacher",
            "adaptive",
            "opd",
            "opd_sampled",
            "opd_fkl",
            "gkd",
            "exopd_0.5",
            "exopd_1.25",
            "exopd_1.5",
            "distillm2",
            "sampled_f",
            "vopd",
            "tip",
            "entropy_aware",
            "selected",
            "layers",
            "returns",
            "opsa",
            "trl",
        ),
        Budget(200_000, 20.0),
        seeds=(0, 1, 2, 3, 4),
    ),
    "capacity": Track(
        "Capacity gap",
        ("sft_teacher", "fkl_teacher", "skew_teacher", "taid", "opd", "fkl_noised", "opsa"),
        Budget(350_000, 25.0),
        student=SMALL,
        labels=400,
        start_steps=1500,
        start_band=(0.45, 0.75),
        seeds=(0, 1, 2, 3, 4),
    ),
    "negatives": Track(
        "Negatives",
        ("sft_right", "redi", "symmetric", "simpo", "dpo", "sft_noised", "opsa"),
        Budget(150_000, 8.0),
        needs=("weak",),
        labels=0,
        start_steps=800,
        start_band=(0.7, 0.85),
        fresh=800,
        seeds=(0, 1, 2, 3, 4),
    ),
    "experts": Track(
        "Two experts",
        ("sft_teacher", "fkl_teacher", "opd", "exopd_1.25", "opd_one", "fkl_noised", "opsa"),
        Budget(250_000, 20.0),
        needs=("addition", "subtraction"),
        operations=("+", "-"),
        labels=300,
        start_steps=900,
        start_band=(0.1, 0.4),
        seeds=(0, 1, 2, 3, 4),
    ),
    "hacking": Track(
        "Teacher hacking",
        ("offline", "online_teacher", "online_student", "fkl_noised", "opsa"),
        Budget(600_000, 25.0, marks=8),
        needs=("imitator", "addition"),
        metric="golden",
    ),
    # Across tokenizers. The second teacher has the student's: what a KL between whole distributions comes to.
    "digits": Track(
        "Digits from groups of digits", ACROSS, Budget(200_000, 30.0), needs=("grouped", "addition"), group=1
    ),
    "groups": Track(
        "Groups of digits from digits",
        ACROSS,
        Budget(150_000, 30.0),
        needs=("addition", "grouped"),
        labels=400,
        start_steps=800,
        group=GROUP,
    ),
    # The task "recovery": long traces, mistakes that stay, a teacher who repairs them.
    "recovery": replace(
        RECOVERY,
        methods=(
            *("sft_teacher", "fkl_teacher", "jsd_teacher", "rkl_teacher", "taid"),
            *("opd", "gkd", "opd_fkl", "gkd_half", "gkd_half_rkl", "gkd_half_fkl"),
            *("opd_sampled", "vopd", "returns", "returns_fixed", "returns_half", "distillm2", "sampled_f", "tip"),
            *("entropy_aware", "opsa", "opd_blind", "sft_mistakes", "fkl_mistakes", "rkl_mistakes"),
        ),
        needs=("recovery", "recovery_blind"),
        swept=True,
    ),
    "recovery_long": replace(
        RECOVERY,
        title="Recovery, 900k tokens",
        methods=("opd", "fkl_teacher", "fkl_mistakes", "sft_mistakes", "opd_blind", "opsa"),
        budget=Budget(900_000, 45.0, points=(1 / 9, 1 / 3, 1.0)),
        needs=("recovery", "recovery_blind"),
        swept=True,
    ),
    "recovery_negatives": replace(
        RECOVERY,
        title="Negatives with long right prefixes",
        methods=("sft_right", "redi_all", "redi_after", "redi_first", "dpo_traces", "sft_mistakes", "opsa"),
        needs=("recovery",),
        swept=True,
        pairs=2000,
    ),
    # Where the best is not what the teacher does on average.
    "ways": replace(
        RECOVERY,
        title="Many right ways",
        methods=(
            *("opd", "returns", "gkd", "opd_sampled", "fkl_teacher", "rkl_teacher", "sft_teacher"),
            *("fkl_noised", "opsa"),
        ),
        needs=("ways",),
        batch=64,
    ),
    # Where a student that is told the solution can judge itself.
    "told": Track(
        "Solutions to be told",
        ("sft_labels", "context_given", "sft_noised", "context", "opsd", "sdpo", "sdpo_fixed", "opsa"),
        Budget(100_000, 10.0),
        student=told.STUDENT,
        needs=(),
        labels=told.LABELS,
        start_steps=told.STEPS,
        start_band=(told.KNOWS, 1.0),
        fresh=4000,
        seeds=(0, 1, 2, 3, 4),
        swept=True,
    ),
    "direction": Track(
        "A direction made by rewards",
        (
            *("opd", "exopd_1.25", "exopd_1.5", "exopd_2", "rkl_teacher", "fkl_teacher", "sft_teacher"),
            *("opd_sampled", "opd_reward", "fkl_noised", "opsa"),
        ),
        Budget(200_000, 20.0),
        needs=("quick",),
        fresh=4000,
        seeds=(0, 1, 2, 3, 4),
        metric="exact_t1",
        direction=direction.RECIPE,
    ),
    "recovery_six": replace(
        RECOVERY,
        title="Recovery where the guess can be learned, n = 6",
        methods=("opd", "fkl_teacher", "fkl_mistakes", "sft_mistakes", "opsa"),
        needs=("recovery_six",),
        swept=True,
        size=6,
        seeds=tuple(range(8)),
    ),
}


@dataclass(frozen=True)
class Cell:
    track: str
    method: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.track}/{self.method}-{self.seed}"


def cells(names: tuple[str, ...] = tuple(TRACKS), seeds: Sequence[int] | None = None) -> list[Cell]:
    """In the order they are run: a whole round of methods before the next seed, so that an early stop is a table."""
    found = [Cell(t, m, s) for t in names for m in TRACKS[t].methods for s in seeds or TRACKS[t].seeds]
    return sorted(found, key=lambda cell: cell.seed)


@dataclass
class Prepared:
    """What the cells of a track and seed share."""

    start: dict[str, Any]  # about the starting point
    setting: Setting
    charges: dict[str, Charge] = field(default_factory=dict)


def prepare(
    track: Track,
    cell: Cell,
    note: Callable[[str], None] = lambda text: None,
    report: Callable[[float], None] = lambda share: None,
) -> Prepared:
    """Teachers, text, start and curve of a cell; what is not cached yet is made."""
    if cell.track == "ways":
        return prepare_ways(track, cell, note, report)
    if cell.track == "told":
        return prepare_told(track, cell, note, report)
    if track.size:
        return prepare_recovery(track, cell, note, report)
    models = {name: teacher(name, note)[0] for name in track.needs}
    locals_ = {name: LocalTeacher(model, tokenizer_of(model)) for name, model in models.items()}
    first = locals_[track.needs[0]]
    test = heldout(SCORED, track.operations)
    data, charges = Data(), {}
    score: Score = Exact(test)
    judge: Any = first
    note("preparing")
    if track.labels:
        data.labelled = [p.row() for p in problems(track.labels, 10_000 + cell.seed, track.operations)]
    if cell.track == "negatives":
        text = sample("weak", models["weak"], track.fresh, 4, 500 + cell.seed)
        score = _together(score, Sampled(test))
        data.right, data.pairs = text.right(), text.pairs()
        data.fresh = data.right
        charges["pairs"] = text.charge()
        by_prompt = {p.prompt: p for p in text.problems}
        begin = [as_prompt(by_prompt[row["prompt"]], row["completion"]) for row in data.right]
    elif cell.track == "experts":
        judge = RoutedTeacher({"addition": (first, ["+"]), "subtraction": (locals_["subtraction"], ["-"])})
        parts = [
            sample(name, models[name], track.fresh // 2, 1, 77, (operation,))
            for name, operation in zip(track.needs, track.operations, strict=True)
        ]
        data.fresh = [row for part in parts for row in part.rows()]
        charges["fresh"] = Charge(sum(p.cpu_seconds for p in parts) / track.fresh, track.fresh)
        begin = [as_prompt(p) for p in problems(track.labels, 10_000 + cell.seed, track.operations)]
    else:
        text = sample(track.needs[0], models[track.needs[0]], track.fresh, 1, 77, track.operations)
        data.fresh, charges["fresh"] = text.rows(), text.charge()
        data.fixed = data.fresh[: track.fixed]
        charges["fixed"] = replace(charges["fresh"], sequences=track.fixed)
        begin = [
            as_prompt(p, tok=track.tokenizer) for p in problems(track.labels, 10_000 + cell.seed, track.operations)
        ]
        trained_on = [as_prompt(p) for p in text.problems[: track.fixed]]
        if cell.track == "hacking":
            score = _together(score, Hacking(first, locals_["addition"], trained_on))
    if cell.track in ("main", "capacity"):
        score = _together(score, ToTeacher(first, test[:96]))
    method = METHODS[cell.method]
    charges["noised"] = charges.get("fresh", charges.get("pairs", Charge()))
    charge = charges.get(method.prompts, Charge()) if method.text in ("teacher", "verified") else Charge()
    curve = Curve(track.budget, score, charge, report)
    model, about = start(
        track.start_key(cell.seed),
        track.student,
        begin,
        track.start_steps,
        track.start_lr,
        cell.seed,
        band=track.start_band,
        operations=track.operations,
        vocabulary=len(track.tokenizer),
        note=note,
    )
    if track.direction:
        name = f"reinforced-{track.direction}-{track.start_key(cell.seed)}"
        improved, gained = direction.reinforced(name, model, cell.seed, note)
        judge, about = LocalTeacher(improved, track.tokenizer), {**about, "reinforced": gained}
        score = curve.score = _together(score, Sampled(test), ToTeacher(judge, test[:96]))
        text = sample(name, improved, track.fresh, 1, 90 + cell.seed)
        data.fresh, data.checked = text.rows(), [p.row() for p in text.problems]
        if method.text == "teacher":
            curve.charge = text.charge()
    data.noised = noised(data.fresh, "0123456789", 83)
    setting = Setting(
        model=model,
        teacher=judge,
        data=data,
        curve=curve,
        folder=CACHE / "runs" / cell.name,
        seed=cell.seed,
        lr=track.lr,
        batch=track.batch,
        steps=track.budget.tokens // (track.batch * TOKENS_A_SEQUENCE),
        tokenizer=track.tokenizer,
        same=locals_[track.needs[1]] if track.group else None,
    )
    return Prepared(about, setting, charges)


def prepare_recovery(
    track: Track, cell: Cell, note: Callable[[str], None], report: Callable[[float], None]
) -> Prepared:
    """The same of the task "recovery"."""
    models = {name: teacher(name, note)[0] for name in track.needs}
    locals_ = [LocalTeacher(model, recovery_models.TOKENIZER) for model in models.values()]
    first, method = track.needs[0], METHODS[cell.method]
    note("preparing")
    text = recovery_models.sampled(first, models[first], track.size, track.fresh, 77)
    mistakes = recovery_models.with_mistakes(track.size, track.fresh, 78)
    pairs = recovery_models.pairs(track.size, track.pairs, 79)
    right = [{"prompt": p["prompt"], "completion": p["chosen"], "domain": "recovery"} for p in pairs]
    data = Data(fresh=text.rows, mistakes=mistakes.rows, right=right, pairs=pairs)
    charges = {"fresh": Charge(text.cpu_seconds / track.fresh, track.fresh)}
    charge = charges.get(method.prompts, Charge()) if method.text == "teacher" else Charge()
    curve = Curve(track.budget, Recovery(locals_[0], track.size), charge, report)
    assert isinstance(track.student, recovery_models.LongSize)
    model, about = recovery_models.start(track.size, cell.seed, track.student, note)
    setting = Setting(
        model=model,
        teacher=locals_[0],
        data=data,
        curve=curve,
        folder=CACHE / "runs" / cell.name,
        seed=cell.seed,
        lr=rate(track, cell.method),
        batch=track.batch,
        steps=track.budget.tokens // (track.batch * recovery_task.TOKENS),
        tokenizer=recovery_models.TOKENIZER,
        same=locals_[-1],
        longest=recovery_task.TOKENS,
    )
    return Prepared(about, setting, charges)


def prepare_ways(track: Track, cell: Cell, note: Callable[[str], None], report: Callable[[float], None]) -> Prepared:
    """The same of the task with eight right ways."""
    model, _ = teacher("ways", note)
    judge = LocalTeacher(model, recovery_models.TOKENIZER)
    note("preparing")
    curve = Curve(track.budget, ways.Ways(judge, cell.seed % ways.WAYS), Charge(), report)
    student, about = ways.start(cell.seed, note)
    fresh = ways.sampled(model, track.fresh, 77)
    setting = Setting(
        model=student,
        teacher=judge,
        data=Data(fresh=fresh, noised=noised(fresh, "01234567", 83)),
        curve=curve,
        folder=CACHE / "runs" / cell.name,
        seed=cell.seed,
        lr=track.lr,
        batch=track.batch,
        steps=track.budget.tokens // (track.batch * ways.TOKENS),
        tokenizer=recovery_models.TOKENIZER,
        longest=ways.TOKENS,
    )
    return Prepared(about, setting)


def prepare_told(track: Track, cell: Cell, note: Callable[[str], None], report: Callable[[float], None]) -> Prepared:
    """The same where the start judges itself, told the solution."""
    note("preparing")
    model, about = told.start(cell.seed, note)
    rows, test = told.rows(track.fresh, 77), heldout(SCORED)
    curve = Curve(track.budget, _together(Exact(test), Sampled(test)), Charge(), report)
    setting = Setting(
        model=model,
        teacher=LocalTeacher(copy.deepcopy(model), track.tokenizer),
        data=Data(labelled=rows, fresh=rows, noised=noised(rows, "0123456789", 83)),
        curve=curve,
        folder=CACHE / "runs" / cell.name,
        seed=cell.seed,
        lr=rate(track, cell.method),
        batch=track.batch,
        steps=track.budget.tokens // (track.batch * TOKENS_A_SEQUENCE),
    )
    return Prepared(about, setting)


def rate(track: Track, method: str) -> float:
    """The learning rate of a cell: the track's, or the method's own where it was looked for."""
    return RATES.get(method, track.lr) if track.swept else track.lr


def _together(*scores: Score) -> Score:
    return lambda model: {name: value for score in scores for name, value in score(model).items()}


assert longest() < 128  # the models' longest sequence
