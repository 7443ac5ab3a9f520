// What a model wrote as elements: formulas, code, light Markdown, folded thinking. Text goes in as text nodes only.
//
// First the pieces in which Markdown means nothing (code, formulas) are cut out and leave a mark behind; then lines
// become blocks; then marks and emphasis within a line become elements.
const MARK = /\uE000(\d+)\uE001/;
const CUT = "\uE002"; // where characters were left out of the page; followed by their number and \uE003
const LONGEST_INLINE = 1500;

const element = (tag, properties, ...children) => {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(properties ?? {})) {
    if (value !== false && value !== null && value !== undefined) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children);
  return node;
};

// A formula, or its source as code where it is not understood.
function shownFormula(source, display, written) {
  try {
    const math = formula(source, display);
    return display ? element("div", { class: "display" }, math) : math;
  } catch {
    return element(display ? "pre" : "code", { class: "source", title: "not shown as a formula" }, written);
  }
}

// The end of what opened at `from`, or -1: not past a cut, not further than `most` characters.
function closing(text, close, from, most) {
  const cut = text.indexOf(CUT, from);
  const end = Math.min(text.length, from + most, cut < 0 ? Infinity : cut);
  for (let at = text.indexOf(close, from); at >= 0 && at + close.length <= end; at = text.indexOf(close, at + 1)) {
    let slashes = 0;
    while (text[at - 1 - slashes] === "\\") slashes += 1;
    if (slashes % 2 === 0 || close[0] === "`") return at;
  }
  return -1;
}

function closingBrace(text, from) {
  for (let at = from, open = 0; at < Math.min(text.length, from + LONGEST_FORMULA); at += 1) {
    if (text[at] === CUT) return -1;
    if (text[at] === "\\") at += 1;
    else if (text[at] === "{") open += 1;
    else if (text[at] === "}" && --open === 0) return at;
  }
  return -1;
}

// "$12 and $15" is money. A formula has no space inside its dollars, no digit behind them, and is no sentence.
function dollarFormula(text, at) {
  let end = closing(text, "$", at + 1, LONGEST_INLINE);
  const open = (from, to) => text.slice(from, to).replace(/\\./g, "").replace(/[^{}]/g, "");
  const deep = (braces) => braces.split("{").length > braces.split("}").length;
  while (end >= 0 && deep(open(at, end))) { // within braces dollars are those of \text{if $x$}
    const next = closing(text, "$", end + 1, at + LONGEST_INLINE - end);
    if (next < 0) break;
    end = next;
  }
  if (end < 0 || /\d/.test(text[end + 1] ?? "")) return -1;
  const inside = text.slice(at + 1, end);
  if (!inside.trim()) return -1;
  // With space on both sides only what is plainly LaTeX is one.
  if (inside.trim() !== inside && !/^ [^\n]*\\[a-zA-Z][^\n]* $/.test(inside)) return -1;
  if (/\n\s*\n/.test(inside)) return -1;
  const words = inside.replace(/\\[a-zA-Z]+\s*(?:\{[^{}]*\})?/g, "").match(/[A-Za-z]{3,}/g) ?? [];
  const begins = /^\d[\d,.]*\s+[a-z]{2,}/i.test(inside);
  return words.length > (begins ? 0 : 3) && !/[=<>^_\\]/.test(inside) ? -1 : end;
}

