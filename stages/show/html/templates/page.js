"use strict";
// Shows a stage when its cell is asked for, begins the map at the culprit, and copies the finding.
(() => {
  const details = JSON.parse(document.getElementById("details").textContent);
  const dialog = document.getElementById("stage");

  const element = (tag, text, name) => {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text; // never markup: names come from files
    if (name) made.className = name;
    return made;
  };

  const copy = async (text, said) => {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const area = element("textarea", text);
      (dialog.open ? dialog : document.body).append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    said.textContent = "Copied.";
  };

  const facts = (pairs) => {
    const list = element("dl", undefined, "facts");
    for (const [name, value] of pairs) {
      const pair = element("div");
      pair.append(element("dt", name), element("dd", value));
      list.append(pair);
    }
    return list;
  };

  const table = (columns, rows) => {
    const made = element("table"), head = element("tr"), box = element("div", undefined, "scroll");
    made.append(element("caption", "Worst elements"));
    for (const name of columns) head.append(element("th", name, name === "index" ? "" : "n"));
    made.append(head);
    for (const row of rows) {
      const line = element("tr");
      row.forEach((cell, at) => line.append(element("td", cell, at ? "n" : "")));
      made.append(line);
    }
    box.append(made);
    return box;
  };

  const show = (row) => {
    const found = details[row];
    document.getElementById("stage-title").textContent = found.title;
    const body = document.getElementById("stage-body");
    body.replaceChildren(...found.hints.map((hint) => element("p", hint, "hint")), facts(found.facts));
    if (found.worst.length) body.append(table(found.columns, found.worst));
    if (found.command) {
      const said = element("span", "", "quiet"), button = element("button", "Copy");
      button.addEventListener("click", () => copy(found.command, said));
      body.append(element("p", "To look closer:", "quiet"), element("code", found.command), button, said);
    }
    dialog.showModal();
  };

  document.addEventListener("click", (event) => {
    const row = event.target.closest("[data-row]");
    if (row) show(row.dataset.row);
    if (event.target === dialog || event.target.closest(".close")) dialog.close(); // the dark around it, too
  });

  // One stop for the Tab key in each map, arrows inside it.
  for (const map of document.querySelectorAll(".heat")) {
    const first = map.querySelector(".culprit") ?? map.querySelector("[data-row]");
    if (!first) continue;
    first.tabIndex = 0;
    map.addEventListener("keydown", (event) => {
      const cell = event.target.closest("td");
      if (!cell) return;
      const [down, right] = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key] ?? [0, 0];
      if (event.key === "Enter" || event.key === " ") show(cell.dataset.row);
      else if (!down && !right) return;
      event.preventDefault();
      const next = map.tBodies[0].rows[cell.parentElement.rowIndex - 1 + down]?.cells[cell.cellIndex + right];
      if (next?.dataset.row) [cell.tabIndex, next.tabIndex] = [-1, 0], next.focus();
    });
    map.addEventListener("pointerover", (event) => {
      const cell = event.target.closest("td[data-row]");
      if (!cell || cell.title) return;
      const found = details[cell.dataset.row];
      cell.title = [found.title, ...found.facts.slice(0, 3).map((pair) => pair.join(" ")), ...found.hints].join("\n");
    });
  }
  // The map that is shown begins where the culprit is in sight.
  const centre = () => {
    for (const box of document.querySelectorAll(".map")) {
      const cell = box.querySelector(".culprit");
      if (!cell || !box.clientWidth) continue;
      const at = cell.getBoundingClientRect(), of = box.getBoundingClientRect();
      box.scrollLeft += at.left - of.left - (of.width - at.width) / 2;
      box.scrollTop += at.top - of.top - (of.height - at.height) / 2;
    }
  };
  centre();
  for (const choice of document.querySelectorAll("input[name=side]")) choice.addEventListener("change", centre);

  const said = document.getElementById("copied");
  document.getElementById("copy").addEventListener("click", () => copy(document.querySelector("#markdown + details pre").textContent, said));
  addEventListener("beforeprint", () => {
    for (const closed of document.querySelectorAll("details")) closed.open = true;
  });
  document.documentElement.dataset.ready = "yes";
})();
