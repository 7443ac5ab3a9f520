"""What writing several tokens at a time costs: accuracy of a denoiser by ``llmdistill eval`` against forward passes.

    python eval/proof/diffusion_arithmetic.py --seeds 0 --models RUNS --no-diversity    # a checkpoint and its suite
    OMP_NUM_THREADS=1 python eval/proof/diffusion_price.py RUNS/sums.yaml RUNS/MCD --block 4 --new 24

Any suite and any diffusion checkpoint will do; of a real one, say GSM8K and MBPP of LLaDA:

    python eval/proof/diffusion_price.py gsm8k mbpp GSAI-ML/LLaDA-8B-Instruct --block 32 --new 256 --trust-remote-code

Every row is an evaluation by the command, through the engine ``diffusion``; it goes on where it was stopped.
The table is printed, with 95 % intervals over problems, and written to ``--out``. Forward passes are counted on the
first ``--count`` prompts of each suite, as the evaluation asked them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from llmdistill import cli
from llmdistill.diffusion import DiffusionGenerationConfig, MaskedDiffusionLM, generate
from llmdistill.tokenization.special import eos_ids

THRESHOLDS = (0.99, 0.9, 0.7, 0.5)


def settings_of(block: int) -> dict[str, dict[str, Any]]:
    """Name -> settings of the sampler: one token a step, then more of them, by number and by certainty."""
    found: dict[str, dict[str, Any]] = {}
    tokens = 1
    while tokens <= block:
        found[f"{tokens} a step"] = {"denoising_steps": block // tokens}
        tokens *= 2
    return found | {f"threshold {t:g}": {"select": "threshold", "threshold": t} for t in THRESHOLDS}


def scored(suite: str, name: str, settings: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """One evaluation, by the command."""
    folder = options.work / name.replace(" ", "-")
    words = ["eval", suite, "--model", options.model, "--engine", "diffusion", "--dtype", options.dtype]
    drawn = {"max_new_tokens": options.new, "temperature": options.temperature, "n": options.n}
    words += ["--diffusion", json.dumps(settings), *(w for k, v in drawn.items() for w in (f"--{k}", str(v)))]
    words += ["--output_dir", str(folder), "--limit", str(options.limit), "--batch_size", str(options.batch)]
    if cli.main([*words, *(["--trust_remote_code"] if options.trust_remote_code else [])]):
        raise SystemExit(f"{suite} with {name} failed")
    found: dict[str, Any] = json.loads((folder / Path(suite).stem / "results.json").read_text())
    prompts = (folder / Path(suite).stem / "prompts.jsonl").read_text().splitlines()[: options.count]
    return found["avg"] | {"prompts": [json.loads(line)["text"] for line in prompts]}


def forwards(model: Any, tokenizer: Any, prompts: list[str], options: argparse.Namespace, **own: Any) -> float:
    """Forward passes of a completion, mean over the prompts."""
    config = DiffusionGenerationConfig(max_new_tokens=options.new, temperature=options.temperature, **own)
    counts = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt, add_special_tokens=False).input_ids], device=model.device)
        counts.append(int(generate(model, ids, config=config, eos_ids=eos_ids(model.model, tokenizer)).nfe))
    return sum(counts) / len(counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="+")
    parser.add_argument("model")
    parser.add_argument("--block", type=int, default=32, help="tokens written together")
    parser.add_argument("--new", type=int, default=256, help="longest completion")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--n", type=int, default=1, help="samples of every problem")
    parser.add_argument("--limit", type=int, default=0, help="problems of each suite; 0: all")
    parser.add_argument("--count", type=int, default=32, help="prompts that forward passes are counted on")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--work", type=Path, default=Path("runs/diffusion_price"), help="folder of the evaluations")
    parser.add_argument("--out", type=Path, help="file for the table")
    parser.add_argument("--trust-remote-code", action="store_true")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = MaskedDiffusionLM.from_pretrained(
        options.model, trust_remote_code=options.trust_remote_code, dtype=options.dtype
    )
    model = model.to(device).eval()
    shared: dict[str, Any] = {"block_length": options.block, "cache": "none" if model.block_size is None else "block"}
    columns = " | ".join(f"{Path(suite).stem} | forwards" for suite in options.suites)
    lines = [f"| revealed | {columns} |", "|---" * (1 + 2 * len(options.suites)) + "|"]
    for name, own in settings_of(options.block).items():
        cells = [name]
        for suite in options.suites:
            found = scored(suite, name, shared | own, options)
            low, value, high = (100 * found[key] for key in ("low", "value", "high"))
            passes = forwards(model, tokenizer, found["prompts"], options, **shared, **own)
            cells += [f"{value:.1f} ({low:.1f} to {high:.1f})", f"{passes:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    table = "\n".join(lines) + "\n"
    print(table)
    if options.out:
        options.out.write_text(table)


if __name__ == "__main__":
    main()
