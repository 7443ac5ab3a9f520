// LaTeX formulas as MathML elements. What is not understood throws; the caller then shows the source as it is.
// Elements are made one by one and text goes in as text: nothing of a formula is ever read as markup.
const LONGEST_FORMULA = 4000;
const DEEPEST_FORMULA = 60;

const mathElement = (tag, attributes, ...children) => {
  const node = document.createElementNS("http://www.w3.org/1998/Math/MathML", tag);
  for (const [key, value] of Object.entries(attributes ?? {})) node.setAttribute(key, value);
  node.append(...children);
  return node;
};
const row = (nodes) => (nodes.length === 1 ? nodes[0] : mathElement("mrow", null, ...nodes));
const gap = (em) => mathElement("mspace", { width: `${em}em` });
const isOperator = (node) => node?.localName === "mo" && !node.dataset.closes;

function styled(character, font) {
  const alphabet = ALPHABETS.get(font);
  if (!alphabet) return character;
  const [capitals, small, digits, special] = alphabet;
  if (Object.hasOwn(special, character)) return special[character];
  const code = character.codePointAt(0);
  if (code >= 65 && code <= 90) return String.fromCodePoint(capitals + code - 65);
  if (code >= 97 && code <= 122) return String.fromCodePoint(small + code - 97);
  if (digits && code >= 48 && code <= 57) return String.fromCodePoint(digits + code - 48);
  return character;
}

class Formula {
  constructor(source) {
    if (source.length > LONGEST_FORMULA) throw new Error("formula too long");
    this.tokens = source.match(/\\(?:(?:operatorname|hspace|tag)\*|[a-zA-Z]+|[^])|\s+|[^]/gu) ?? [];
    this.at = 0;
    this.depth = 0;
    this.font = "";
  }

  // Everything, as one element. Lines broken by \\ outside an environment become rows.
  whole() {
    const { rows } = this.table(() => this.at >= this.tokens.length);
    return rows.length === 1 && rows[0].cells.length === 1 ? row(rows[0].cells[0]) : grid(rows, "rl");
  }

  peek() {
    while (this.at < this.tokens.length && /^\s/.test(this.tokens[this.at])) this.at += 1;
    return this.tokens[this.at];
  }

  next() {
    const token = this.peek();
    if (token === undefined) throw new Error("formula ends early");
    this.at += 1;
    return token;
  }

  expect(token) {
    if (this.next() !== token) throw new Error(`${token} expected`);
  }

  // Nodes up to what stops; infix commands (\over) take what is on both of their sides.
  nodes(stops) {
    if (++this.depth > DEEPEST_FORMULA) throw new Error("nested too deeply");
    const font = this.font;
    const found = [];
    for (let token = this.peek(); token !== undefined && !stops(token); token = this.peek()) {
      if (token === "\\over" || token === "\\choose" || token === "\\atop") {
        this.next();
        const bare = token === "\\over" ? null : { linethickness: "0" };
        const fraction = mathElement("mfrac", bare, row(found.splice(0)), row(this.nodes(stops)));
        found.push(...(token === "\\choose" ? [fence("(", "prefix"), fraction, fence(")", "postfix")] : [fraction]));
      } else if (/^\\(display|text|script)style$/.test(token)) {
        this.next();
        found.push(mathElement("mstyle", { displaystyle: token === "\\displaystyle" }, ...this.nodes(stops)));
      } else {
        this.scripted(found);
      }
    }
    this.font = font; // \bf holds to the end of its group
    this.depth -= 1;
    return found;
  }

