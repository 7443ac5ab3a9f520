"""Start-up before the first step: seconds, and memory, by the number of prompts; the first start and the second.

    OMP_NUM_THREADS=1 python eval/perf/startup.py --prompts 10000 100000 1000000 --again 3

Each start is a process of its own: it reads a file of JSON lines through ``datasets``, encodes every row with a chat
template, and makes an OPDTrainer, whose start-up checks it runs. The first start finds no cache of any kind, the next
ones what it left. ``objects`` is the same with the rows encoded into Python objects, as they were before they stood in
Arrow. Models are tiny: what is measured is the rows' share.

- ``rows``: seconds from the file to examples. ``start``: these, and the trainer with its checks; imports left out.
- ``anonymous``: the most memory of the process's own at any time (RssAnon, looked at every 20 ms) less what it had
  before the rows. ``resident``: VmHWM less the same; it counts pages of files that the kernel may take back.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from eval.perf.record import ROOT, add_results_option, note

GIB = 2**20  # /proc counts in KiB
WORDS = (
    "sum",
    "of",
    "the",
    "first",
    "prime",
    "numbers",
    "below",
    "triangle",
    "angle",
    "find",
    "x",
    "if",
    "then",
    "how",
)


def write_prompts(file: Path, count: int, words: int) -> None:
    """Rows of chat messages, their lengths spread evenly around ``words``."""
    draw = random.Random(0)
    with file.open("w") as lines:
        for i in range(count):
            said = " ".join(draw.choices(WORDS, k=draw.randint(words // 2, words * 3 // 2)))
            lines.write(json.dumps({"prompt": [{"role": "user", "content": f"{i}: {said}"}], "answer": str(i)}) + "\n")


class Memory(threading.Thread):
    """The most anonymous memory of this process since it was started, KiB."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.over = 0, threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.02):
            self.most = max(self.most, kib("RssAnon"))


def kib(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def start(file: str, folder: str, kind: str) -> dict[str, float]:
    """One start in this process."""
    import datasets
    import torch

    from llmdistill import DataConfig, OPDConfig, OPDTrainer, RolloutConfig
    from llmdistill.preflight import preflight
    from llmdistill.texts import encoded_rows
    from llmdistill.texts.loading import load_rows
    from tests import tiny

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    datasets.disable_progress_bars()
    if kind == "objects":
        encoded_rows.SHORT = 1 << 60
        encoded_rows._dataset_of = lambda rows: None
    args = OPDConfig(
        output_dir=str(Path(folder) / "run"),
        max_steps=1,
        report_to=[],
        rollouts=RolloutConfig(max_new_tokens=4),
        per_device_train_batch_size=2,
    )
    models, tokenizer = (tiny.llama(1), tiny.llama(2)), tiny.tokenizer()
    for model in models:
        model.config.max_position_embeddings = 2048
    before, watch, began = kib("RssAnon"), Memory(), time.perf_counter()
    watch.start()
    data = DataConfig(train=file, max_prompt_tokens=1500)
    rows = load_rows(file, data, "data.train")
    trainer = OPDTrainer(
        models[0], args, teacher=models[1], train_dataset=rows, processing_class=tokenizer, data=data, preflight=False
    )
    encoded = time.perf_counter() - began
    preflight(trainer)
    next(iter(trainer.get_train_dataloader()))
    started = time.perf_counter() - began
    watch.over.set()
    watch.join()
    resident = kib("VmHWM") - before
    return {"rows": encoded, "start": started, "anonymous": (watch.most - before) / GIB, "resident": resident / GIB}


def in_a_process(file: Path, folder: Path, kind: str) -> dict[str, float]:
    words = [sys.executable, __file__, "--file", str(file), "--folder", str(folder), "--kind", kind]
    environment = {**os.environ, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def measure(count: int, options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_prompts(folder / "prompts.jsonl", count, options.words)
        for kind in options.kinds:
            (folder / kind).mkdir()
            runs = [in_a_process(folder / "prompts.jsonl", folder / kind, kind) for _ in range(1 + options.again)]
            for which, found in (("first", runs[:1]), ("second", runs[1:])):
                for unit, what in (("s", "rows"), ("s", "start"), ("GiB", "anonymous"), ("GiB", "resident")):
                    if found:
                        values = [run[what] for run in found]
                        note(
                            "startup", f"{kind}, {count} prompts, {which} start: {what}", unit, values, options.results
                        )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--words", type=int, default=20, help="of a prompt, on average")
    parser.add_argument("--again", type=int, default=3, help="starts after the first")
    parser.add_argument("--kinds", nargs="+", choices=("arrow", "objects"), default=["arrow"])
    add_results_option(parser)
    for hidden in ("--file", "--folder", "--kind"):
        parser.add_argument(hidden, default="", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.file:
        found: Any = start(options.file, options.folder, options.kind)
        print(json.dumps(found))
        return
    for count in options.prompts:
        measure(count, options)


if __name__ == "__main__":
    main()
