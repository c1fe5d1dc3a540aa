// A table that its box is too narrow for is shown as a block for each row, every cell under its heading.
(() => {
  const boxes = [...document.querySelectorAll(".scroll")].filter((box) => box.querySelector("table"));
  const roles = { TABLE: "table", THEAD: "rowgroup", TBODY: "rowgroup", TR: "row", TD: "cell" };
  for (const box of boxes) {
    for (const table of box.querySelectorAll("table")) {
      const heads = [...(table.tHead?.rows[0]?.cells ?? [])]
        .map((cell) => cell.textContent.trim().replace(/[._](?=\w)/g, "$&\u200b"));  // a long name may go on below
      for (const element of [table, ...table.querySelectorAll("thead, tbody, tr, td")])
        element.setAttribute("role", roles[element.tagName]);  // a block is no table to a screen reader
      for (const body of table.tBodies) for (const row of body.rows) [...row.cells].forEach((cell, i) => {
        if (i && heads[i] && cell.colSpan === 1) cell.dataset.label = heads[i];
      });
    }
  }
  const fit = () => {
    for (const box of boxes) box.classList.remove("stacked");
    for (const box of boxes.filter((b) => b.scrollWidth > b.clientWidth + 1)) box.classList.add("stacked");
  };
  fit();
  let asked = 0;
  addEventListener("resize", () => { cancelAnimationFrame(asked); asked = requestAnimationFrame(fit); });
  for (const part of document.querySelectorAll("details")) part.addEventListener("toggle", fit);
})();