  // One atom with the scripts and primes behind it.
  scripted(found) {
    const before = found.at(-1);
    let base = /^[\^_']$/.test(this.peek()) ? mathElement("mrow") : this.atom(before);
    if (base === null) return;
    let limits = base.limits;
    const called = base.called;
    let below = null;
    let above = [];
    for (let token = this.peek(); token !== undefined; token = this.peek()) {
      if (token === "^") {
        this.next();
        above.push(this.argument());
      } else if (token === "_") {
        this.next();
        below = below ? mathElement("mrow", null, below, this.argument()) : this.argument();
      } else if (token === "'" || token === "’") {
        this.next();
        above.push(mathElement("mo", { lspace: "0", rspace: "0" }, "′"));
      } else if (token === "\\limits" || token === "\\nolimits") {
        this.next();
        limits = token === "\\limits";
      } else {
        break;
      }
    }
    above = above.length ? row(above) : null;
    const [both, under, over] = limits ? ["munderover", "munder", "mover"] : ["msubsup", "msub", "msup"];
    const closes = base.dataset.closes;
    if (below && above) base = mathElement(both, null, base, below, above);
    else if (below) base = mathElement(under, null, base, below);
    else if (above) base = mathElement(over, null, base, above);
    if (closes) base.dataset.closes = "1";
    if (called && before && !isOperator(before) && before.localName !== "mspace") found.push(gap(0.167));
    found.push(base);
    if (called && !/^(?:[([{)\]}|,.;:=+\-&/]|\\left|\\right|\\\\|\\[bB]ig.*)?$/.test(this.peek() ?? "")) {
      found.push(gap(0.167));
    }
  }

  argument() {
    const token = this.peek();
    if (token === "{") return row(this.group());
    if (/^\d$/.test(token ?? "")) return mathElement("mn", null, styled(this.next(), this.font)); // \frac12 is one half
    if (token === undefined || /^[}^_&]$/.test(token)) throw new Error("argument missing");
    return this.atom(undefined) ?? mathElement("mrow");
  }

  group() {
    this.expect("{");
    const found = this.nodes((token) => token === "}");
    this.expect("}");
    return found;
  }

  // The source between braces, for text.
  raw() {
    if (this.peek() !== "{") return this.next();
    this.next();
    const start = this.at;
    for (let open = 1; ; this.at += 1) {
      const token = this.tokens[this.at];
      if (token === undefined) throw new Error("} expected");
      open += token === "{" ? 1 : token === "}" ? -1 : 0;
      if (!open) break;
    }
    return this.tokens.slice(start, this.at++).join("");
  }

  option() {
    if (this.peek() !== "[") return null;
    this.next();
    const found = this.nodes((token) => token === "]");
    this.expect("]");
    return row(found);
  }

