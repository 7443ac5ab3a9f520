"""Make the questions of the quick start: short ones, whose answers a person can judge at a glance.

    python data/quickstart_questions.py

writes data/quickstart/questions.jsonl and questions_heldout.jsonl, one row a line:

    {"id": "5f0c...", "prompt": [{"role": "user", "content": "What is a thermometer used for?"}], "domain": "tool"}

Kinds of questions were kept that SmolLM2-135M-Instruct answers sensibly: what a thing is, what somebody does, what a
tool is for, capitals, currencies, languages, plurals, symbols of elements. (It gets sums, opposites and colours wrong,
and a student can only become as good as its teacher.) What a question is about decides the split, by its hash: a thing
is asked about in training, in every phrasing, or held out, in one. So what is measured are answers about things of
which the student was told nothing. The three questions that the quick start shows stand first. No model is needed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

from llmdistill.files import atomic_write

HELDOUT_ONE_IN = 5

# Held out whatever their hash, and shown with their answers: the teacher's own are right.
SHOWN = ("a thermometer", "Kenya's capital", "photosynthesis")

# kind: (phrasings, what they are asked about)
QUESTIONS: dict[str, tuple[tuple[str, ...], str]] = {
    "idea": (
        ("What is {}?", "Explain {} in one sentence.", "Tell me briefly what {} is."),
        "photosynthesis|gravity|inflation|vaccination|the water cycle|evaporation|a refrigerator|plate tectonics|"
        "natural selection|a solar eclipse|democracy|machine learning|magnetism|friction|electricity|a volcano|"
        "an earthquake|a rainbow|pollution|recycling|a vitamin|a virus|a planet|the moon|a glacier|a desert|"
        "a rainforest|a river|an island|a mountain|a novel|a poem|a symphony|a museum|a library|a bank|a budget|"
        "a loan|a tax|a hospital|a university|a vote|a law|an atom|a molecule|a cell|the heart|the brain|a lung|"
        "the skin|a computer|the internet|a battery|an engine|a bicycle|an airplane|a train|a bridge|yoga|meditation|"
        "football|chess|bread|cheese|chocolate|coffee|tea|honey|rice|a salad|a garden|a forest|a bee|a whale|"
        "a dinosaur|an eagle|a fossil|an orchestra|jazz|algebra|geometry|a triangle|philosophy|psychology|biology|"
        "chemistry|astronomy|archaeology|agriculture|trade|a contract|insurance|a passport|a hurricane|a drought|"
        "erosion|osmosis|respiration|digestion|energy|sound|light",
    ),
    "tool": (
        ("What is {} used for?", "What can I do with {}?"),
        "a thermometer|a hammer|a microscope|a telescope|a compass|a ladder|a stethoscope|a calculator|a camera|"
        "a ruler|a screwdriver|a shovel|a broom|an oven|a blender|a kettle|a map|a clock|a calendar|a dictionary|"
        "an umbrella|a backpack|a tent|a helmet|a printer|a keyboard|a microphone|a magnet|a barometer|a needle|"
        "a knife|a spoon|a wheelbarrow|a saw|a wrench|a drill|a paintbrush|a lamp|a mirror|soap|a towel|"
        "a vacuum cleaner|a scale|a spreadsheet|a search engine",
    ),
    "work": (
        ("What does {} do?", "Describe the work of {}."),
        "a baker|a teacher|a doctor|a nurse|a firefighter|a farmer|a carpenter|an architect|a lawyer|a judge|a pilot|"
        "a journalist|a photographer|a chef|an engineer|an electrician|a plumber|a dentist|a veterinarian|"
        "a librarian|a scientist|a historian|an accountant|a gardener|a translator|a tailor|a programmer|a musician|"
        "an actor|a police officer|a mechanic|a pharmacist|a geologist|a biologist|an astronaut|a fisherman|a coach|"
        "an editor",
    ),
    "capital": (
        ("What is the capital of {}?", "Which city is the capital of {}?"),
        "Kenya|France|Spain|Germany|Japan|China|India|Egypt|Canada|Australia|Brazil|Argentina|Chile|Peru|Mexico|Cuba|"
        "Portugal|Greece|Turkey|Russia|Poland|Sweden|Norway|Finland|Denmark|Ireland|Austria|Hungary|Romania|Thailand|"
        "Vietnam|Indonesia|Nigeria|Ghana|Ethiopia|Morocco|Iran|Iraq|Israel|Pakistan|Nepal|New Zealand|South Korea",
    ),
    "currency": (
        ("What is the currency of {}?",),
        "Japan|China|India|the United Kingdom|Switzerland|Mexico|Brazil|Russia|South Korea|Canada|Australia|Sweden|"
        "Norway|Turkey|Egypt|Israel|Thailand|Poland|Denmark|South Africa",
    ),
    "language": (
        ("What language is spoken in {}?",),
        "Spain|France|Germany|Italy|Portugal|Brazil|Mexico|Japan|China|Russia|Egypt|Greece|Turkey|Sweden|Poland|"
        "Finland|Argentina|Thailand|Vietnam|South Korea|Hungary|the Netherlands",
    ),
    "plural": (
        ("What is the plural of '{}'?",),
        "child|mouse|foot|tooth|woman|man|goose|box|city|leaf|knife|wolf|baby|party|church|bus|tomato|hero|photo|"
        "fish|sheep|person|life|dish|story|country|family|watch|half|shelf",
    ),
    "symbol": (
        ("What is the chemical symbol of {}?",),
        "gold|silver|iron|copper|oxygen|hydrogen|carbon|nitrogen|sodium|potassium|calcium|helium|lead|tin|zinc|"
        "mercury|chlorine|magnesium|aluminum|sulfur|neon|nickel",
    ),
}


def is_shown(kind: str, about: str) -> bool:
    return about in SHOWN or f"{about}'s {kind}" in SHOWN


def is_held_out(kind: str, about: str) -> bool:
    """Whether `about` is held out: one in five, by its hash, and what is shown."""
    return (
        is_shown(kind, about)
        or int(hashlib.sha256(f"{kind}/{about}".encode()).hexdigest()[:8], 16) % HELDOUT_ONE_IN == 0
    )


def make_rows() -> tuple[list[dict], list[dict]]:
    """(training rows, held-out rows), each sorted by id, which mixes the kinds; the shown ones first."""
    train, held = [], []
    for kind, (phrasings, things) in QUESTIONS.items():
        for about in things.split("|"):
            apart = is_held_out(kind, about)
            for text in (phrase.format(about) for phrase in (phrasings[:1] if apart else phrasings)):
                key = hashlib.sha256(text.encode()).hexdigest()[:16]
                row = {"id": key, "prompt": [{"role": "user", "content": text}], "domain": kind}
                (held if apart else train).append((not is_shown(kind, about), key, row))
    return tuple([row for _, _, row in sorted(rows, key=lambda r: r[:2])] for rows in (train, held))  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("data/quickstart"), help="folder for both files")
    args = parser.parse_args()
    for name, rows in zip(("questions", "questions_heldout"), make_rows(), strict=True):
        path = args.out / f"{name}.jsonl"
        atomic_write(path, "".join(json.dumps(row) + "\n" for row in rows))
        print(f"{path}: {len(rows)} questions")


if __name__ == "__main__":
    main()
