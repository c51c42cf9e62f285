"use strict";
// Elements of the page, numbers as text, and axes of plots.

const make =
  (space) =>
  (tag, attributes = {}, ...children) => {
    const element = space ? document.createElementNS(space, tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (value !== undefined && value !== null && value !== false) element.setAttribute(name, value);
    }
    element.append(...children.flat().filter((child) => child !== null && child !== undefined));
    return element;
  };
const h = make("");
const s = make("http://www.w3.org/2000/svg");

const color = (key) => `--c: var(--${String(key || "attention").replace(/[._]/g, "-")}, var(--other))`;

// ------------------------------------------------------------------------------------------------------------ numbers

const formats = {};
const fixed = (value, digits) =>
  (formats[digits] ??= new Intl.NumberFormat("en-US", {
    minimumFractionDigits: digits,
    maximumFractionDigits: digits,
  })).format(value);
// Three digits that mean something, whatever the magnitude.
const digits = (value) => {
  if (!value) return "0";
  const size = Math.floor(Math.log10(Math.abs(value)));
  return size < -3 ? value.toExponential(1) : fixed(value, Math.max(0, 2 - size));
};
const percent = (share) => (share > 0 && share < 0.0005 ? "< 0.1%" : `${fixed(100 * share, 1)}%`);
const whole = (value) => fixed(value, 0);
const seconds = (ms) => (ms < 1000 ? `${digits(ms)} ms` : `${digits(ms / 1000)} s`);
const gib = (bytes) => (bytes >= 2 ** 29 ? `${fixed(bytes / 2 ** 30, 1)} GiB` : `${digits(bytes / 2 ** 20)} MiB`);
const short = (value) =>
  digits(value)
    .replace(/(\.\d*?)0+$/, "$1")
    .replace(/\.$/, "");
const scaled = (value, unit, show = digits) => {
  const [factor, prefix] = [
    [1e12, "T"],
    [1e9, "G"],
    [1e6, "M"],
    [1e3, "k"],
  ].find(([factor]) => value >= factor) || [1, ""];
  return `${show(value / factor)} ${prefix}${unit}`;
};

const context = document.createElement("canvas").getContext("2d");
function measure(text, size, weight = 500) {
  context.font = `${weight} ${size}px ${getComputedStyle(document.body).fontFamily}`;
  return context.measureText(text).width;
}

// --------------------------------------------------------------------------------------------------------------- axes

const log = (low, high, from, to) => (value) =>
  from + ((Math.log10(value) - Math.log10(low)) / (Math.log10(high) - Math.log10(low) || 1)) * (to - from);
const linear = (low, high, from, to) => (value) => from + ((value - low) / (high - low || 1)) * (to - from);
const decades = (low, high) => {
  const found = [];
  for (let power = Math.ceil(Math.log10(low) - 1e-9); power <= Math.log10(high) + 1e-9; power++)
    found.push(10 ** power);
  return found;
};
// About `count` round values from 0 up to `high`.
function rounds(high, count) {
  const raw = high / count || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].find((factor) => factor * power >= raw) * power;
  const found = [];
  for (let i = 0; i * step <= high * (1 + 1e-9); i++) found.push(i * step);
  return found;
}

function canvas(width, height, label, ...children) {
  return s("svg", { width: "100%", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label }, children);
}
const text = (x, y, content, attributes = {}) => s("text", { x, y, ...attributes }, content);
const rule = (x1, y1, x2, y2, kind = "grid") => s("line", { x1, y1, x2, y2, class: kind });
const title = (content) => s("title", {}, content);

// Moves labels apart, down the page, keeping their order: [{y, ...}] -> the same with y at least `gap` apart.
function spread(labels, gap, low, high) {
  labels.sort((a, b) => a.y - b.y);
  labels.forEach((label, i) => (label.y = Math.max(label.y, i ? labels[i - 1].y + gap : low)));
  for (let i = labels.length - 1, floor = high; i >= 0; i--, floor = labels[i + 1].y - gap)
    labels[i].y = Math.min(labels[i].y, floor);
  return labels;
}
