"use strict";
// Draws the page's figures from the JSON in #data. A curve has x values for each axis, y, and, where a point stands for
// several records, their least and greatest (low, high).

const data = JSON.parse(document.getElementById("data").textContent);
const AXIS = {
  flops: { title: "compute", unit: "FLOPs", steps: [[1e18, "E"], [1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1, ""]] },
  samples: { title: "clips seen", unit: "", steps: [[1e9, "G"], [1e6, "M"], [1e4, "k", 1e3], [1, ""]] },
  train_seconds: { title: "training time", unit: "", steps: [[7200, "h", 3600], [180, "min", 60], [0, "s", 1]] },
};
const STYLE = "text{font:12px system-ui,sans-serif;fill:var(--soft)}.grid{stroke:var(--line)}.band{fill:var(--band)}" +
  ".line{fill:none;stroke:var(--run);stroke-width:1.8;stroke-linejoin:round}.spread{fill:var(--run);opacity:.18}" +
  ".dot,.bar{fill:var(--run)}.cursor{stroke:var(--soft)}.cell{fill:var(--c0)}text.ink{fill:var(--ink)}text.on{fill:var(--paper)}" +
  [0, 1, 2, 3, 4, 5].map((i) => `.c${i}{--run:var(--c${i})}`).join("");
const NAMES = ["--paper", "--ink", "--soft", "--line", "--band", "--c0", "--c1", "--c2", "--c3", "--c4", "--c5"];
const LIGHT = ["#ffffff", "#1c2026", "#626a75", "#dde1e6", "#f3f4f6", "#0067a8", "#c14a00", "#00795a", "#a8457f", "#8a6500", "#5a50b4"];
const DASHES = ["", "6 3", "2 3", "8 3 2 3"];

document.head.append(Object.assign(document.createElement("style"), { textContent: STYLE }));

function node(parent, tag, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}

function number(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  return size >= 1e5 || size < 1e-3 ? value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e") : String(+value.toPrecision(4));
}

function scaleOf(axis, most) { // [divisor, unit]
  const found = AXIS[axis].steps.find((step) => most >= step[0]) || AXIS[axis].steps.at(-1);
  return [found[2] || found[0] || 1, found[1] + AXIS[axis].unit];
}

function ticks(low, high, count) {
  const raw = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= raw * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
  return found;
}

const axis = () => document.querySelector("[name=axis]:checked").value;
const shown = () => data.runs.map((run, i) => ({ ...run, i })).filter(({ i }) => {
  const box = document.querySelector(`[name=run][value="${i}"]`);
  return !box || box.checked;
});