  atom(before) {
    const token = this.next();
    if (token === "{") {
      this.at -= 1;
      const inner = this.group();
      return inner.length === 1 && inner[0].textContent === "," // 1{,}000
        ? mathElement("mo", { lspace: "0", rspace: "0", separator: "false" }, ",")
        : mathElement("mrow", null, ...inner);
    }
    if (token[0] === "\\" && token.length > 1) return this.command(token.slice(1).replace(/\*$/, ""), before);
    if (/^\d$/.test(token)) return this.number(token);
    if (token === ".") return mathElement("mo", { lspace: "0", rspace: "0" }, "."); // 0.\overline{3}
    if (token === "~") return gap(0.25);
    if (/^[}&]$/.test(token)) throw new Error(`unexpected ${token}`);
    if (DELIMITERS.has(token) && !/[/.<>]/.test(token)) return plainDelimiter(token);
    if (/^\p{L}$/u.test(token)) return this.letter(token);
    if (token === "%" || token === "$" || /^\p{So}$/u.test(token)) return mathElement("mtext", null, token);
    return operator(token === "-" ? "−" : token === "*" ? "∗" : token, before);
  }

  letter(character) {
    if (character.codePointAt(0) > 0x2fff) return mathElement("mtext", null, character);
    const shown = styled(character, this.font);
    return mathElement("mi", shown === character && this.font === "normal" ? { mathvariant: "normal" } : null, shown);
  }

  number(first) {
    const rest = this.tokens.slice(this.at, this.at + 400).join("");
    const [more] = /^\d*(?:,\d{3}(?!\d))*(?:\.\d+)?/.exec(rest);
    // A group of three behind a comma is read as thousands only after one to three digits.
    const taken = more.includes(",") && /^\d*/.exec(more)[0].length > 2 ? /^\d*(?:\.\d+)?/.exec(more)[0] : more;
    this.at += taken.length;
    return mathElement("mn", null, ...[...(first + taken)].map((c) => styled(c, this.font)).join(""));
  }

  command(name, before) {
    const plain = this.symbol(name, before);
    if (plain) return plain;
    if (FONTS.has(name)) return this.switchFont(name);
    if (TEXTS.has(name)) return written(this.raw(), TEXTS.get(name));
    if (IGNORED.has(name)) {
      for (let i = IGNORED.get(name); i > 0; i -= 1) this.raw();
      return null;
    }
    if (ACCENTS.has(name)) return topped(this.argument(), ACCENTS.get(name), false);
    if (OVER.has(name)) return topped(this.argument(), OVER.get(name), true);
    if (UNDER.has(name)) {
      const mark = mathElement("mo", { stretchy: "true" }, UNDER.get(name));
      const under = mathElement("munder", { accentunder: "true" }, this.argument(), mark);
      under.limits = true;
      return under;
    }
    if (LONG_ARROWS.has(name)) {
      const below = this.option();
      const arrow = mathElement("mo", { stretchy: "true", minsize: "1.5em" }, LONG_ARROWS.get(name));
      const padded = (node) => mathElement("mpadded", { width: "+0.8em", lspace: "0.4em" }, node);
      const over = padded(this.argument());
      if (!below) return mathElement("mover", null, arrow, over);
      return mathElement("munderover", null, arrow, padded(below), over);
    }
    const size = SIZES.get(name.replace(/[lrm]$/, ""));
    if (size) {
      const form = name.endsWith("l") ? "prefix" : name.endsWith("r") ? "postfix" : "infix";
      return fence(this.delimiter(), form, { minsize: `${size}em`, maxsize: `${size}em` });
    }
    return this.construct(name);
  }

  symbol(name, before) {
    if (SPACES.has(name)) return gap(SPACES.get(name));
    if (LETTERS.has(name)) return mathElement("mi", null, LETTERS.get(name));
    if (UPRIGHT.has(name)) return mathElement("mi", { mathvariant: "normal" }, UPRIGHT.get(name));
    if (OPERATORS.has(name)) return operator(OPERATORS.get(name), before);
    if (FUNCTIONS.has(name)) return called(name);
    if (LIMITS.has(name)) return called(LIMITS.get(name), true);
    if (INTEGRALS.has(name)) return mathElement("mo", null, INTEGRALS.get(name));
    if (BIG.has(name)) return Object.assign(mathElement("mo", null, BIG.get(name)), { limits: true });
    return name === "|" ? plainDelimiter("‖") : DELIMITERS.has(name) ? plainDelimiter(DELIMITERS.get(name)) : null;
  }

  switchFont(name) {
    const font = this.font;
    this.font = FONTS.get(name);
    // \mathbf{x} is a command with an argument, \bf a switch to the end of the group.
    if (/^(?:rm|it|bf|cal|sf|tt|frak|scr)$/.test(name) && this.peek() !== "{") return null;
    if (/^(?:rm|it|bf|sf|tt)$/.test(name)) return null;
    const inner = this.argument();
    this.font = font;
    return inner;
  }

  construct(name) {
    switch (name) {
      case "frac": return mathElement("mfrac", null, this.argument(), this.argument());
      case "dfrac": case "cfrac": return inStyle(true, mathElement("mfrac", null, this.argument(), this.argument()));
      case "tfrac": return inStyle(false, mathElement("mfrac", null, this.argument(), this.argument()));
      case "binom": return this.binomial();
      case "dbinom": return inStyle(true, this.binomial());
      case "tbinom": return inStyle(false, this.binomial());
      case "sqrt": {
        const index = this.option();
        return index ? mathElement("mroot", null, this.argument(), index) : mathElement("msqrt", null, this.argument());
      }
      case "left": return this.fenced();
      case "begin": return this.environment();
      case "boxed": case "fcolorbox": return mathElement("mrow", { class: "boxed" }, this.argument());
      case "cancel": case "bcancel": case "xcancel": case "sout":
        return mathElement("mrow", { class: "cancel" }, this.argument());
      case "phantom": case "hphantom": case "vphantom": return mathElement("mphantom", null, this.argument());
      case "overset": case "stackrel": {
        const above = this.argument();
        return mathElement("mover", null, this.argument(), above);
      }
      case "underset": {
        const below = this.argument();
        return mathElement("munder", null, this.argument(), below);
      }
      case "operatorname": return called(plainText(this.raw()));
      case "mathop": return Object.assign(this.argument(), { limits: true });
      case "mathbin": case "mathrel": case "mathord": case "mathopen": case "mathclose": case "mathpunct":
      case "ensuremath": case "smash": case "mathclap": case "mathrlap": case "mathllap": return this.argument();
      case "textcolor": case "colorbox": this.raw(); return this.argument();
      case "not": return mathElement("mo", null, `${this.argument().textContent}\u0338`.normalize());
      case "bmod": return mathElement("mo", { lspace: "0.22em", rspace: "0.22em" }, "mod");
      case "mod": return mathElement("mrow", null, gap(0.5), modulo());
      case "pmod": case "pod": {
        const inner = [...(name === "pmod" ? [modulo()] : []), this.argument()];
        return mathElement("mrow", null, gap(0.5), plainDelimiter("("), ...inner, plainDelimiter(")"));
      }
      case "tag": return mathElement("mtext", { class: "number" }, `\u2003(${plainText(this.raw())})`);
      case "hspace": case "mspace": case "hskip": case "kern": case "mkern": return this.space();
      case "substack": {
        this.expect("{");
        const { rows } = this.table((token) => token === "}");
        this.expect("}");
        return grid(rows, "c");
      }
      default: throw new Error(`\\${name} is not known`);
    }
  }

  binomial() {
    const fraction = mathElement("mfrac", { linethickness: "0" }, this.argument(), this.argument());
    return mathElement("mrow", null, fence("(", "prefix"), fraction, fence(")", "postfix"));
  }

  space() {
    const source = this.peek() === "{" ? this.raw() : this.tokens.slice(this.at).join("");
    const [all, size, unit] = /^\s*(-?\d*\.?\d+)\s*(em|ex|pt|px|mm|cm|in|mu)/.exec(source) ?? [];
    if (!all) throw new Error("length expected");
    if (this.tokens[this.at - 1] !== "}") this.at += all.length;
    return gap(Math.min(Math.max(size * LENGTHS.get(unit), -2), 8));
  }

  delimiter() {
    const token = this.next();
    const found = DELIMITERS.get(token) ?? DELIMITERS.get(token.slice(1));
    if (found === undefined) throw new Error(`${token} is no delimiter`);
    return found;
  }

  fenced() {
    const inner = [fence(this.delimiter(), "prefix")];
    for (;;) {
      inner.push(...this.nodes((token) => token === "\\right" || token === "\\middle"));
      const last = this.next() === "\\right";
      inner.push(fence(this.delimiter(), last ? "postfix" : "infix"));
      if (last) break;
    }
    const whole = mathElement("mrow", null, ...inner);
    whole.dataset.closes = "1";
    return whole;
  }

  environment() {
    const name = this.raw().replace(/\*$/, "");
    const known = ENVIRONMENTS.get(name);
    if (!known) throw new Error(`environment ${name} is not known`);
    let [open, close, columns] = known;
    if (name === "array" || name === "tabular" || name === "subarray") {
      if (this.peek() === "[") this.option();
      columns = this.raw().replace(/[@!>p]\{[^{}]*\}/g, "").replace(/[^lcr|]/g, "") || "c";
    } else if (name.startsWith("aligna") || name === "alignedat") {
      this.raw();
    }
    const { rows, lined } = this.table((token) => token === "\\end");
    this.expect("\\end");
    if (this.raw().replace(/\*$/, "") !== name) throw new Error(`\\end{${name}} expected`);
    const body = grid(rows, columns, lined);
    const wide = !/matrix|cases|array|tabular/.test(name) || name === "dcases";
    if (wide) body.setAttribute("displaystyle", "true");
    if (!open && !close) return body;
    return mathElement("mrow", null, fence(open, "prefix"), body, fence(close, "postfix"));
  }

  // Rows of cells up to what stops, each with whether a line is drawn above it.
  table(stops) {
    const rows = [{ cells: [], line: false }];
    const ends = (token) => ["&", "\\\\", "\\cr", "\\hline"].includes(token) || stops(token);
    for (;;) {
      const current = rows.at(-1);
      while (/^\\(?:hline|cline|toprule|midrule|bottomrule)$/.test(this.peek() ?? "")) {
        if (this.next() === "\\cline") this.raw();
        current.line = true;
      }
      current.cells.push(this.nodes(ends));
      const token = this.peek();
      if (token === undefined || stops(token)) break;
      if (token === "\\hline") continue;
      this.next();
      if (token === "&") continue;
      const [skip] = /^\[\s*-?[\d.]+\s*[a-z]{2}\s*\]/.exec(this.tokens.slice(this.at, this.at + 16).join("")) ?? [""];
      this.at += skip.length; // \\[2pt]; its tokens are single characters
      rows.push({ cells: [], line: false });
    }
    const last = rows.at(-1);
    const empty = rows.length > 1 && last.cells.every((cell) => cell.length === 0);
    if (empty) rows.pop();
    return { rows, lined: empty && last.line };
  }
}

