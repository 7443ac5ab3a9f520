"""SmolLM2-135M-Instruct becomes a masked diffusion model: cross-entropy of masked tokens before and after, with and
without the shift.

    python data/quickstart_models.py
    OMP_NUM_THREADS=1 python eval/proof/ar_to_diffusion.py OUT --steps 40          # both variants, float32
    OMP_NUM_THREADS=1 python eval/proof/ar_to_diffusion.py OUT --only shift --steps 300

The text is this repository's own documentation in windows of 48 tokens, every tenth held out. Each variant is one run
of ``stage: from_ar`` on the one loop: batch 4, AdamW at 1e-4. OUT gets a folder for each, and the table ``table.md``;
what is there already is not run again. A run that was stopped goes into the table as far as it was measured.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from llmdistill import DataConfig
from llmdistill.diffusion import FromARConfig, MaskedDiffusionTrainer
from llmdistill.models.loading import load_model
from llmdistill.threads import best_thread_count

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "data" / "quickstart" / "teacher"  # SmolLM2-135M-Instruct
WINDOW, BATCH, RATE = 48, 4, 1e-4
VARIANTS: dict[str, dict[str, Any]] = {"shift": {"shift": True}, "no_shift": {"shift": False}}
COLUMNS = {"t15": "t = .15", "t50": "t = .5", "t90": "t = .9"}


def windows(tokenizer: Any) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Texts of ``WINDOW`` tokens to train on, and held-out ones."""
    files = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    ids = [i for file in files for i in tokenizer(file.read_text(), add_special_tokens=False)["input_ids"]]
    texts = [tokenizer.decode(ids[i : i + WINDOW]) for i in range(0, len(ids) - WINDOW, WINDOW)]
    rows = [{"text": text} for text in texts]
    return [row for i, row in enumerate(rows) if i % 10], rows[::10]


def run(out: Path, name: str, steps: int, heldout_windows: int, every: int) -> None:
    """One variant; its measurements are written as they come."""
    model, tokenizer = load_model(str(MODEL), "float32", "student")
    train, heldout = windows(tokenizer)
    args = FromARConfig(
        output_dir=str(out / name),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=8,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        logging_steps=5,
        save_strategy="no",
        heldout_masks=1,
        heldout_sequences=heldout_windows,
        seed=0,
        **VARIANTS[name],
    )
    trainer = MaskedDiffusionTrainer(
        model,
        args,
        train_dataset=train,
        eval_dataset=heldout,
        processing_class=tokenizer,
        data=DataConfig(text_column="text", max_text_tokens=2 * WINDOW),
        preflight=False,
    )
    file, begun = out / f"{name}.json", time.perf_counter()
    found: dict[str, Any] = {"windows": len(train), "heldout": min(heldout_windows, len(heldout)), "measured": {}}

    def measure(step: int) -> None:
        values = trainer.evaluate()
        found["measured"][step] = {k: values[f"eval_{k}/masked_ce"] for k in COLUMNS} | {
            "bound": values["eval_bound/nats"],
            "seconds": time.perf_counter() - begun,
        }
        file.write_text(json.dumps(found, indent=1))
        print(name, step, found["measured"][step], flush=True)

    from transformers import TrainerCallback

    class Every(TrainerCallback):
        """Measures between steps."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % every == 0 and state.global_step < steps:
                measure(state.global_step)

    measure(0)
    trainer.add_callback(Every())
    trainer.train()
    measure(steps)


def table(out: Path) -> str:
    """What was measured, a row for each variant and step."""
    lines = ["| | steps | " + " | ".join(COLUMNS.values()) + " | bound | seconds |", "|---|---|---|---|---|---|---|"]
    for name in VARIANTS:
        if (file := out / f"{name}.json").is_file():
            for step, values in json.loads(file.read_text())["measured"].items():
                numbers = " | ".join(f"{values[k]:.2f}" for k in (*COLUMNS, "bound"))
                lines.append(f"| {name} | {step} | {numbers} | {values['seconds']:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("out", type=Path)
    words.add_argument("--steps", type=int, default=300)
    words.add_argument("--only", choices=sorted(VARIANTS))
    words.add_argument("--heldout", type=int, default=48, help="windows that are measured")
    words.add_argument("--every", type=int, default=20, help="steps between measurements")
    given = words.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(best_thread_count() if torch.get_num_threads() > 1 else 1)
    for name in [given.only] if given.only else list(VARIANTS):
        if not (given.out / f"{name}.json").is_file():
            run(given.out, name, given.steps, given.heldout, given.every)
    text = table(given.out)
    (given.out / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