function drawCurve(svg, name, width) {
  const height = 230, left = 56, right = 12, top = 20, bottom = 40, x = axis();
  const runs = shown().filter((run) => run.curves[name]);
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("height", height);
  if (!runs.length) return node(svg, "text", { x: left, y: 40 }, "no run to show"), null;
  const percent = data.figures[name].percent ? 100 : 1;
  const xs = runs.flatMap((run) => run.curves[name][x]), ends = runs.flatMap((run) => run.bands.map((band) => band[x]));
  const most = [...xs, ...ends].reduce((a, b) => Math.max(a, b), 0) || 1;
  const ys = runs.flatMap((run) => run.curves[name].y.concat(run.curves[name].low || [], run.curves[name].high || []));
  let low = ys.reduce((a, b) => Math.min(a, b)), high = ys.reduce((a, b) => Math.max(a, b));
  const room = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
  low = low >= 0 && (low < high / 3 || low - room < 0) ? 0 : low - room;
  high += room;
  const px = (value) => left + (value / most) * (width - left - right);
  const py = (value) => height - bottom - ((value - low) / (high - low)) * (height - top - bottom);

  let start = 0; // the bands belong to the first run shown
  runs[0].bands.forEach((band, i) => {
    const wide = px(band[x]) - px(start);
    if (i % 2 === 0) node(svg, "rect", { class: "band", x: px(start), y: top, width: Math.max(wide, 0), height: height - top - bottom });
    if (wide > band.name.length * 7) node(svg, "text", { x: px(start) + wide / 2, y: top - 6, "text-anchor": "middle" }, band.name);
    start = band[x];
  });
  const [divisor, unit] = scaleOf(x, most);
  for (const tick of ticks(low * percent, high * percent, 4)) {
    node(svg, "line", { class: "grid", x1: left, x2: width - right, y1: py(tick / percent), y2: py(tick / percent) });
    node(svg, "text", { x: left - 6, y: py(tick / percent) + 4, "text-anchor": "end" }, number(tick) + (percent > 1 ? " %" : ""));
  }
  for (const tick of ticks(0, most / divisor, Math.max(2, width / 110)))
    node(svg, "text", { x: px(tick * divisor), y: height - bottom + 16, "text-anchor": "middle" }, number(tick));
  node(svg, "text", { x: width - right, y: height - 6, "text-anchor": "end" }, AXIS[x].title + (unit ? `, ${unit}` : ""));

  for (const run of runs) {
    const c = run.curves[name], group = node(svg, "g", { class: `c${run.i % 6}` });
    const point = (value, y) => `${px(value).toFixed(1)},${py(y).toFixed(1)}`;
    const path = (values) => values.map((y, i) => point(c[x][i], y));
    // what holds over a stretch of steps is drawn from the stretch's beginning to its end
    const stairs = (values) => values.flatMap((y, i) => [point(i ? c[x][i - 1] : 0, y), point(c[x][i], y)]);
    const stepped = data.figures[name].stepped;
    if (c.low) node(group, "polygon", { class: "spread", points: [...path(c.high), ...path(c.low).reverse()].join(" ") });
    node(group, "polyline", { class: "line", points: (stepped ? stairs : path)(c.y).join(" "), "stroke-dasharray": DASHES[Math.floor(run.i / 6) % 4] });
    if (c.y.length <= 30 && !stepped) c.y.forEach((y, i) => node(group, "circle", { class: "dot", r: 3, cx: px(c[x][i]), cy: py(y) }));
  }
  const cursor = node(svg, "line", { class: "cursor", y1: top, y2: height - bottom, visibility: "hidden" });
  const at = (value) => { // the values shown under the figure
    cursor.setAttribute("visibility", "visible");
    for (const end of ["x1", "x2"]) cursor.setAttribute(end, px(value));
    const values = runs.map((run) => {
      const c = run.curves[name], i = nearest(c[x], value);
      return `${runs.length > 1 ? run.name + " " : ""}${number(c.y[i] * percent)}${percent > 1 ? " %" : ""}`;
    });
    const band = runs[0].bands.find((b) => value <= b[x]);
    return `${number(value / divisor)}${unit && " "}${unit}${band ? `, ${band.name}` : ""}: ${values.join(" · ")}`;
  };
  const inverse = (pixel) => Math.min(Math.max((pixel - left) / (width - left - right), 0), 1) * most;
  return { at, inverse, stops: runs[0].curves[name][x], hide: () => cursor.setAttribute("visibility", "hidden") };
}

function nearest(sorted, value) {
  let low = 0, high = sorted.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < value) low = middle + 1; else high = middle;
  }
  return low > 0 && value - sorted[low - 1] < sorted[low] - value ? low - 1 : low;
}

const textWidth = (words) => Math.min(170, 16 + 7 * Math.max(...words.map((word) => word.length)));
const cut = (word) => (word.length > 22 ? word.slice(0, 21) + "…" : word);

