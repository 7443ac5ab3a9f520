"""The plot of transfer.md: python eval/proof/transfer_plot.py reads the results in transfer/ and writes transfer.svg.

Bits per byte of both held-out texts, a row for each method and text trained on; a dot is a seed. Of the model's own
text what lies right of "before the transfer" is the KL from what it was.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
LEFT, WIDTH, GAP, TOP, STEP = 190, 190, 30, 56, 24
PANELS = {"own": ("its own text", 0.85, 1.5), "pairs": ("somebody else's text", 0.4, 1.5)}
NAMES = {
    "alm": "ALM",
    "sft": "fine-tuning",
    "p_kl_sft": "P-KL, fine-tuning",
    "alm_sft": "ALM, fine-tuning",
    "alm_hidden": "ALM, hidden states",
}
TEXTS = {"own": "its own", "pairs": "other's"}
ROWS = [
    *((method, text, "0.0001") for text in ("pairs", "own") for method in ("alm", "sft")),
    *((method, "own", "0.0001") for method in ("p_kl_sft", "alm_sft", "alm_hidden")),
]
STYLE = """<style>
text { fill: #1f2328 } .faint { stroke: #d1d9e0 } .line { stroke: #59636e }
.alm { fill: #0969da } .sft { fill: #bc4c00 }
@media (prefers-color-scheme: dark) {
text { fill: #f0f6fc } .faint { stroke: #3d444d } .line { stroke: #9198a1 }
.alm { fill: #4493f8 } .sft { fill: #db6d28 }
}
</style>"""


def bits(name: str) -> dict[str, float]:
    found: dict[str, Any] = json.loads((HERE / "transfer" / f"{name}.json").read_text())
    return found["bits_per_byte"]  # type: ignore[no-any-return]


def seeds(method: str, text: str, rate: str) -> list[dict[str, float]]:
    """Of every seed that has a result for twelve steps."""
    names = (f"{method}-{text}-{rate}-{seed}" for seed in range(3))
    return [bits(name) for name in names if (HERE / "transfer" / f"{name}.json").exists()]


def panel(kind: str, x0: int) -> list[str]:
    title, low, high = PANELS[kind]
    bottom = TOP + STEP * len(ROWS)

    def x(value: float) -> float:
        return round(x0 + WIDTH * (value - low) / (high - low), 1)

    parts = [f'<text x="{x0}" y="18" font-weight="bold">{title}</text>']
    for tick in (t / 10 for t in range(4, 16, 2)):
        if low <= tick <= high:
            parts.append(f'<path class="faint" d="M{x(tick)} {TOP - 8}V{bottom}"/>')
            parts.append(f'<text x="{x(tick)}" y="{bottom + 16}" text-anchor="middle">{tick:.1f}</text>')
    for name, said in (("former", "before"), ("transferred", "untrained")):
        at = x(bits(name)[kind])
        parts.append(f'<path class="line" stroke-dasharray="4 3" d="M{at} {TOP - 8}V{bottom}"/>')
        parts.append(f'<text x="{at}" y="{TOP - 14}" text-anchor="middle">{said}</text>')
    for i, (method, text, rate) in enumerate(ROWS):
        y, family = TOP + STEP * i + 8, "sft" if method == "sft" else "alm"
        for found in seeds(method, text, rate):
            parts.append(f'<circle class="{family}" cx="{x(found[kind])}" cy="{y}" r="4" fill-opacity="0.75"/>')
    return parts


def plot() -> str:
    width, height = LEFT + 2 * WIDTH + GAP + 24, TOP + STEP * len(ROWS) + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="12" role="img" aria-label="bits per byte of held-out text">',
        STYLE,
        f'<text x="{LEFT - 12}" y="18" text-anchor="end">trained on</text>',
    ]
    for i, (method, text, _) in enumerate(ROWS):
        y = TOP + STEP * i + 12
        parts.append(f'<text x="8" y="{y}">{NAMES[method]}</text>')
        parts.append(f'<text x="{LEFT - 12}" y="{y}" text-anchor="end">{TEXTS[text]}</text>')
    for k, kind in enumerate(PANELS):
        parts += panel(kind, LEFT + k * (WIDTH + GAP))
    middle = LEFT + WIDTH + GAP // 2
    parts.append(f'<text x="{middle}" y="{height - 6}" text-anchor="middle">bits per byte of held-out text</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    (HERE / "transfer.svg").write_text(plot())
