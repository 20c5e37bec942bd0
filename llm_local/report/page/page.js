"use strict";
// Glue between the page's data and uPlot: colours and dashes, the axis, the legend by keyboard, and what is new.

const DASHES = [[], [8, 4], [2, 3], [10, 3, 2, 3]];
const HEIGHT = { wide: 340, narrow: 220 };
const plain = new Intl.NumberFormat("en", { maximumSignificantDigits: 5 });
const tiny = new Intl.NumberFormat("en", { maximumSignificantDigits: 3, notation: "scientific" });
const short = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });
const said = (value) => (value == null ? "–" : (value && Math.abs(value) < 1e-3 ? tiny : plain).format(value));
const drawn = new Map();
let data = JSON.parse(document.getElementById("chart-data").textContent);
let axis = "steps";

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function tokensAt(run, step) {
  const { steps, tokens } = data.tokens[run];
  const after = steps.findIndex((each) => each >= step);
  if (after < 1) return after === 0 ? tokens[0] : tokens[tokens.length - 1];
  const share = (step - steps[after - 1]) / (steps[after] - steps[after - 1]);
  return tokens[after - 1] + share * (tokens[after] - tokens[after - 1]);
}

// uPlot has one x for all curves: the steps, or tokens, of all of them, with holes
function table(chart) {
  const each = chart.curves.map((curve) => {
    const x = axis === "steps" ? curve.x : curve.x.map((step) => tokensAt(curve.run, step));
    return [x, curve.y];
  });
  return uPlot.join(each); // a hole where others have a point is no gap, a null of its own is
}

function series(curve) {
  const stroke = colour(`--c${curve.colour}`);
  const common = { label: curve.label, spanGaps: false, value: (u, value) => said(value) };
  if (curve.kind === "raw") return { ...common, class: "hidden", stroke, alpha: 0.3, width: 1, points: { show: false } };
  const dash = DASHES[curve.dash];
  if (curve.kind === "line") {
    return { ...common, stroke, dash, width: 2, points: { show: curve.y.length < 2, size: 6, fill: stroke } };
  }
  const fill = curve.dash % 2 ? colour("--panel") : stroke;
  return { ...common, stroke, width: 1, dash: [1, 4], points: { show: true, size: 7 + 2 * (curve.dash > 1), width: 1.5, stroke, fill } };
}

function marker(curve) {
  const stroke = `var(--c${curve.colour})`;
  const line = `<line x1="0" y1="5" x2="24" y2="5" stroke="${stroke}" stroke-width="2" stroke-dasharray="${DASHES[curve.dash].join(" ")}"/>`;
  const fill = curve.dash % 2 ? "var(--panel)" : stroke;
  const dot = `<circle cx="12" cy="5" r="${3.2 + (curve.dash > 1)}" stroke="${stroke}" stroke-width="1.5" fill="${fill}"/>`;
  return `<svg viewBox="0 0 24 10" aria-hidden="true">${curve.kind === "points" ? dot : line}</svg>`;
}

// of each curve the point that is nearest to the cursor and no hole
function nearest(u, number, index) {
  const values = u.data[number];
  for (let away = 0; away < values.length; away++) {
    if (values[index - away] != null) return index - away;
    if (values[index + away] != null) return index + away;
  }
  return index;
}

function showLast(u) {
  const last = u.data[0].length - 1;
  u.setLegend({ idxs: u.data.map((values, number) => (number ? nearest(u, number, last) : last)) }, false);
}

function options(chart, place, width) {
  const line = { stroke: () => colour("--line"), width: 1 };
  const axes = { stroke: () => colour("--soft"), grid: line, ticks: line, font: "12px system-ui, sans-serif" };
  return {
    width,
    height: place.closest(".wide") ? HEIGHT.wide : HEIGHT.narrow,
    scales: { x: { time: false } },
    cursor: { sync: { key: "step", setSeries: false }, dataIdx: nearest, points: { size: 6 } },
    series: [
      { label: axis === "steps" ? "step" : "tokens", value: (u, value) => said(value) },
      ...chart.curves.map(series),
    ],
    axes: [
      { ...axes, space: 70, values: (u, ticks) => ticks.map((tick) => short.format(tick)) },
      { ...axes, size: 60, values: (u, ticks) => ticks.map((tick) => short.format(tick)) },
    ],
    hooks: { ready: [(u) => queueMicrotask(() => showLast(u))], setSeries: [(u, number, change) => toggleRaw(u, chart, number, change)] },
  };
}

