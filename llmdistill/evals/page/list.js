// The list of problems: only the rows near the screen are in the page, so that ten thousand cost what twenty do.
const ROW = 92; // pixels of a row; --row of the style sheet
const BEYOND = 8; // rows that are made above and below what is seen

class VirtualList {
  // `make`: an item to its row, a <li>.
  constructor(box, make) {
    this.box = box;
    this.make = make;
    this.items = [];
    this.rows = new Map(); // those in the page, by item
    [this.above, this.below] = ["", ""].map(() => element("li", { class: "space", role: "presentation" }));
    box.addEventListener("scroll", () => this.draw(), { passive: true });
    new ResizeObserver(() => this.draw()).observe(box);
  }

  show(items) {
    this.items = items;
    this.box.replaceChildren(this.above, this.below);
    this.rows.clear();
    this.draw();
  }

  draw() {
    if (!this.above.isConnected) return; // before anything is shown
    const height = this.box.clientHeight || innerHeight;
    const first = Math.max(0, Math.floor(this.box.scrollTop / ROW) - BEYOND);
    const last = Math.min(this.items.length, Math.ceil((this.box.scrollTop + height) / ROW) + BEYOND);
    const wanted = this.items.slice(first, last);
    const kept = new Set(wanted);
    for (const [item, row] of this.rows) {
      if (kept.has(item)) continue;
      row.remove();
      this.rows.delete(item);
    }
    wanted.forEach((item, i) => {
      if (this.rows.has(item)) return;
      const row = this.make(item);
      row.setAttribute("aria-setsize", this.items.length);
      row.setAttribute("aria-posinset", first + i + 1);
      this.rows.set(item, row);
      this.box.insertBefore(row, this.box.children[i + 1]); // behind the space above
    });
    this.above.style.height = `${first * ROW}px`;
    this.below.style.height = `${(this.items.length - last) * ROW}px`;
  }

  // Scrolls so that an item is seen, if it is not.
  reveal(item) {
    const place = this.items.indexOf(item) * ROW;
    if (place < 0) return;
    const [top, bottom] = [this.box.scrollTop, this.box.scrollTop + this.box.clientHeight];
    if (place < top || place + ROW > bottom) this.box.scrollTop = Math.max(0, place - this.box.clientHeight / 3);
    this.draw();
  }
}
