// Two small charts: tokens per block, and accuracy against time with every degree as a button.

const SPACE = "http://www.w3.org/2000/svg";

function make(name, attributes, parent, text) {
  const element = document.createElementNS(SPACE, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  parent?.append(element);
  return element;
}

export const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)} %`;
export const milliseconds = (ms) => `${ms < 10 ? ms.toFixed(2) : ms.toFixed(1)} ms`;

// tokens: L + 1 numbers; block: the one whose output is shown, or null for the input
export function drawTokens(place, tokens, block) {
  const width = Math.max(160, place.clientWidth), height = 150, top = 16, bottom = 18;
  const step = width / tokens.length, room = height - top - bottom, few = step >= 22;
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  svg.setAttribute("aria-label", `Tokens entering each block, then leaving the last: ${tokens.join(", ")}`);
  tokens.forEach((count, at) => {
    const x = at * step + step * 0.14, wide = step * 0.72, tall = Math.max(2, (room * count) / tokens[0]);
    const current = (block === null ? 0 : block + 1) === at;
    make("rect", { x, y: top, width: wide, height: room, rx: 3, class: "ghost" }, svg);
    make("rect", { x, y: top + room - tall, width: wide, height: tall, rx: 3, class: current ? "bar now" : "bar" }, svg);
    if (few || current) {
      make("text", { x: x + wide / 2, y: top + room - tall - 4, class: "value" }, svg, count);
    }
    const name = at === 0 ? "in" : String(at);
    if (few || at % 3 === 0) make("text", { x: x + wide / 2, y: height - 4, class: "tick" }, svg, name);
  });
  place.replaceChildren(svg);
}

function ticks(low, high, most) {
  const raw = (high - low) / most, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= raw);
  const ticks = [];
  for (let at = Math.ceil(low / step) * step; at <= high + 1e-9; at += step) ticks.push(at);
  return { ticks, digits: Math.max(0, -Math.floor(Math.log10(step) + 1e-9)) };
}

function span(values, least) {
  const low = Math.min(...values), high = Math.max(...values), more = Math.max((high - low) * 0.14, least);
  return [low - more, high + more];
}

// degrees: of /api/family; current: a degree; choose: called with one
export function drawFrontier(place, degrees, current, choose) {
  const accurate = degrees.every((entry) => entry.top1 !== null);
  const up = (entry) => (accurate ? 100 * entry.top1 : entry.gmacs);
  const width = Math.max(260, place.clientWidth), height = 250, right = 18, top = 14, bottom = 40;
  const [lowX, highX] = span(degrees.map((entry) => entry.p50_ms), 0.02);
  const [lowY, highY] = span(degrees.map(up), 0.001);
  const across = ticks(lowX, highX, width < 420 ? 3 : 6), along = ticks(lowY, highY, 6);
  const left = 46 + 6 * Math.max(0, along.digits - 1);
  const x = (value) => left + ((value - lowX) / (highX - lowX)) * (width - left - right);
  const y = (value) => top + (1 - (value - lowY) / (highY - lowY)) * (height - top - bottom);
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, role: "group" });
  svg.setAttribute("aria-label", accurate ? "Accuracy against time" : "Compute against time");
  for (const at of along.ticks) {
    make("line", { x1: left, x2: width - right, y1: y(at), y2: y(at), class: "grid" }, svg);
    make("text", { x: left - 8, y: y(at) + 4, class: "tick end" }, svg, at.toFixed(along.digits));
  }
  for (const at of across.ticks) {
    make("text", { x: x(at), y: height - bottom + 18, class: "tick" }, svg, at.toFixed(across.digits));
  }
  make("text", { x: (left + width - right) / 2, y: height - 4, class: "axis" }, svg, "ms for one image, median on this machine");
  make("text", { x: -(top + height - bottom) / 2, y: 11, transform: "rotate(-90)", class: "axis" }, svg,
    accurate ? "top-1, %" : "GMACs");
  const best = degrees.filter((entry) => entry.on_frontier).sort((one, other) => one.p50_ms - other.p50_ms);
  make("polyline", { points: best.map((entry) => `${x(entry.p50_ms)},${y(up(entry))}`).join(" "), class: "frontier" }, svg);
  for (const entry of degrees) point(svg, entry, x(entry.p50_ms), y(up(entry)), entry.degree === current, choose);
  keepFocus(place, svg);
}

function point(svg, entry, x, y, current, choose) {
  const kind = entry.on_frontier ? "best" : entry.pays ? "beaten" : "idle";
  const words = [`Degree ${entry.degree}`, entry.top1 === null ? null : `${percent(entry.top1)} top-1`,
    `${milliseconds(entry.p50_ms)}, 99 of 100 within ${milliseconds(entry.p99_ms)}`, `${entry.gmacs.toPrecision(3)} GMACs`,
    entry.pays ? null : "does not pay here"].filter(Boolean).join(", ");
  const group = make("g", { class: `point ${kind}${current ? " now" : ""}`, tabindex: 0, role: "button" }, svg);
  group.setAttribute("aria-label", words);
  group.setAttribute("aria-pressed", current);
  group.dataset.degree = entry.degree;
  make("title", {}, group, words);
  make("circle", { cx: x, cy: y, r: 18, class: "reach" }, group);
  if (current) make("circle", { cx: x, cy: y, r: 12, class: "ring" }, group);
  make("circle", { cx: x, cy: y, r: 6.5, class: "dot" }, group);
  make("text", { x, y: y - 15, class: "name" }, group, `r = ${entry.degree}`);
  group.addEventListener("click", () => choose(entry.degree));
  group.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    choose(entry.degree);
  });
}

// A chart that is drawn again must not take the focus away from whoever moves through it by keys.
function keepFocus(place, svg) {
  const focused = place.contains(document.activeElement) ? document.activeElement.dataset.degree : undefined;
  place.replaceChildren(svg);
  if (focused !== undefined) svg.querySelector(`[data-degree="${focused}"]`)?.focus();
}