function drawMatrix(svg, name, width) {
  const { classes, counts } = data.matrices[name], left = textWidth(classes), top = 8;
  const cell = Math.min((width - left - 4) / classes.length, 44), bottom = top + cell * classes.length;
  const side = Math.max(cell - 1, cell / 2), every = Math.ceil(12 / cell); // which lines have room for their name
  svg.setAttribute("viewBox", `0 0 ${width} ${bottom + left}`);
  svg.setAttribute("height", bottom + left);
  counts.forEach((row, i) => {
    const sum = total(row);
    row.forEach((count, j) => {
      const box = node(svg, "rect", { class: "cell", x: left + j * cell, y: top + i * cell, width: side, height: side, opacity: 0.06 + (0.94 * count) / sum });
      node(box, "title", {}, `${classes[i]} as ${classes[j]}: ${count}`);
      const place = { class: count > sum * 0.5 ? "on" : "ink", x: left + (j + 0.5) * cell, y: top + (i + 0.5) * cell + 4, "text-anchor": "middle" };
      if (count && cell >= 18) node(svg, "text", place, count);
    });
    if (i % every) return;
    const x = left + (i + 0.5) * cell + 4, y = bottom + 8;
    node(svg, "text", { x: left - 6, y: top + cell * (i + 0.5) + 4, "text-anchor": "end" }, cut(classes[i]));
    node(svg, "text", { x, y, "text-anchor": "end", transform: `rotate(-90 ${x} ${y})` }, cut(classes[i]));
  });
  return null;
}

const total = (row) => row.reduce((a, b) => a + b, 0) || 1;

function drawPairs(svg, name, width) { // of many classes: what was taken for what, the most frequent first
  const { classes, counts } = data.matrices[name], pairs = [];
  counts.forEach((row, i) => row.forEach((count, j) => { if (count && i !== j) pairs.push([count, i, j]); }));
  const rows = pairs.sort((a, b) => b[0] - a[0]).slice(0, 30), line = 40, full = width - 70;
  svg.setAttribute("viewBox", `0 0 ${width} ${Math.max(rows.length, 1) * line}`);
  svg.setAttribute("height", Math.max(rows.length, 1) * line);
  if (!rows.length) node(svg, "text", { x: 0, y: 15 }, "nothing was confused");
  rows.forEach(([count, i, j], k) => {
    const y = k * line, sum = total(counts[i]);
    node(svg, "text", { class: "ink", x: 0, y: y + 13 }, `${cut(classes[i])} as ${cut(classes[j])}`);
    node(svg, "rect", { class: "band", x: 0, y: y + 18, width: full, height: 14 });
    node(svg, "rect", { class: "bar c0", x: 0, y: y + 18, width: (full * count) / sum, height: 14 });
    node(svg, "text", { class: "ink", x: full + 8, y: y + 29 }, `${count} of ${sum}`);
  });
  return null;
}

function drawBars(svg, name, width) {
  let { rows, ends } = data.bars[name];
  if (ends) {
    const sorted = rows.filter((row) => row[1] !== null).sort((a, b) => b[1] - a[1]);
    rows = sorted.length > 2 * ends ? [...sorted.slice(0, ends), ["…"], ...sorted.slice(-ends)] : sorted;
  }
  const left = textWidth(rows.map((row) => row[0])), line = 24, full = width - left - 56;
  svg.setAttribute("viewBox", `0 0 ${width} ${rows.length * line + 8}`);
  svg.setAttribute("height", rows.length * line + 8);
  rows.forEach(([label, score], i) => {
    const y = i * line + 4;
    node(svg, "text", { x: left - 6, y: y + 15, "text-anchor": "end" }, cut(label));
    if (score === undefined) return; // the row that stands for those left out
    node(svg, "rect", { class: "band", x: left, y, width: full, height: line - 6 });
    node(svg, "rect", { class: "bar c0", x: left, y, width: full * score, height: line - 6 });
    node(svg, "text", { class: "ink", x: left + full + 8, y: y + 15 }, score === null ? "-" : `${Math.round(100 * score)} %`);
  });
  return null;
}

const DRAW = { curve: drawCurve, matrix: drawMatrix, pairs: drawPairs, bars: drawBars };

function draw(figure, width) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const handle = DRAW[figure.dataset.kind](svg, figure.dataset.name, width);
  return [svg, handle];
}

