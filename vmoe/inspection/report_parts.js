"use strict";
// What the page is made of: elements, numbers as texts, the shared tooltip, sortable tables, bars.

const DATA = JSON.parse(document.getElementById("data").textContent);
const NOUN = { image: "patches", text: "text tokens" };
const byId = (id) => document.getElementById(id);

function setStyle(element, key, text) {
  if (key.startsWith("--")) element.style.setProperty(key, text);
  else element.style[key] = text;
}

// Texts of the data enter the page as text nodes and attributes alone, never as HTML.
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined) continue;
    if (name === "style") for (const [key, text] of Object.entries(value)) setStyle(element, key, text);
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

const bytesOf = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
const unpack = ({ kind, data }) => new { Uint8Array, Uint16Array, Uint32Array, Float32Array }[kind](bytesOf(data).buffer);

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
// Sums of weights (soft routing, gate values) have a decimal, counts have none.
function asCount(value) {
  if (!isNumber(value)) return "–";
  return asFixed(Number.isInteger(value) ? 0 : 1)(value);
}
const asFixed = (digits) => (value) => {
  const options = { minimumFractionDigits: digits, maximumFractionDigits: digits };
  return isNumber(value) ? value.toLocaleString("en-US", options) : "–";
};
const asShare = (value) => (isNumber(value) ? `${(100 * value).toFixed(1)}%` : "–");
const asWeight = asFixed(4);
const ratio = (part, whole) => (whole > 0 ? part / whole : null);
const sum = (values) => values.reduce((total, value) => total + value, 0);
const range = (length) => Array.from({ length }, (_, index) => index);
const capital = (text) => text[0].toUpperCase() + text.slice(1);

const colourOf = (expert) => DATA.palette[expert % DATA.palette.length];
const inkOn = (colour) => DATA.inks[colour];

function tag(expert) {
  const colour = colourOf(expert);
  return make("span", { class: "tag", style: { background: colour, color: inkOn(colour) } }, String(expert));
}

// A stripe pattern for what was dropped, which needs no colour to be recognised.
function hatch(scale) {
  const tile = make("canvas", { width: 6 * scale, height: 6 * scale });
  const brush = tile.getContext("2d");
  brush.scale(scale, scale);
  brush.fillStyle = DATA.dropped;
  brush.fillRect(0, 0, 6, 6);
  brush.strokeStyle = "#ffffff";
  brush.lineWidth = 1.4;
  for (const start of [-6, 0, 6]) {
    brush.beginPath();
    brush.moveTo(start, 6);
    brush.lineTo(start + 6, 0);
    brush.stroke();
  }
  return tile;
}

// ---- tooltip and live region ----

// box: where the thing is, as getBoundingClientRect gives it; lines: [expert or null, text].
function showTip(box, title, lines) {
  const tip = byId("tip");
  tip.replaceChildren(make("strong", {}, title));
  if (lines.length) {
    tip.append(make("ul", {}, ...lines.map(([expert, text]) => make("li", {}, expert === null ? null : tag(expert), text))));
  }
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const space = document.documentElement.clientWidth - width - 8;
  const above = box.top - height - 8;
  tip.style.left = `${window.scrollX + Math.max(8, Math.min(space, box.left + box.width / 2 - width / 2))}px`;
  tip.style.top = `${window.scrollY + (above > 60 ? above : box.bottom + 8)}px`;
}

function hideTip() {
  byId("tip").hidden = true;
}

function say(text) {
  byId("live").textContent = text;
}

const sentence = (title, lines) =>
  `${title}: ${lines.map(([expert, text]) => (expert === null ? text : `expert ${expert}, ${text}`)).join("; ")}`;

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") hideTip();
});

// One stop for Tab in a list; arrows, Home and End go from item to item.
function rove(list, items) {
  items.forEach((item, index) => {
    item.tabIndex = index === 0 ? 0 : -1;
    item.addEventListener("keydown", (event) => {
      const [next, last] = [index + 1, index - 1];
      const keys = { ArrowRight: next, ArrowDown: next, ArrowLeft: last, ArrowUp: last, Home: 0, End: items.length - 1 };
      if (!(event.key in keys)) return;
      event.preventDefault();
      const target = items[keys[event.key]];
      if (!target) return;
      item.tabIndex = -1;
      target.tabIndex = 0;
      target.focus();
    });
  });
  return list;
}

