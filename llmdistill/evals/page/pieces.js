// Where in a text code and formulas are: the pieces in which Markdown means nothing. They are cut out and leave a mark
// behind. All of it is linear in the text: what is looked for ahead is looked for over a bounded stretch.
const MARK = /\uE000(\d+)\uE001/;
const CUT = "\uE002"; // where characters were left out of the page; followed by their number and \uE003
const LONGEST_INLINE = 1500;
const LONGEST_FORMULA = 4000;
const MOST_ELEMENTS = 20_000; // of all formulas of one text; further ones are shown as they were written
const FORMULA = 10; // elements that as much time is spent on as on reading a formula
const DEEPEST = 60; // levels of elements in a formula; browsers lay out deep ones in quadratic time and worse
const ENVIRONMENTS = new Set(["align", "aligned", "alignat", "array", "bmatrix", "Bmatrix", "cases", "dcases", "eqnarray",
  "equation", "gather", "gathered", "matrix", "multline", "pmatrix", "smallmatrix", "split", "vmatrix", "Vmatrix"]);

const byId = (id) => document.getElementById(id);
const whole = (number) => Number(number).toLocaleString("en");
const element = (tag, properties, ...children) => {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(properties ?? {})) {
    if (value !== false && value !== null && value !== undefined) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children);
  return node;
};

const depth = (node) => 1 + [...node.children].reduce((most, child) => Math.max(most, depth(child)), 0);

// Hundreds of accents on one letter, which browsers take seconds to place.
const tamed = (text) => text.replace(/(\p{M}{8})\p{M}+/gu, "$1\uFFFD");

// A formula by Temml, as elements; throws where Temml does not understand it. Nothing in it is trusted: no links, no
// classes, no images, no macros that expand without end, nothing larger than a line or two.
function formula(source, display) {
  if (source.length > LONGEST_FORMULA) throw new Error("formula too long");
  const holder = document.createElement("span");
  temml.render(source, holder, {
    displayMode: display, throwOnError: true, trust: false, maxSize: [20, 40], maxExpand: 500, macros: {},
  });
  const math = holder.firstChild;
  if (holder.childNodes.length !== 1 || math.localName !== "math") throw new Error("no formula");
  if (depth(math) > DEEPEST) throw new Error("nested too deeply");
  return math;
}

// A formula, or its source as code where it is not understood.
function shownFormula(source, display, written) {
  try {
    let math;
    try {
      math = formula(source, display);
    } catch (error) { // lines that are aligned without an environment
      if (!/&|\\\\/.test(source)) throw error;
      math = formula(`\\begin{aligned}${source}\\end{aligned}`, display);
    }
    return display ? element("div", { class: "display" }, math) : math;
  } catch {
    return element(display ? "pre" : "code", { class: "source", title: "not shown as a formula" }, written);
  }
}

class Pieces {
  constructor(text) {
    this.text = text;
    this.nodes = [];
    this.cuts = [...text.matchAll(/\uE002/g)].map((hit) => hit.index);
    this.elements = 0;
  }

