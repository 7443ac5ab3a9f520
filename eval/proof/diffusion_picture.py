"""A picture of denoising, drawn from a real sampling: each token a cell, as dark as it was revealed early.

    python eval/proof/diffusion_arithmetic.py --seeds 0 --models RUNS --no-diversity
    python eval/proof/diffusion_picture.py RUNS/MCD --prompt '58+67=' --new 24 --out eval/proof/diffusion_picture.svg

A row for every way of writing: one token a step in the order of entropy, and by threshold. Its cells have a ground of
their own, so the page behind may be light or dark.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import torch

from llmdistill.diffusion import DiffusionGenerationConfig, MaskedDiffusionLM, generate
from llmdistill.tokenization.special import eos_ids

WAYS: dict[str, dict[str, Any]] = {
    "one token a step": {},
    "two tokens a step": {"tokens": 2},
    "threshold .9": {"select": "threshold", "threshold": 0.9},
}
EARLY, LATE, INK, PAPER = (8, 48, 107), (222, 235, 247), "#1b1f24", "#ffffff"
SIZE, GAP, ROW, LEFT, PER_LINE = 30, 3, 34, 16, 24


def shade(share: float) -> tuple[str, str]:
    """The colour of a cell that was revealed after ``share`` of the steps, and that of its text."""
    mixed = [round(a + (b - a) * share) for a, b in zip(EARLY, LATE, strict=True)]
    return "#" + "".join(f"{x:02x}" for x in mixed), PAPER if share < 0.55 else INK


def written(model: Any, tokenizer: Any, prompt: str, new: int, settings: dict[str, Any]) -> tuple[list[Any], int]:
    """(token, step it was revealed in) of the completion up to its end, and the forward passes of all."""
    ids = torch.tensor([tokenizer(prompt, add_special_tokens=False).input_ids])
    block = model.block_size or new
    given = {k: v for k, v in settings.items() if k != "tokens"}
    given |= {"denoising_steps": block // settings["tokens"]} if "tokens" in settings else {}
    config = DiffusionGenerationConfig(max_new_tokens=new, temperature=0.0, **given)
    out = generate(model, ids, config=config, eos_ids=eos_ids(model.model, tokenizer))
    shown = out.completion_mask[0]
    tokens = [tokenizer.decode([i]) for i in out.sequences[0][shown].tolist()]
    return list(zip(tokens, out.step_map[0][shown].tolist(), strict=True)), int(out.nfe)


def drawn(prompt: str, rows: dict[str, tuple[list[Any], int]], model_name: str) -> str:
    """The rows as SVG."""
    parts, y = [], 34
    for name, (cells, passes) in rows.items():
        last = max(step for _, step in cells)
        title = f"{name}: {len(cells)} tokens in {passes} forward passes"
        parts.append(f'<text x="{LEFT}" y="{y}" fill="{INK}" font-weight="600">{escape(title)}</text>')
        y += 10
        for i, (token, step) in enumerate(cells):
            x = LEFT + i % PER_LINE * (SIZE + GAP)
            y += ROW + 14 if i and i % PER_LINE == 0 else 0
            colour, ink = shade(step / max(last, 1))
            middle = x + SIZE / 2
            parts.append(f'<rect x="{x}" y="{y}" width="{SIZE}" height="{SIZE}" rx="4" fill="{colour}"/>')
            shown = escape(" ".join(token.strip("<>|").split()) or "␣")
            font = f'font-family="monospace" font-size="{13 if len(shown) < 3 else 10}"'
            parts.append(f'<text x="{middle}" y="{y + 20}" fill="{ink}" text-anchor="middle" {font}>{shown}</text>')
            parts.append(
                f'<text x="{middle}" y="{y + SIZE + 11}" fill="#57606a" text-anchor="middle" '
                f'font-size="9">{step + 1}</text>'
            )
        y += SIZE + 38
    width = 2 * LEFT + min(PER_LINE, max(len(cells) for cells, _ in rows.values())) * (SIZE + GAP)
    foot = f"{prompt} by {model_name}, greedy. Dark cells were revealed first; below each the step that revealed it."
    parts.append(f'<text x="{LEFT}" y="{y - 8}" fill="#57606a" font-size="11">{escape(foot)}</text>')
    ground = f'<rect width="{width}" height="{y + 6}" rx="8" fill="{PAPER}" stroke="#d0d7de"/>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y + 6}" font-family="sans-serif"'
    return "\n".join([f'{head} font-size="13">', ground, *parts, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a denoiser's folder")
    parser.add_argument("--prompt", default="58+67=")
    parser.add_argument("--new", type=int, default=24, help="tokens")
    parser.add_argument("--name", default="a Llama of 61,000 weights", help="what the picture calls the model")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".svg"))
    options = parser.parse_args()
    model, tokenizer = MaskedDiffusionLM.from_pretrained(options.model)
    rows = {name: written(model.eval(), tokenizer, options.prompt, options.new, way) for name, way in WAYS.items()}
    options.out.write_text(drawn(options.prompt, rows, options.name))


if __name__ == "__main__":
    main()
