// The browser of problems and samples. The list is made from a small index; a problem's samples are unpacked when it
// is opened (or searched), so that a page of many megabytes opens at once.
const VERDICTS = new Map([
  ["r", "right"], ["R", "right, though cut at the token limit"], ["w", "wrong"], ["t", "cut at the token limit, wrong"],
  ["T", "cut at the token limit, no answer"], ["n", "no answer"], ["e", "failed"], ["u", "not graded"], ["-", "missing"],
]);
const FILTERS = [
  ["", "all", () => true],
  ["wrong", "all wrong", (v) => /[wtTne]/.test(v) && !/[rR]/.test(v)],
  ["mixed", "mixed", (v) => /[wtTne]/.test(v) && /[rR]/.test(v)],
  ["right", "all right", (v) => /[rR]/.test(v) && !/[wtTne]/.test(v)],
  ["truncated", "with a truncated sample", (v) => /[RtT]/.test(v)],
  ["unanswered", "with no answer", (v) => /[nT]/.test(v)],
  ["failed", "with a failed sample", (v) => /e/.test(v)],
];
const ORDERS = [
  ["", "as in the suite", null],
  ["hard", "hardest first", (a, b) => a.rate - b.rate],
  ["easy", "easiest first", (a, b) => b.rate - a.rate],
  ["long", "longest first", (a, b) => b.tokens - a.tokens],
  ["short", "shortest first", (a, b) => a.tokens - b.tokens],
];

