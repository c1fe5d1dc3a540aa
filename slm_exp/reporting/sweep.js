"use strict";
// Everything here adds to a page that says the same without it. No network, no storage.
const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
const show = (element) => { if (element) element.hidden = false; };

// The same run lights up in every chart and table.
(() => {
  let lit = null;
  const light = (run) => {
    if (run === lit) return;
    for (const element of $$(".lit")) element.classList.remove("lit");
    lit = run;
    if (run) for (const element of $$(`[data-run="${CSS.escape(run)}"]`)) element.classList.add("lit");
  };
  const of = (event) => event.target.closest?.("[data-run]")?.dataset.run ?? null;
  for (const kind of ["pointerover", "focusin"]) document.addEventListener(kind, (event) => light(of(event)));
})();

// Charts: one stop of the Tab key each, arrows from mark to mark, and a tip for the mark pointed at.
for (const chart of $$("svg.points")) {
  const marks = $$("a.point", chart), all = $$(".point", chart);
  const at = (mark) => { const m = mark.querySelector("use, circle.dense"); return m.getAttribute("x") + m.getAttribute("y") + m.getAttribute("cx") + m.getAttribute("cy"); };
  const told = new Map(all.map((mark) => {
    const title = mark.querySelector("title"), text = title.textContent;
    mark.setAttribute("aria-label", text);
    title.remove();
    return [mark, text];
  }));
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  tip.setAttribute("aria-hidden", "true");
  chart.parentElement.append(tip);
  const open = (mark) => {
    const same = all.filter((other) => at(other) === at(mark) && !other.classList.contains("out"));
    const lines = same.slice(0, 4).map((other) => told.get(other));
    tip.textContent = [...lines, ...(same.length > 4 ? [`and ${same.length - 4} more at the same place`] : [])].join("\n");
    tip.hidden = false;
    const box = chart.parentElement.getBoundingClientRect(), here = mark.querySelector("use, circle").getBoundingClientRect();
    const left = here.left - box.left + here.width / 2 - tip.offsetWidth / 2;
    tip.style.left = `${Math.max(0, Math.min(left, box.width - tip.offsetWidth))}px`;
    const above = here.top - box.top - tip.offsetHeight - 8;
    tip.style.top = `${above > -40 ? above : here.bottom - box.top + 8}px`;
  };
  const close = () => { tip.hidden = true; };
  marks.forEach((mark, i) => mark.setAttribute("tabindex", i ? "-1" : "0"));
  for (const mark of all) {
    mark.addEventListener("pointerenter", () => open(mark));
    mark.addEventListener("pointerleave", close);
    mark.addEventListener("focus", () => open(mark));
    mark.addEventListener("blur", close);
  }
  chart.addEventListener("keydown", (event) => {
    if (event.key === "Escape") return close();
    const shown = marks.filter((mark) => !mark.classList.contains("out"));
    const now = shown.indexOf(document.activeElement);
    const to = { ArrowRight: now + 1, ArrowDown: now + 1, ArrowLeft: now - 1, ArrowUp: now - 1, Home: 0, End: shown.length - 1 }[event.key];
    if (to === undefined || !shown.length) return;
    event.preventDefault();
    const next = shown[(to + shown.length) % shown.length];
    for (const mark of marks) mark.setAttribute("tabindex", mark === next ? "0" : "-1");
    next.focus();
  });
}

// Marks by another setting.
(() => {
  const form = document.querySelector("form.shade");
  if (!form) return;
  show(form);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.elements.shade.addEventListener("change", ({ target }) => {
    const option = target.selectedOptions[0], values = JSON.parse(option.dataset.values);
    const of = new Map($$("#table-runs tbody tr").map((row) => {
      const cell = row.querySelector(`[data-key="${CSS.escape(target.value)}"]`);
      return [row.dataset.run, Math.max(0, values.indexOf(cell.textContent))];
    }));
    for (const mark of $$("a.point")) {
      const k = of.get(mark.dataset.run);
      mark.setAttribute("class", mark.getAttribute("class").replace(/\bs\d\b/, `s${k}`));
      mark.querySelector("use").setAttribute("href", `#shape-${k}`);
    }
    for (const key of $$("ul.marks")) {
      key.setAttribute("aria-label", `Marks by ${option.textContent}`);
      key.replaceChildren(...values.map((value, k) => {
        const item = document.createElement("li"), name = document.createElement("span");
        item.innerHTML = `<svg width="16" height="16" aria-hidden="true" class="s${k}"><use href="#shape-${k}" x="8" y="8"/></svg>`;
        name.textContent = value;
        item.append(name);
        return item;
      }));
    }
  });
})();

