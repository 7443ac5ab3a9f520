r"""Matrices, the branches of cases, sums of matrices with factors, and vectors written with \hat{i} and its kin."""

from __future__ import annotations

import re

from llmdistill.verify.answers.algebra import same
from llmdistill.verify.answers.expression import parse
from llmdistill.verify.answers.notation import split_top, unwrap
from llmdistill.verify.answers.sequences import Reader, system_of
from llmdistill.verify.answers.tree import Node, number, substituted, symbols
from llmdistill.verify.answers.values import Matrix, Quantity, Readings, Sequence, Value

_MATRIX = re.compile(
    r"(?:\(|\[|\\lbrack|\||\\\{)? ?\\begin ?\{(?P<kind>[pbvBV]?(?:small)?matrix|array|cases|aligned|gathered"
    r"|(?:align|gather|equation)\*?|split)\} ?"
    r"(?:\{[^{}]{0,20}\})?(?P<body>.*)"
    r"\\end ?\{(?P=kind)\} ?(?:\)|\]|\|)?(?P<transposed> ?\^ ?\{? ?T ?\}?)?",
    re.S,
)
_BLOCK = re.compile(
    r"\\begin ?\{(?P<kind>[pbB]?(?:small)?matrix|array)\} ?(?:\{[^{}]{0,20}\})?.*?\\end ?\{(?P=kind)\}", re.S
)
_ROWS = re.compile(r"\[ ?\[[^\[\]]*\](?: ?, ?\[[^\[\]]*\])+ ?\]")
_TURNED = re.compile(r"(?P<inside>\(.+\)|\[.+\]) ?\^ ?(?:T|\{ ?T ?\})")
_UNIT_VECTORS = ("hat i", "hat j", "hat k")


def read_matrix(text: str, read: Reader) -> list[Value]:
    match = _MATRIX.fullmatch(text)
    if not match or match["body"].find(r"\end") < match["body"].find(r"\begin"):
        return []  # none, or a sum of two
    kind = match["kind"]
    rows = [
        row.strip() for row in re.split(r"\\\\(?:\[[^\]]*\])?|\\cr(?![A-Za-z])", match["body"].replace(r"\hline", ""))
    ]
    rows = [row for row in rows if row]
    if (
        kind not in ("cases", "array")
        and not kind.endswith("matrix")
        and any(re.match(r"[\s&]*=", row) for row in rows)
    ):
        return list(read(" ".join(row.replace("&", "") for row in rows)))  # a calculation, step by step
    if not kind.endswith("matrix") and kind != "array" or text.startswith(r"\{"):
        return _cases(rows, read)
    cells = tuple(tuple(read(cell.strip()) for cell in split_top(row, "&")) for row in rows)
    if not cells or len({len(row) for row in cells}) > 1 or not all(cell for row in cells for cell in row):
        return []
    if match["transposed"]:
        cells = tuple(zip(*cells, strict=True))
    determinant = kind in ("vmatrix", "Vmatrix") or text.startswith("|")
    return [Matrix("determinant" if determinant else "matrix", cells)]


def _cases(rows: list[str], read: Reader) -> list[Value]:
    rows = [row.strip(" ,;") for row in rows]
    plain = [row.replace("&", "") for row in rows]
    system = system_of(plain, read)
    if system:
        return system
    cells = [[cell for cell in split_top(row, r"&|,") if cell] for row in rows]
    read_cells = tuple(
        tuple(read(re.sub(r"^(?:if|for|when|otherwise) ", "", unwrap(cell)).strip()) for cell in row) for row in cells
    )
    return [Matrix("cases", read_cells)] if read_cells and all(cell for row in read_cells for cell in row) else []


def read_rows(text: str, read: Reader) -> list[Value]:
    """[[1, 2], [3, 4]], rows of a matrix; (1, 2)^T, a column."""
    if _ROWS.fullmatch(text):
        rows = tuple(tuple(read(cell) for cell in split_top(row)) for row in re.findall(r"\[([^\[\]]*)\]", text[1:-1]))
        return [Matrix("matrix", rows)] if len({len(row) for row in rows}) == 1 else []
    turned = _TURNED.fullmatch(text)
    return [value for value in read(turned["inside"]) if isinstance(value, Sequence)] if turned else []


def read_combination(text: str, read: Reader) -> list[Value]:
    r"""\frac12 A, A + tB, where A and B are matrices: their cells with the factors multiplied in; [] of other texts."""
    blocks = list(_BLOCK.finditer(text))
    if not blocks or len(blocks) > 6 or (len(blocks) == 1 and blocks[0].span() == (0, len(text))):
        return []
    names = [f"matrix {n}" for n in range(len(blocks))]
    plain, end = "", 0
    for n, block in enumerate(blocks):
        plain += text[end : block.start()].rstrip("([") + rf" \hat{{m_{{{n}}}}} "
        end = block.end()
        end += len(text[end:]) - len(text[end:].lstrip(")] ")) if text[block.start() - 1 : block.start()] in "([" else 0
    tree = parse(plain + text[end:])
    found = [read_matrix(block.group(), read) for block in blocks]
    matrices = [value for one in found for value in one if isinstance(value, Matrix)]
    if tree is None or len(matrices) != len(blocks) or len({_shape(m) for m in matrices}) > 1:
        return []
    names = [f"hat m_{n}" for n in range(len(blocks))]
    factors = _coefficients(tree, names)
    if factors is None:
        return []
    cells = [[[_tree(cell) for cell in row] for row in m.rows] for m in matrices]
    if any(cell is None for m in cells for row in m for cell in row):
        return []
    rows = tuple(
        tuple((_total(factors, [m[i][j] for m in cells]),) for j in range(len(cells[0][i])))
        for i in range(len(cells[0]))
    )
    return [Matrix("matrix", rows)]


def _total(factors: list[Node], cells: list[Node | None]) -> Quantity:
    terms = tuple(Node("product", (factor, cell)) for factor, cell in zip(factors, cells, strict=True) if cell)
    return Quantity(Node("sum", terms) if len(terms) > 1 else terms[0])


def _shape(matrix: Matrix) -> tuple[int, ...]:
    return tuple(len(row) for row in matrix.rows)


def _tree(cell: Readings) -> Node | None:
    return next((value.tree for value in cell if isinstance(value, Quantity) and value.unit is None), None)


def _coefficients(tree: Node, names: list[str]) -> list[Node] | None:
    """The factors of some symbols in an expression that is linear in them; None of any other."""

    def at(values: list[int]) -> Node:
        found = tree
        for name, value in zip(names, values, strict=True):
            found = substituted(found, name, number(value))
        return found

    factors = [at([int(n == m) for m in range(len(names))]) for n in range(len(names))]
    terms = tuple(Node("product", (f, Node("symbol", name=name))) for f, name in zip(factors, names, strict=True))
    linear = Node("sum", terms) if len(terms) > 1 else terms[0]
    return factors if same(tree, linear, may_be_long=True) else None


def read_vector(text: str) -> list[Value]:
    r"""3\hat{i} + 4\hat{j} as (3, 4); [] of other texts."""
    tree = parse(text)
    used = symbols(tree) & set(_UNIT_VECTORS) if tree is not None else frozenset()
    if tree is None or not {"hat i", "hat j"} <= used:
        return []
    names = list(_UNIT_VECTORS[: 3 if "hat k" in used else 2])
    factors = _coefficients(tree, names)
    return [] if factors is None else [Sequence("tuple", tuple((Quantity(factor),) for factor in factors))]
