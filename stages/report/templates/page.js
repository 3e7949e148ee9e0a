"use strict";
// Draws the figures in the page's own colours, and shows the side that is asked for.
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const drawn = new Map();
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  const themed = (layout) => {
    const ink = colour("--ink"), line = colour("--line");
    const result = { ...layout, font: { ...layout.font, color: ink, family: getComputedStyle(document.body).fontFamily } };
    for (const key of Object.keys(layout).filter((k) => /^[xy]axis\d*$/.test(k))) {
      result[key] = { ...layout[key], gridcolor: line, linecolor: line, zerolinecolor: line, tickcolor: line };
    }
    result.hoverlabel = { bgcolor: colour("--card"), bordercolor: line, font: { color: ink }, align: "left" };
    return result;
  };

  const paint = () => {
    for (const [box, figure] of drawn) Plotly.react(box, figure.data, themed(figure.layout), { displayModeBar: false, responsive: true });
  };

  for (const box of document.querySelectorAll("[data-figure]")) {
    const figure = figures[box.dataset.figure];
    if (!figure) continue;
    box.style.minWidth = `${figure.layout.meta?.width ?? 0}px`;
    box.style.height = `${figure.layout.height}px`;
    drawn.set(box, figure);
  }
  paint();

  for (const choice of document.querySelectorAll("input[name=side]")) {
    choice.addEventListener("change", () => {
      const heat = document.querySelector("[data-figure=heat]");
      for (const trace of drawn.get(heat).data) trace.visible = trace.meta === choice.value;
      paint();
    });
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
  addEventListener("beforeprint", () => {
    for (const details of document.querySelectorAll("details")) details.open = true;
    paint();
  });
  addEventListener("afterprint", paint);
  document.documentElement.dataset.ready = "yes";
})();