// A heading sorts its table; cells without a value stay last.
for (const table of $$("table.sortable")) {
  const body = table.tBodies[0];
  for (const head of $$("th[data-sort]", table)) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.replaceChildren(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending", i = head.cellIndex;
      for (const other of $$("th[data-sort]", table)) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const key = (row) => row.cells[i].dataset.value;
      const compare = (a, b) => (a === "" || b === "" || isNaN(a) || isNaN(b))
        ? a.localeCompare(b, "en", { numeric: true }) : Number(a) - Number(b);
      body.append(...[...body.rows].sort((r, s) => {
        const a = key(r), b = key(s);
        if (a === "" || b === "") return (a === "") - (b === "");
        return up ? compare(a, b) : compare(b, a);
      }));
    });
  }
}

// The filter of the runs holds for the tables and the charts.
(() => {
  const form = document.querySelector("form.filter");
  show(form);
  const rows = $$("#table-runs tbody tr"), output = form.querySelector("output");
  const apply = () => {
    const find = form.elements.find.value.trim().toLowerCase().split(/\s+/), seen = new Set();
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      const chosen = $$("select", form).every(({ name, value }) => !value || (name === "state" ? row.dataset.state === value
        : row.querySelector(`[data-key="${CSS.escape(name)}"]`).textContent === value));
      if (chosen && find.every((word) => text.includes(word))) seen.add(row.dataset.run);
    }
    for (const row of $$("table.filtered tbody tr")) row.hidden = !seen.has(row.dataset.run);
    for (const mark of $$("a.point")) mark.classList.toggle("out", !seen.has(mark.dataset.run));
    output.textContent = seen.size === rows.length ? "" : `${seen.size} of ${rows.length} runs`;
  };
  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(apply));
})();

// Atlas: one pair of layers in every picture, one plan alone.
(() => {
  const form = document.querySelector("form.pair");
  if (!form) return;
  show(form);
  const sheets = $$(".sheet-of").map((box) => {
    const picture = box.querySelector("svg"), { left, top, size, n } = picture.dataset;
    return { picture, left: +left, top: +top, size: +size, n: +n, cross: picture.querySelector(".cross"),
      values: Uint8Array.from(atob(box.dataset.values), (c) => c.charCodeAt(0)),
      output: box.closest("figure").querySelector("output") };
  });
  const say = () => {
    const a = form.elements.a.valueAsNumber, b = form.elements.b.valueAsNumber;
    for (const { left, top, size, n, cross, values, output } of sheets) {
      const there = a >= 0 && b >= 0 && a < n && b < n;
      output.textContent = there ? (values[a * n + b] / 255).toFixed(2) : "–";
      const cell = size / n, side = Math.max(cell, 4);
      cross.innerHTML = there ? ["halo", "line"].map((kind) => `<rect class="${kind}" x="${left + (a + 0.5) * cell - side / 2}"
        y="${top + size - (b + 0.5) * cell - side / 2}" width="${side}" height="${side}"/>`).join("") : "";
    }
  };
  form.addEventListener("input", say);
  form.addEventListener("submit", (event) => event.preventDefault());
  for (const { picture, left, top, size, n } of sheets) {
    picture.addEventListener("pointermove", (event) => {
      const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(picture.getScreenCTM().inverse());
      const a = Math.floor((at.x - left) / size * n), b = Math.floor((top + size - at.y) / size * n);
      if (a >= 0 && b >= 0 && a < n && b < n) { form.elements.a.value = a; form.elements.b.value = b; say(); }
    });
  }
  say();
  const box = document.querySelector(".sheets");
  for (const button of $$("button.alone")) {
    show(button);
    button.addEventListener("click", () => {
      const on = button.getAttribute("aria-pressed") !== "true";
      for (const other of $$("button.alone")) other.setAttribute("aria-pressed", String(on && other === button));
      box.classList.toggle("one", on);
      for (const frame of $$(".window", box))
        frame.classList.toggle("this", on && frame.dataset.plans.split(" ").includes(button.dataset.plan));
    });
  }
})();

for (const button of $$("button.copy")) {
  show(button);
  button.addEventListener("click", async () => {
    const text = document.getElementById(button.dataset.of);
    try {
      await navigator.clipboard.writeText(text.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(text);
      button.textContent = "Selected";
    }
  });
}
