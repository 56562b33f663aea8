"use strict";
// What the page is made of: elements, numbers as texts, the shared tooltip, sortable tables, charts.

const DATA = JSON.parse(document.getElementById("data").textContent);
const SPECIFICATIONS = JSON.parse(document.getElementById("specifications").textContent);
const NOUN = { image: "patches", text: "words" };
const byId = (id) => document.getElementById(id);

// Texts of the data enter the page as text nodes and attributes alone, never as HTML.
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined) continue;
    if (name === "style") Object.assign(element.style, value);
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
  const digits = Number.isInteger(value) ? 0 : 1;
  return value.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}
const asDecimal = (value) => (isNumber(value) ? value.toLocaleString("en-US", { minimumFractionDigits: 1, maximumFractionDigits: 1 }) : "–");
const asShare = (value) => (isNumber(value) ? `${(100 * value).toFixed(1)}%` : "–");
const asFixed = (digits) => (value) => (isNumber(value) ? value.toFixed(digits) : "–");
const asWeight = asFixed(4);
const ratio = (part, whole) => (whole > 0 ? part / whole : null);
const sum = (values) => values.reduce((total, value) => total + value, 0);

// In the middle, for what tells names apart often stands last.
function shorten(text, length) {
  if (text.length <= length) return text;
  const half = Math.floor((length - 1) / 2);
  return `${text.slice(0, half).trimEnd()}…${text.slice(text.length - (length - 1 - half)).trimStart()}`;
}

const colourOf = (expert) => DATA.palette[expert % DATA.palette.length];

const inkOn = (colour) => DATA.inks[colour];

function tag(expert) {
  return make("span", { class: "tag", style: { background: colourOf(expert), color: inkOn(colourOf(expert)) } }, String(expert));
}

