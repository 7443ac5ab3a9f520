"""Which answers are equal: one rule for each pair of types, and none for the pairs that are not in the table.

``decide`` takes two texts. It is symmetric but for what a gold may leave open: see the table in eval/VERIFIER.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llmdistill.verify.answers import rules_named, rules_numbers, rules_sets, rules_several
from llmdistill.verify.answers.algebra import Undecided
from llmdistill.verify.answers.notation import compact, tidy
from llmdistill.verify.answers.reading import bare, option_letter, read
from llmdistill.verify.answers.terms import Terms
from llmdistill.verify.answers.values import (
    Assignment,
    Chain,
    Digits,
    Equation,
    Family,
    Matrix,
    Option,
    Permutation,
    Quantity,
    Ratio,
    Readings,
    RealSet,
    Residue,
    Sequence,
    Sizes,
    System,
    Time,
    Words,
)


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether two answers are equal, and the rule that said so."""

    equal: bool
    rule: str


def decide(
    gold: str, answer: str, *, choice: bool = False, may_be_long: bool = True, tolerance: float | None = None
) -> Decision:
    """Whether an answer is the gold one.

    Raises:
        Undecided: that takes algebra, and ``may_be_long`` is not set.
    """
    if gold.strip() == answer.strip() != "":
        return Decision(True, "same text")
    plain = bare(tidy(gold)), bare(tidy(answer))
    if not plain[0] or not plain[1]:
        return Decision(False, "nothing to compare")
    if choice:
        letters = option_letter(gold), option_letter(answer)
        if letters[0] and letters[1]:
            return Decision(letters[0] == letters[1], "option letter")
    if compact(plain[0]) == compact(plain[1]):
        return Decision(True, "same text")
    return same_readings(read(gold), read(answer), Terms(_readings, may_be_long, tolerance))


def same_readings(gold: Readings, answer: Readings, terms: Terms) -> Decision:
    """Equal if some reading of the one is some reading of the other."""
    undecided: Undecided | None = None
    compared = ""
    for left in gold:
        for right in answer:
            rule = _RULES.get((type(left), type(right)))
            if rule is None:
                continue
            compared = compared or _title(rule)
            try:
                if rule(left, right, terms):
                    return Decision(True, _title(rule))
            except Undecided as error:
                undecided = error
    if undecided is not None:
        raise undecided
    if compared:
        return Decision(False, compared)
    return Decision(False, f"{_kinds(gold)} is no {_kinds(answer)}")


def _kinds(found: Readings) -> str:
    return " or ".join(dict.fromkeys(type(value).__name__.lower() for value in found))


def _readings(gold: Readings, answer: Readings, terms: Terms) -> bool:
    return same_readings(gold, answer, terms).equal or _text(gold) == _text(answer) != ""


def _text(found: Readings) -> str:
    return "".join(compact(value.text) for value in found if hasattr(value, "text"))


def _title(rule: Rule) -> str:
    return rule.__name__.removesuffix("_rule").replace("_", " ")


Rule = Callable[..., bool]
_SYMMETRIC: dict[tuple[type, type], Rule] = {
    (Quantity, Quantity): rules_numbers.quantity_rule,
    (Time, Time): rules_numbers.time_rule,
    (Time, Quantity): rules_numbers.hour_rule,
    (Ratio, Ratio): rules_numbers.ratio_rule,
    (Ratio, Quantity): rules_numbers.ratio_as_quotient_rule,
    (Digits, Digits): rules_numbers.digits_rule,
    (Digits, Quantity): rules_numbers.digits_without_base_rule,
    (Residue, Residue): rules_numbers.residue_rule,
    (Sizes, Sizes): rules_numbers.sizes_rule,
    (Sequence, Sequence): rules_several.sequence_rule,
    (Sequence, Quantity): rules_several.one_element_rule,
    (System, System): rules_several.system_rule,
    (System, Assignment): rules_several.system_as_tuple_rule,
    (System, Sequence): rules_several.system_as_values_rule,
    (Matrix, Matrix): rules_several.matrix_rule,
    (Matrix, Sequence): rules_several.column_rule,
    (Permutation, Permutation): rules_several.permutation_rule,
    (RealSet, RealSet): rules_sets.real_set_rule,
    (Chain, Chain): rules_sets.chain_rule,
    (Chain, RealSet): rules_sets.chain_as_set_rule,
    (Assignment, Assignment): rules_named.assignment_rule,
    **{
        (Assignment, kind): rules_named.value_of_name_rule
        for kind in (Quantity, Time, Ratio, Digits, Sizes, Sequence, RealSet, Matrix, Words, Option)
    },
    (Equation, Equation): rules_named.equation_rule,
    (Family, Family): rules_named.family_rule,
    (Option, Option): rules_named.option_rule,
    (Words, Words): rules_named.words_rule,
}
_RULES: dict[tuple[type, type], Rule] = {
    **_SYMMETRIC,
    **{(b, a): rule for (a, b), rule in _SYMMETRIC.items()},
    (Quantity, Residue): rules_numbers.number_with_modulus_rule,
    (Quantity, Sizes): rules_numbers.product_of_sizes_rule,
}
