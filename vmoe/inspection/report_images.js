// The images with the routing of their patches and text tokens in the chosen layer.

const PAGE_SIZE = 24;
const WEIGHT_STEPS = 10000;
const KEPT_BIT = 1 << 15;
const unpacked = new Map();
let page = 0;

// Typed arrays of a layer's routing, and where each sample's tokens begin; null if the layer never saw the modality.
function routingOf(layerIndex, modality) {
  const key = `${layerIndex} ${modality}`;
  const packed = DATA.layers[layerIndex][modality === "image" ? "patches" : "text"];
  if (packed && !unpacked.has(key)) {
    let next = 0;
    const starts = DATA.samples.map(({ text_tokens: tokens }) => {
      const start = next;
      next += modality === "image" ? packed.grid[0] * packed.grid[1] : tokens.length;
      return start;
    });
    unpacked.set(key, { ...packed, starts, expert: unpack(packed.expert), weight: unpack(packed.weight) });
  }
  return unpacked.get(key) ?? null;
}

// The choices of a token, best first: {expert, weight, kept}.
function choicesOf(routing, sample, token) {
  const first = (routing.starts[sample] + token) * routing.shown;
  return Array.from({ length: routing.shown }, (_, choice) => {
    const weight = routing.weight[first + choice];
    const value = (weight & (KEPT_BIT - 1)) / WEIGHT_STEPS;
    return { expert: routing.expert[first + choice], weight: value, kept: weight >= KEPT_BIT };
  });
}

const takenBy = (choices) => choices.find(({ kept }) => kept)?.expert ?? null;
const tookIt = (choices, expert) => choices.some((choice) => choice.kept && choice.expert === expert);

// Lines of the tooltip of a token.
function linesOf(choices) {
  const { chooser, num_selected_experts: all } = DATA.layers[state.layer];
  const fate = (kept) => (kept ? "" : ", dropped: no capacity");
  const lines = choices.map(({ expert, weight, kept }) => [expert, `weight ${asWeight(weight)}${fate(kept)}`]);
  if (chooser === "tokens") return lines;
  const taken = lines.filter((_, index) => choices[index].kept);
  if (!taken.length) return [[null, "taken by no expert"]];
  const more = taken.length === choices.length && choices.length < all;
  return more ? [...taken, [null, `the ${taken.length} largest weights`]] : taken;
}

// ---- the map of an image ----

// A map is drawn when its size is known, and again when it changes.
const resized = new ResizeObserver((entries) => {
  for (const { target } of entries) drawMap(target, Number(target.dataset.sample));
});

function drawMap(canvas, sample, cursor = null) {
  const routing = routingOf(state.layer, "image");
  const [rows, columns] = routing.grid;
  const scale = window.devicePixelRatio || 1;
  const { width, height } = canvas.getBoundingClientRect();
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  const brush = canvas.getContext("2d");
  brush.scale(scale, scale);
  const [w, h] = [width / columns, height / rows];
  const stripes = brush.createPattern(hatch(scale), "repeat");
  stripes.setTransform(new DOMMatrix().scale(1 / scale));
  const size = Math.min(13, 0.56 * Math.min(w, h));
  brush.font = `600 ${size}px system-ui, sans-serif`;
  brush.textAlign = "center";
  brush.textBaseline = "middle";
  brush.lineJoin = "round";
  const outlined = [];
  for (let token = 0; token < rows * columns; token++) {
    const choices = choicesOf(routing, sample, token);
    const [x, y] = [(token % columns) * w, Math.floor(token / columns) * h];
    const highlighted = state.expert !== null && tookIt(choices, state.expert);
    const expert = highlighted ? state.expert : takenBy(choices);
    // What nobody took stays hatched, whichever expert is chosen.
    if (state.expert !== null && !highlighted && expert !== null) {
      brush.fillStyle = "rgba(20, 24, 29, 0.55)";
      brush.fillRect(x, y, w, h);
      continue;
    }
    brush.globalAlpha = expert === null ? 0.85 : highlighted ? 0.45 : 0.62;
    brush.fillStyle = expert === null ? stripes : colourOf(expert);
    brush.fillRect(x, y, w, h);
    brush.globalAlpha = 1;
    brush.strokeStyle = "rgba(255, 255, 255, 0.75)";
    brush.lineWidth = 0.75;
    brush.strokeRect(x, y, w, h);
    if (highlighted) outlined.push([x, y]);
    if (expert !== null && size >= 8) {
      brush.strokeStyle = "rgba(0, 0, 0, 0.85)";
      brush.lineWidth = 2.5;
      brush.strokeText(String(expert), x + w / 2, y + h / 2);
      brush.fillStyle = "#ffffff";
      brush.fillText(String(expert), x + w / 2, y + h / 2);
    }
  }
  for (const [x, y] of outlined) frame(brush, x, y, w, h, 1);
  if (cursor !== null) frame(brush, (cursor % columns) * w, Math.floor(cursor / columns) * h, w, h, 2);
}

