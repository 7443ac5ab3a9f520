"""Tokenizer transfer proved: SmolLM2-135M-Instruct with Mistral's vocabulary, taught by what it was before.

    make quickstart                              # the model, its prompts, and pairs
    python eval/proof/transfer.py                # every run that has no result yet; killed, it goes on where it was
    python eval/proof/transfer.py --runs alm-own-0.0003-0
    python eval/proof/transfer.py --table        # run nothing; print the table of transfer.md
    python eval/proof/transfer.py --answers NAME UNTRAINED TAUGHT   # what students in folders answer, as any checkpoint

A run is a method, the text it is trained on and a seed; its result is a JSON in eval/proof/transfer/. All runs of a
text see equally many bytes of it. Text: ``own`` is what the model itself wrote before the transfer, at temperature 1,
to everyday prompts of the quick start, briefly; ``pairs`` is the right answers of its pairs, which somebody else wrote.

Held out is text of both kinds. A text's bits per byte are -log2 of its likelihood, its end of turn included, over its
bytes: that knows nothing of tokens. On the model's own text what a student has more than the model is the forward KL
between the two, in bits per byte of text; on somebody else's it is no distance to anything.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from llmdistill import DataConfig, Method, Term
from llmdistill import methods as compositions
from llmdistill.models.transfer import transfer
from llmdistill.objectives.labels import cross_entropy
from llmdistill.recipe.config import DistillationConfig
from llmdistill.teachers.local import LocalTeacher
from llmdistill.texts import Sampling
from llmdistill.texts.prompts import PromptEncoder, completed
from llmdistill.texts.sources import Only
from llmdistill.tokenization.special import pad_id
from llmdistill.training.trainer import DistillationTrainer

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "transfer"
QUICKSTART, CACHE = ROOT / "data" / "quickstart", ROOT / "runs" / "transfer"
DATA = DataConfig(max_prompt_tokens=200)
STEPS, BATCH = 12, 8
LONG = 40  # steps of the run whose student is kept
HELDOUT = 32  # sequences of each kind of text
OWN = 208  # answers of its own to train on: a seed draws among them, and the longest run sees them 1.5 times
LONGEST = 48  # tokens of an answer; one that is longer is no text to learn an end from, and left out
SHOWN, BRIEF = 20, 40  # held-out questions, and tokens of an answer: as recipes/data/transfer.yaml has them
BRIEFLY = {"role": "system", "content": "Answer in one short sentence."}
Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A method's name below, the text it is trained on, a learning rate, and a seed: of the order of the rows."""

    method: str
    text: str
    lr: float
    seed: int
    steps: int = STEPS

    @property
    def name(self) -> str:
        steps = "" if self.steps == STEPS else f"-{self.steps}"
        return f"{self.method}-{self.text}-{self.lr:g}-{self.seed}{steps}"


# name -> (composition of llmdistill.methods, or none: the cross-entropy alone; its settings)
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("", {}),
    "alm": ("alm", {}),
    "alm_sft": ("alm", {"ce_weight": 1.0}),
    "alm_hidden": ("alm", {"hidden_weight": 1.0}),
    "p_kl_sft": ("p_kl", {"ce_weight": 1.0}),
}
RATE, HIGH = 1e-4, 3e-4
SEEDS = (0, 1, 2)
KEPT = Run("alm", "own", HIGH, 0, LONG)  # the student of this one is kept, with its tokenizer
RUNS = [
    *(Run(method, "pairs", RATE, seed) for seed in SEEDS for method in ("alm", "sft")),
    *(Run(method, "own", RATE, seed) for seed in SEEDS for method in ("alm", "sft")),
    KEPT,
    *(Run(method, "own", RATE, 0) for method in ("p_kl_sft", "alm_sft", "alm_hidden")),
    *(Run(method, "own", HIGH, 0) for method in ("alm", "sft")),
]


# ------------------------------------------------------------------------------------------------ models and texts


def former() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model before the transfer: the teacher of every run."""
    folder = QUICKSTART / "teacher"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


def new_vocabulary() -> PreTrainedTokenizerBase:
    """Mistral's SentencePiece vocabulary, 32,768 tokens, from the package mistral-common."""
    import mistral_common

    file = Path(mistral_common.__file__).parent / "data" / "mistral_instruct_tokenizer_240323.model.v3"
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(file, Path(folder) / "tokenizer.model")
        return LlamaTokenizer.from_pretrained(folder)


