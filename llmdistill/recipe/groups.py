"""Several teachers of a recipe: which of them answer together, and how messages call each."""

from __future__ import annotations

import re
from collections.abc import Sequence

from llmdistill.errors import UserError
from llmdistill.recipe.config import TeacherConfig


def in_section(error: UserError, section: str) -> UserError:
    """The error with the settings of ``teacher`` named as those of ``section``, an entry of ``teachers``."""
    said = re.sub(r"(?<!\S)teacher\.(?=\w)", f"{section}.", str(error))
    return UserError(said.replace(" --teacher.", f" --{section.replace('[', '.').replace(']', '')}."))


def teacher_groups(configs: Sequence[TeacherConfig]) -> list[list[int]]:
    """Indices of the teachers that answer together: one, or an ensemble of those with the same domains.

    Raises:
        UserError: no teacher, a name twice, a domain claimed by two groups, two teachers of the same domains without
            weights, or a weight that averages nothing.
    """
    if not configs:
        raise UserError("teachers is an empty list; a run needs at least one. Fix: give one with model, url or stored.")
    groups: dict[frozenset[str], list[int]] = {}
    for i, config in enumerate(configs):
        groups.setdefault(frozenset(config.domains), []).append(i)
        same = [j for j in range(i) if config.name and configs[j].name == config.name]
        if same:
            raise UserError(f"teachers[{same[0]}] and teachers[{i}] are both named {config.name!r}. Fix: rename one.")
    owner: dict[str, int] = {}
    for domains, members in groups.items():
        first, whose = members[0], f"domains {sorted(domains)}" if domains else "no domains"
        for domain in sorted(domains):
            if (other := owner.setdefault(domain, first)) != first:
                raise UserError(
                    f"domain {domain!r} is both teachers[{other}]'s and teachers[{first}]'s, which differ in others. "
                    "Fix: take it from one of them, or give both the same domains and a weight."
                )
        bare = [i for i in members if configs[i].weight == 0]
        if len(members) > 1 and bare:
            names = " and ".join(f"teachers[{i}]" for i in members)
            raise UserError(
                f"{names} have {whose}, and teachers[{bare[0]}].weight is 0; teachers of the same rows are averaged. "
                "Fix: give each a weight > 0, or domains of its own."
            )
        if len(members) == 1 and configs[first].weight > 0:
            raise UserError(
                f"teachers[{first}].weight is {configs[first].weight:g}, and no other teacher has {whose}, so there is "
                "nothing to average. Fix: leave weight out, or give another teacher the same domains and a weight."
            )
    return list(groups.values())