// [end, element] of the code or formula that begins at `at`, or null.
function piece(text, at) {
  const rest = text.slice(at, at + 40);
  const fence = /^(`{3,}|~{3,})([^\n`]*)\n/.exec(text.slice(at, at + 120));
  if (fence && /(?:^|\n)[ \t]*$/.test(text.slice(Math.max(0, at - 20), at))) {
    const body = at + fence[0].length;
    const limit = text.indexOf(CUT, body) < 0 ? text.length : text.indexOf(CUT, body);
    const close = new RegExp(`^[ \\t]*${fence[1]}${fence[1][0]}*[ \\t]*$`, "m").exec(text.slice(body, limit));
    const end = close ? body + close.index : limit;
    const code = text.slice(body, end).replace(/\n$/, "");
    const language = fence[2].trim().slice(0, 30);
    const block = element("pre", { class: "code", tabindex: "0" }, element("code", null, code));
    const label = language ? [element("small", null, language)] : [];
    const labelled = element("div", { class: "codeblock" }, ...label, block);
    return [close ? end + close[0].length : limit, labelled];
  }
  const ticks = /^`+/.exec(rest);
  if (ticks) {
    const end = closing(text, ticks[0], at + ticks[0].length, LONGEST_INLINE);
    if (end < 0 || /\n\s*\n/.test(text.slice(at, end))) return null;
    if (ticks[0] === "``" && text.slice(at, end).includes("''")) return null; // LaTeX's quotation marks
    return [end + ticks[0].length, element("code", null, text.slice(at + ticks[0].length, end).trim())];
  }
  for (const [open, close, display] of [["\\[", "\\]", true], ["\\(", "\\)", false], ["$$", "$$", true]]) {
    if (!rest.startsWith(open)) continue;
    const end = closing(text, close, at + 2, LONGEST_FORMULA);
    if (end < 0) return null;
    return [end + 2, shownFormula(text.slice(at + 2, end), display, text.slice(at, end + 2))];
  }
  if (rest[0] === "$") {
    const end = dollarFormula(text, at);
    return end < 0 ? null : [end + 1, shownFormula(text.slice(at + 1, end), false, text.slice(at, end + 1))];
  }
  const begin = /^\\begin\{([a-z]+\*?)\}/i.exec(rest);
  if (begin && ENVIRONMENTS.has(begin[1].replace("*", ""))) {
    const last = `\\end{${begin[1]}}`;
    const end = closing(text, last, at, LONGEST_FORMULA);
    if (end < 0) return null;
    const source = text.slice(at, end + last.length);
    return [end + last.length, shownFormula(source, true, source)];
  }
  const box = /^\\f?boxed\s*\{/.exec(rest);
  if (box) {
    const end = closingBrace(text, at);
    if (end < 0) return null;
    const source = text.slice(at, end + 1);
    return [end + 1, shownFormula(source, false, source)];
  }
  return null;
}

// The text with marks for its pieces, and the pieces. Backslashes before punctuation are dropped as Markdown does.
function marked(text) {
  const pieces = [];
  const parts = [];
  const keep = (node) => parts.push(`\uE000${pieces.push(node) - 1}\uE001`);
  let from = 0;
  const special = /[\\`$~]|\uE002(\d+)\uE003/g;
  for (let hit = special.exec(text); hit; hit = special.exec(text)) {
    const at = hit.index;
    if (hit[0][0] === CUT) {
      parts.push(text.slice(from, at), "\n\n");
      const count = Number(hit[1]).toLocaleString("en");
      keep(element("p", { class: "cut" }, `${count} characters left out of this page; the samples files have them`));
      parts.push("\n\n");
      special.lastIndex = from = at + hit[0].length;
      continue;
    }
    const found = piece(text, at);
    if (found) {
      parts.push(text.slice(from, at));
      const block = /^(?:DIV|PRE)$/.test(found[1].nodeName);
      if (block) parts.push("\n");
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
  return { text: parts.join(""), pieces };
}

function inline(text, pieces) {
  const nodes = [];
  const parts = text.split(/(\uE000\d+\uE001|\*\*(?=\S)[^]+?\*\*|(?<![\w*])\*(?=[^\s*])[^*\n]*[^\s*]\*(?![\w*]))/);
  parts.forEach((part, i) => {
    const mark = MARK.exec(part);
    if (i % 2 === 0) nodes.push(document.createTextNode(part));
    else if (part.startsWith("**")) nodes.push(element("strong", null, ...inline(part.slice(2, -2), pieces)));
    else if (part.startsWith("*")) nodes.push(element("em", null, ...inline(part.slice(1, -1), pieces)));
    else nodes.push(pieces[mark[1]]);
  });
  return nodes;
}

// A list with at most one list inside each of its items; what is indented further stands there too.
function list(lines, pieces) {
  const begin = (line) => {
    const ordered = /^\s*\d/.test(line);
    return element(ordered ? "ol" : "ul", { start: ordered ? Number.parseInt(line, 10) : null });
  };
  const outer = begin(lines[0]);
  const margin = /^\s*/.exec(lines[0])[0].length;
  let last = null;
  for (const line of lines) {
    const item = /^(\s*)(?:[-*+•]|\d{1,4}[.)])\s+(.*)$/s.exec(line);
    if (!item) {
      last.append(element("br"), ...inline(line.trim(), pieces));
      continue;
    }
    last = element("li", null, ...inline(item[2], pieces));
    if (item[1].length < margin + 2) {
      outer.append(last);
    } else {
      const parent = outer.lastChild;
      if (!/^[OU]L$/.test(parent.lastChild?.nodeName ?? "")) parent.append(begin(line));
      parent.lastChild.append(last);
    }
  }
  return outer;
}