def transferred() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The student of every run: the model with the new vocabulary, and no training since."""
    model, tokenizer = former()
    new = new_vocabulary()
    transfer(model, tokenizer, new)
    return model, new


def read(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def texts(kind: str, part: str) -> list[Row]:
    """Rows of a kind of text: ``train`` or ``heldout``."""
    if kind == "own":
        if part == "heldout":
            return written(CACHE / "own.jsonl", HELDOUT)
        return written(CACHE / "own.jsonl", HELDOUT + OWN)[HELDOUT:]
    rows = read(QUICKSTART / ("pairs.jsonl" if part == "train" else "pairs_heldout.jsonl"))
    found = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    return found if part == "train" else found[:HELDOUT]


def written(file: Path, count: int) -> list[Row]:
    """The first ``count`` answers of the former model that come to an end, at temperature 1; kept as they are made."""
    prompts = [row for row in read(QUICKSTART / "train.jsonl") if row["domain"] == "everyday"]
    rows = read(file) if file.exists() else []
    if len([row for row in rows if row["ended"]]) < count:
        model, tokenizer = former()
        teacher, encode = LocalTeacher(model, tokenizer), PromptEncoder(tokenizer, DATA)
        file.parent.mkdir(parents=True, exist_ok=True)
    while len(found := [row for row in rows if row["ended"]]) < count:
        start = len(rows)
        part = [{"prompt": [BRIEFLY, *row["prompt"]]} for row in prompts[start : start + 32]]
        rollout = teacher.generate([encode(row, i) for i, row in enumerate(part)], Sampling(LONGEST, seed=start))
        for row, ids, mask, finish in zip(
            part, rollout.input_ids, rollout.completion_mask, rollout.finish, strict=True
        ):
            text = tokenizer.decode(ids[mask], skip_special_tokens=True)
            rows.append({**row, "completion": text, "ended": finish == "stop" and bool(text.strip())})
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{len(rows)} answers, {sum(row['ended'] for row in rows)} of them whole", flush=True)
    return found[:count]


def bits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> list[float]:
    """-log2 of the likelihood of every completion and its end of turn, over the completion's bytes."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    judge, found = LocalTeacher(model, tokenizer), list[float]()
    for row, prompt in zip(rows, PromptEncoder(tokenizer, DATA).encode_all(rows, completions=True), strict=True):
        blocks = judge.score(completed([prompt], pad_id(tokenizer)), 0)
        nats = -sum(float(block.token_logprobs.sum()) for block in blocks)
        found.append(nats / math.log(2) / len(row["completion"].encode()))
    for parameter in trainable:  # a teacher is frozen
        parameter.requires_grad_(True)
    return found


