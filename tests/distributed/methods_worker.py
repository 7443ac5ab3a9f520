"""One launch of the distribution test of methods: what a composition can hold, trained by however many processes.

    accelerate launch --config_file recipes/accelerate/zero3.yaml -m tests.distributed.methods_worker FOLDER [ONE CASES]

Each case trains four steps undisturbed, and again from the checkpoint after two; some also from that of one process, of
whose launch ONE is the folder (-: of none). Every rank writes what it saw to
``FOLDER/rank-N.json``; the first also writes weights, helpers and averages, whole, as ``FOLDER/CASE.pt``.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from peft import LoraConfig
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, TrainerCallback

from llmdistill import Ask, DistillationConfig, DistillationTrainer, Method, RolloutConfig, Term, methods
from llmdistill.compat import fsdp, zero3
from llmdistill.composition.method import Measured, Schedule
from llmdistill.composition.term import Hidden
from llmdistill.models.generation import HFRollouts, generate
from llmdistill.models.helpers import NAME as HELPERS
from llmdistill.models.weights import gathered, named_weights
from llmdistill.objectives import sparse
from llmdistill.objectives.divergences import forward_kl, reverse_kl
from llmdistill.objectives.labels import cross_entropy
from llmdistill.objectives.selection import entropy
from llmdistill.recipe.data_config import DataConfig
from llmdistill.recipe.launches import leave_group, whole_models
from llmdistill.teachers.local import LocalTeacher
from llmdistill.teachers.student import StudentTeacher, Which
from llmdistill.texts import Prompt, Rollout, Sampling, request_seed
from llmdistill.texts.sources import Only
from tests.distributed.worker import make_model, make_rows, make_tokenizer

STEPS, GLOBAL_BATCH, ACCUMULATION, PROMPTS, SEED = 4, 8, 2, 16, 3
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
DATA = DataConfig(weight_column="weight", contexts={"hint": "hint"})


# ---------------------------------------------------------------- the cases


class Heard(Schedule):
    """Weighs labels by how the domains fare, and keeps everything it was told."""

    def __init__(self) -> None:
        self.weight, self.total, self.told = 0.5, 0, list[dict[str, Any]]()

    def start(self, total_steps: int) -> None:
        self.total = total_steps

    def update(self, measured: Measured) -> None:
        by = measured.by("kl", "domain")
        self.weight = 0.2 + by["a"] / (by["a"] + by["b"])
        self.told.append(
            {
                "step": measured.step,
                "losses": dict(measured.losses),
                "watched": {"/".join(k): v for k, v in measured.watched.items()},
                "groups": {"/".join(k): list(v) for k, v in sorted(measured.groups.items())},
            }
        )

    def numbers(self) -> Mapping[str, float]:
        return {"weight": self.weight}

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self.weight, "told": self.told}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weight, self.told = state["weight"], list(state["told"])


def two_terms() -> Method:
    """The divergence on two samples a prompt; the labels, where a row has some, by sequence."""
    heard = Heard()
    kl = Term("kl", reverse_kl, (Ask(),), text="student", watch={"entropy": lambda logits, *_: entropy(logits)})
    labels = Term("labels", cross_entropy, (), ("tokens",), text="labels", mean="sequence", weight=lambda: heard.weight)
    texts = {"student": Only("student"), "labels": Only("dataset", optional=True)}
    return Method((kl, labels), texts, {"heard": heard})


def labelled() -> Method:
    return Method(Term("kl", forward_kl, (Ask(),)), {"main": Only("dataset")})


def judged_by_itself() -> Method:
    return Method(Term("kl", forward_kl, (Ask(context="hint"),)), {"main": Only("dataset")})


def listed_by_itself() -> Method:
    """Over the student's likeliest tokens, and over those of the judge."""
    ask = (Ask(kind="top_k", context="hint"),)
    terms = [
        Term(f"kl_{support}", sparse.reverse_kl, ask, top_k=6, support=support) for support in ("student", "teacher")
    ]
    return Method(tuple(terms), {"main": Only("dataset")})


