// The page itself: header, choice of layer and expert, and the sections on layers, experts, classes and words.

const state = { layer: 0, expert: null };
const MAX_CLASSES = 40; // rows of the heat map

// ---- header ----

const LAYER_NAMES = DATA.layers.map(({ title }) => title);
const expertName = () => (state.expert === null ? "all experts" : `expert ${state.expert}`);

// Room in the experts; a fixed number of rows overrides the factor.
function capacityText({ router, capacity, capacity_factor: factor, batch_priority: priority }) {
  if (router === "soft") return "soft: nothing is dropped";
  if (capacity === null && factor === null) return router === "top_k" ? "no limit: nothing is dropped" : "factor of training";
  const room = capacity === null ? `factor ${factor}` : `${capacity} row${capacity === 1 ? "" : "s"} per expert`;
  return `${room}${router === "top_k" && priority ? ", largest weights first" : ""}`;
}

function routerText({ router, num_selected_experts: choices }) {
  if (router === "top_k") return `top-k: each token chooses ${choices === 1 ? "an expert" : `${choices} experts`}`;
  return { expert_choice: "expert choice: each expert chooses tokens", soft: "soft: each expert gets all tokens, weighted" }[router];
}

// What share_dropped is, by the layers' routers; null where nothing can be dropped.
const DROPPED_TEXT = {
  top_k: "Dropped: the share of assignments for which an expert had no room.",
  expert_choice: "Taken by none: the share of tokens that no expert chose.",
};
const ROUTERS = [...new Set(DATA.layers.map(({ router }) => router))];
const DROPPED_TITLE = ROUTERS.includes("top_k") ? "Dropped" : ROUTERS.includes("expert_choice") ? "Taken by none" : null;

function facts(list, entries) {
  list.replaceChildren(...entries.map(([term, text]) => make("div", {}, make("dt", {}, term), make("dd", {}, text))));
}

function drawHeader() {
  const known = DATA.facts;
  const every = (text) => [...new Set(DATA.layers.map(text))].join("; ");
  const modalities = DATA.modalities.map((name) => NOUN[name]).join(" and ");
  document.title = `Routing report: ${known.checkpoint}`;
  byId("lead").textContent = `Which experts the ${modalities} of ${known.data} go to in ${known.checkpoint}`;
  facts(byId("facts"), [
    ["Model", known.checkpoint],
    ["Data", known.data],
    ["Images", asCount(known.num_samples) + (known.num_skipped ? `, and ${asCount(known.num_skipped)} unreadable ones left out` : "")],
    ["Words", known.words_from ?? "none"],
    ["Sparse layers", asCount(DATA.layers.length)],
    ["Experts", every(({ num_experts: experts }) => asCount(experts))],
    ["Router", every(routerText)],
    ["Capacity", every(capacityText)],
  ]);
  byId("dropped-note").textContent = ROUTERS.filter((name) => name in DROPPED_TEXT).map((name) => `${DROPPED_TEXT[name]} `).join("");
  const given = DATA.num_samples_given;
  byId("few-note").textContent = DATA.samples.length < given ? `To keep this file small, ${asCount(DATA.samples.length)} of the ${asCount(given)} images are here, evenly spread.` : "";
  facts(byId("more-facts"), [
    ["Weights (SHA-256)", known.weights],
    ["Data (SHA-256)", known.data_fingerprint],
    ...Object.entries(known.versions),
  ]);
}

// ---- layers ----

function drawLayers() {
  const rows = DATA.layers.flatMap((layer, index) =>
    Object.keys(layer.tokens).map((modality) => ({ layer, index, modality, busiest: busiest(layer, modality) })),
  );
  const noun = ({ modality }) => NOUN[modality];
  drawTable(byId("layer-table"), {
    label: "Layers",
    chosen: ({ index }) => index === state.layer,
    key: ({ index, modality }) => `${index} ${modality}`,
    rows,
    columns: [
      {
        title: "Layer",
        text: true,
        value: ({ index }) => index,
        show: ({ index }) => make("button", { type: "button", class: "plain", onclick: () => choose({ layer: index }) }, LAYER_NAMES[index]),
      },
      { title: "Of", text: true, value: noun, show: noun },
      column("Tokens", ({ layer, modality }) => layer.tokens[modality], asCount),
      column("Experts", ({ layer }) => layer.num_experts, asCount),
      ...(DROPPED_TITLE === null ? [] : [column(DROPPED_TITLE, ({ layer, modality }) => layer.share_dropped[modality], asShare)]),
      column("Gate entropy", ({ layer, modality }) => layer.entropy[modality], asFixed(3)),
      column("Idle experts", ({ layer, modality }) => layer.kept[modality].filter((value) => value === 0).length, asCount),
      column("Largest load", ({ busiest }) => busiest.share, asShare),
      column("Of expert", ({ busiest }) => busiest.expert, (expert) => (expert === null ? "–" : tag(expert))),
    ],
  });
}