// what is drawn faintly goes and comes with its curve
function toggleRaw(u, chart, number, change) {
  const curve = chart.curves[number - 1];
  if (!curve || curve.kind !== "line" || change.show == null) return;
  chart.curves.forEach((other, at) => {
    const is = other.kind === "raw" && other.run === curve.run && other.stage === curve.stage;
    if (is && u.series[at + 1].show !== change.show) u.setSeries(at + 1, { show: change.show });
  });
}

function dressLegend(u, chart) {
  u.root.querySelectorAll(".u-legend .u-series").forEach((row, number) => {
    if (number === 0) return;
    const head = row.querySelector("th");
    row.querySelector(".u-marker").innerHTML = marker(chart.curves[number - 1]);
    head.tabIndex = 0;
    head.setAttribute("role", "button");
    const tell = () => head.setAttribute("aria-pressed", String(u.series[number].show));
    tell();
    head.addEventListener("click", tell);
    head.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      head.click();
    });
  });
  u.over.addEventListener("mouseleave", () => showLast(u));
}

function draw(chart) {
  const place = document.querySelector(`[data-chart="${CSS.escape(chart.id)}"] .plot`);
  if (!place) return;
  const width = Math.max(120, place.clientWidth);
  drawn.get(chart.id)?.u.destroy();
  const u = new uPlot(options(chart, place, width), table(chart), place);
  drawn.set(chart.id, { u, chart, place });
  dressLegend(u, chart);
}

const drawAll = () => data.charts.forEach(draw);

function fit() {
  for (const { u, place } of drawn.values()) {
    const width = Math.max(120, place.clientWidth);
    if (width !== u.width) u.setSize({ width, height: u.height });
  }
}

document.querySelector("main").addEventListener("change", (event) => {
  if (event.target.name !== "axis") return;
  axis = event.target.value;
  drawAll();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
addEventListener("resize", fit);

// a chart that is zoomed into stays so
function renew(chart) {
  const old = drawn.get(chart.id);
  const labels = (each) => each.curves.map((curve) => curve.label + curve.kind).join("\n");
  if (!old || labels(old.chart) !== labels(chart)) return draw(chart);
  const { min, max } = old.u.scales.x;
  const x = old.u.data[0];
  const isZoomed = min > x[0] || max < x[x.length - 1];
  old.chart = chart;
  old.u.setData(table(chart), !isZoomed);
  if (isZoomed) old.u.redraw();
  if (old.u.cursor.left < 0) showLast(old.u);
}

// what has not changed stays as it is, with its focus and what is open in it
function takeUp(news) {
  data = JSON.parse(news.data);
  const fresh = document.createElement("template");
  fresh.innerHTML = news.main;
  const main = document.querySelector("main");
  const names = (root) => [...root.querySelectorAll("[data-chart]")].map((each) => each.dataset.chart).join("\n");
  const isSame = names(main) === names(fresh.content);
  for (const part of [...fresh.content.children]) {
    const old = document.getElementById(part.id);
    if (!old) main.append(part);
    else if (part.id === "charts" ? !isSame : old.innerHTML !== part.innerHTML) old.replaceWith(part);
  }
  if (isSame) return data.charts.forEach(renew);
  drawn.forEach(({ u }) => u.destroy());
  drawn.clear();
  const chosen = main.querySelector(`input[value=${axis}]`);
  if (chosen) chosen.checked = true;
  drawAll();
}

async function poll() {
  try {
    const answer = await fetch("news");
    if (!answer.ok) throw new Error(answer.statusText);
    takeUp(await answer.json());
    document.body.classList.remove("lost");
  } catch {
    document.body.classList.add("lost");
  }
  setTimeout(poll, 1000 * seconds);
}

const seconds = Number(document.body.dataset.seconds);
if (seconds) setTimeout(poll, 1000 * seconds);
drawAll();
document.documentElement.dataset.drawn = String(drawn.size);