function tableOf(lines, pieces) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|");
  const [head, , ...body] = lines;
  const cell = (text, tag) => element(tag, null, ...inline(text.trim(), pieces));
  const rowOf = (line, tag) => element("tr", null, ...cells(line).map((text) => cell(text, tag)));
  return element("div", { class: "scroll" }, element("table", null,
    element("thead", null, rowOf(head, "th")), element("tbody", null, ...body.map((line) => rowOf(line, "td")))));
}

const ITEM = /^\s*(?:[-*+•]|\d{1,4}[.)])\s+\S/;
const TABLE = /^\s*\|.*\|\s*$/;

function blocks(source) {
  const { text, pieces } = marked(source);
  const made = [];
  const lines = text.split("\n");
  const take = (fits) => {
    const start = at;
    while (at < lines.length && fits(lines[at])) at += 1;
    return lines.slice(start, at);
  };
  const whole = (line) => {
    const mark = /^\s*\uE000(\d+)\uE001\s*$/.exec(line);
    return mark && /^(?:DIV|PRE|P)$/.test(pieces[mark[1]].nodeName) ? pieces[mark[1]] : null;
  };
  const heading = /^\s{0,3}(#{1,6})\s+(.*?)\s*#*\s*$/;
  const rule = /^\s*(?:-{3,}|\*{3,}|_{3,})\s*$/;
  const plain = (line) => line.trim() && !whole(line) && !heading.test(line) && !ITEM.test(line) && !rule.test(line) &&
    !/^\s*>/.test(line) && !TABLE.test(line);
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    const alone = whole(line);
    if (!line.trim()) at += 1;
    else if (alone) { made.push(alone); at += 1; }
    else if (rule.test(line)) { made.push(element("hr")); at += 1; }
    else if (heading.test(line)) {
      made.push(element("p", { class: "heading" }, ...inline(heading.exec(line)[2], pieces)));
      at += 1;
    } else if (/^\s*>/.test(line)) {
      const quoted = take((l) => /^\s*>/.test(l)).map((l) => l.replace(/^\s*>\s?/, ""));
      made.push(element("blockquote", null, ...inline(quoted.join("\n"), pieces)));
    } else if (ITEM.test(line)) {
      made.push(list(take((l) => ITEM.test(l) || (plain(l) && /^\s{2,}/.test(l))), pieces));
    } else if (TABLE.test(line)) {
      const rows = take((l) => TABLE.test(l));
      const table = rows.length > 1 && /^[\s|:-]+$/.test(rows[1]);
      made.push(table ? tableOf(rows, pieces) : element("p", null, ...inline(rows.join("\n"), pieces)));
    } else {
      const taken = take(plain);
      made.push(element("p", null, ...inline((taken.length ? taken : [lines[at++]]).join("\n"), pieces)));
    }
  }
  return made;
}

// A part that is made when it is first opened.
function folded(label, make, open) {
  const node = element("details", { class: "think", open }, element("summary", null, label));
  const fill = () => {
    if (!node.open || node.childElementCount > 1) return;
    node.append(element("div", null, ...make()));
    stretched(node);
  };
  node.addEventListener("toggle", fill);
  if (open) fill();
  return node;
}

// `text` as elements. Its thinking, up to the last </think>, is folded; where there is nothing else it is open.
function rendered(text) {
  const clean = text.replace(/[\uE000\uE001]/g, "\uFFFD").replace(/\r\n?/g, "\n")
    .replace(/\[asy\][^`\uE002]*?\[\/asy\]/g, "\n```asy\n$&\n```\n"); // the drawings of the MATH problems are programs
  const last = clean.lastIndexOf("</think>");
  const first = clean.indexOf("<think>");
  const said = (part) => `Thinking, ${part.length.toLocaleString("en")} characters shown`;
  if (last >= 0) {
    const begin = first >= 0 && first < last ? first : -1;
    const thought = clean.slice(begin < 0 ? 0 : begin + 7, last);
    const answer = clean.slice(last + 8);
    const before = begin > 0 ? blocks(clean.slice(0, begin)) : [];
    const fold = thought.trim() ? [folded(said(thought), () => blocks(thought), !answer.trim())] : [];
    return [...before, ...fold, ...blocks(answer)];
  }
  if (first < 0) return blocks(clean);
  const thought = clean.slice(first + 7);
  return [...blocks(clean.slice(0, first)), folded(`${said(thought)}, not ended`, () => blocks(thought), true)];
}

// One line: pieces and emphasis, no blocks.
function line(text) {
  const { text: rest, pieces } = marked(text.replace(/[\uE000-\uE003]/g, "\uFFFD").replace(/\s+/g, " "));
  return inline(rest, pieces).map((node) => {
    if (node.nodeName !== "DIV") return node;
    node.firstChild.removeAttribute("display");
    return node.firstChild;
  });
}