function busiest(layer, modality) {
  const kept = layer.kept[modality];
  const total = sum(layer.asked[modality]);
  if (!(sum(kept) > 0)) return { expert: null, share: null };
  const expert = kept.indexOf(Math.max(...kept));
  return { expert, share: kept[expert] / total };
}

function drawLayerCharts() {
  const charts = [
    ...(DROPPED_TITLE === null ? [] : [[ROUTERS.includes("top_k") ? "Share dropped" : "Share taken by none", "share_dropped", "share_lines", asShare]]),
    ["Gate entropy, nats", "entropy", "lines", asFixed(3)],
  ];
  byId("layer-charts").replaceChildren(
    ...charts.map(([title, key, chart, show]) => {
      const rows = DATA.layers.flatMap((layer, index) =>
        Object.entries(layer[key]).map(([modality, value]) => ({ layer: LAYER_NAMES[index], modality: NOUN[modality], value, shown: show(value), spoken: `${LAYER_NAMES[index]}, ${NOUN[modality]}: ${show(value)}` })),
      );
      const box = make("div");
      drawChart(box, chart, rows, `${title} of each layer; the table below has the same figures`);
      return make("div", {}, make("h3", {}, title), box);
    }),
  );
  const agreement = Object.entries(DATA.agreement).map(([modality, matrix]) => {
    const rows = matrix.flatMap((values, a) =>
      values.map((value, b) => ({ a: LAYER_NAMES[a], b: LAYER_NAMES[b], value, shown: asFixed(2)(value), spoken: `${LAYER_NAMES[a]} and ${LAYER_NAMES[b]}: ${asFixed(2)(value)}` })),
    );
    const box = make("div", { style: { maxWidth: `${140 + 64 * matrix.length}px` } });
    drawChart(box, "agreement", rows, `Agreement between layers, ${NOUN[modality]}`, { height: 32 * matrix.length });
    return make("div", {}, make("h4", {}, capital(NOUN[modality])), box);
  });
  byId("agreement").replaceChildren(...agreement);
}

const capital = (text) => text[0].toUpperCase() + text.slice(1);

// ---- experts ----

function expertButton(expert) {
  const label = `Choose expert ${expert}`;
  return make("button", { type: "button", class: "plain", "aria-label": label, onclick: () => toggleExpert(expert) }, tag(expert));
}

const toggleExpert = (expert) => choose({ expert: state.expert === expert ? null : expert });

