"""SmolLM2-135M on sums that are guessed and then worked: fine-tuning against on-policy distillation at equal CPU time.

    python recipes/sums/make.py && accelerate launch -m llmdistill.redi --config recipes/sums/start.yaml
    python eval/proof/real_model.py texts                        # what the teacher writes, and data/sums/texts.jsonl
    python eval/proof/real_model.py run start opd sft repairs --seeds 0 1 2
    python eval/proof/real_model_table.py

Each run is its recipe (recipes/sums/) with another seed, stopped at the first step that ends after ``--seconds`` of the
process's CPU time, of which loading, checks and scores are no part. The texts to fine-tune on cost no time here, so
that the equal time favours fine-tuning: sampling and the teacher's passes are in the time of the on-policy run. Scores
are :func:`llmdistill.evals.evaluate` (`llmdistill eval`), greedy. Runs that are there are not made again.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from real_model_table import ARMS, RESULTS, SHARES
from transformers import TrainerCallback

from llmdistill.evals import evaluate
from llmdistill.evals.records import EvalFolder
from llmdistill.files import atomic_write
from llmdistill.methods.redi_config import REDIConfig
from llmdistill.models.generation import generate
from llmdistill.opd import OPDConfig, OPDTrainer
from llmdistill.pipeline.redi_trl import fine_tuning
from llmdistill.pipeline.run import build, load_student
from llmdistill.pipeline.stage import Stage
from llmdistill.recipe.command_line import parse
from llmdistill.record.run_folder import RunFolder
from llmdistill.texts import Prompt, Sampling
from llmdistill.texts.loading import load_rows
from llmdistill.tokenization.special import context_length

ROOT = Path(__file__).resolve().parents[2]
RECIPES, DATA, RUNS = ROOT / "recipes" / "sums", ROOT / "data" / "sums", ROOT / "runs" / "sums"
START = RUNS / "start" / "student"
WRITTEN = re.compile(r"Guess (\d+)\. (\d+) \+ (\d+) = (\d+), (\d+) \+ (\d+) = (\d+)\.")  # what `So` follows


class Clock(TrainerCallback):
    """Ends a run when it has used up its CPU time."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.used, self.steps = seconds, 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.used, self.steps = time.process_time() - self.began, state.global_step
        control.should_training_stop = self.used >= self.seconds


def write_texts() -> None:
    """The teacher's samples on read.jsonl, at temperature 1."""
    model, tokenizer = load_student(parse(OPDConfig, ["--config", str(RECIPES / "opd.yaml")]).student)
    prompts = [json.loads(line)["prompt"] for line in (DATA / "read.jsonl").read_text().splitlines()]
    lines, began, eos = list[str](), time.process_time(), (tokenizer.eos_token_id,)
    for k in range(0, len(prompts), 64):
        batch = [Prompt(list(tokenizer(text)["input_ids"]), text) for text in prompts[k : k + 64]]
        rollout = generate(model.eval(), batch, Sampling(48, seed=k), eos_ids=eos, pad_id=tokenizer.pad_token_id)
        for prompt, row, mask in zip(batch, rollout.input_ids, rollout.completion_mask, strict=True):
            text = tokenizer.decode(row[mask].tolist(), skip_special_tokens=True)
            lines.append(json.dumps({"prompt": prompt.text.split("\n\n")[0], "chosen": text}))  # without the working
    atomic_write(DATA / "texts.jsonl", "".join(f"{line}\n" for line in lines))
    print(f"{len(lines)} texts, {time.process_time() - began:.0f} CPU seconds")