function frame(brush, x, y, w, h, width) {
  for (const [colour, inset] of [["#000000", width / 2], ["#ffffff", 1.5 * width]]) {
    brush.strokeStyle = colour;
    brush.lineWidth = width;
    brush.strokeRect(x + inset, y + inset, w - 2 * inset, h - 2 * inset);
  }
}

function makeMap(sample, name) {
  const { grid } = routingOf(state.layer, "image");
  const [rows, columns] = grid;
  const canvas = make("canvas", {
    tabindex: 0,
    role: "application",
    "aria-roledescription": "routing map",
    "aria-label": `Patches of ${name}, ${rows} rows of ${columns}`,
    "aria-describedby": "map-help",
    "data-sample": sample,
  });
  let cursor = 0;
  const point = (token, aloud) => {
    cursor = token;
    drawMap(canvas, sample, cursor);
    const [row, column] = [Math.floor(token / columns), token % columns];
    const title = `Row ${row}, column ${column}`;
    const lines = linesOf(choicesOf(routingOf(state.layer, "image"), sample, token));
    const box = canvas.getBoundingClientRect();
    const [w, h] = [box.width / columns, box.height / rows];
    showTip(new DOMRect(box.left + column * w, box.top + row * h, w, h), title, lines);
    if (aloud) say(sentence(title, lines));
  };
  const leave = () => {
    hideTip();
    drawMap(canvas, sample);
  };
  const underPointer = (event) => {
    const box = canvas.getBoundingClientRect();
    const within = (value, size) => Math.max(0, Math.min(size - 1, Math.floor(value * size)));
    const row = within((event.clientY - box.top) / box.height, rows);
    point(row * columns + within((event.clientX - box.left) / box.width, columns), false);
  };
  canvas.addEventListener("pointermove", underPointer);
  canvas.addEventListener("pointerdown", underPointer);
  canvas.addEventListener("pointerleave", leave);
  canvas.addEventListener("focus", () => canvas.matches(":focus-visible") && point(cursor, true));
  canvas.addEventListener("blur", leave);
  canvas.addEventListener("keydown", (event) => {
    const [down, right] = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key] ?? [];
    if (down === undefined) return;
    event.preventDefault();
    const row = Math.max(0, Math.min(rows - 1, Math.floor(cursor / columns) + down));
    const column = Math.max(0, Math.min(columns - 1, (cursor % columns) + right));
    point(row * columns + column, true);
  });
  resized.observe(canvas);
  return canvas;
}

// ---- the tokens of a caption ----