function grid(rows, columns, lined = false) {
  const kinds = columns.replaceAll("|", "");
  // Positions of the vertical lines, as the number of columns before them.
  const bars = new Set();
  [...columns].forEach((c, i) => c === "|" && bars.add(columns.slice(0, i).replaceAll("|", "").length));
  const made = rows.map(({ cells, line }, r) => mathElement("mtr", null, ...cells.map((cell, i) => {
    const kind = kinds === "rl" || kinds === "rcl" ? kinds[i % kinds.length] : kinds[Math.min(i, kinds.length - 1)];
    const marks = [kind];
    if (line) marks.push("above");
    if (lined && r === rows.length - 1) marks.push("below");
    if (bars.has(i)) marks.push("before");
    if (i === cells.length - 1 && bars.has(i + 1)) marks.push("after");
    // An operator that begins a cell has its left side in the cell before.
    const content = i && isOperator(cell[0]) && kinds.startsWith("r") ? [mathElement("mrow"), ...cell] : cell;
    if (content !== cell && cell[0].getAttribute("form") === "prefix") cell[0].removeAttribute("form");
    return mathElement("mtd", { class: marks.join(" ") }, ...content);
  })));
  return mathElement("mtable", { class: kinds.startsWith("r") ? "aligned" : "grid" }, ...made);
}