function drawExperts() {
  const layer = DATA.layers[state.layer];
  const modalities = Object.keys(layer.tokens);
  const experts = [...Array(layer.num_experts).keys()];
  const loads = {
    soft: "Load: the sum of the weights with which tokens were made of the expert's outputs.",
    expert_choice: "Load: tokens that the expert chose, as a share of all choices; several experts may choose the same token.",
    top_k: "Load: assignments that the expert had room for, as a share of all assignments; those it had no room for stand on top in grey.",
  };
  byId("experts-note").textContent =
    loads[layer.router] +
    ` Importance: the sum of the router's weights over all tokens${layer.router === "top_k" ? ", before anything is dropped" : ""}. Choose an expert by its number or bar.`;
  const opacity = (expert) => (state.expert === null || state.expert === expert ? 1 : 0.3);
  const charts = modalities.flatMap((modality) => {
    const noun = NOUN[modality];
    const [kept, asked, importance] = [layer.kept[modality], layer.asked[modality], layer.importance[modality]];
    const bar = (part, order, values, total, colour) =>
      experts.map((expert) => {
        const share = ratio(values[expert], total);
        const spoken = `expert ${expert}, ${part}: ${asCount(values[expert])}, ${asShare(share)}`;
        return { expert, spoken, part, order, count: asCount(values[expert]), share, shown: asShare(share), colour: colour(expert), opacity: opacity(expert) };
      });
    const total = sum(asked);
    const dropped = asked.map((value, expert) => value - kept[expert]);
    const load = bar("taken", 0, kept, total, colourOf);
    if (dropped.some((value) => value > 0)) load.push(...bar("dropped", 1, dropped, total, () => DATA.dropped));
    return [
      [`Load, ${noun}`, load],
      [`Importance, ${noun}`, bar("importance", 0, importance, sum(importance), colourOf)],
    ];
  });
  // The boxes stay, so that the page does not jump when the expert changes.
  const box = byId("expert-charts");
  if (box.childElementCount !== charts.length) {
    box.replaceChildren(...charts.map(() => make("div", {}, make("h3"), make("div", { class: "chart" }))));
  }
  charts.forEach(([title, rows], index) => {
    const [heading, chart] = box.children[index].children;
    heading.textContent = title;
    drawChart(chart, "bars", rows, `${title} of each expert; the table below has the same figures`, { click: ({ expert }) => isNumber(expert) && toggleExpert(expert) });
  });
  drawTable(byId("expert-table"), {
    label: `Experts of ${LAYER_NAMES[state.layer]}`,
    chosen: (expert) => expert === state.expert,
    rows: experts,
    columns: [
      { title: "Expert", text: true, value: (expert) => expert, show: expertButton },
      ...modalities.flatMap((modality) => {
        const [kept, asked, importance] = [layer.kept[modality], layer.asked[modality], layer.importance[modality]];
        const [allAsked, allImportance] = [sum(asked), sum(importance)];
        const group = capital(NOUN[modality]);
        const own = (title, value, show, id = title) => column(title, value, show, { group, id: `${group} ${id}` });
        return [
          own("load", (expert) => kept[expert], asCount),
          own("share", (expert) => ratio(kept[expert], allAsked), asShare, "load share"),
          ...(layer.router !== "top_k" ? [] : [own("dropped", (expert) => ratio(asked[expert] - kept[expert], asked[expert]), asShare)]),
          own("importance", (expert) => importance[expert], asDecimal),
          own("share", (expert) => ratio(importance[expert], allImportance), asShare, "importance share"),
        ];
      }),
    ],
  });
}

// ---- typical patches ----

let sheet = null; // address of the sheet of patches of the layer

function drawCollage() {
  const { typical, num_experts: numExperts } = DATA.layers[state.layer];
  const box = byId("collage");
  if (sheet) URL.revokeObjectURL(sheet.address);
  sheet = null;
  if (!typical) {
    box.replaceChildren(make("p", { class: "empty" }, "This layer sees no images."));
    return;
  }
  const address = URL.createObjectURL(new Blob([bytesOf(typical.sheet)], { type: "image/jpeg" }));
  sheet = { address };
  box.style.setProperty("--sheet", `url("${address}")`);
  const [height, width] = typical.patch;
  const patchList = (expert, most, side, captions) => {
    const zoom = side / Math.max(height, width);
    const figures = typical.patches[expert].slice(0, most).map(([sample, row, column, weight], index) => {
      const shown = DATA.sample_index.indexOf(sample);
      const name = shown < 0 ? `image ${sample} of the data` : DATA.samples[shown].path;
      const lines = [[expert, `weight ${asWeight(weight)}`]];
      const title = `${name}, row ${row}, column ${column}`;
      const patch = make("span", {
        class: "patch",
        role: "img",
        "aria-label": sentence(title, lines),
        style: {
          width: `${width * zoom}px`,
          height: `${height * zoom}px`,
          backgroundImage: "var(--sheet)",
          backgroundSize: `${typical.columns * typical.cell[1] * zoom}px ${numExperts * typical.cell[0] * zoom}px`,
          backgroundPosition: `${-index * typical.cell[1] * zoom}px ${-expert * typical.cell[0] * zoom}px`,
        },
      });
      explain(patch, title, lines);
      return make("li", {}, make("figure", {}, patch, captions ? make("figcaption", { "aria-hidden": "true" }, asFixed(2)(weight)) : null));
    });
    if (!figures.length) return make("p", { class: "empty" }, "No patch went here.");
    return rove(make("ul", { class: "collage" }, ...figures), figures.map((figure) => figure.querySelector(".patch")));
  };
  if (state.expert !== null) {
    box.replaceChildren(patchList(state.expert, Infinity, 64, true));
    return;
  }
  const rows = typical.patches.map((_, expert) =>
    make(
      "div",
      {},
      make("button", { type: "button", class: "tag-button", "aria-label": `Choose expert ${expert}`, onclick: () => toggleExpert(expert) }, tag(expert)),
      patchList(expert, 11, 40, false),
    ),
  );
  box.replaceChildren(make("div", { class: "rows" }, ...rows));
}

// ---- classes and words ----