// Shows the tooltip of an element for pointer and keyboard.
function explain(element, title, lines) {
  const show = () => showTip(element.getBoundingClientRect(), title, lines);
  for (const name of ["pointerenter", "focus"]) element.addEventListener(name, show);
  for (const name of ["pointerleave", "blur"]) element.addEventListener(name, hideTip);
  return element;
}

// ---- tables ----

// A column of `drawTable` that shows its values by `show`.
const column = (title, value, show, more = {}) => ({ title, value, show: (row) => show(value(row)), ...more });

const sorting = {}; // {table: {id of the column, direction}} that the reader chose, kept when the table is drawn again

// columns: see `column`, with text: true for texts, id: where titles change or repeat. The first names the row.
// key(row): what it is known by when the table is drawn again.
function drawTable(box, { label, columns, rows, chosen = () => false, sort = null, key = columns[0].value }) {
  const idOf = ({ id, title }) => id ?? title;
  const saved = sorting[box.id];
  const known = saved ? columns.findIndex((one) => idOf(one) === saved.id) : -1;
  const order = known >= 0 ? { column: known, direction: saved.direction } : (sort ?? { column: 0, direction: "ascending" });
  const body = make("tbody");
  const headers = columns.map((one, index) => {
    const button = make("button", { type: "button" }, one.title);
    button.addEventListener("click", () => {
      const [first, other] = one.text ? ["ascending", "descending"] : ["descending", "ascending"];
      order.direction = order.column === index && order.direction === first ? other : first;
      order.column = index;
      sorting[box.id] = { id: idOf(one), direction: order.direction };
      fill();
      say(`Sorted by ${one.title}, ${order.direction}`);
    });
    return make("th", { scope: "col", class: one.text ? "text" : null }, button);
  });

  function fill() {
    const sign = order.direction === "ascending" ? 1 : -1;
    const missing = (value) => value === null || value === undefined || Number.isNaN(value);
    const sorted = rows
      .map((row) => [columns[order.column].value(row), row])
      .sort(([a], [b]) => {
        if (missing(a) || missing(b)) return missing(a) - missing(b);
        return sign * (typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b);
      });
    headers.forEach((header, index) => header.setAttribute("aria-sort", index === order.column ? order.direction : "none"));
    const drawnRows = sorted.map(([, row]) => {
      const cells = columns.map(({ show, text }, index) =>
        make(index ? "td" : "th", { class: text ? "text" : null, scope: index ? null : "row" }, show(row)),
      );
      return make("tr", { class: chosen(row) ? "chosen" : null, "data-key": key(row) }, ...cells);
    });
    body.replaceChildren(...drawnRows);
  }

  fill();
  const head = make("thead", {}, make("tr", {}, ...headers));
  const table = make("table", {}, make("caption", { class: "unseen" }, label), head, body);
  const scroll = { class: "scroll", tabindex: 0, role: "region", "aria-label": `${label} (table)` };
  box.replaceChildren(make("div", scroll, table));
}

// ---- bars ----

// A bar for each expert. parts: {name, values, colour(expert)}, stacked, as shares of `total`.
function drawBars(box, title, parts, total) {
  const experts = range(parts[0].values.length);
  const most = Math.max(...experts.map((expert) => sum(parts.map(({ values }) => values[expert]))));
  const items = experts.map((expert) => {
    const lines = parts.map(({ name, values }) => {
      return [null, `${name}: ${asCount(values[expert])}, ${asShare(ratio(values[expert], total))}`];
    });
    const pieces = parts.map(({ values, colour }) =>
      make("span", { style: { height: `${100 * (ratio(values[expert], most) ?? 0)}%`, background: colour(expert) } }),
    );
    const label = experts.length <= 32 ? make("small", { "aria-hidden": "true" }, String(expert)) : null;
    const look = { class: state.expert === null || state.expert === expert ? "bar" : "bar pale", type: "button" };
    const spoken = { "aria-label": sentence(`expert ${expert}`, lines), onclick: () => toggleExpert(expert) };
    const bar = make("button", { ...look, ...spoken }, make("span", { class: "pile" }, ...pieces), label);
    return explain(bar, `Expert ${expert}`, lines);
  });
  const scale = `largest: ${asShare(ratio(most, total))}`;
  const group = make("div", { class: "bars", role: "group", "aria-label": `${title} of each expert` }, ...items);
  box.replaceChildren(make("h3", {}, title, make("small", {}, scale)), rove(group, items));
}
