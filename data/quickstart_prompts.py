"""Make the prompts of the quick start: short problems and everyday requests, split into training and held-out.

    python data/quickstart_prompts.py                  # 2000 training and 200 held-out prompts, about 3 s
    python data/quickstart_prompts.py --size 5000      # 5000 and 500

writes data/quickstart/train.jsonl and heldout.jsonl, one row a line:

    {"id": "5f0c...", "prompt": [{"role": "user", "content": "..."}], "domain": "reasoning_gym/gcd" or "everyday"}

Seven in ten rows are problems of twenty reasoning-gym tasks in equal shares, chosen for short statements; three in ten
are everyday requests (explain, list, rewrite, a letter, a word problem, ...) composed from the lists below, so that
the student is also seen on prose. The id is the hash of the text and decides the split: whatever the size, seed or
order, a prompt is always training or always held-out. Rows are sorted by id, which mixes the domains.

Prompts have no system turn. SmolLM2's template then adds its own, 30 tokens with the generation prompt; with it no
prompt is longer than 110 tokens, so a rollout of 40 tokens stays within 150. No model is needed to run this script.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from llmdistill.files import atomic_write

SEED = 20261
EVERYDAY_SHARE = 0.3
HELDOUT_ONE_IN = 10
MAX_PIECES = 72  # words, digits and signs, about what SmolLM2's tokenizer makes of them; measured: <= 110 tokens

# reasoning-gym tasks and their settings; {} is the task's own default.
TASKS: dict[str, dict[str, int]] = {
    "aiw": {},
    "basic_arithmetic": {},
    "calendar_arithmetic": {},
    "chain_sum": {},
    "coin_flip": {"max_trials": 30},
    "complex_arithmetic": {},
    "count_bits": {},
    "family_relationships": {},
    "fraction_simplification": {},
    "gcd": {},
    "gsm_symbolic": {},
    "lcm": {},
    "leg_counting": {"max_animals": 5},
    "letter_counting": {},
    "number_sequence": {},
    "prime_factorization": {},
    "sentence_reordering": {},
    "simple_equations": {},
    "spell_backward": {},
    "syllogism": {},
}

# Everyday requests: each template is filled with every combination of the lists it names.
EVERYDAY = [
    "Explain {topic} {manner}.",
    "What is {topic}, and why does it matter?",
    "Give me {few} facts about {topic}.",
    "What is the difference between {pair}?",
    "List {few} {things}.",
    "I need {few} {things}. Add one sentence to each.",
    "Rewrite this sentence so that it sounds {tone}: {sentence}",
    "Say this in fewer words: {sentence} Keep a {tone} tone.",
    "What does the word '{word}' mean? {example}",
    "Give {few} words that mean nearly the same as '{word}'.",
    "Write a short {message} to {person} {purpose}.",
    "How do I {chore}? {steps}",
    "What should I keep in mind when I {chore} for the first time?",
    "Is this review positive or negative? '{review}' {because}",
    "Write the first two sentences of a story about {hero} {place}.",
    "Write a {mood} poem of four lines about {hero}.",
]
WORDS = {
    "topic": (
        "photosynthesis|gravity|inflation|vaccination|the water cycle|compound interest|a refrigerator|the tide|"
        "plate tectonics|recursion in programming|natural selection|a solar eclipse|supply and demand|the ozone layer|"
        "a rechargeable battery|blood circulation|democracy|machine learning|yeast|sonar|magnetism"
    ),
    "manner": "in two sentences|to a ten-year-old|with an everyday example|in one short paragraph|in simple words",
    "pair": (
        "weather and climate|a virus and a bacterium|a comet and an asteroid|a city and a town|speed and velocity|"
        "a debit card and a credit card|baking powder and baking soda|a novel and a short story|mass and weight|"
        "a lake and a pond|jam and jelly|an opinion and a fact|RAM and a hard disk|a crocodile and an alligator"
    ),
    "few": "three|four|five",
    "things": (
        "healthy breakfast ideas|things to pack for a camping trip|ways to save water at home|"
        "good habits for studying|countries in South America|indoor games for a rainy day|"
        "kitchen tools every cook needs|uses for old newspapers|questions to ask in a job interview|"
        "plants that grow well in shade|ways to thank a colleague|musical instruments|tips for better sleep|"
        "gifts for a grandmother|names for a grey cat|rules for a shared kitchen"
    ),
    "tone": "more polite|more formal|friendlier|more confident|calmer",
    "sentence": (
        "Send me the report by noon.|You forgot to call the bank again.|We can't come to your party on Saturday.|"
        "The food was cold and the waiter was rude.|I don't understand what you want from me.|"
        "This plan costs too much and takes too long.|Stop parking in front of my garage.|"
        "I think maybe we could try the other design.|The meeting is moved because nobody was ready.|"
        "My train is late, so start without me."
    ),
    "word": (
        "curious|frugal|resilient|ambiguous|generous|reluctant|vivid|obsolete|candid|meticulous|gloomy|swift|humble|"
        "fragile|abundant|clumsy|sincere|tedious|brave|subtle"
    ),
    "example": "Use it in a sentence.|Answer in one sentence.|Give an example from daily life.",
    "message": "email|letter|note|text message",
    "person": "my neighbour|my landlord|my teacher|a colleague|my aunt|the local library|my football coach",
    "purpose": (
        "to say thank you for helping me move|to apologise for being late|to ask for a day off|"
        "to ask about opening hours|to invite them to a birthday dinner|to report a broken window|"
        "to wish them a good recovery|to suggest a new date"
    ),
    "chore": (
        "boil an egg|change a bicycle tyre|remove a coffee stain|plan a weekly budget|plant tomatoes|make pancakes|"
        "write a CV|train a puppy to sit|clean a keyboard|learn ten new words a day|pack a suitcase|"
        "wash a wool sweater|make green tea|back up my photos"
    ),
    "steps": "Give short steps.|Answer in at most three steps.|Tell me what I need first.",
    "review": (
        "The battery lasts two days and charging is quick.|It broke after a week and nobody answered my emails.|"
        "A slow start, but the ending made me cry.|The room was smaller than in the pictures, and noisy.|"
        "Best soup I have had in years.|Fine for the price, but I would not buy it twice.|"
        "The app crashes whenever I open the map.|Our guide was funny and knew every street."
    ),
    "because": "Answer with one word.|Give a reason in one sentence.|Say how sure you are.",
    "hero": (
        "an old clockmaker|a lost kite|two brothers|a lighthouse keeper|a clever crow|a girl with a red umbrella|"
        "a robot gardener|a retired pilot|a shy baker|a wandering cat"
    ),
    "place": "in a mountain village|on a rainy morning|at a busy market|on the last day of summer|in an empty museum",
    "name": "Anna|Ben|Clara|David|Emma|Farid|Grace|Hugo|Ines|Jonas|Kira|Liam|Maya|Noah|Olga|Pedro",
    "item": "apples|pencils|stickers|tickets|marbles|notebooks|cookies|postcards|buttons|candles",
    "mood": "cheerful|quiet|funny|sad",
}
WORD_PROBLEMS = [
    "{who} buys {a} {item} at {b} dollars each and pays with {c} dollars. How much change does {who} get?",
    "{who} has {c} {item} and gives {a} to each of {b} friends. How many {item} are left?",
    "A train travels {a} kilometres in {b} minutes. How far does it travel in one hour at that speed?",
    "{who} reads {a} pages a day. How many days does {who} need for a book of {c} pages?",
    "A box holds {b} rows of {a} {item}. How many {item} are in {d} boxes?",
    "{who} works {a} hours a day for {b} days and earns {d} dollars an hour. How much does {who} earn?",
]


def problems(per_task: int) -> Iterator[tuple[str, str]]:
    """(domain, text) of up to `per_task` problems of each task."""
    import reasoning_gym  # here: importing it takes a second that --help need not wait for

    for task, settings in TASKS.items():
        dataset = reasoning_gym.create_dataset(task, size=per_task, seed=SEED, **settings)
        for index in range(per_task):
            yield f"reasoning_gym/{task}", dataset[index]["question"].strip()


def everyday(count: int) -> Iterator[tuple[str, str]]:
    """(domain, text) of `count` requests: every template has an equal share, word problems as much as four of them."""
    rng = random.Random(SEED)
    share = -(-count // (len(EVERYDAY) + 4))  # rounded up
    for template in EVERYDAY:
        slots = re.findall(r"{(\w+)}", template)
        combinations = itertools.product(*(WORDS[slot].split("|") for slot in slots))
        filled = [dict(zip(slots, words, strict=True)) for words in combinations]
        for words in rng.sample(filled, min(share, len(filled))):
            yield "everyday", template.format(**words)
    for _ in range(4 * share):
        a, b, d = rng.randint(2, 12), rng.randint(2, 9), rng.randint(2, 20)
        numbers = {"a": a, "b": b, "c": a * b + rng.randint(1, 40), "d": d}
        template = rng.choice(WORD_PROBLEMS)
        yield (
            "everyday",
            template.format(
                who=rng.choice(WORDS["name"].split("|")), item=rng.choice(WORDS["item"].split("|")), **numbers
            ),
        )


def make_rows(size: int) -> tuple[list[dict], list[dict]]:
    """(`size` training rows, `size` // 10 held-out rows), without duplicates and sorted by id."""
    # A fifth more than needed: some are duplicates, some too long, and the split is one in ten only on average.
    wanted = int(1.2 * (size + size // HELDOUT_ONE_IN)) + 100
    rows: dict[str, dict] = {}
    counts = {"everyday": 0, "reasoning_gym": 0}
    sources = itertools.chain(
        everyday(int(EVERYDAY_SHARE * wanted)), problems(int((1 - EVERYDAY_SHARE) * wanted / len(TASKS)) + 1)
    )
    for domain, text in sources:
        pieces = re.findall(r"[^\W\d_]+|\d|[^\w\s]|_", text)
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        if len(pieces) <= MAX_PIECES and key not in rows:
            rows[key] = {"id": key, "prompt": [{"role": "user", "content": text}], "domain": domain}
            counts[domain.split("/")[0]] += 1
    heldout = [rows[key] for key in sorted(rows) if int(key, 16) % HELDOUT_ONE_IN == 0]
    train = [rows[key] for key in sorted(rows) if int(key, 16) % HELDOUT_ONE_IN != 0]
    if len(train) < size or len(heldout) < size // HELDOUT_ONE_IN:
        found = f"{len(train)} training and {len(heldout)} held-out prompts are distinct ({counts})"
        raise SystemExit(f"--size {size}: only {found}; ask for fewer, or add tasks to TASKS")
    return train[:size], heldout[: size // HELDOUT_ONE_IN]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("data/quickstart"), help="folder for both files")
    parser.add_argument("--size", type=int, default=2000, help="training prompts; a tenth as many are held out")
    args = parser.parse_args()
    for name, rows in zip(("train", "heldout"), make_rows(args.size), strict=True):
        path = args.out / f"{name}.jsonl"
        atomic_write(path, "".join(json.dumps(row) + "\n" for row in rows))
        tally = Counter(row["domain"].split("/")[0] for row in rows)
        print(f"{path}: {len(rows)} prompts, " + ", ".join(f"{n} {domain}" for domain, n in sorted(tally.items())))


if __name__ == "__main__":
    main()