function operator(character, before) {
  // After another operator, or first in line, a sign belongs to what follows.
  const sign = /^[+−±∓]$/.test(character) && (!before || isOperator(before));
  return mathElement("mo", sign ? { form: "prefix" } : null, character);
}

function plainDelimiter(token) {
  const character = DELIMITERS.get(token) || token;
  const form = OPENING.has(character) ? "prefix" : CLOSING.has(character) ? "postfix" : null;
  const node = mathElement("mo", { stretchy: "false", ...(form ? { form } : { lspace: "0", rspace: "0" }) }, character);
  if (form !== "prefix") node.dataset.closes = "1";
  return node;
}

function fence(character, form, more) {
  const node = mathElement("mo", { stretchy: "true", fence: "true", form, ...more }, character);
  if (form === "infix") ["lspace", "rspace"].forEach((side) => node.setAttribute(side, "0.1em"));
  if (form === "postfix") node.dataset.closes = "1";
  return node;
}

function called(name, limits = false) {
  const node = limits ? mathElement("mo", { movablelimits: "true", lspace: "0", rspace: "0", form: "prefix" }, name)
    : mathElement("mi", { mathvariant: "normal" }, name);
  return Object.assign(node, { called: true, limits });
}

function topped(base, character, stretchy) {
  if (character === "‾") return mathElement("mrow", { class: "overline" }, base);
  const mark = mathElement("mo", { stretchy: String(stretchy) }, character);
  return Object.assign(mathElement("mover", { accent: "true" }, base, mark), { limits: stretchy });
}

const modulo = () => mathElement("mo", { lspace: "0", rspace: "0.3em" }, "mod");
const inStyle = (display, node) => mathElement("mstyle", { displaystyle: String(display), scriptlevel: "0" }, node);

const plainText = (source) => source.replace(/\\[,;:! ]|~|\s+/g, "\u00a0").replace(/\\([%$#&_{}\\])/g, "$1")
  .replace(/\\(?:text|math)[a-z]+\s*|\\(?:displaystyle|small|large)\b|[{}]/g, "");

// \text{if $x > 0$}: words, with formulas between them.
function written(source, font) {
  const parts = source.split(/(?<!\\)\$([^$]*)\$|\\\((.*?)\\\)/su);
  const nodes = parts.flatMap((part, i) => {
    if (!part) return [];
    if (i % 3) return [new Formula(part).whole()];
    return [mathElement("mtext", font === "normal" ? null : { class: font }, plainText(part))];
  });
  return row(nodes);
}

// The formula as a <math> element. Throws where it is not understood.
function formula(source, display) {
  const math = mathElement("math", display ? { display: "block" } : null);
  math.append(new Formula(source.trim()).whole());
  math.setAttribute("alttext", source.trim());
  return math;
}
