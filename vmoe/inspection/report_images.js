// The images with the routing of their patches and words in the chosen layer.

const PAGE_SIZE = 24;
const WEIGHT_STEPS = 10000;
const KEPT_BIT = 1 << 15;
const images = { page: 0, found: DATA.samples.map((_, index) => index) };
const unpacked = new Map();

// Typed arrays of a layer's routing, and where each sample's tokens begin; null if the layer never saw the modality.
function routingOf(layerIndex, modality) {
  const key = `${layerIndex} ${modality}`;
  if (!unpacked.has(key)) {
    const layer = DATA.layers[layerIndex];
    const packed = modality === "image" ? layer.patches : layer.text;
    if (!packed) unpacked.set(key, null);
    else {
      const starts = [];
      let start = 0;
      for (const sample of DATA.samples) {
        starts.push(start);
        start += modality === "image" ? packed.grid[0] * packed.grid[1] : sample.words.length;
      }
      unpacked.set(key, { ...packed, starts, expert: unpack(packed.expert), weight: unpack(packed.weight) });
    }
  }
  return unpacked.get(key);
}

// The choices of a token, best first: {expert, weight, kept}.
function choicesOf(routing, sample, token) {
  const first = (routing.starts[sample] + token) * routing.shown;
  return Array.from({ length: routing.shown }, (_, choice) => {
    const weight = routing.weight[first + choice];
    return { expert: routing.expert[first + choice], weight: (weight & (KEPT_BIT - 1)) / WEIGHT_STEPS, kept: weight >= KEPT_BIT };
  });
}

const takenBy = (choices) => choices.find(({ kept }) => kept)?.expert ?? null;
const tookIt = (choices, expert) => choices.some((choice) => choice.kept && choice.expert === expert);

// Lines of the tooltip of a token.
function linesOf(choices) {
  const layer = DATA.layers[state.layer];
  if (layer.router === "top_k") {
    return choices.map(({ expert, weight, kept }) => [expert, `weight ${asWeight(weight)}${kept ? "" : ", dropped: no room"}`]);
  }
  const taken = choices.filter(({ kept }) => kept).map(({ expert, weight }) => [expert, `weight ${asWeight(weight)}`]);
  if (!taken.length) return [[null, "taken by no expert"]];
  const others = taken.length === choices.length && choices.length < layer.num_selected_experts;
  const all = layer.router === "soft" ? `of ${layer.num_experts}` : "of those that took it";
  return others ? [...taken, [null, `the ${taken.length} largest weights ${all}`]] : taken;
}

// ---- the map of an image ----

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
    const [row, column] = [within((event.clientY - box.top) / box.height, rows), within((event.clientX - box.left) / box.width, columns)];
    point(row * columns + column, false);
  };
  canvas.addEventListener("pointermove", underPointer);
  canvas.addEventListener("pointerdown", underPointer);
  canvas.addEventListener("pointerleave", leave);
  canvas.addEventListener("focus", () => canvas.matches(":focus-visible") && point(cursor, true));
  canvas.addEventListener("blur", leave);
  canvas.addEventListener("keydown", (event) => {
    const [row, column] = [Math.floor(cursor / columns), cursor % columns];
    const targets = {
      ArrowLeft: [row, column - 1],
      ArrowRight: [row, column + 1],
      ArrowUp: [row - 1, column],
      ArrowDown: [row + 1, column],
      Home: [row, 0],
      End: [row, columns - 1],
    };
    const target = targets[event.key];
    if (!target) return;
    event.preventDefault();
    const [newRow, newColumn] = [Math.max(0, Math.min(rows - 1, target[0])), Math.max(0, Math.min(columns - 1, target[1]))];
    point(newRow * columns + newColumn, true);
  });
  whenSeen(canvas, () => drawMap(canvas, sample));
  return canvas;
}

// ---- the words of a caption ----