def measured(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Of both kinds of held-out text: every text's bits per byte, and those of all together."""
    each, together = dict[str, list[float]](), dict[str, float]()
    for kind in ("own", "pairs"):
        rows = texts(kind, "heldout")
        each[kind] = bits(model, tokenizer, rows)
        together[kind] = weighted(each[kind], rows)
    return {"bits_per_byte": together, "of_each_text": {k: [round(x, 5) for x in v] for k, v in each.items()}}


def weighted(values: Sequence[float], rows: Sequence[Row]) -> float:
    """Mean of values by the texts' bytes."""
    sizes = [len(row["completion"].encode()) for row in rows]
    return sum(v * n for v, n in zip(values, sizes, strict=True)) / sum(sizes)


# ------------------------------------------------------------------------------------------------------- the runs


def trainer_of(run: Run, folder: str) -> DistillationTrainer:
    composition, settings = METHODS[run.method]
    shared = dict(
        output_dir=folder,
        max_steps=run.steps,
        per_device_train_batch_size=BATCH,
        learning_rate=run.lr,
        lr_scheduler_type="linear",
        warmup_steps=2,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        seed=run.seed,
        save_strategy="no",
        logging_steps=4,
        heldout_sequences=1,
    )
    student, tokenizer = transferred()
    teacher = LocalTeacher(*former(), batch_tokens=2048)
    rows: dict[str, Any] = {"train_dataset": texts(run.text, "train"), "processing_class": tokenizer, "data": DATA}
    if composition:
        args = compositions.config_class(composition)(**shared, **settings)
        return DistillationTrainer(student, args, teacher, method=args.build(), **rows)
    method = Method((Term("cross_entropy", cross_entropy, (), ("tokens",)),), {"main": Only("dataset")})
    return DistillationTrainer(student, DistillationConfig(**shared), None, method=method, **rows)


def done(run: Run) -> None:
    """Trains, measures and writes the result."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(run, folder)
        before = time.process_time()
        trainer.train()
        seconds = time.process_time() - before
    composition, settings = METHODS[run.method]
    result = {
        **{"run": run.name, "composition": composition or "cross-entropy", **settings, "lr": run.lr},
        **{"steps": run.steps, "sequences": run.steps * BATCH, "cpu_seconds": round(seconds), **stamp()},
        **measured(trainer.model, trainer.encode.tokenizer),
        "log": [{k: v for k, v in line.items() if isinstance(v, int | float)} for line in trainer.state.log_history],
    }
    keep(run.name, result)
    if run == KEPT:
        trainer.model.save_pretrained(CACHE / "student")
        trainer.encode.tokenizer.save_pretrained(CACHE / "student")


def keep(name: str, result: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(name, result["bits_per_byte"], flush=True)


def stamp() -> dict[str, str]:
    """Commit and machine of a result."""
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return {"commit": head.stdout.strip(), "machine": f"{names[0].split(':')[1].strip()}, one thread" if names else ""}


def references() -> None:
    """The former model, and the student before any training."""
    for name, make in (("former", former), ("transferred", transferred)):
        if not (RESULTS / f"{name}.json").exists():
            keep(name, {"run": name, **measured(*make()), **stamp()})


def table() -> str:
    """Markdown: bits per byte of both held-out texts; of several seeds the mean, and the smallest and largest."""
    found = {file.stem: json.loads(file.read_text()) for file in RESULTS.glob("*.json") if "answers" not in file.name}
    lines = [
        "| | trained on | rate | steps | seeds | its own text | somebody else's | CPU s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, title in (("former", "before the transfer"), ("transferred", "transferred, untrained")):
        if name in found:
            own, pairs = (found[name]["bits_per_byte"][kind] for kind in ("own", "pairs"))
            lines.append(f"| {title} | | | | | {own:.3f} | {pairs:.3f} | |")
    for key in dict.fromkeys((run.method, run.text, run.lr, run.steps) for run in RUNS):
        rows = [found[r.name] for r in RUNS if (r.method, r.text, r.lr, r.steps) == key and r.name in found]
        if rows:
            scores = [spread([r["bits_per_byte"][kind] for r in rows]) for kind in ("own", "pairs")]
            seconds = statistics.mean(r["cpu_seconds"] for r in rows)
            lines.append(
                f"| {key[0]} | {key[1]} | {key[2]:g} | {key[3]} | {len(rows)} | {' | '.join(scores)} | {seconds:.0f} |"
            )
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def answers(name: str, untrained: str, taught: str) -> None:
    """Greedy answers to held-out questions, of the former model and of a student in two folders, before and after.

    Loaded and asked as anybody would who has the folders alone.
    """
    folders = {"before": str(QUICKSTART / "teacher"), "untrained": untrained, "taught": taught}
    questions = [row["prompt"] for row in read(QUICKSTART / "questions_heldout.jsonl")[:SHOWN]]
    chats, said = [[BRIEFLY, *question] for question in questions], dict[str, list[str]]()
    for which, folder in folders.items():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        said[which] = answered(model, AutoTokenizer.from_pretrained(folder), chats)
    lines = [dict(zip(said, each, strict=True)) for each in zip(*said.values(), strict=True)]
    found = [{"question": q[-1]["content"], **line} for q, line in zip(questions, lines, strict=True)]
    (RESULTS / f"answers-{name}.json").write_text(json.dumps({**stamp(), "answers": found}, indent=1) + "\n")
    for line in found:
        print(json.dumps(line, indent=1), flush=True)


@torch.no_grad()
def answered(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chats: Sequence[list[Row]]) -> list[str]:
    tokenizer.padding_side = "left"
    written = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    batch = tokenizer(written, add_special_tokens=False, return_tensors="pt", padding=True)
    out = model.generate(
        batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=BRIEF, do_sample=False
    )
    return list(tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", choices=[run.name for run in RUNS], help="default: all")
    parser.add_argument("--again", action="store_true", help="also those that have a result")
    parser.add_argument("--table", action="store_true", help="run nothing")
    words = ("NAME", "UNTRAINED", "TAUGHT")
    parser.add_argument("--answers", nargs=3, metavar=words, help="run nothing; what a student in two folders answers")
    options = parser.parse_args()
    if options.answers:
        torch.set_num_threads(1)
        answers(*options.answers)
        return 0
    if not options.table:
        torch.set_num_threads(1)
        references()
        for run in RUNS:
            wanted = run.name in (options.runs or [r.name for r in RUNS])
            if wanted and (options.again or not (RESULTS / f"{run.name}.json").exists()):
                done(run)
    print(table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
