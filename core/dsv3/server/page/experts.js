// Which experts the router has chosen since the server started, as a picture: a row is a layer, a column an expert.

import { call } from "./api.js";
import { $, plural } from "./text.js";

const LEFT = 26; // of the layers' numbers, in CSS pixels
const BOTTOM = 18; // of the experts'
let load = { layers: [], tokens: 0 };
let pointed = null; // {row, column}

/** Each expert's count over an even share of its layer's. Zeros where nothing was counted. */
export function shares(counts) {
  const all = counts.reduce((a, b) => a + b, 0);
  return counts.map((count) => (all ? (count * counts.length) / all : 0));
}

/** The picture in words. */
export function summary({ layers, tokens }) {
  let busiest = { share: 0 };
  layers.forEach(({ layer, counts }) =>
    shares(counts).forEach((share, expert) => {
      if (share > busiest.share) busiest = { share, layer, expert };
    }),
  );
  if (!busiest.share) return "No token has passed the experts yet. Ask something, and this fills.";
  const all = layers.flatMap(({ counts }) => counts);
  const idle = all.filter((count) => count === 0).length;
  const most = `Busiest expert ${busiest.share.toFixed(1)}× even load (layer ${busiest.layer}, expert ${busiest.expert}).`;
  const unused = `${idle ? idle.toLocaleString("en") : "None"} of ${all.length.toLocaleString("en")} unused.`;
  return `${most} ${unused} ${plural(tokens, "token")} counted.`;
}

/** Ask the server anew, if the picture is open. */
export async function loadExperts() {
  if ($("load").hidden) return;
  try {
    const { layers, tokens } = await (await call("v1/experts")).json();
    load = { tokens, layers: layers.map((row) => ({ ...row, shares: shares(row.counts) })) };
    $("load-summary").textContent = summary(load);
  } catch (problem) {
    load = { layers: [], tokens: 0 };
    $("load-summary").textContent = `${problem.message} ${problem.advice ?? ""}`;
  }
  $("load-figure").hidden = !load.layers.some(({ counts }) => counts.some(Boolean));
  draw();
}

/** Where the cells lie, in CSS pixels. */
function grid() {
  const columns = Math.max(1, ...load.layers.map(({ counts }) => counts.length));
  const high = Math.max(4, Math.min(22, Math.floor(360 / Math.max(1, load.layers.length))));
  return { columns, rows: load.layers.length, high, wide: ($("heat").clientWidth - LEFT) / columns };
}

/** Cold to even to hot, over a quarter to four times the even load, by the logarithm. */
function shade(share, { cold, even, hot }) {
  const at = share ? Math.max(-1, Math.min(1, Math.log2(share) / 2)) : -1;
  const end = at < 0 ? cold : hot;
  return `rgb(${even.map((part, i) => Math.round(part + (end[i] - part) * Math.abs(at))).join(" ")})`;
}

function palette() {
  const style = getComputedStyle(document.documentElement);
  const value = (name) => style.getPropertyValue(name).trim();
  const parts = (name) => value(name).match(/[0-9a-f]{2}/gi).map((pair) => parseInt(pair, 16));
  return { cold: parts("--cold"), even: parts("--even"), hot: parts("--hot"), soft: value("--soft"), text: value("--text") };
}

function draw() {
  const canvas = $("heat");
  if (!load.layers.length || !canvas.clientWidth) return;
  const { columns, rows, high, wide } = grid();
  const colours = palette();
  const sharp = window.devicePixelRatio || 1;
  canvas.style.height = `${rows * high + BOTTOM}px`;
  canvas.width = Math.round(canvas.clientWidth * sharp);
  canvas.height = Math.round((rows * high + BOTTOM) * sharp);
  canvas.setAttribute("aria-label", `Load of ${plural(columns, "expert")} in ${plural(rows, "layer")}`);
  const pen = canvas.getContext("2d");
  pen.scale(sharp, sharp);
  const across = wide > 5 ? wide - 1 : wide + 0.3; // gaps where there is room, else no seams
  const down = high > 5 ? high - 1 : high;
  load.layers.forEach((layer, row) =>
    layer.shares.forEach((share, column) => {
      pen.fillStyle = shade(share, colours);
      pen.fillRect(LEFT + column * wide, row * high, across, down);
    }),
  );
  drawNames(pen, canvas.clientWidth, colours.soft);
  if (pointed) {
    pen.strokeStyle = colours.text;
    pen.lineWidth = 2;
    const out = wide > 5 ? 0 : 2; // around a cell too small to see
    const [x, y] = [LEFT + pointed.column * wide - 0.5 - out, Math.max(1, pointed.row * high - 0.5 - out)];
    pen.strokeRect(x, y, wide + 2 * out, high + 2 * out);
  }
}

function drawNames(pen, width, colour) {
  const { columns, rows, high } = grid();
  pen.fillStyle = colour;
  pen.font = "11px system-ui, sans-serif";
  pen.textBaseline = "middle";
  const every = Math.ceil(14 / high);
  load.layers.forEach(({ layer }, row) => row % every === 0 && pen.fillText(layer, 0, Math.max(6, row * high + high / 2)));
  pen.fillText("expert 0", LEFT, rows * high + 10);
  pen.textAlign = "right";
  pen.fillText(columns - 1, width, rows * high + 10);
}

/** Mark a cell, and say what it holds; one outside the picture marks none. */
function point(row, column) {
  const { layer, counts, shares: over } = load.layers[row] ?? {};
  pointed = counts?.[column] === undefined ? null : { row, column };
  const told = pointed && `Layer ${layer}, expert ${column}: ${plural(counts[column], "token")}`;
  $("cell").textContent = pointed ? `${told}, ${over[column].toFixed(2)}× even load` : "";
  draw();
}

function toggle(open) {
  $("load").hidden = !open;
  $("load-button").setAttribute("aria-expanded", String(open));
  if (open) loadExperts();
}

function keys(event) {
  const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  if (!step) return;
  event.preventDefault();
  const [row, column] = pointed ? [pointed.row + step[0], pointed.column + step[1]] : [0, 0];
  if (load.layers[row]?.counts[column] !== undefined) point(row, column);
}

/** Wire the panel; open at once where there is room beside the conversation. */
export function expertPanel() {
  const close = () => (toggle(false), $("load-button").focus());
  $("load-button").addEventListener("click", () => {
    toggle($("load").hidden);
    if (!$("load").hidden) $("load-close").focus();
  });
  $("load-close").addEventListener("click", close);
  $("load").addEventListener("keydown", (event) => event.key === "Escape" && (event.stopPropagation(), close()));
  const pointAt = (event) => {
    const { high, wide } = grid();
    point(Math.floor(event.offsetY / high), Math.floor((event.offsetX - LEFT) / wide));
  };
  $("heat").addEventListener("pointermove", pointAt);
  $("heat").addEventListener("pointerdown", pointAt);
  $("heat").addEventListener("pointerleave", (event) => event.pointerType === "mouse" && point(-1, -1));
  $("heat").addEventListener("keydown", keys);
  new ResizeObserver(draw).observe($("heat"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  if (matchMedia("(min-width: 75rem)").matches) toggle(true);
}