def layers_of_itself() -> Method:
    def distance(states: Sequence[Tensor], *evidence: Tensor, helpers: Mapping[str, nn.Module]) -> Tensor:
        return (states[0] - evidence[0]).square().mean(-1)

    terms = (
        Term("layers", None, (Ask(context="hint"),), hidden=Hidden(distance, (0,), (0,))),
        Term("kl", forward_kl, (Ask(context="hint"),)),
    )
    return Method(terms, {"main": Only("dataset")})


def named(name: str, **settings: Any) -> Callable[[], Method]:
    return lambda: methods.config_class(name)(output_dir="unused", **settings).build()


@dataclass(frozen=True)
class Case:
    """What is trained. ``judge`` None: another model."""

    method: Callable[[], Method]
    judge: Which | None = None
    lora: bool = False
    from_disk: bool = False  # where ZeRO-3 shards while loading; else it does when training begins
    persistent: int = 100  # ZeRO-3 leaves smaller weights whole on every rank: here the norms, else all of these models
    samples: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)
    resumed: bool = True


CASES: dict[str, Case] = {
    "two_terms": Case(two_terms, samples=2, settings={"domain_weights": {"a": 0.5, "b": 2.0}}),
    "two_terms_lora": Case(two_terms, samples=2, lora=True, resumed=False),
    "mixture": Case(labelled, settings={"mixture_every": 1}),
    "tip": Case(named("tip", keep=0.4), resumed=False),
    "distillm2": Case(named("distillm2", adaptive_alpha=True, gradual_beta=True)),
    "live": Case(judged_by_itself, "live", from_disk=True, resumed=False),
    "live_lora": Case(judged_by_itself, "live", lora=True, resumed=False),
    "initial": Case(judged_by_itself, "initial", from_disk=True),
    "initial_lora": Case(judged_by_itself, "initial", lora=True),
    "ema": Case(judged_by_itself, "ema"),
    "ema_from_disk": Case(judged_by_itself, "ema", from_disk=True),
    "ema_persistent": Case(judged_by_itself, "ema", persistent=100_000, resumed=False),
    "ema_lora": Case(judged_by_itself, "ema", lora=True),
    "listed_live": Case(listed_by_itself, "live", resumed=False),
    "listed_ema": Case(listed_by_itself, "ema", from_disk=True, resumed=False),
    "layers_of_itself": Case(layers_of_itself, "ema", resumed=False),
    "cosine": Case(named("layers", sequences="dataset", student_layers=[0, -1], teacher_layers=[1, -1])),
    "mi_alpha": Case(named("layers", sequences="dataset", distance="mi_alpha"), from_disk=True),
    "mi_alpha_lora": Case(named("layers", sequences="dataset", distance="mi_alpha"), lora=True),
}


# Gone on with in another launch: an average of the student; an adapter, with helpers.
CROSSED = ("ema", "mi_alpha_lora")

# ---------------------------------------------------------------- how they are run


class ByRow(HFRollouts):
    """Samples whose seeds speak of a row and a step, so that they do not depend on the rank that draws them."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Rollout:
        assert self.model is not None
        seeded = replace(sampling, seed=request_seed(SEED, self.policy_version, 0))
        rows = [p.row for p in prompts]
        with self.ready(self.model) as model:
            return generate(
                model,  # type: ignore[arg-type]
                prompts,
                seeded,
                eos_ids=self.eos_ids,
                pad_id=self.pad_id,
                policy_version=self.policy_version,
                rows=rows,
            )


class Watched(StudentTeacher):
    """Also counts the weights that judging did not leave as they were, bit for bit, and how often it judged."""

    moved, judged = 0, 0

    @contextmanager
    def _as_judge(self) -> Iterator[None]:
        before = [part.clone() for part in self._parts()]
        with super()._as_judge():
            yield
        for kept, part, p in zip(before, self._parts(), self._bound.parameters(), strict=True):
            self.moved += not torch.equal(kept, part)
            if hasattr(p, "ds_id") and not zero3.is_sharded(p):  # whole at the moment: of the same parts
                self.moved += not torch.equal(kept, zero3.shard_like(p.detach(), p)[: len(kept)])
        self.judged += 1

    def _parts(self) -> list[Tensor]:
        """What this rank holds of every weight."""
        fsdp.shard_again(self._bound)
        parts = [zero3.local_shard(p).detach() for p in self._bound.parameters()]
        return [part.to_local() if fsdp.is_shard(part) else part for part in parts]  # type: ignore[operator]


class Start(TrainerCallback):
    """Notes the step at which training began."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step = state.global_step


