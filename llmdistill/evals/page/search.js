// Search in the samples, in a worker: texts are unpacked and read there while the page stays as quick as it was.
// The worker is this very text; the page's policy lets nothing else become one, and lets it load nothing.
const searcher = () => {
  const KEPT = 48e6; // characters of unpacked texts that are kept for the next search
  const blocks = new Map();
  const texts = new Map();
  let kept = 0;
  let newest = 0;

  async function unpacked(place) {
    if (texts.has(place)) return texts.get(place);
    const bytes = Uint8Array.from(atob(blocks.get(place)), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const data = JSON.parse(await new Response(stream).text());
    const whole = (text) => (typeof text === "string" ? text : (text ?? []).join("\n"));
    const parts = [data.question, ...data.samples.flatMap((s) => [s.text, s.extracted ?? "", s.detail])];
    const text = parts.map(whole).join("\n\n").toLowerCase();
    if (kept + text.length <= KEPT) {
      texts.set(place, text);
      kept += text.length;
    }
    return text;
  }

  async function search({ id, wanted, places }) {
    let hits = [];
    let told = Date.now();
    for (const [i, place] of places.entries()) {
      if ((await unpacked(place)).includes(wanted)) hits.push(place);
      if (Date.now() - told < 150) continue;
      told = Date.now();
      await new Promise((go) => setTimeout(go)); // a newer search may have come
      if (id !== newest) return;
      postMessage({ id, hits, done: (i + 1) / places.length });
      hits = [];
    }
    if (id === newest) postMessage({ id, hits, done: 1 });
  }

  addEventListener("message", ({ data }) => {
    for (const [place, block] of data.blocks ?? []) blocks.set(place, block);
    if (data.id === undefined) return;
    newest = data.id;
    search(data);
  });
};

class Search {
  // `found`: told ({id, hits, done}) as problems are found, by their places.
  constructor(found) {
    this.found = found;
    this.id = 0;
  }

  // Starts a search and forgets the one before. Without `wanted` there is nothing more to find.
  start(wanted, places) {
    this.id += 1;
    if (!wanted) {
      this.worker?.postMessage({ id: this.id, wanted, places: [] });
      return;
    }
    if (!this.worker) {
      const url = URL.createObjectURL(new Blob([`"use strict";(${searcher})()`], { type: "text/javascript" }));
      this.worker = new Worker(url);
      URL.revokeObjectURL(url);
      this.worker.addEventListener("message", ({ data }) => data.id === this.id && this.found(data));
      this.worker.addEventListener("error", () => this.found({ id: this.id, hits: [], done: 1, failed: true }));
      this.sent = new Set();
    }
    const blocks = places.filter((place) => !this.sent.has(place));
    for (const place of blocks) this.sent.add(place);
    this.worker.postMessage({
      id: this.id, wanted, places, blocks: blocks.map((place) => [place, byId(`data-${place}`).textContent]),
    });
  }
}