function makeWords(sample) {
  const routing = routingOf(state.layer, "text");
  const { words } = DATA.samples[sample];
  if (!routing) return make("p", {}, "This layer sees no words.");
  const buttons = words.map((word, index) => {
    const choices = choicesOf(routing, sample, index);
    const expert = state.expert !== null && tookIt(choices, state.expert) ? state.expert : takenBy(choices);
    const lines = linesOf(choices);
    const colour = expert === null ? DATA.dropped : colourOf(expert);
    const dim = state.expert !== null && expert !== null && expert !== state.expert;
    const button = make(
      "button",
      { type: "button", class: `${dim ? "dim" : ""} ${expert === null ? "lost" : ""}`.trim(), style: { background: colour, color: inkOn(colour) } },
      word,
      make("span", { class: "number", "aria-hidden": "true" }, expert === null ? "–" : String(expert)),
      make("span", { class: "unseen" }, ` ${sentence("", lines).slice(2)}`),
    );
    if (expert !== null) button.addEventListener("click", () => choose({ expert: state.expert === expert ? null : expert }));
    return explain(button, word, lines);
  });
  return rove(make("ul", { class: "chips", "aria-label": "Words of the caption" }, ...buttons.map((button) => make("li", {}, button))), buttons);
}

// The model's likeliest names of the image; the right one is marked.
function makeNames(top, rightIndex) {
  const items = top.map(([name, share], index) => {
    const right = index === rightIndex;
    return make("li", { class: right ? "right" : null }, make("span", {}, name, right ? " ✓" : "", right ? make("span", { class: "unseen" }, " right") : null), make("span", {}, asShare(share)));
  });
  return make("ol", { class: "names", "aria-label": "The model's likeliest names" }, ...items);
}

function makeCard(sample) {
  const { path, class: label, words, top, right, source } = DATA.samples[sample];
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
    words.length ? makeWords(sample) : null,
  );
}

// ---- which images ----

function countPatches(sample, wanted) {
  const routing = routingOf(state.layer, "image");
  let count = 0;
  for (let token = 0; token < routing.grid[0] * routing.grid[1]; token++) count += wanted(choicesOf(routing, sample, token));
  return count;
}

function findImages() {
  const wanted = byId("find").value.trim().toLowerCase();
  const order = byId("order").value;
  const texts = ({ path, class: label, caption, top }) => [path, label, caption, top[0]?.[0]].filter(Boolean).join("\n").toLowerCase();
  images.found = DATA.samples.map((_, index) => index).filter((index) => texts(DATA.samples[index]).includes(wanted));
  if (order === "data" || !routingOf(state.layer, "image") || (order === "expert" && state.expert === null)) return;
  const test = order === "dropped" ? (choices) => takenBy(choices) === null : (choices) => tookIt(choices, state.expert);
  const counts = new Map(images.found.map((sample) => [sample, countPatches(sample, test)]));
  images.found.sort((a, b) => counts.get(b) - counts.get(a) || a - b);
}

function drawImages() {
  hideTip();
  byId("order").options[1].disabled = state.expert === null;
  if (state.expert === null && byId("order").value === "expert") byId("order").value = "data";
  findImages();
  const pages = Math.max(1, Math.ceil(images.found.length / PAGE_SIZE));
  images.page = Math.max(0, Math.min(pages - 1, images.page));
  const first = images.page * PAGE_SIZE;
  const shown = images.found.slice(first, first + PAGE_SIZE);
  const number = images.found.length;
  byId("page").textContent = number ? `page ${images.page + 1} of ${pages}, ${number} image${number === 1 ? "" : "s"}` : "none found";
  byId("previous").disabled = images.page === 0;
  byId("next").disabled = images.page >= pages - 1;
  const columns = routingOf(state.layer, "image")?.grid[1] ?? 0;
  const cards = byId("cards");
  // A map needs some 16 pixels a patch for its numbers.
  cards.style.setProperty("--card", `${Math.max(296, Math.min(600, 2 * 16 * columns + 40))}px`);
  for (const canvas of cards.querySelectorAll("canvas")) waiting.delete(canvas);
  cards.replaceChildren(...shown.map(makeCard));
}

function startImages() {
  byId("find").addEventListener("input", () => {
    images.page = 0;
    drawImages();
  });
  byId("order").addEventListener("change", () => {
    images.page = 0;
    drawImages();
  });
  for (const [id, step] of [["previous", -1], ["next", 1]]) {
    byId(id).addEventListener("click", () => {
      images.page += step;
      drawImages();
      // A button that is switched off loses the focus to the whole page.
      if (byId(id).disabled) byId(step > 0 ? "previous" : "next").focus();
      byId("images").scrollIntoView();
    });
  }
  let timer = null;
  window.addEventListener("resize", () => {
    clearTimeout(timer);
    timer = setTimeout(() => {
      for (const canvas of document.querySelectorAll(".map canvas")) whenSeen(canvas, () => drawMap(canvas, Number(canvas.dataset.sample)));
    }, 150);
  });
}
