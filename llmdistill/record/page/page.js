// Filters and orders the logged completions. Without script the whole list is there, newest first.
(() => {
  const list = document.getElementById("completions");
  if (!list) return;
  const form = document.querySelector(".filters");
  const rows = [...list.children];
  const texts = rows.map((row) => row.textContent.toLowerCase());
  const value = (id) => document.getElementById(id)?.value ?? "";
  const apply = () => {
    const wanted = value("contains").toLowerCase();
    let shown = 0;
    rows.forEach((row, i) => {
      const fits = ["domain", "finish"].every((key) => !value(key) || row.dataset[key] === value(key));
      row.hidden = !(fits && texts[i].includes(wanted));
      shown += row.hidden ? 0 : 1;
    });
    document.getElementById("count").textContent = shown + " shown";
  };
  const order = () => {
    const sign = Number(value("order"));
    const sorted = sign ? [...rows].sort((a, b) => sign * (a.dataset.kl - b.dataset.kl)) : rows;
    list.append(...sorted);
  };
  form.hidden = false;
  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  document.getElementById("order").addEventListener("change", order);
})();
