"""Every architecture in turn: trained, saved, adapted and sampled, with the number that says how far from right.

    python -m tests.students.sweep [ARCHITECTURE ...]

prints the table of eval/proof/students.md. Each model has some ten thousand random weights in float32.
"""

from __future__ import annotations

import copy
import fcntl
import platform
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llmdistill import OPDConfig, OPDTrainer, UserError
from llmdistill.models import generation, saving
from llmdistill.models.adapters import adapted
from llmdistill.models.causality import check_causal
from llmdistill.models.generation import generate
from llmdistill.models.loading import load_model
from llmdistill.models.unused import freeze_unused
from llmdistill.texts import Prompt, Sampling
from tests import tiny
from tests.students.architectures import small
from tests.students.multimodal import WRAPPED, wrapped

# Encoders, encoder-decoders, assistants of another model, and classes whose smallest config is a gigabyte or asks for a
# package that is not a dependency.
NOT_TRIED = """
bart bert bert-generation big_bird bigbird_pegasus blenderbot blenderbot-small camembert data2vec-text electra
ernie git marian mbart megatron-bert musicgen musicgen_melody mvp pegasus plbart prophetnet rembert roberta
roberta-prelayernorm roc_bert roformer trocr whisper xlm xlm-roberta xlm-roberta-xl xlnet xmod reformer moshi
aria_text blt cpmant emu3 fuyu gemma3n gemma4_assistant gemma4_unified_assistant got_ocr2 phi4_multimodal
qwen3_5_moe qwen4_exp gpt-sw3
"""
PROMPTS = [Prompt(list(range(5, 5 + n)), str(n)) for n in (3, 12, 7)]


class NotMade(Exception):
    """transformers itself cannot make, or run, a model of these sizes."""


@dataclass
class Row:
    """What was found of an architecture; every number is 0 where all is right."""

    name: str
    made: str = ""  # the class
    loss: float | None = None  # relative difference of our loss from that of whole logits
    gradient: float | None = None  # largest difference of a gradient over the largest gradient
    saved: float | None = None  # of the log-probs of the saved and loaded student from the trained one's
    adapted: float | None = None  # the same with an adapter on all linear layers, merged
    sampled: float | None = None  # largest difference of what a batch drew with from a forward pass over each alone
    refused: str = ""  # what was said instead
    remark: str = ""

    @property
    def right(self) -> bool:
        """Every number is rounding, or something was refused in words."""
        limits = {"loss": 1e-4, "gradient": 1e-3, "saved": 1e-5, "adapted": 1e-4, "sampled": 1e-3}
        found = {name: getattr(self, name) for name in limits}
        return all(value is None or value <= limits[name] for name, value in found.items()) and (
            bool(self.refused) or None not in found.values()
        )


def names() -> list[str]:
    """Those that can be tried."""
    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(NOT_TRIED.split()) | set(WRAPPED))


def examine(name: str) -> Row:
    """Tries out one architecture.

    Raises:
        NotMade: it cannot be tried.
    """
    row = Row(name)

    def make(seed: int) -> Any:
        return through_the_door(name, seed) if name in WRAPPED else small(name, seed)

    try:
        student = make(0)
        student(input_ids=torch.randint(4, 260, (2, 16)), use_cache=False)
    except Exception as error:
        raise NotMade(f"{type(error).__name__} {next(iter(str(error).strip().splitlines()), '')[:160]}") from error
    row.made = type(student).__name__
    with tempfile.TemporaryDirectory() as folder:
        try:
            check_causal(student, student)
            row.loss, row.gradient = against_whole_logits(make(0), make(1), Path(folder))
            row.saved = saved_and_loaded(student, Path(folder) / "whole")
            adapter = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
            student = adapted(student, adapter)
            freeze_unused(student)
            torch.manual_seed(1)
            with torch.no_grad():
                for key, parameter in student.named_parameters():
                    if "lora_B" in key and parameter.requires_grad:
                        parameter.normal_(std=0.1)
            row.adapted = saved_and_loaded(student, Path(folder) / "adapted")
            student = make(0)
            row.sampled = off_its_forward(student)
            row.remark = "" if generation._batched.get(student, True) else "one sequence at a time"
        except UserError as error:
            row.refused = str(error).splitlines()[0]
    return row


def through_the_door(name: str, seed: int) -> Any:
    """A class of several modalities as a recipe loads its checkpoint: some have one of their own for text alone.

    Raises:
        AssertionError: it is another model on text.
    """
    model = wrapped(name, seed)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tiny.tokenizer().save_pretrained(folder)
        student = load_model(folder, "float32", "student")[0].eval()
    away = saving.relative_distance(*(saving.logits_on_few_tokens(m, m) for m in (student, model)))
    assert away <= 1e-5, f"loaded, {name} is {away:.2g} off"
    return student


