// What a model wrote as elements: Markdown by markdown-it, whose tokens become elements one by one, with text in text
// nodes only; formulas and code in the places that pieces.js marked; folded thinking.
const markdown = markdownit({ html: false, linkify: false, typographer: false })
  // Shown as they were written: what would swallow text (references), load or lead somewhere, or is no Markdown of
  // models (indented code, headings by underlining). Backslashes and code are pieces.js's.
  .disable(["code", "fence", "reference", "lheading", "html_block", "html_inline", "link", "image", "autolink",
    "backticks", "escape"]);
const TAGS = new Set(["p", "ul", "ol", "li", "blockquote", "table", "thead", "tbody", "tr", "th", "td", "strong", "em",
  "s"]);

// Text with its marks replaced by their pieces.
function* withPieces(text, pieces) {
  for (const [i, part] of text.split(/\uE000(\d+)\uE001/).entries()) {
    if (i % 2) yield pieces[part] ?? "\uFFFD";
    else if (part) yield part;
  }
}

// Adds to `box`, a paragraph or the like: a block among its words divides it in two.
function addInline(box, tokens, pieces) {
  const open = [box];
  const top = () => open.at(-1);
  for (const token of tokens) {
    if (token.nesting === 1 && TAGS.has(token.tag)) open.push(top().appendChild(element(token.tag)));
    else if (token.nesting === -1 && TAGS.has(token.tag) && open.length > 1) open.pop();
    else if (token.type === "softbreak") top().append("\n");
    else if (token.type === "hardbreak") top().append(element("br"));
    else top().append(...withPieces(token.content, pieces));
  }
}

// A paragraph as one or several, since blocks (code, displayed formulas) stand between them.
function divided(paragraph) {
  const made = [];
  let part = paragraph.cloneNode(false);
  const end = () => {
    if (part.textContent.trim() || part.querySelector("math, br")) made.push(part);
    part = paragraph.cloneNode(false);
  };
  for (const node of [...paragraph.childNodes]) {
    if (!isBlock(node)) part.append(node);
    else {
      end();
      made.push(node);
    }
  }
  end();
  return made;
}

function elements(tokens, pieces) {
  const root = document.createDocumentFragment();
  const open = [root];
  const top = () => open.at(-1);
  for (const token of tokens) {
    if (token.type === "inline") {
      addInline(top(), token.children, pieces);
    } else if (token.type === "hr") {
      top().append(element("hr"));
    } else if (token.nesting === 1) {
      const tag = TAGS.has(token.tag) ? token.tag : "p";
      const heading = token.type === "heading_open" ? "heading" : null;
      open.push(element(tag, { class: heading, start: tag === "ol" ? token.attrGet("start") : null }));
    } else if (token.nesting === -1 && open.length > 1) {
      const node = open.pop();
      // In a tight list an item's words stand in the item itself.
      if (token.type === "paragraph_close") top().append(...divided(node).flatMap((n) =>
        (token.hidden && n.nodeName === "P" ? [...n.childNodes] : [n])));
      else if (node.nodeName === "TABLE") top().append(element("div", { class: "scroll" }, node));
      else top().append(node);
    } else {
      top().append(...withPieces(token.content, pieces));
    }
  }
  return [...root.childNodes];
}

// `indented`: what begins a line is part of the text, as in programs and their statements.
function blocks(source, indented = false) {
  const pieces = new Pieces(source);
  let text = pieces.marked();
  if (indented) text = text.replace(/^[ \t]+/gm, (space) => space.replaceAll("\t", "    ").replaceAll(" ", "\u00A0"));
  return elements(markdown.parse(text, {}), pieces.nodes);
}

// A part that is made when it is first opened.
function folded(label, make, open) {
  const node = element("details", { class: "think", open }, element("summary", null, label));
  node.fill = () => {
    if (!node.open || node.childElementCount > 1) return;
    node.append(element("div", null, ...make()));
    stretched(node);
  };
  node.addEventListener("toggle", node.fill);
  if (open) node.fill();
  return node;
}

// The drawings of the MATH problems are programs.
function withDrawings(text) {
  const parts = [];
  let from = 0;
  for (let at = text.indexOf("[asy]"); at >= 0; at = text.indexOf("[asy]", from)) {
    const end = text.indexOf("[/asy]", at);
    if (end < 0) break;
    const drawing = text.slice(at, end + 6);
    parts.push(text.slice(from, at), /[`\uE002]/.test(drawing) ? drawing : `\n\`\`\`asy\n${drawing}\n\`\`\`\n`);
    from = end + 6;
  }
  return [...parts, text.slice(from)].join("");
}

// A program that stands there without a fence.
const isProgram = (text) => !/^ *(?:```|~~~)/m.test(text) && !text.includes(CUT) && text.includes("\n") &&
  /^(?:from \w|import \w|(?:async )?def \w+ ?\(|class \w+|@\w+|#!|#include|"""|[ \t]+\S)/.test(text.replace(/^\n+/, ""));

// `text` as elements. Its thinking, up to the last </think>, is folded; where there is nothing else it is open.
function rendered(text, code = false) {
  const clean = withDrawings(text.replace(/[\uE000\uE001]/g, "\uFFFD").replace(/\r\n?/g, "\n"));
  const shown = (part) => (code && isProgram(part) ? [element("pre", { class: "code", tabindex: "0" }, part)]
    : blocks(part, code));
  const last = clean.lastIndexOf("</think>");
  const first = clean.indexOf("<think>");
  const said = (part) => `Thinking, ${whole(part.length)} characters shown`;
  if (last >= 0) {
    const begin = first >= 0 && first < last ? first : -1;
    const thought = clean.slice(begin < 0 ? 0 : begin + 7, last);
    const answer = clean.slice(last + 8);
    const before = begin > 0 ? shown(clean.slice(0, begin)) : [];
    const fold = thought.trim() ? [folded(said(thought), () => blocks(thought), !answer.trim())] : [];
    return [...before, ...fold, ...shown(answer)];
  }
  if (first < 0) return shown(clean);
  const thought = clean.slice(first + 7);
  return [...shown(clean.slice(0, first)), folded(`${said(thought)}, not ended`, () => blocks(thought), true)];
}

// One line: pieces and emphasis, no blocks.
function line(text) {
  const pieces = new Pieces(text.replace(/[\uE000-\uE003]/g, "\uFFFD").replace(/\s+/g, " "));
  const box = element("span");
  const [inline] = markdown.parseInline(pieces.marked().replaceAll("\n", " "), {});
  addInline(box, inline?.children ?? [], pieces.nodes);
  for (const display of box.querySelectorAll("div.display")) display.replaceWith(...display.childNodes);
  return [...box.childNodes];
}