// Rows {name, index, counts (E), total, top, share} of a packed table with a row of counts per name, or per expert.
function countRows(names, counts, numExperts, expertsFirst) {
  return names.map((name, index) => {
    const own = Array.from({ length: numExperts }, (_, expert) => counts[expertsFirst ? expert * names.length + index : index * numExperts + expert]);
    const total = sum(own);
    const top = total > 0 ? own.indexOf(Math.max(...own)) : null;
    return { name, index, counts: own, total, top, share: top === null ? null : own[top] / total };
  });
}

function countColumns(title) {
  const expert = state.expert;
  const noun = DATA.layers[state.layer].router === "soft" ? "sum of weights" : "assignments";
  return [
    column(title, ({ name }) => name, (name) => name, { text: true }),
    column(noun, ({ total }) => total, asCount, { id: "total" }),
    column("most to", ({ top }) => top, (top) => (top === null ? "–" : expertButton(top))),
    column("share to that", ({ share }) => share, asShare),
    ...(expert === null
      ? []
      : [
          column(`to expert ${expert}`, ({ counts }) => counts[expert], asCount, { id: "count" }),
          column(`share to expert ${expert}`, ({ counts, total }) => ratio(counts[expert], total), asShare, { id: "share" }),
        ]),
  ];
}

// What the sums of the tables are, as the end of a sentence.
function countNote({ router, num_selected_experts: choices, share_dropped: dropped }, modality, token) {
  if (router === "soft") return ": sums of the weights of the experts' outputs.";
  if (router === "expert_choice") return `; ${token} counts once for each expert that chose it.`;
  const each = choices > 1 ? `; ${token} asks for ${choices} experts, and counts for each that had room.` : ".";
  return each + (dropped[modality] > 0 ? ` Dropped assignments (${asShare(dropped[modality])}) are not counted.` : "");
}

function drawClasses() {
  const layer = DATA.layers[state.layer];
  const known = layer.expert_class !== null && DATA.class_names;
  byId("class-parts").hidden = !known;
  if (!known) {
    byId("classes-note").textContent = layer.patches === null ? "This layer sees no images." : "The data has no classes.";
    return;
  }
  const rows = countRows(DATA.class_names, unpack(layer.expert_class), layer.num_experts, true);
  const seen = rows.filter(({ total }) => total > 0);
  const strength = ({ counts, total, share }) => (state.expert === null ? share : counts[state.expert] / total);
  const drawnRows = [...seen].sort((a, b) => strength(b) - strength(a)).slice(0, MAX_CLASSES);
  if (state.expert === null) drawnRows.sort((a, b) => a.top - b.top || b.share - a.share);
  const few = seen.length > drawnRows.length;
  byId("classes-note").textContent =
    `Where the patches of each class's images went${countNote(layer, "image", "a patch")} ` +
    (few
      ? `The map shows the ${drawnRows.length} of ${asCount(seen.length)} classes with the largest share in ${state.expert === null ? "one expert" : expertName()}; the table has all.`
      : `A row of the map adds up to 100%${layer.share_dropped.image > 0 && layer.router === "top_k" ? " of what was not dropped" : ""}.`);
  // A label that stands for two classes would draw them on top of each other: then the class's number tells them apart.
  const most = byId("class-chart").clientWidth >= 480 ? 36 : 20;
  const short = drawnRows.map(({ name }) => shorten(name, most));
  const labelOf = (at) => {
    if (short.indexOf(short[at]) === short.lastIndexOf(short[at])) return short[at];
    const number = ` (${drawnRows[at].index})`;
    return shorten(drawnRows[at].name, most - number.length) + number;
  };
  const cells = drawnRows.flatMap(({ name, counts, total }, index) =>
    counts.map((count, expert) => ({ row: labelOf(index), name, expert, share: count / total, shown: asShare(count / total), count: asCount(count) })),
  );
  drawChart(byId("class-chart"), "classes", cells, "Share of each class that went to each expert; the table beside it has the figures", { height: 18 * drawnRows.length });
  const sort = { column: state.expert === null ? 3 : 5, direction: "descending" };
  drawTable(byId("class-table"), { label: "Classes and experts", rows, columns: countColumns("Class"), sort, key: ({ index }) => index });
}

