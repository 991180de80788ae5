"use strict";
/* Small charts as SVG, drawn here; what they show stands in a sentence or a table beside them too. */
const W = 600, H = 180, LEFT = 52, BELOW = 24;

function shape(tag, attributes, text = "") {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text) made.textContent = text;
  return made;
}

/* points: [{ x, y, from, kind, told }]; a line through them, a mark for each and, if it came `from` somewhere, a hollow
   one there. `kind` is the mark's class; `least` and `most` are on the scale whatever the points are. */
function chart(box, label, points, { unit, line = true, bars = false, least = null, most = null } = {}) {
  box.replaceChildren();
  box.hidden = !points.length;
  if (!points.length) return;
  const xs = points.map((p) => p.x), ys = points.flatMap((p) => [p.y, p.from ?? p.y]);
  let [low, high] = [Math.min(...ys, least ?? Infinity), Math.max(...ys, most ?? -Infinity)];
  if (low === high) [low, high] = [low - (least === null ? 0.5 : 0), high + 0.5];
  const [first, last] = [Math.min(...xs), Math.max(...xs)];
  const across = (x) => (last === first ? (LEFT + W) / 2 : LEFT + 12 + ((x - first) / (last - first)) * (W - LEFT - 24));
  const up = (y) => 8 + (1 - (y - low) / (high - low)) * (H - BELOW - 16);
  const svg = shape("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": label, class: "chart" });
  for (const y of [low, (low + high) / 2, high]) {
    svg.append(shape("line", { x1: LEFT, x2: W, y1: up(y), y2: up(y), class: "grid" }));
    svg.append(shape("text", { x: LEFT - 6, y: up(y) + 4, "text-anchor": "end" }, short(y)));
  }
  svg.append(shape("text", { x: LEFT, y: H - 4 }, unit));
  if (line) svg.append(shape("polyline", { points: points.map((p) => `${across(p.x)},${up(p.y)}`).join(" "), class: "line" }));
  for (const p of points) {
    if (p.from !== undefined) {
      svg.append(shape("line", { x1: across(p.x), x2: across(p.x), y1: up(p.from), y2: up(p.y), class: `way ${p.kind ?? ""}` }));
      svg.append(shape("circle", { cx: across(p.x), cy: up(p.from), r: 4, class: `hollow ${p.kind ?? ""}` }));
    }
    const mark = bars
      ? shape("rect", { x: across(p.x) - 4, y: up(p.y), width: 8, height: up(low) - up(p.y), class: "mark" })
      : p.kind === "bad"
        ? shape("rect", { x: across(p.x) - 5, y: up(p.y) - 5, width: 10, height: 10, class: "mark bad" })
        : shape("circle", { cx: across(p.x), cy: up(p.y), r: 5, class: `mark ${p.kind ?? ""}` });
    mark.append(shape("title", {}, p.told));
    svg.append(mark);
  }
  box.append(svg);
}

function short(y) {
  return Math.abs(y) >= 1e6 ? `${(y / 1e6).toFixed(1)} M` : Math.abs(y) >= 1e3 ? `${(y / 1e3).toFixed(0)} k` : y.toFixed(2);
}