def rows() -> list[dict[str, Any]]:
    """Every other row is of domain b; some weigh a half, some have a weight for each token, some no completion."""
    made, encoded = list[dict[str, Any]](), make_tokenizer()
    for i, row in enumerate(make_rows(PROMPTS, 5)):
        tokens = len(encoded(row["completion"], add_special_tokens=False)["input_ids"])
        weight: Any = [0.25 + 0.5 * (k % 3) for k in range(tokens)] if i % 4 == 1 else 0.5 if i % 4 == 2 else 1.0
        hint = None if i % 8 == 6 else f"t{30 + i} t{50 + i} t{22 + i}"
        made.append({**row, "domain": "ab"[i % 2], "weight": weight, "hint": hint})
    return made


def weighed(method: Method) -> list[dict[str, Any]]:
    """The rows as a method can read them."""
    data = [dict(row) for row in rows()]
    if method.uses == {"student"}:  # weights of tokens are those of a completion that is there
        data = [{**row, "weight": 1.0 if isinstance(row["weight"], list) else row["weight"]} for row in data]
    if any(getattr(source, "optional", False) for source in method.texts.values()):
        for i in (3, 4, 9):
            data[i]["completion"], data[i]["weight"] = "", 1.0
    return data


def make_trainer(name: str, folder: Path) -> DistillationTrainer:
    case, world = CASES[name], int(os.environ.get("WORLD_SIZE", 1))
    args = DistillationConfig(
        output_dir=str(folder),
        max_steps=STEPS,
        save_steps=STEPS // 2,
        save_strategy="steps" if case.resumed else "no",
        logging_steps=1,
        learning_rate=1e-2,
        # Adam divides gradients by their size: where that is rounding, so is the update. This much larger an eps also
        # lets a gradient of the wrong scale be seen in the weights.
        adam_epsilon=1e-2,
        per_device_train_batch_size=GLOBAL_BATCH // ACCUMULATION // world,
        gradient_accumulation_steps=ACCUMULATION,
        rollouts=RolloutConfig(max_new_tokens=8, samples_per_prompt=case.samples),
        chunk_tokens=16,
        seed=SEED,
        **case.settings,
    )
    if args.deepspeed_plugin is not None:
        args.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = (
            case.persistent
        )
    tokenizer, method = make_tokenizer(), case.method()
    student = make_model(0, hidden=32, tied=True)
    if case.from_disk:
        with args.main_process_first(local=False):
            if args.process_index == 0:
                student.save_pretrained(folder / "start")
        student = AutoModelForCausalLM.from_pretrained(folder / "start", dtype=torch.float32)
    judge = Watched(case.judge, 0.5) if case.judge else LocalTeacher(make_model(1, hidden=48, tied=False), tokenizer)
    trainer = DistillationTrainer(
        student,
        args,
        judge,
        method=method,
        train_dataset=weighed(method),
        processing_class=tokenizer,
        peft_config=LORA if case.lora else None,
        data=DATA,
    )
    if method.uses & {"student"}:
        engine = ByRow(eos_ids=trainer.eos_ids, pad_id=trainer.pad_id, ready=trainer._generating)
        trainer.rollout_engine = engine
    return trainer


def whole_average(judge: StudentTeacher) -> dict[str, Tensor]:
    """The average of all ranks' parts. Where weights are not sharded, all ranks' must be equal."""
    mine = {name: part.flatten().clone() for name, part in judge.average.items()}
    every = gather_object([mine]) if torch.distributed.is_initialized() else [mine]
    named = dict(judge._bound.named_parameters())
    found = {}
    for name in mine:
        parts = [rank[name] for rank in every]
        if judge.sharded:
            shape = getattr(named[name], "ds_shape", named[name].shape)
            found[name] = torch.cat(parts)[: shape.numel()].view(shape)
        else:
            assert all(torch.equal(parts[0], part) for part in parts), name
            found[name] = parts[0].view_as(named[name])
    return found


