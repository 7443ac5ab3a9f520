"""What was asked of the model, and with which versions: config.json as the page shows it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llmdistill.record.page.load import as_dict
from llmdistill.record.page.text import clipped, name

CONFIG_BYTES = 40_000
FIRST = ("template", "sampling", "data", "grader", "versions")  # shown as tables, in this order; other objects follow


def facts(config: Mapping[str, Any]) -> str:
    """Template, sampling, engine and versions in a line each: what a score is compared by."""
    template, sampling, versions = (as_dict(config.get(key)) for key in ("template", "sampling", "versions"))
    named = [f"{template['name']} {template.get('version', '')}".strip()] if template.get("name") else []
    if template.get("hash"):
        named.append(f"hash {str(template['hash'])[:12]}")
    if (few_shot := as_dict(config.get("few_shot"))).get("examples"):
        named.append(f"{_said(few_shot['examples'])} examples {str(few_shot.get('hash', ''))[:12]}".strip())
    engine = [str(config[key]) for key in ("engine", "dtype") if config.get(key)]
    shown = {
        "template": ", ".join(named),
        "sampling": ", ".join(f"{k} {_said(v)}" for k, v in sampling.items() if v is not None),
        "engine": ", ".join(engine),
        "seed": "" if config.get("seed") is None else _said(config["seed"]),
        "versions": ", ".join(f"{k} {_said(v)}" for k, v in list(versions.items())[:4] if v is not None),
    }
    items = "".join(f"<div><dt>{term}</dt><dd>{name(value, 300)}</dd></div>" for term, value in shown.items() if value)
    return f'<dl class="facts">{items}</dl>' if items else ""


def settings(config: Mapping[str, Any]) -> str:
    """Tables of the objects in config.json, its single values above them, and all of it as it is in the file."""
    if not config:
        return '<p class="none">No config.json.</p>'
    single = {key: value for key, value in config.items() if not isinstance(value, dict | list)}
    keys = sorted(
        (key for key, value in config.items() if isinstance(value, dict) and value),
        key=lambda key: FIRST.index(key) if key in FIRST else len(FIRST),
    )
    tables = [_table(key, as_dict(config[key])) for key in keys]
    if single:
        tables.insert(0, _table("run", single))
    text = clipped(json.dumps(config, indent=1, ensure_ascii=False), CONFIG_BYTES)
    whole = f'<details><summary>config.json, everything</summary><pre tabindex="0">{text}</pre></details>'
    return f'<div class="tables">{"".join(tables)}</div><div id="config">{whole}</div>'


def _table(title: str, values: Mapping[str, Any]) -> str:
    body = "".join(
        f'<tr><th scope="row">{name(str(key).replace("_", " "), 60)}</th>'
        f'<td class="words" dir="auto">{name(_said(value), 400)}</td></tr>'
        for key, value in list(values.items())[:40]
        if value is not None
    )
    return f'<div class="scroll"><table><caption>{name(title, 60)}</caption><tbody>{body}</tbody></table></div>'


def _said(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