// A stripe pattern for what was dropped, so that it is told apart without colour.
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
  const room = document.documentElement.clientWidth - width - 8;
  const above = box.top - height - 8;
  tip.style.left = `${window.scrollX + Math.max(8, Math.min(room, box.left + box.width / 2 - width / 2))}px`;
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
  items.forEach((item, place) => {
    item.tabIndex = place === 0 ? 0 : -1;
    item.addEventListener("keydown", (event) => {
      const steps = { ArrowRight: place + 1, ArrowDown: place + 1, ArrowLeft: place - 1, ArrowUp: place - 1, Home: 0, End: items.length - 1 };
      const target = items[steps[event.key]];
      if (!(event.key in steps)) return;
      event.preventDefault();
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

// ---- work that waits until it is seen ----

const waiting = new Map();
const observer = new IntersectionObserver(
  (entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      observer.unobserve(target);
      const work = waiting.get(target);
      waiting.delete(target);
      if (work && target.isConnected) work();
    }
  },
  { rootMargin: "300px" },
);

function whenSeen(element, work) {
  waiting.set(element, work);
  observer.unobserve(element); // so that the observer tells again of one that it knows
  observer.observe(element);
}

// ---- tables ----

// A column of `drawTable` that shows its values by `show`.
const column = (title, value, show, more = {}) => ({ title, value, show: (row) => show(value(row)), ...more });

const SHORT_TABLE = 100;
const sorting = {}; // {table: {column, direction}} that the reader chose, kept when the table is drawn again

// columns: {title, value(row), show(row) -> text or element, text: true for words, group: heading above several, id: where
// titles change or repeat}; the first names the row. key(row): what it is known by when the table is drawn again.
function drawTable(box, { label, columns, rows, chosen = () => false, sort = null, key = columns[0].value }) {
  const idOf = ({ id, group, title }) => id ?? `${group ?? ""} ${title}`;
  const saved = sorting[box.id];
  const known = saved ? columns.findIndex((one) => idOf(one) === saved.id) : -1;
  const state = known >= 0 ? { column: known, direction: saved.direction } : { ...(sort ?? { column: 0, direction: "ascending" }) };
  let all = rows.length <= SHORT_TABLE + 20;
  const head = make("tr");
  const body = make("tbody");
  const more = make("button", { type: "button", class: "more" }, `Show all ${asCount(rows.length)} rows`);

  const classOf = (place) => {
    const { text, group } = columns[place];
    return [text ? "text" : "", group && group !== columns[place - 1]?.group ? "first" : ""].join(" ").trim() || null;
  };
  const headers = columns.map((one, place) => {
    const button = make("button", { type: "button" }, one.title);
    const header = make("th", { scope: "col", class: classOf(place) }, button);
    button.addEventListener("click", () => {
      const first = one.text ? "ascending" : "descending";
      const other = first === "ascending" ? "descending" : "ascending";
      state.direction = state.column === place && state.direction === first ? other : first;
      state.column = place;
      sorting[box.id] = { id: idOf(one), direction: state.direction };
      fill();
      say(`Sorted by ${[one.group, one.title].filter(Boolean).join(", ")}, ${state.direction}`);
    });
    head.append(header);
    return header;
  });

  function fill() {
    const { value: valueOf } = columns[state.column];
    const sign = state.direction === "ascending" ? 1 : -1;
    const missing = (value) => value === null || value === undefined || Number.isNaN(value);
    const sorted = rows
      .map((row) => [valueOf(row), row])
      .sort(([a], [b]) => {
        if (missing(a) || missing(b)) return missing(a) - missing(b);
        if (typeof a === "string") return sign * a.localeCompare(b, "en", { numeric: true });
        return sign * (a - b);
      });
    headers.forEach((header, place) => header.setAttribute("aria-sort", place === state.column ? state.direction : "none"));
    body.replaceChildren(
      ...(all ? sorted : sorted.slice(0, SHORT_TABLE)).map(([, row]) =>
        make(
          "tr",
          { class: chosen(row) ? "chosen" : null, "data-key": key(row) },
          ...columns.map(({ show }, place) =>
            make(place === 0 ? "th" : "td", { class: classOf(place), scope: place === 0 ? "row" : null }, show(row)),
          ),
        ),
      ),
    );
    more.hidden = all;
  }

  more.addEventListener("click", () => {
    all = true;
    fill();
    body.querySelector(`tr:nth-child(${SHORT_TABLE + 1})`)?.scrollIntoView({ block: "nearest" });
  });
  fill();
  const groups = make("tr", { class: "groups" });
  for (const [place, { group }] of columns.entries()) {
    if (place > 0 && group === columns[place - 1].group) continue;
    const span = columns.slice(place).findIndex((one) => one.group !== group);
    const width = span < 0 ? columns.length - place : span;
    groups.append(group ? make("th", { scope: "colgroup", colspan: width, class: "first" }, group) : make("td", { colspan: width }));
  }
  const grouped = columns.some(({ group }) => group);
  const table = make("table", {}, make("caption", { class: "unseen" }, label), make("thead", {}, grouped ? groups : null, head), body);
  box.replaceChildren(make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": `${label} (table)` }, table), more);
}

// ---- charts ----

const drawn = new Map(); // {element: {name, rows, label, click, height}}
const dark = window.matchMedia("(prefers-color-scheme: dark)");

function chartConfig() {
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const [ink, soft, line] = ["--ink", "--soft", "--line"].map(colour);
  const font = getComputedStyle(document.body).fontFamily;
  return {
    background: "transparent",
    font,
    view: { stroke: null },
    axis: { labelColor: ink, titleColor: soft, gridColor: line, domainColor: soft, tickColor: soft, labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal" },
    axisX: { grid: false },
    legend: { labelColor: ink, titleColor: soft, labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal", orient: "bottom" },
    bar: { stroke: soft, strokeWidth: 0.5 },
  };
}

function embed(box) {
  const { name, rows, label, click, height } = drawn.get(box);
  const specification = { ...SPECIFICATIONS[name], datasets: { rows }, description: label };
  if (height) Object.assign(specification, { height, autosize: { type: "fit-x", contains: "padding" } });
  const options = { actions: false, renderer: "svg", ast: true, config: chartConfig(), tooltip: { theme: dark.matches ? "dark" : "light" } };
  // One after the other: a drawing that is still under way must not land on top of a later one.
  box.turn = (box.turn ?? Promise.resolve()).then(async () => {
    if (drawn.get(box)?.rows !== rows) return;
    box.result?.finalize();
    box.result = await vegaEmbed(box, specification, options);
    if (click) box.result.view.addEventListener("click", (_, item) => item?.datum && click(item.datum));
  });
  box.turn.catch((error) => console.error(error));
}

// height: of the plot without its axes, where the number of rows decides it.
function drawChart(box, name, rows, label, { click = null, height = null } = {}) {
  drawn.set(box, { name, rows, label, click, height });
  box.classList.add("chart", name);
  box.classList.toggle("clickable", Boolean(click));
  whenSeen(box, () => embed(box));
}

dark.addEventListener("change", () => {
  for (const box of drawn.keys()) if (box.isConnected) whenSeen(box, () => embed(box));
});