def against_whole_logits(student: Any, teacher: Any, folder: Path) -> tuple[float, float]:
    """Our reverse KL on the dataset's text against the same from whole logits: of loss and of gradients."""
    args = OPDConfig(output_dir=str(folder / "run"), sequences="dataset", per_device_train_batch_size=4)
    rows = tiny.rows(4)
    trainer = OPDTrainer(student, args, copy.deepcopy(teacher), train_dataset=rows, processing_class=tiny.tokenizer())
    inputs, _ = trainer.get_batch_samples(iter([trainer.train_dataset]), 1, torch.device("cpu"))  # type: ignore[list-item]
    student.eval()
    loss = trainer.compute_loss(student, inputs[0])
    loss.backward()
    ours = {key: p.grad.clone() for key, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    text = inputs[0]["micro_batch"].rollout
    counted = text.completion_mask[:, 1:]

    def logprobs(model: Any) -> torch.Tensor:
        output = model(input_ids=text.input_ids, attention_mask=text.attention_mask.long(), use_cache=False)
        return output.logits[:, :-1][counted].float().log_softmax(-1)

    with torch.no_grad():
        teacher_NV = logprobs(teacher)
    student_NV = logprobs(student)
    whole = (student_NV.exp() * (student_NV - teacher_NV)).sum(-1).mean()
    whole.backward()
    largest = max(float(p.grad.abs().max()) for p in student.parameters() if p.grad is not None)
    gaps = [
        float((ours.get(key, torch.zeros_like(p)) - p.grad).abs().max())
        for key, p in student.named_parameters()
        if p.grad is not None
    ]
    return abs(float(loss) - float(whole)) / abs(float(whole)), max(gaps) / largest


def saved_and_loaded(student: Any, folder: Path) -> float:
    """Relative distance of a saved student from the one in memory.

    Raises:
        UserError: it is another one.
    """
    tokenizer = tiny.tokenizer()
    saving.check_savable(student, tokenizer)
    logits = saving.logits_on_few_tokens(student, student)
    saving.save_student(student, folder, tokenizer)
    if problem := saving.differs_from(logits, folder, student):
        raise AssertionError(problem)
    loaded, _ = load_model(str(folder), "float32", "student")
    loaded.eval()
    return saving.relative_distance(saving.logits_on_few_tokens(loaded, loaded), logits)


@torch.no_grad()
def off_its_forward(model: Any) -> float:
    """Largest difference in nats of what a batch drew with from a forward pass over each sequence alone."""
    rollout, worst = generate(model, PROMPTS, Sampling(5, seed=3), eos_ids=(1,), pad_id=2), 0.0
    for b in range(len(rollout)):
        one = rollout.sequences([b])
        logits = model(input_ids=one.input_ids, use_cache=False).logits[0, :-1].float()
        said = logits.log_softmax(-1).gather(1, one.input_ids[0, 1:, None]).squeeze(1)
        worst = max(worst, float((said - one.behavior_logprobs[0, 1:])[one.completion_mask[0, 1:]].abs().max()))
    return worst


def table(rows: list[Row]) -> str:
    """Markdown."""

    def cell(value: float | None) -> str:
        return "–" if value is None else f"{value:.0e}" if value else "0"

    lines = [
        "| architecture | class | loss | gradient | saved | adapted | sampled | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        numbers = " | ".join(cell(v) for v in (row.loss, row.gradient, row.saved, row.adapted, row.sampled))
        remark = f"refused: {row.refused.partition(':')[0]}" if row.refused else row.remark
        lines.append(f"| {row.name} | {row.made} | {numbers} | {remark} |")
    return "\n".join(lines)


def write(file: Path, rows: list[Row]) -> None:
    """Puts rows into the table of a page, each in the place of what was found of its architecture before. Several
    processes of pytest may do so at a time."""
    with file.open("r+") as page:
        fcntl.flock(page, fcntl.LOCK_EX)
        text = _with_rows(page.read().splitlines(), rows)
        page.seek(0)
        page.truncate()
        page.write(text)


def _with_rows(lines: list[str], rows: list[Row]) -> str:
    header = table([]).splitlines()
    start = lines.index(header[0]) + len(header)
    end = next((i for i in range(start, len(lines)) if not lines[i].startswith("|")), len(lines))
    known = {line.split(" | ")[0].strip("| "): line for line in lines[start:end]}
    known |= {row.name: line for row, line in zip(rows, table(rows).splitlines()[len(header) :], strict=True)}
    return "\n".join([*lines[:start], *(known[name] for name in sorted(known)), *lines[end:]]) + "\n"


def main(chosen: list[str]) -> None:
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    rows, failed = [], []
    for name in chosen or names():
        try:
            rows.append(examine(name))
            print(rows[-1], file=sys.stderr, flush=True)
        except Exception as error:
            failed.append(f"- {name}: {type(error).__name__} {next(iter(str(error).strip().splitlines()), '')[:160]}")
            print(failed[-1], file=sys.stderr, flush=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()} CPU"
    print(f"Commit {commit}, {versions}, float32, one thread.\n\n{table(rows)}")
    if failed:
        print("\nNot made, or failed:\n\n" + "\n".join(failed))


if __name__ == "__main__":
    main(sys.argv[1:])