function makeTokens(sample) {
  const routing = routingOf(state.layer, "text");
  if (!routing) return make("p", {}, "This layer sees no texts.");
  const buttons = DATA.samples[sample].text_tokens.map((token, index) => {
    const choices = choicesOf(routing, sample, index);
    const expert = state.expert !== null && tookIt(choices, state.expert) ? state.expert : takenBy(choices);
    const lines = linesOf(choices);
    const colour = expert === null ? DATA.dropped : colourOf(expert);
    const dim = state.expert !== null && expert !== null && expert !== state.expert;
    const look = `${dim ? "dim" : ""} ${expert === null ? "lost" : ""}`.trim();
    const button = make(
      "button",
      { type: "button", class: look, style: { background: colour, color: inkOn(colour) } },
      token,
      make("span", { class: "number", "aria-hidden": "true" }, expert === null ? "–" : String(expert)),
      make("span", { class: "unseen" }, ` ${sentence("", lines).slice(2)}`),
    );
    if (expert !== null) button.addEventListener("click", () => toggleExpert(expert));
    return explain(button, token, lines);
  });
  const items = buttons.map((button) => make("li", {}, button));
  return rove(make("ul", { class: "chips", "aria-label": "Text tokens of the caption" }, ...items), buttons);
}

// The model's likeliest names of the image; the right one is marked.
function makeNames(top, rightIndex) {
  const items = top.map(([name, share], index) => {
    const right = index === rightIndex;
    const mark = right ? [" ✓", make("span", { class: "unseen" }, " right")] : [];
    return make("li", { class: right ? "right" : null }, make("span", {}, name, ...mark), make("span", {}, asShare(share)));
  });
  return make("ol", { class: "names", "aria-label": "The model's likeliest names" }, ...items);
}

function makeCard(sample) {
  const { path, class: label, text_tokens: tokens, top, right, source } = DATA.samples[sample];
  const name = label ?? path.split("/").pop();
  const maps = routingOf(state.layer, "image");
  const pair = make("div", { class: "pair" }, make("img", { src: source, alt: `The image ${path}` }));
  if (maps) pair.append(make("div", { class: "map" }, make("img", { src: source, alt: "" }), makeMap(sample, name)));
  else pair.append(make("p", {}, "This layer sees no images."));
  return make(
    "article",
    { class: "card", "aria-label": `Image ${path}` },
    pair,
    make("div", {}, make("h3", {}, name), make("p", {}, path)),
    top.length ? makeNames(top.slice(0, 3), right) : null,
    tokens.length ? makeTokens(sample) : null,
  );
}

// ---- which images ----

function findImages() {
  const wanted = byId("find").value.trim().toLowerCase();
  const text = ({ path, class: label, caption, top }) => [path, label, caption, top[0]?.[0]].filter(Boolean).join("\n");
  const found = range(DATA.samples.length).filter((index) => text(DATA.samples[index]).toLowerCase().includes(wanted));
  if (byId("order").value !== "worst") return found;
  const mistake = (index) => DATA.samples[index].mistake ?? -Infinity;
  return found.sort((a, b) => (mistake(a) === mistake(b) ? a - b : mistake(b) - mistake(a)));
}

function drawImages() {
  hideTip();
  const found = findImages();
  const pages = Math.max(1, Math.ceil(found.length / PAGE_SIZE));
  page = Math.max(0, Math.min(pages - 1, page));
  const number = `${found.length} image${found.length === 1 ? "" : "s"}`;
  byId("page").textContent = found.length ? `page ${page + 1} of ${pages}, ${number}` : "none found";
  byId("previous").disabled = page === 0;
  byId("next").disabled = page >= pages - 1;
  const columns = routingOf(state.layer, "image")?.grid[1] ?? 0;
  const cards = byId("cards");
  // A map needs some 16 pixels a patch for its numbers.
  cards.style.setProperty("--card", `${Math.max(296, Math.min(600, 2 * 16 * columns + 40))}px`);
  cards.replaceChildren(...found.slice(page * PAGE_SIZE, (page + 1) * PAGE_SIZE).map(makeCard));
}

function startImages() {
  for (const id of ["find", "order"]) {
    byId(id).addEventListener("input", () => {
      page = 0;
      drawImages();
    });
  }
  byId("order-label").hidden = DATA.samples.every(({ mistake }) => mistake === null);
  for (const [id, step] of [["previous", -1], ["next", 1]]) {
    byId(id).addEventListener("click", () => {
      page += step;
      drawImages();
      // A button that is switched off loses the focus to the whole page.
      if (byId(id).disabled) byId(step > 0 ? "previous" : "next").focus();
      byId("images").scrollIntoView();
    });
  }
}