def train(arm: str, seed: int, seconds: float, more: Sequence[str]) -> dict[str, Any]:
    """One run; its student is saved."""
    folder, clock = RUNS / f"{arm}-{seed}", Clock(seconds)
    shared = ["--output_dir", str(folder), "--seed", str(seed), *more]
    if arm == "opd":
        recipe = parse(OPDConfig, ["--config", str(RECIPES / "opd.yaml"), "--max_steps", "1000", *shared])
        trainer: Any = build(recipe, OPDTrainer)
        trainer.wants_preflight = False
    else:
        texts = DATA / ("texts.jsonl" if arm == "sft" else "repairs.jsonl")
        given = ["--config", str(RECIPES / "sft.yaml"), "--data.train", str(texts), "--stage1_steps", "1000", *shared]
        recipe = parse(REDIConfig, given)
        args = cast(REDIConfig, recipe.args)
        model, tokenizer = load_student(recipe.student)
        encoder = args.encoder(tokenizer, recipe.data, context_length(model.config))
        rows = encoder.encode_all(load_rows(str(texts), recipe.data, "data.train"), "data.train", positive=True)
        trainer = fine_tuning(Stage(recipe, RunFolder(folder), model, tokenizer, []), rows)
    trainer.add_callback(clock)
    trainer.train()
    model, tokenizer = trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class
    model.save_pretrained(folder / "student")
    tokenizer.save_pretrained(folder / "student")
    return {"steps": clock.steps, "cpu_seconds": round(clock.used, 1)}


def score(name: str, limit: int) -> dict[str, Any]:
    """Accuracy with its interval, each problem's verdict, and what the text says."""
    model = START if name == "start" else RUNS / name / "student"
    done = evaluate(
        RECIPES / "suite.yaml", str(model), engine="hf", dtype="float32", batch_size=100, limit=limit, workers=1,
        data_dir=str(DATA), output_dir=str(RUNS / "eval" / name),
    )  # fmt: skip
    folder = EvalFolder(done.folder)
    problems = {p.id: p for p in folder.problems()}
    grades = {grade.problem: grade.passed for grade in folder.grades()}
    said = [reading(problems[s.problem].question, s.text) for s in folder.samples()]
    shares = {key: round(statistics.mean(one[key] for one in said), 3) for key in said[0]}
    entry = {key: round(done.results["avg"][key], 4) for key in ("value", "low", "high")}
    return {"accuracy": entry, **shares, "right": {key: int(grades[key]) for key in sorted(grades)}}


def reading(question: str, text: str) -> dict[str, bool]:
    """What a text does that has the form of the rows; ``form``: it also copies the terms rightly."""
    a, b, c = (int(term) for term in question.split(" + "))
    found = WRITTEN.fullmatch(text.strip())
    if not found:
        return dict.fromkeys(SHARES, False)
    guess, p, q, first, left, r, second = map(int, found.groups())
    return {
        "form": (p, q, left, r) == (a, b, first, c),
        "guess_right": guess == a + b + c,
        "ends_at_its_guess": second == guess,
        "first_right": first == p + q,
        "second_right": second == left + r,
    }


def run(arms: Sequence[str], seeds: Sequence[int], seconds: float, limit: int, more: Sequence[str]) -> None:
    """All runs that are not there yet, seed by seed, each kept as it is done."""
    for seed in seeds:
        for arm in arms:
            name = arm if arm == "start" else f"{arm}-{seed}"
            if name in stored()["runs"]:
                continue
            made = {} if arm == "start" else train(arm, seed, seconds, more)
            made |= score(name, limit)
            found = stored()
            found["seconds"] = seconds
            found["runs"][name] = {"arm": arm, "seed": seed, **made}
            atomic_write(RESULTS, json.dumps(found, indent=1) + "\n")
            print(name, {key: value for key, value in made.items() if key != "right"}, flush=True)


def stored() -> dict[str, Any]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {"runs": {}}  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("texts", "run"))
    parser.add_argument("arms", nargs="*", choices=[*ARMS, []], default=[])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=300.0, help="CPU seconds of a run")
    parser.add_argument("--limit", type=int, default=200, help="held-out problems")
    args, more = parser.parse_known_args()
    torch.set_num_threads(1)
    if args.what == "texts":
        write_texts()
    else:
        run(args.arms, args.seeds, args.seconds, args.limit, more)


if __name__ == "__main__":
    main()