  // Index of the next cut, which nothing reaches across.
  cut(from) {
    let [low, high] = [0, this.cuts.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.cuts[middle] < from) low = middle + 1;
      else high = middle;
    }
    return this.cuts[low] ?? this.text.length;
  }

  // The end of what opened before `from`, or -1: not past a cut, not further than `most` characters.
  closing(close, from, most) {
    const end = Math.min(this.text.length, from + most, this.cut(from));
    const within = this.text.slice(from, end);
    for (let at = within.indexOf(close); at >= 0; at = within.indexOf(close, at + 1)) {
      let slashes = 0;
      while (within[at - 1 - slashes] === "\\") slashes += 1;
      if (slashes % 2 === 0 || close[0] === "`") return from + at;
    }
    return -1;
  }

  closingBrace(from) {
    const end = Math.min(this.text.length, from + LONGEST_FORMULA, this.cut(from));
    for (let at = from, open = 0; at < end; at += 1) {
      if (this.text[at] === "\\") at += 1;
      else if (this.text[at] === "{") open += 1;
      else if (this.text[at] === "}" && --open === 0) return at;
    }
    return -1;
  }

  // The dollar that closes the one at `at`: within braces dollars are those of \text{if $x$}.
  closingDollar(at) {
    const end = Math.min(this.text.length, at + LONGEST_INLINE, this.cut(at));
    let first = -1;
    for (let i = at + 1, open = 0; i < end; i += 1) {
      const c = this.text[i];
      if (c === "\\") i += 1;
      else if (c === "{") open += 1;
      else if (c === "}") open -= 1;
      else if (c === "$") {
        if (open <= 0) return i;
        if (first < 0) first = i;
      }
    }
    return first;
  }

  // "$12 and $15" is money. A formula has no space inside its dollars, no digit behind them, and is no sentence.
  dollarFormula(at) {
    const end = this.closingDollar(at);
    if (end < 0 || /\d/.test(this.text[end + 1] ?? "")) return -1;
    const inside = this.text.slice(at + 1, end);
    const bare = inside.trim();
    if (!bare || /\n[^\S\n]*\n/.test(inside)) return -1;
    // With space on both sides only what is plainly LaTeX is one.
    if (bare !== inside && !(inside === ` ${bare} ` && !bare.includes("\n") && /\\[a-zA-Z]/.test(bare))) return -1;
    const words = inside.replace(/\\[a-zA-Z]+\s*(?:\{[^{}]*\})?/g, "").match(/[A-Za-z]{3,}/g) ?? [];
    const begins = /^\d[\d,.]*\s+[a-z]{2,}/i.test(inside);
    return words.length > (begins ? 0 : 3) && !/[=<>^_\\]/.test(inside) ? -1 : end;
  }

  made(source, display, written) {
    if (this.elements > MOST_ELEMENTS) {
      return element(display ? "pre" : "code", { class: "source", title: "one formula of too many" }, written);
    }
    const shown = shownFormula(source, display, written);
    this.elements += FORMULA + shown.querySelectorAll("*").length;
    return shown;
  }

  // [end, element] of the code or formula that begins at `at`, or null.
  at(at) {
    const { text } = this;
    const rest = text.slice(at, at + 120);
    const fence = /^(`{3,}|~{3,})([^\n`]*)\n/.exec(rest);
    if (fence && /(?:^|\n)[ \t>]*$/.test(text.slice(Math.max(0, at - 40), at))) return this.fence(at, fence);
    const ticks = /^`+/.exec(rest);
    if (ticks) {
      const end = this.closing(ticks[0], at + ticks[0].length, LONGEST_INLINE);
      if (end < 0 || /\n[^\S\n]*\n/.test(text.slice(at, end))) return null;
      if (ticks[0] === "``" && text.slice(at, end).includes("''")) return null; // LaTeX's quotation marks
      return [end + ticks[0].length, element("code", null, text.slice(at + ticks[0].length, end).trim())];
    }
    for (const [open, close, display] of [["\\[", "\\]", true], ["\\(", "\\)", false], ["$$", "$$", true]]) {
      if (!rest.startsWith(open)) continue;
      const end = this.closing(close, at + 2, LONGEST_FORMULA + 2);
      if (end < 0 || !text.slice(at + 2, end).trim()) return null;
      return [end + 2, this.made(text.slice(at + 2, end), display, text.slice(at, end + 2))];
    }
    if (rest[0] === "$") {
      const end = this.dollarFormula(at);
      return end < 0 ? null : [end + 1, this.made(text.slice(at + 1, end), false, text.slice(at, end + 1))];
    }
    const begin = /^\\begin\{([a-z]+)\*?\}/i.exec(rest);
    if (begin && ENVIRONMENTS.has(begin[1])) {
      const last = begin[0].replace("begin", "end");
      const end = this.closing(last, at, LONGEST_FORMULA);
      if (end < 0) return null;
      const source = text.slice(at, end + last.length);
      return [end + last.length, this.made(source, true, source)];
    }
    if (/^\\f?boxed *\{/.test(rest)) {
      const end = this.closingBrace(at);
      if (end < 0) return null;
      const source = text.slice(at, end + 1);
      return [end + 1, this.made(source.replace(/^\\f?boxed */, "\\boxed"), false, source)];
    }
    return null;
  }

  // A block of code up to its fence, or to a cut or the end where there is none.
  fence(at, [opening, mark, info]) {
    const body = at + opening.length;
    const limit = this.cut(body);
    const close = new RegExp(`^[ \\t>]{0,40}${mark}${mark[0]}*[ \\t]{0,40}$`, "m").exec(this.text.slice(body, limit));
    const end = close ? body + close.index : limit;
    const code = this.text.slice(body, end).replace(/\n$/, "");
    const language = info.trim().slice(0, 30);
    const block = element("pre", { class: "code", tabindex: "0" }, element("code", null, code));
    const label = language ? [element("small", null, language)] : [];
    return [close ? end + close[0].length : limit, element("div", { class: "codeblock" }, ...label, block)];
  }

  // The text with marks for its pieces. Backslashes before punctuation are dropped as Markdown does.
  marked() {
    const { text } = this;
    const parts = [];
    const keep = (node) => parts.push(`\uE000${this.nodes.push(node) - 1}\uE001`);
    let from = 0;
    const special = /[\\`$~]|\uE002(\d+)\uE003/g;
    for (let hit = special.exec(text); hit; hit = special.exec(text)) {
      const at = hit.index;
      if (hit[0][0] === CUT) {
        parts.push(text.slice(from, at), "\n\n");
        keep(element("p", { class: "cut" }, `${whole(hit[1])} characters left out of this page; the samples files have them`));
        parts.push("\n\n");
        special.lastIndex = from = at + hit[0].length;
        continue;
      }
      const found = this.at(at);
      if (found) {
        const block = isBlock(found[1]);
        parts.push(text.slice(from, at));
        if (block) parts.push("\n"); // its own line of the paragraph, so of the list's item too
        keep(found[1]);
        if (block) parts.push("\n");
        special.lastIndex = from = found[0];
      } else if (hit[0] === "\\" && /[$%*#_`]/.test(text[at + 1] ?? "")) {
        parts.push(text.slice(from, at));
        keep(document.createTextNode(text[at + 1]));
        special.lastIndex = from = at + 2;
      } else if (hit[0] === "`" || hit[0] === "$") { // unclosed: not tried again one character on
        special.lastIndex = at + /^(?:`+|\${1,2})/.exec(text.slice(at, at + 50))[0].length;
      }
    }
    parts.push(text.slice(from));
    return parts.join("");
  }
}

const isBlock = (node) => /^(?:DIV|PRE|P)$/.test(node.nodeName);
