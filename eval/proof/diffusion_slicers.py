"""Row 19: what the states are worth in which reinforcement takes its log-probs, on a toy with several right answers.

    OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 python eval/proof/diffusion_slicers.py --seeds 0 1 2      # writes .json and .md

A prompt names the step of an arithmetic progression modulo 6, of which six terms are to be written: any of six starts
is right. A first model is trained on progressions with some wrong terms until it is right in a tenth of 300 samples or
so (how many steps that takes differs by a factor of three between seeds); from there each slicer takes the same updates
with the same rewards. For each: the share of right answers, and the entropy in nats of their starts (at most 1.79).

Held to (means over the seeds): trace, random and coupled masks at least three times their start, and the trace above
full masks by .05. Not held to: that full masks gain at all (here they do not), that the trace is above random or
coupled masks, and that it keeps more of the starts than full masks do: at this learning rate it mostly keeps one of
each prompt.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
)
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from llmdistill.diffusion.backbone import MaskedDiffusionLM
from llmdistill.diffusion.generation_config import DiffusionGenerationConfig
from llmdistill.diffusion.rl_stage import DiffusionRLConfig
from llmdistill.diffusion.rl_trainer import DiffusionRLTrainer
from llmdistill.diffusion.sampling import generate
from llmdistill.diffusion.stages import SFTConfig
from llmdistill.diffusion.trainers import MaskedDiffusionTrainer
from llmdistill.recipe.config import RolloutConfig
from llmdistill.record.run_folder import RunFolderCallback

BASE, TERMS = 6, 6
STEPS = {"a": 1, "b": 2, "c": 5}
SLICERS = ("trace", "random", "coupled", "full")
WRONG, RIGHT = 0.15, 0.08  # of the first model: share of wrong terms in its text, and of right samples it stops at
HERE = Path(__file__).resolve().parent


def tokenizer() -> PreTrainedTokenizerFast:
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", *"012345", *STEPS])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")


def progression(name: str, start: int) -> str:
    return "".join(str((start + STEPS[name] * i) % BASE) for i in range(TERMS))


def is_right(name: str, text: str) -> bool:
    return len(text) == TERMS and text[0].isdigit() and text == progression(name, int(text[0]))


def reward(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
    return [float(is_right(p[-1], text)) for p, text in zip(prompts, completions, strict=True)]


def careless(rng: random.Random, wrong: float) -> dict[str, str]:
    """A row whose terms are each replaced with probability ``wrong``."""
    name = rng.choice(list(STEPS))
    terms = progression(name, rng.randrange(BASE))
    return {
        "prompt": name,
        "completion": "".join(str(rng.randrange(BASE)) if rng.random() < wrong else term for term in terms),
    }


def shared(seed: int, steps: int, lr: float, batch: int) -> dict[str, Any]:
    return dict(
        output_dir=tempfile.mkdtemp(prefix="slicers"),
        per_device_train_batch_size=batch,
        learning_rate=lr,
        lr_scheduler_type="constant",
        max_steps=steps,
        logging_steps=1_000_000,
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        report_to="none",
        seed=seed,
        chunk_tokens=8192,
        shift=False,
    )


def run(trainer: Any) -> float:
    """Trains; CPU seconds of this process."""
    for callback in (RunFolderCallback, PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    begun = time.process_time()
    trainer.train()
    return time.process_time() - begun


def score(trainer: Any, tok: PreTrainedTokenizerFast, count: int = 300) -> dict[str, float]:
    model = MaskedDiffusionLM(trainer.model.eval(), trainer.denoiser.mask_token_id, probe=False)
    names = list(STEPS) * (count // len(STEPS))
    prompts = torch.tensor([tok(name, add_special_tokens=False).input_ids for name in names])
    config = DiffusionGenerationConfig(max_new_tokens=TERMS + 1)
    out = generate(model, prompts, config=config, eos_ids=[1], generator=torch.Generator().manual_seed(0))
    texts = tok.batch_decode(
        [row[mask].tolist() for row, mask in zip(out.sequences, out.completion_mask, strict=True)],
        skip_special_tokens=True,
    )
    right = [(name, text[0]) for name, text in zip(names, texts, strict=True) if is_right(name, text)]
    entropies = []
    for name in STEPS:
        counts = Counter(start for of, start in right if of == name)
        total = sum(counts.values())
        entropies.append(-sum(c / total * math.log(c / total) for c in counts.values()) if total else 0.0)
    return {"right": len(right) / len(names), "entropy": statistics.fmean(entropies)}


class UntilRight(TrainerCallback):
    """Ends training when a share of ``least`` of the samples is right, looked at every ``every`` steps."""

    def __init__(self, trainer: Any, tok: PreTrainedTokenizerFast, least: float, every: int = 50) -> None:
        self.trainer, self.tok, self.least, self.every = trainer, tok, least, every

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            control.should_training_stop = score(self.trainer, self.tok)["right"] >= self.least
            self.trainer.model.train()


def one_seed(seed: int, updates: int, prompts: int, sft_steps: int, keep: Any) -> dict[str, Any]:
    rng, tok = random.Random(seed), tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tok),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config).float()
    rows = [careless(rng, WRONG) for _ in range(2000)]
    args = SFTConfig(**shared(seed, sft_steps, 3e-3, 32))
    start = MaskedDiffusionTrainer(model, args, train_dataset=rows, preflight=False, processing_class=tok)
    start.add_callback(UntilRight(start, tok, RIGHT))
    seconds = run(start)
    found: dict[str, Any] = {"start": {**score(start, tok), "steps": start.state.global_step, "seconds": seconds}}
    asked = [{"prompt": name} for name in STEPS] * 700
    for slicing in SLICERS:
        rollouts = RolloutConfig(max_new_tokens=TERMS + 1, samples_per_prompt=8, batch_tokens=8192)
        rl = DiffusionRLConfig(
            **shared(seed, updates, 1e-3, prompts), rollouts=rollouts, slicing=slicing, keep_low=0.01, keep_high=0.99
        )
        student = copy.deepcopy(start.model)
        trainer = DiffusionRLTrainer(
            student, rl, reward=reward, train_dataset=asked, preflight=False, processing_class=tok
        )
        seconds = run(trainer)
        found[slicing] = {**score(trainer, tok), "seconds": seconds}
        print(seed, slicing, found[slicing], "from", found["start"], flush=True)
        keep(found)
    return found


def table(results: dict[int, dict[str, Any]], about: str) -> str:
    """Means over the seeds, and in brackets one by one."""

    def cell(name: str, key: str, digits: int) -> str:
        values = [results[seed][name][key] for seed in sorted(results)]
        return f"{statistics.fmean(values):.{digits}f} ({', '.join(f'{v:.{digits}f}' for v in values)})"

    lines = ["# What the states are worth in which reinforcement takes its log-probs", "", about, ""]
    lines += ["| log-probs in | right | entropy of right answers, nats | CPU s |", "|---|---|---|---|"]
    for name in ("start", *SLICERS):
        lines.append(f"| {name} | {cell(name, 'right', 3)} | {cell(name, 'entropy', 2)} | {cell(name, 'seconds', 0)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--sft-steps", type=int, default=1500, help="at most")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of .json and .md")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    file, done = options.out / "diffusion_slicers.json", dict[int, dict[str, Any]]()

    def keep(seed: int, found: dict[str, Any]) -> None:
        done[seed] = found
        file.write_text(json.dumps({"updates": options.updates, "seeds": done}, indent=1) + "\n")

    for seed in options.seeds:
        one_seed(seed, options.updates, options.prompts, options.sft_steps, partial(keep, seed))
    about = (
        f"`eval/proof/diffusion_slicers.py --seeds {' '.join(map(str, options.seeds))}`: {options.updates} updates of "
        f"{options.prompts} prompts of 8 samples, AdamW at 1e-3, from one first model a seed; 300 samples of each. "
        "Means over the seeds, and one by one."
    )
    (options.out / "diffusion_slicers.md").write_text(table(done, about))
    mean = {
        name: {key: statistics.fmean(of_seed[name][key] for of_seed in done.values()) for key in ("right", "entropy")}
        for name in ("start", *SLICERS)
    }
    print(json.dumps(mean, indent=1))
    least = {name: mean[name]["right"] >= 3 * mean["start"]["right"] for name in SLICERS if name != "full"}
    assert all(least.values()), least
    assert mean["trace"]["right"] > mean["full"]["right"] + 0.05


if __name__ == "__main__":
    main()
