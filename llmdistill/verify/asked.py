"""What is asked about answers, as the caller and the worker processes both know it. It reads no text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["math", "choice"]
LONGEST_COMPLETION = 200_000  # characters that are read, the last ones
LONGEST_ANSWER = 10_000  # what a worker may parse is bounded: longer answers are no answers


@dataclass(frozen=True)
class Asked:
    """One completion to judge.

    Attributes:
        prediction: the completion.
        gold: the right answer, LaTeX or plain, or a solution that boxes it.
        kind: "choice" where the answer is an option letter.
        last_number: whether an unmarked last number counts (extract.extract).
        tolerance: how far a number may be from the gold, absolute (OlympiadBench's error_tolerance).
    """

    prediction: str
    gold: str
    kind: Kind = "math"
    last_number: bool = True
    tolerance: float | None = None


# One of each kind of thing that takes algebra, and a completion of each kind: mpmath is imported, its constants are
# known and patterns are compiled before the first fork.
WARM_UP = [
    {
        "items": [
            *(
                {"do": "compare", "gold": gold, "answer": answer, "parts": (), "kind": "math", "tolerance": None}
                for gold, answer in (
                    ("\\frac{x+1}{2}", "x/2+\\frac12"),
                    ("\\sqrt{2}+\\pi", "\\pi+\\sqrt{8}/2"),
                    ("\\{1,2\\}", "2, 1"),
                    ("(1,2]", "1<x\\le 2"),
                    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix}1\\\\x\\end{pmatrix}"),
                    ("y=2x+1", "2x-y+1=0"),
                    ("\\sin x", "\\cos(x)"),
                    ("1.5", "(3x)/(2x)"),
                )
            ),
            *(
                {"do": "find", "prediction": text, "gold": gold, "kind": kind, "last_number": True, "tolerance": None}
                for text, gold, kind in (
                    ("So it is \\boxed{2}.", "3", "math"),
                    ("We add.\n\nThus there are 5 apples.", "5", "math"),
                    ("The answer is (B).", "B", "choice"),
                )
            ),
        ]
    }
]