// Only here do texts come from: of what models wrote nothing is read elsewhere.
async function unpack(id) {
  const bytes = Uint8Array.from(atob(byId(id).textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(tamed(await new Response(stream).text()));
}

// Text that came in two ends: [head, characters left out, tail], or a string when it is whole.
const joined = (text) => (typeof text === "string" ? text : text.map((part) =>
  (typeof part === "number" ? `${CUT}${part}\uE003` : part.replace(/[\uE002\uE003]/g, "\uFFFD"))).join(""));
const rawText = (text) => (typeof text === "string" ? text
  : `${text[0]}\n[… ${whole(text[1])} characters left out of this page …]\n${text[2]}`);
const typeset = (text, code) =>
  rendered(typeof text === "string" ? text.replace(/[\uE002\uE003]/g, "\uFFFD") : joined(text), code);

function dots(verdicts) {
  const shown = [...verdicts].slice(0, 64).map((v) => element("i", { class: `dot v-${v}` }));
  const counts = [...VERDICTS].map(([v, label]) => [verdicts.split(v).length - 1, label]).filter(([count]) => count);
  const label = counts.map(([count, name]) => `${count} ${name}`).join("; ");
  if (verdicts.length > 64) shown.push(element("small", null, `+${verdicts.length - 64}`));
  return element("span", { class: "dots", role: "img", "aria-label": label, title: label }, ...shown);
}

const solved = (problem) => {
  const there = problem.verdicts.replace(/[-u]/g, "").length;
  if (!there && problem.verdicts.includes("u")) return "not graded";
  return there ? `${problem.verdicts.replace(/[^rR]/g, "").length} of ${there}` : "no samples";
};

// Which mark stands for which verdict, of those that are there.
function legend(problems) {
  const there = new Set(problems.map((problem) => problem.verdicts).join(""));
  return [...VERDICTS].filter(([v]) => there.has(v)).map(([v, label]) =>
    element("span", null, element("i", { class: `dot v-${v}`, "aria-hidden": "true" }), label));
}

// An extracted answer is a formula as a rule; whatever is none is shown as it is.
function answer(text) {
  if (text === null) return element("em", null, "none");
  if (/^[\w\s.,'-]*$/.test(text)) return document.createTextNode(text);
  const shown = shownFormula(text.replace(/^\$([^]*)\$$/, "$1"), false, text);
  shown.setAttribute("displaystyle", "true");
  return shown;
}

class Browser {
  constructor(index) {
    this.problems = index.map((problem, place) => {
      const there = problem.verdicts.replace(/[-u]/g, "");
      const rate = there ? there.replace(/[^rR]/g, "").length / there.length : -1;
      const words = [problem.id, problem.start, problem.gold ?? "", ...Object.values(problem.groups)].join("\n");
      const href = `#problem=${encodeURIComponent(problem.id)}`;
      return { ...problem, place, rate, href, words: words.toLowerCase() };
    });
    this.shown = [];
    this.current = null;
    this.raw = false;
    this.list = new VirtualList(byId("problem-list"), (problem) => this.row(problem));
    this.search = new Search((found) => this.found(found));
    this.detail = byId("problem-detail");
  }

  start() {
    const option = (value, label) => element("option", { value }, label);
    for (const [value, label, fits] of FILTERS) {
      const count = this.problems.filter((p) => fits(p.verdicts)).length;
      if (!value || count) byId("show").append(option(value, `${label} (${whole(count)})`));
    }
    byId("order").append(...ORDERS.map(([value, label]) => option(value, label)));
    this.groupOptions();
    const form = byId("problem-filters");
    form.hidden = false;
    form.addEventListener("submit", (event) => event.preventDefault());
    let timer = 0;
    byId("search").addEventListener("input", () => {
      clearTimeout(timer);
      timer = setTimeout(() => this.update(), 150);
    });
    form.addEventListener("change", (event) => event.target.id !== "search" && this.update());
    addEventListener("hashchange", () => this.follow());
    addEventListener("keydown", (event) => this.key(event));
    byId("legend").append(...legend(this.problems));
    this.update();
    this.follow();
    if (!this.current && !location.hash && this.shown.length) this.open(this.shown[0], false, false);
  }

  groupOptions() {
    const found = new Map();
    for (const { groups } of this.problems) {
      for (const [key, value] of Object.entries(groups)) found.set(key, (found.get(key) ?? new Set()).add(value));
    }
    const select = byId("group");
    select.append(element("option", { value: "" }, "all"));
    for (const [key, values] of found) {
      const sorted = [...values].sort((a, b) => a.localeCompare(b, "en", { numeric: true })).slice(0, 200);
      const options = sorted.map((value) => element("option", { value: JSON.stringify([key, value]) }, value));
      select.append(element("optgroup", { label: key }, ...options));
    }
    select.parentElement.hidden = found.size === 0;
  }

  row(problem) {
    const facts = element("span", { class: "facts" }, dots(problem.verdicts), element("span", null, solved(problem)),
      element("span", null, problem.tokens ? `${whole(Math.round(problem.tokens))} tokens` : ""));
    const title = element("span", { class: "id" }, problem.id);
    const start = element("span", { class: "start", dir: "auto" }, ...line(problem.start));
    const current = this.current === problem ? "true" : null;
    return element("li", null, element("a", { href: problem.href, "aria-current": current }, title, facts, start));
  }

  // Filters and orders; what is searched is looked for in the samples too, by the worker.
  update() {
    const wanted = byId("search").value.trim().toLowerCase();
    const fits = FILTERS.find(([value]) => value === byId("show").value)[2];
    const group = byId("group").value ? JSON.parse(byId("group").value) : null;
    this.candidates = this.problems.filter((p) => fits(p.verdicts) && (!group || p.groups[group[0]] === group[1]));
    const order = ORDERS.find(([value]) => value === byId("order").value)[2];
    if (order) this.candidates.sort((a, b) => order(a, b) || a.place - b.place);
    this.hits = new Set(this.candidates.filter((p) => p.words.includes(wanted)));
    this.show(wanted ? ", searching the samples…" : "");
    this.search.start(wanted, this.candidates.filter((p) => !this.hits.has(p)).map((p) => p.place));
  }

  found({ hits, done, failed }) {
    for (const place of hits) this.hits.add(this.problems[place]);
    if (failed) this.show(", the samples cannot be searched in this browser");
    else this.show(done < 1 ? `, searching the samples… ${Math.round(100 * done)} %` : "", hits.length > 0);
  }

  show(note, changed = true) {
    if (changed) {
      this.shown = this.candidates.filter((p) => this.hits.has(p));
      this.list.show(this.shown);
    }
    byId("count").textContent = `${whole(this.shown.length)} of ${whole(this.problems.length)} problems${note}`;
  }

  follow() {
    const [, id] = /^#problem=(.*)$/.exec(location.hash) ?? [];
    if (id === undefined) return;
    let wanted = id;
    try {
      wanted = decodeURIComponent(id);
    } catch { /* not ours: compared as it is */ }
    const problem = this.problems.find((p) => p.id === wanted);
    if (problem) this.open(problem, true);
    else this.detail.replaceChildren(element("p", { class: "none" }, "No problem of this name is on this page."));
  }

  // `seen`: the page moves to it, as when it was asked for.
  async open(problem, focus, seen = true) {
    this.current = problem;
    for (const [item, row] of this.list.rows) {
      if (item === problem) row.firstChild.setAttribute("aria-current", "true");
      else row.firstChild.removeAttribute("aria-current");
    }
    const data = await unpack(`data-${problem.place}`);
    if (this.current !== problem) return;
    this.detail.replaceChildren(...this.problem(problem, data));
    stretched(this.detail);
    if (!seen) return;
    byId("browser").classList.add("opened");
    this.list.reveal(problem);
    const box = this.detail.getBoundingClientRect();
    if (focus || box.top < 0 || box.top > innerHeight / 2) byId("browser").scrollIntoView({ block: "start" });
    this.detail.scrollTop = 0;
    if (focus) this.detail.querySelector("h3").focus({ preventScroll: true });
  }

  problem(problem, data) {
    const groups = Object.entries(problem.groups);
    const tags = groups.map(([key, value]) => element("bdi", { class: "tag" }, `${key}: ${value}`));
    const back = element("a", { class: "back", href: "#problems" }, "← the list");
    back.addEventListener("click", () => this.close());
    const code = data.kind === "code";
    const samples = data.samples.map((sample, i) => this.sample(sample, i === 0, code));
    const jump = (i) => {
      samples[i].open = true;
      samples[i].scrollIntoView({ block: "nearest" });
      samples[i].firstChild.focus();
    };
    const strip = data.samples.map((sample, i) => {
      const label = `sample ${sample.index}: ${VERDICTS.get(sample.verdict)}`;
      const dot = element("i", { class: `dot v-${sample.verdict}` });
      const button = element("button", { type: "button", title: label, "aria-label": label }, dot);
      button.addEventListener("click", () => jump(i));
      return button;
    });
    const raw = element("input", { type: "checkbox", id: "raw" });
    raw.checked = this.raw;
    raw.addEventListener("change", () => this.toggleRaw(raw.checked));
    const notes = [];
    if (data.absent) {
      const said = `${whole(data.absent)} more samples are left out of this page; the samples files have them.`;
      notes.push(element("p", { class: "note" }, said));
    }
    return [
      back,
      element("h3", { tabindex: "-1" }, element("bdi", null, problem.id)),
      element("p", { class: "facts" }, ...tags, element("span", null, `${solved(problem)}${/^\d/.test(solved(problem)) ? " right" : ""}`)),
      element("h4", null, "Question"),
      this.text(data.question, "question", code),
      ...this.prompt(data),
      ...this.gold(data),
      element("div", { class: "strip" }, element("span", { class: "dots" }, ...strip),
        element("label", null, raw, " text as it was written")),
      ...samples,
      ...notes,
    ];
  }

  // What the model read, to the letter: the template's own words too.
  prompt({ prompt }) {
    if (!prompt) return [];
    const label = prompt.messages ? "Messages to the endpoint, whose own chat template goes around them"
      : `Prompt as the model read it, ${whole(prompt.tokens)} tokens`;
    const shown = folded(label, () => [element("pre", { class: "raw" }, rawText(prompt.text))], false);
    shown.classList.add("prompt");
    return [shown];
  }

  gold(data) {
    const made = [];
    if (data.kind === "code") {
      const program = (label, text) => folded(label, () => [element("pre", { class: "code" }, rawText(text))], false);
      if (data.gold) made.push(program("Reference program", data.gold));
      if (data.tests) made.push(program("Tests", data.tests));
    } else if (data.gold !== null) {
      const gold = element("b", null, answer(rawText(data.gold)));
      made.push(element("p", { class: "gold" }, element("span", null, "right answer "), gold));
    }
    return made;
  }

  text(text, kind, code) {
    const box = element("div", { class: `text ${kind}`, dir: "auto" });
    box.fill = () => {
      const plain = () => element("pre", { class: "raw" }, rawText(text));
      try {
        box.replaceChildren(...(this.raw ? [plain()] : typeset(text, code)));
      } catch { // a text the page cannot lay out is still shown
        box.replaceChildren(plain());
      }
    };
    box.fill();
    return box;
  }

  sample(sample, open, code) {
    const long = sample.extracted !== null && (sample.extracted.length > 120 || sample.extracted.includes("\n"));
    const found = sample.extracted !== null && sample.stage && `found by ${sample.stage}`;
    const facts = [`${whole(sample.tokens)} tokens`, found, sample.finish === "length" && "truncated",
      `seed ${sample.seed}`].filter(Boolean);
    const dot = element("i", { class: `dot v-${sample.verdict}`, "aria-hidden": "true" });
    const summary = element("summary", null,
      element("span", { class: `badge v-${sample.verdict}` }, dot, sample.kind.replaceAll("_", " ")),
      element("span", { class: "number" }, `#${sample.index}`),
      element("span", { class: "answer" }, ...(long ? ["program"] : sample.verdict === "u" ? [] : [answer(sample.extracted)])),
      element("span", { class: "facts" }, ...facts.map((f) => element("span", null, f))));
    const node = element("details", { class: "sample" }, summary);
    node.fill = () => {
      if (!node.open || node.childElementCount > 1) return;
      if (sample.detail) node.append(element("p", { class: "why" }, element("span", null, "verdict: "), sample.detail));
      if (long) node.append(folded("Extracted", () => [element("pre", { class: "code" }, sample.extracted)], false));
      const empty = element("p", { class: "none" }, "An empty completion.");
      node.append(sample.text.length ? this.text(sample.text, "written", code) : empty);
      stretched(node);
    };
    node.addEventListener("toggle", node.fill);
    node.open = open;
    node.fill();
    return node;
  }

  // All samples with their thinking; closes them where all are open.
  openAll() {
    const all = () => [...this.detail.querySelectorAll("details.sample, .written details.think")];
    const open = !all().every((part) => part.open);
    for (const selected of ["details.sample", ".written details.think"]) { // the second are made by the first
      for (const part of this.detail.querySelectorAll(selected)) {
        part.open = open;
        part.fill();
      }
    }
  }

  toggleRaw(raw) {
    this.raw = raw;
    if (byId("raw")) byId("raw").checked = raw;
    for (const box of this.detail.querySelectorAll(".text")) box.fill();
    stretched(this.detail);
  }

  close() {
    byId("browser").classList.remove("opened");
    this.list.rows.get(this.current)?.firstChild.focus();
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = /^(?:INPUT|SELECT|TEXTAREA)$/.test(event.target.nodeName) && event.target.type !== "checkbox";
    if (typing && event.key !== "Escape") return;
    if (event.key === "j" || event.key === "k") {
      const at = this.shown.indexOf(this.current);
      const next = this.shown[at < 0 ? 0 : at + (event.key === "j" ? 1 : -1)];
      if (!next) return;
      history.replaceState(null, "", next.href);
      this.open(next, false);
    } else if (event.key === "/") {
      event.preventDefault();
      byId("search").focus();
    } else if (event.key === "r" && this.current) {
      this.toggleRaw(!this.raw);
    } else if (event.key === "o" && this.current) {
      this.openAll();
    } else if (event.key === "Escape") {
      if (typing) event.target.blur();
      else this.close();
    }
  }
}

(async () => {
  const status = byId("count");
  if (!byId("index")) return;
  try {
    new Browser(await unpack("index")).start();
  } catch (error) {
    byId("problem-filters").hidden = false;
    status.textContent = `The samples cannot be shown: ${error.message}`;
  }
})();