function redraw(figure) {
  const plot = figure.querySelector(".plot"), output = figure.querySelector("output");
  const [svg, handle] = draw(figure, Math.max(plot.clientWidth, 240));
  plot.replaceChildren(svg);
  output.textContent = "";
  if (!handle) return;
  let stop = -1;
  const leave = () => { handle.hide(); output.textContent = ""; stop = -1; };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    output.textContent = handle.at(handle.inverse(event.clientX - box.left));
  });
  svg.addEventListener("pointerleave", leave);
  plot.onblur = leave;
  plot.onkeydown = (event) => { // the arrow keys walk along the first run's curve
    const jump = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[event.key];
    if (jump === undefined) return;
    event.preventDefault();
    stop = Math.min(Math.max(stop + jump, 0), handle.stops.length - 1);
    output.textContent = handle.at(handle.stops[stop]);
  };
}

const figures = [...document.querySelectorAll("figure.chart")];
const redrawAll = () => figures.forEach(redraw);

function quoted(row) {
  return row.map((cell) => (/[",\n]/.test(String(cell)) ? `"${String(cell).replaceAll('"', '""')}"` : cell)).join(",");
}

function csvOf(figure) {
  const { kind, name } = figure.dataset;
  if (kind === "bars") return [["class", data.bars[name].measure], ...data.bars[name].rows];
  if (kind === "matrix" || kind === "pairs") {
    const { classes, counts } = data.matrices[name];
    return [["label \\ predicted", ...classes], ...counts.map((row, i) => [classes[i], ...row])];
  }
  const rows = [["run", ...Object.keys(AXIS), "value", "low", "high"]];
  for (const run of shown()) {
    const c = run.curves[name];
    if (c) c.y.forEach((y, i) => rows.push([run.name, ...Object.keys(AXIS).map((a) => c[a][i]), y, (c.low || c.y)[i], (c.high || c.y)[i]]));
  }
  return rows;
}

function svgOf(figure) { // light colours and all styles inside, so that it looks the same anywhere
  const [svg] = draw(figure, 720);
  svg.setAttribute("xmlns", "http://www.w3.org/2000/svg");
  svg.setAttribute("width", 720);
  const colours = NAMES.map((name, i) => `${name}:${LIGHT[i]}`).join(";");
  const style = document.createElementNS("http://www.w3.org/2000/svg", "style");
  style.textContent = `svg{${colours};background:#fff}${STYLE}`;
  svg.prepend(style);
  return new XMLSerializer().serializeToString(svg);
}

function save(name, kind, text) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: kind }));
  link.download = name.toLowerCase().replace(/[^a-z0-9.]+/g, "-");
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  const figure = button.closest("figure.chart"), head = button.closest("thead th");
  const title = figure && `${document.title} ${figure.querySelector("h3").textContent}`;
  if (head) sortBy(head);
  else if (button.dataset.save === "svg") save(`${title}.svg`, "image/svg+xml", svgOf(figure));
  else if (button.dataset.save === "csv") save(`${title}.csv`, "text/csv", csvOf(figure).map(quoted).join("\n") + "\n");
  else if (button.dataset.save === "table") {
    const table = button.closest(".table").querySelector("table");
    const rows = [...table.rows].map((row) => [...row.cells].map((cell) => cell.dataset.value ?? cell.textContent));
    save(`${table.dataset.name}.csv`, "text/csv", rows.map(quoted).join("\n") + "\n");
  }
});

function sortBy(head) {
  const body = head.closest("table").tBodies[0], column = head.cellIndex;
  const upward = head.getAttribute("aria-sort") !== "ascending";
  for (const other of head.parentNode.cells) other.setAttribute("aria-sort", "none");
  head.setAttribute("aria-sort", upward ? "ascending" : "descending");
  const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const compare = (a, b) => (isNaN(key(a)) || isNaN(key(b)) ? key(a).localeCompare(key(b), undefined, { numeric: true }) : key(a) - key(b));
  body.append(...[...body.rows].sort((a, b) => (upward ? compare(a, b) : compare(b, a))));
}

document.querySelector(".switches")?.addEventListener("change", redrawAll);
new ResizeObserver(redrawAll).observe(document.querySelector("main"));
window.addEventListener("beforeprint", () => {
  document.querySelectorAll("details").forEach((details) => { details.open = true; });
  redrawAll();
});
redrawAll();