function drawWords() {
  const layer = DATA.layers[state.layer];
  const box = byId("word-table");
  box.hidden = !layer.words.length;
  const source = { captions: "the captions", "class names": "the class names" }[DATA.facts.words_from] ?? "the texts";
  byId("words-note").textContent = !layer.words.length
    ? DATA.facts.words_from === null
      ? "No words were read."
      : "This layer sees no words."
    : `Word pieces of ${source}, as the tokenizer cuts them${countNote(layer, "text", "a word")} ` +
      (layer.num_words > layer.words.length ? `The ${layer.words.length} most frequent of ${asCount(layer.num_words)} are listed.` : `All ${layer.words.length} are listed.`);
  if (!layer.words.length) return;
  const rows = countRows(layer.words, unpack(layer.word_expert), layer.num_experts, false);
  const sort = { column: state.expert === null ? 1 : 4, direction: "descending" };
  drawTable(box, { label: "Words and experts", rows, columns: countColumns("Word piece"), sort });
}

// ---- choosing ----

function drawLegend() {
  const layer = DATA.layers[state.layer];
  const buttons = [...Array(layer.num_experts).keys()].map((expert) =>
    make("button", { type: "button", "aria-pressed": String(state.expert === expert), "data-expert": expert, onclick: () => toggleExpert(expert) }, tag(expert), make("span", { class: layer.num_experts > 16 ? "unseen" : null }, `expert ${expert}`)),
  );
  const swatch = make("span", { class: "hatch", style: { backgroundImage: `url(${hatch(1).toDataURL()})` } });
  const none = layer.router === "top_k" ? "dropped" : "taken by none";
  const legend = layer.router === "soft" ? buttons : [...buttons, make("span", { class: "dropped" }, swatch, none)];
  byId("map-note").textContent = {
    top_k: "Each patch has the colour and number of the first chosen expert that had room for it; hatched grey patches were dropped by all that they chose.",
    expert_choice: "Each patch has the colour and number of the expert that chose it with the largest weight; hatched grey patches were chosen by none.",
    soft: "Each patch has the colour and number of the expert with the largest weight in its output.",
  }[layer.router];
  const order = byId("order").options[2];
  order.textContent = layer.router === "top_k" ? "most dropped patches first" : "most patches taken by none first";
  order.hidden = order.disabled = layer.router === "soft";
  if (order.disabled && order.selected) byId("order").value = "data";
  byId("legend").replaceChildren(...legend);
}

function choose({ layer = state.layer, expert = state.expert }) {
  const focused = document.activeElement;
  const index = focusPlace(focused);
  state.layer = layer;
  const { num_experts: numExperts } = DATA.layers[layer];
  state.expert = expert !== null && expert < numExperts ? expert : null;
  byId("layer").value = String(layer);
  byId("expert").replaceChildren(
    make("option", { value: "" }, "all"),
    ...[...Array(numExperts).keys()].map((number) => make("option", { value: number }, `expert ${number}`)),
  );
  byId("expert").value = state.expert === null ? "" : String(state.expert);
  for (const element of document.querySelectorAll(".layer-name")) element.textContent = LAYER_NAMES[layer];
  for (const element of document.querySelectorAll(".expert-name")) element.textContent = expertName();
  drawLayers();
  drawExperts();
  drawCollage();
  drawClasses();
  drawWords();
  drawLegend();
  drawImages();
  if (!focused.isConnected) index?.()?.focus();
  say(`${LAYER_NAMES[layer]}, ${expertName()}`);
}

// Finds again what had the focus before its part of the page was drawn again.
function focusPlace(element) {
  const part = element?.closest("[id]:not(main, section)");
  if (!part) return null;
  const row = element.closest("tr[data-key]");
  const within = (box) => [...box.querySelectorAll("button, .patch")];
  const order = within(row ?? part).indexOf(element);
  if (!row) return () => within(part)[order];
  // Rows may have changed their places; one below the first hundred may not be drawn.
  return () => {
    const same = [...part.querySelectorAll("tr[data-key]")].find(({ dataset }) => dataset.key === row.dataset.key);
    return (same && within(same)[order]) ?? part.querySelector(".scroll");
  };
}

function start() {
  drawHeader();
  byId("layer").replaceChildren(...LAYER_NAMES.map((name, index) => make("option", { value: index }, name)));
  byId("layer").addEventListener("change", (event) => choose({ layer: Number(event.target.value) }));
  byId("expert").addEventListener("change", (event) => choose({ expert: event.target.value === "" ? null : Number(event.target.value) }));
  const sections = { layers: "Layers", experts: "Experts", patches: "Patches", classes: "Classes", words: "Words", images: "Images" };
  byId("sections").replaceChildren(...Object.entries(sections).map(([id, title]) => make("a", { href: `#${id}` }, title)));
  startImages();
  drawLayerCharts();
  choose({});
}

start();