def whole_helpers(trainer: DistillationTrainer) -> dict[str, Tensor]:
    with gathered(list(trainer.helpers.parameters())):
        return {name: fsdp.whole(p).clone() for name, p in trainer.helpers.named_parameters()}


def lines(trainer: DistillationTrainer) -> list[dict[str, float]]:
    """What every step logged, but for what the clock says."""
    skipped = ("time/", "memory/", "epoch", "teacher/positions", "rollout/tokens_per_second", "learning_rate")
    logged = [line for line in trainer.state.log_history if "loss" in line]
    return [{k: v for k, v in line.items() if not k.startswith(skipped)} for line in logged]


def run(name: str, folder: Path, one: Path | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what is JSON, tensors) of a case, of this rank.

    Args:
        one: where one process trained it.
    """
    middle = f"checkpoint-{STEPS // 2}"
    runs: dict[str, Path | None] = {"undisturbed": None}
    if CASES[name].resumed:
        runs["resumed"] = folder / name / middle
    if name in CROSSED and one is not None:
        runs["from one process"] = one / name / middle
    numbers, tensors = dict[str, Any](), dict[str, Any]()
    for which, checkpoint in runs.items():
        into = folder / (f"{name}-from-one" if which == "from one process" else name)
        numbers[which], tensors[which] = trained(name, into, checkpoint)
    return numbers, tensors


def trained(name: str, folder: Path, checkpoint: Path | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what is JSON, tensors) of a case that is trained from its start, or from a checkpoint."""
    trainer = make_trainer(name, folder)
    begun = Start()
    trainer.add_callback(begun)
    trainer.train(None if checkpoint is None else str(checkpoint))
    judge = trainer.judges["teacher"]
    heard = trainer.method.schedules.get("heard")
    plugin = trainer.accelerator.state.deepspeed_plugin
    numbers = {
        "processes": trainer.accelerator.num_processes,
        "zero_stage": None if plugin is None else plugin.zero_stage,
        "began": begun.step,
        "lines": lines(trainer),
        "moved": judge.moved if isinstance(judge, Watched) else 0,
        "judged": judge.judged if isinstance(judge, Watched) else 0,
        "heard": heard.told if isinstance(heard, Heard) else [],
        "schedules": {n: _plain(s.state_dict()) for n, s in trainer.method.schedules.items() if n != "heard"},
    }
    tensors = {
        "weights": {n: t.clone() for n, t in named_weights(trainer.model)},
        "average": whole_average(judge) if isinstance(judge, StudentTeacher) else {},
        "helpers": whole_helpers(trainer),
    }
    if checkpoint is None and len(trainer.helpers):
        trainer.save_model(str(folder / "final"))
        trainer.accelerator.wait_for_everyone()
        numbers["saved"] = saved(trainer, folder / "final", CASES[name].lora)
    return numbers, tensors


def saved(trainer: DistillationTrainer, folder: Path, lora: bool) -> dict[str, Any]:
    """Names in the saved student that are the helpers', and how far it is from the trained one."""
    file = folder / ("adapter_model.safetensors" if lora else "model.safetensors")
    with safe_open(file, "pt") as opened:
        names = list(opened.keys())
    if lora:
        return {"helpers": [n for n in names if HELPERS in n], "difference": 0.0}
    trained = {name: tensor.clone() for name, tensor in named_weights(trainer.model)}
    with whole_models():
        state = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    assert state.keys() == trained.keys(), state.keys() ^ trained.keys()
    difference = max(float((state[n] - trained[n]).abs().max()) for n in trained)
    return {"helpers": [n for n in names if HELPERS in n], "difference": difference}


def _plain(state: Any) -> Any:
    return json.loads(json.dumps(state, default=lambda x: x.tolist()))


def main(folder: Path, one: Path | None, chosen: Sequence[str]) -> None:
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed

        # Its shared-memory all-reduce would be compiled first, for a minute; gloo's sums are the same.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    rank, found = int(os.environ.get("RANK", 0)), {}
    for name in chosen or CASES:
        found[name], tensors = run(name, folder, one)
        if rank == 0:
            torch.save(tensors, folder / f"{name}.pt")
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if sys.argv[2:3] not in ([], ["-"]) else None, sys.argv[3:])
    leave_group()
