"""A masked diffusion model on the arena's arithmetic, from nothing: SFT, TraceRL, MCD, in minutes on two cores.

    OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 python eval/proof/diffusion_arithmetic.py --seeds 0 1 2    # writes .json
    python eval/proof/diffusion_arithmetic.py --table                             # .md and .svg from what is there
    … --seeds 0 --models FOLDER --no-diversity     # keeps the checkpoint of each stage, and a suite of the problems
    … --seeds 0 --models FOLDER --out FOLDER --block 24 --only-sft     # all of an answer is one block

Two-digit additions with every column written out; the trainers are llmdistill.diffusion's. SFT is on text whose answer
is wrong in two of five rows (its columns are right), TraceRL is rewarded for right answers, and MCD is on what the
reinforced model writes itself, so that it learns nothing new but to need fewer steps. Its control is as many steps of
SFT on the same text. After each stage: exact answers on held-out problems and forward passes per answer, for one token
a step and for parallel decoding by threshold, greedy and at temperature 1. After SFT also pass@8 and distinct right
texts against temperature, with ODD and without.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "arena"))

import torch
from models import EOS_ID, PAD_ID, TOKENIZER, Size, ids
from task import Problem, heldout, longest, problems
from transformers import PrinterCallback, ProgressCallback
from transformers.utils import logging as transformers_logging

from llmdistill.diffusion.backbone import MaskedDiffusionLM
from llmdistill.diffusion.diversity import OrthogonalRepulsion
from llmdistill.diffusion.generation_config import DiffusionGenerationConfig
from llmdistill.diffusion.rl_stage import DiffusionRLConfig
from llmdistill.diffusion.rl_trainer import DiffusionRLTrainer
from llmdistill.diffusion.sampling import DiffusionOutput, generate
from llmdistill.diffusion.stages import SFTConfig
from llmdistill.diffusion.steps_stage import StepDistillationConfig
from llmdistill.diffusion.steps_trainer import StepDistillationTrainer
from llmdistill.diffusion.trainers import MaskedDiffusionTrainer
from llmdistill.evals.metrics import pass_at_k
from llmdistill.recipe.config import RolloutConfig
from llmdistill.record.run_folder import RunFolderCallback

HERE = Path(__file__).resolve().parent
DIGITS = 2
BLOCK = 4
LENGTH = -(-longest(DIGITS) // BLOCK) * BLOCK
SIZE = Size(48, 2, 4, 144)
DECODING: dict[str, dict[str, Any]] = {
    "greedy, 4 steps a block": {"temperature": 0.0},
    "greedy, 2": {"temperature": 0.0, "denoising_steps": 2},
    "greedy, 1": {"temperature": 0.0, "denoising_steps": 1},
    "greedy, threshold .9": {"temperature": 0.0, "select": "threshold", "threshold": 0.9},
    "sampled, 4": {"temperature": 1.0},
    "sampled, 2": {"temperature": 1.0, "denoising_steps": 2},
}
TEMPERATURES = (0.2, 0.6, 1.0, 1.4)
ALPHAS = (0.0, 1.0, 4.0)
WRONG = 0.4  # share of wrong answers in the text of SFT
DIVERSE = 32  # problems that pass@8 is of


def shared(seed: int, steps: int, lr: float, batch: int, **changes: Any) -> dict[str, Any]:
    return dict(
        output_dir=tempfile.mkdtemp(prefix="diffusion"),
        per_device_train_batch_size=batch,
        learning_rate=lr,
        max_steps=steps,
        warmup_steps=min(20, steps // 5),
        logging_steps=1_000_000,
        save_strategy="no",
        optim="adamw_torch_fused",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        report_to="none",
        seed=seed,
        chunk_tokens=8192,
        max_grad_norm=1.0,
        **changes,
    )


def reward(prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    return [float(text.rpartition(";")[2] == right) for text, right in zip(completions, answer, strict=True)]


def rows(items: Sequence[Problem]) -> list[dict[str, str]]:
    return [{"prompt": p.prompt, "completion": p.completion, "answer": str(p.answer)} for p in items]


def careless(items: Sequence[Problem], seed: int) -> list[dict[str, str]]:
    """Rows whose answer is another number, a carry or a one away, with probability ``WRONG``."""
    rng, found = random.Random(seed), rows(items)
    for row, p in zip(found, items, strict=True):
        if rng.random() < WRONG:
            wrong = p.answer + rng.choice((-10, -1, 1, 10))
            row["completion"] = f"{row['completion'].rpartition(';')[0]};{wrong}"
    return found


def own_writing(model: Any, items: Sequence[Problem], seed: int) -> list[dict[str, str]]:
    """What the model writes at temperature 1, one token a step; what has no end is left out."""
    out = written(model, items, seed=seed, temperature=1.0)
    found = zip(items, texts(out), out.finish, strict=True)
    return [{"prompt": p.prompt, "completion": text} for p, text, finish in found if finish == "stop" and text]


def run(trainer: Any) -> float:
    """Trains; CPU seconds of this process."""
    for callback in (RunFolderCallback, PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    start = time.process_time()
    trainer.train()
    return time.process_time() - start


def denoiser_of(trainer: Any) -> MaskedDiffusionLM:
    d = trainer.denoiser
    return MaskedDiffusionLM(trainer.model.eval(), d.mask_token_id, shift=d.shift, block_size=d.block_size, probe=False)


def texts(out: DiffusionOutput) -> list[str]:
    found = [row[mask].tolist() for row, mask in zip(out.sequences, out.completion_mask, strict=True)]
    return TOKENIZER.batch_decode(found, skip_special_tokens=True)


def written(model: Any, items: Sequence[Problem], processors: Sequence[Any] = (), seed: int = 0, **c: Any) -> Any:
    prompts = torch.tensor([ids(p.prompt) for p in items])
    config = DiffusionGenerationConfig(max_new_tokens=LENGTH, cache="block", **c)
    generator = torch.Generator().manual_seed(seed)
    return generate(model, prompts, config=config, eos_ids=[EOS_ID], logits_processor=processors, generator=generator)


def score(model: Any, items: Sequence[Problem]) -> dict[str, dict[str, float]]:
    found = {}
    for name, settings in DECODING.items():
        out = written(model, items, **settings)
        right = [p.solved_by(text) for p, text in zip(items, texts(out), strict=True)]
        found[name] = {"exact": sum(right) / len(items), "forwards": float(out.nfe.double().mean())}
    return found


def diversity(model: Any, items: Sequence[Problem], k: int = 8) -> list[dict[str, float]]:
    """pass@k, and different right texts of k samples, by temperature and alpha."""
    found = []
    for temperature in TEMPERATURES:
        for alpha in ALPHAS:
            processors = [OrthogonalRepulsion(alpha, groups=k, protected_ids=(EOS_ID, PAD_ID))] if alpha else []
            repeated = [p for p in items for _ in range(k)]
            out = written(model, repeated, processors, temperature=temperature, denoising_steps=2)
            answers = texts(out)
            right = [p.solved_by(text) for p, text in zip(repeated, answers, strict=True)]
            groups = [slice(i * k, i * k + k) for i in range(len(items))]
            found.append(
                {
                    "temperature": temperature,
                    "alpha": alpha,
                    "pass@1": statistics.fmean(right),
                    f"pass@{k}": statistics.fmean(pass_at_k(k, sum(right[g]), k) for g in groups),
                    f"distinct@{k}": statistics.fmean(len(set(answers[g])) for g in groups),
                }
            )
    return found


def save(trainer: Any, folder: Path, items: Sequence[Problem]) -> None:
    """The checkpoint of a stage, and beside it the held-out problems as a suite of ``llmdistill eval``, whose answer
    is all that is to be written: columns and number."""
    trainer.save_model(str(folder))
    lines = [{"id": p.prompt, "question": p.prompt, "answer": p.completion} for p in items]
    (folder.parent / "sums.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    suite = {
        "suite": "sums",
        "kind": "math",
        "data": {"file": "sums.jsonl"},
        "template": {"user": "{question}", "chat": False},
        "sampling": {"n": 1, "temperature": 0.0, "max_new_tokens": LENGTH},
    }
    (folder.parent / "sums.yaml").write_text(json.dumps(suite, indent=1) + "\n")  # JSON is YAML


def one_seed(
    seed: int,
    steps: Sequence[int],
    held: int,
    keep: Callable[[dict[str, Any]], None],
    with_diversity: bool = True,
    models: Path | None = None,
    block: int = BLOCK,
    only_sft: bool = False,
) -> dict[str, Any]:
    items, pool = heldout(held, digits=DIGITS), problems(3000, seed, digits=DIGITS)
    result: dict[str, Any] = {"seed": seed, "stages": {}}
    model, tokenizer = SIZE.build(seed), copy.deepcopy(TOKENIZER)  # which gets a mask token

    def note(stage: str, trainer: Any, seconds: float) -> None:
        scores = score(denoiser_of(trainer), items)
        result["stages"][stage] = {"cpu_seconds": seconds, "decoding": scores}
        shown = {k: (round(v["exact"], 3), round(v["forwards"], 1)) for k, v in scores.items()}
        print(seed, stage, f"{seconds:.0f} s", shown, flush=True)
        keep(result)
        if models is not None:
            save(trainer, models / stage.replace(" ", "-").replace(",", ""), items)

    common = {"processing_class": tokenizer}
    reads: dict[str, Any] = {"shift": False, "block_size": block}
    args = SFTConfig(**shared(seed, steps[0], 6e-3, 32), **reads, weighting="uniform")
    sft = MaskedDiffusionTrainer(model, args, train_dataset=careless(pool, seed), preflight=False, **common)
    note("SFT", sft, run(sft))
    if with_diversity:
        result["diversity"] = diversity(denoiser_of(sft), items[:DIVERSE])
        keep(result)
    if only_sft:
        return result
    rollouts = RolloutConfig(max_new_tokens=LENGTH, samples_per_prompt=8, batch_tokens=8192)
    args_rl = DiffusionRLConfig(
        **shared(seed, steps[1], 1e-3, 16),
        **reads,
        rollouts=rollouts,
        writing={"cache": "block"},
        keep_low=0.1,
        keep_high=0.9,
    )
    rl = DiffusionRLTrainer(model, args_rl, reward=reward, train_dataset=rows(pool), preflight=False, **common)
    note("TraceRL", rl, run(rl))
    own = own_writing(denoiser_of(rl), pool[:1500], seed)
    args_more = SFTConfig(**shared(seed, steps[2], 1e-3, 32), **reads, weighting="uniform")
    start = copy.deepcopy(rl.model)
    more = MaskedDiffusionTrainer(start, args_more, train_dataset=own, preflight=False, **common)
    note("SFT on own text", more, run(more))
    rounds = 2
    args_mcd = StepDistillationConfig(
        **shared(seed, steps[2], 1e-3, 32), **reads, first_step=1 / 4, rounds=rounds, round_steps=steps[2] // rounds
    )
    mcd = StepDistillationTrainer(model, args_mcd, train_dataset=own, preflight=False, **common)
    note("MCD", mcd, run(mcd))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, nargs=3, default=[1400, 60, 120], help="of SFT, TraceRL, MCD")
    parser.add_argument("--heldout", type=int, default=200)
    parser.add_argument("--no-diversity", action="store_true", help="leave pass@8 out")
    parser.add_argument("--block", type=int, default=BLOCK, help="tokens; 24 holds any answer")
    parser.add_argument("--only-sft", action="store_true", help="leave the other stages out")
    parser.add_argument("--models", type=Path, help="folder for the stages' checkpoints")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of .json, .md and .svg")
    parser.add_argument("--table", action="store_true", help="only write .md and .svg from the .json")
    options = parser.parse_args()
    file = options.out / "diffusion_arithmetic.json"
    warnings.filterwarnings("ignore")
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    known = {r["seed"]: r for r in json.loads(file.read_text())} if file.exists() else {}

    def keep(result: dict[str, Any]) -> None:
        known[result["seed"]] = {**result, "steps": options.steps, "heldout": options.heldout}
        file.write_text(json.dumps([known[s] for s in sorted(known)], indent=1) + "\n")

    for seed in () if options.table else options.seeds:
        diverse, more = not options.no_diversity, (options.models, options.block, options.only_sft)
        keep(one_seed(seed, options.steps, options.heldout, keep, diverse, *more))
    if options.only_sft:
        return
    from diffusion_arithmetic_table import write

    write([known[s] for s in sorted(known)], options.out)


if __name__ == "__main__":
    main()
