// The page itself: header, choice of layer and expert, and the sections on layers, experts, classes and text tokens.

const state = { layer: 0, expert: null };
const MAX_CLASSES = 40; // rows of the heat map

const LAYER_NAMES = DATA.layers.map(({ title }) => title);
const CHOOSERS = [...new Set(DATA.layers.map(({ chooser }) => chooser))];
// What share_dropped is; null where nothing can be dropped.
const DROPPED_TITLE = CHOOSERS.includes("tokens") ? "Dropped" : CHOOSERS.includes("experts") ? "Taken by none" : null;
const expertName = () => (state.expert === null ? "all experts" : `expert ${state.expert}`);
const toggleExpert = (expert) => choose({ expert: state.expert === expert ? null : expert });

// ---- header ----

// Capacity of the experts; a fixed number of rows overrides the factor.
function capacityText({ chooser, capacity, eval_capacity_factor: factor, batch_priority: priority }) {
  if (chooser === "slots") return "soft: nothing is dropped";
  const perToken = chooser === "tokens";
  if (capacity === null && factor === null) return perToken ? "no limit: nothing is dropped" : "factor of training";
  const limit = capacity === null ? `factor ${factor}` : `${capacity} row${capacity === 1 ? "" : "s"} per expert`;
  return `${limit}${perToken && priority ? ", largest weights first" : ""}`;
}

const ROUTER_TEXT = {
  tokens: ({ num_selected_experts: choices }) => `top-k: each token chooses ${choices === 1 ? "an expert" : `${choices} experts`}`,
  experts: () => "expert choice: each expert chooses tokens",
  slots: () => "soft: each expert gets all tokens, weighted",
};

const facts = (entries) => entries.map(([term, text]) => make("div", {}, make("dt", {}, term), make("dd", {}, text)));

function drawHeader() {
  const known = DATA.facts;
  const every = (text) => [...new Set(DATA.layers.map(text))].join("; ");
  const skipped = known.num_skipped ? `, and ${asCount(known.num_skipped)} unreadable ones skipped` : "";
  const [shown, given] = [DATA.samples.length, DATA.num_samples_given];
  const modalities = DATA.modalities.map((name) => NOUN[name]).join(" and ");
  document.title = `Routing report: ${known.checkpoint}`;
  byId("lead").textContent = `Which experts the ${modalities} of ${known.data} go to in ${known.checkpoint}`;
  byId("facts").replaceChildren(
    ...facts([
      ["Model", known.checkpoint],
      ["Data", known.data],
      ["Images", asCount(known.num_samples) + skipped],
      ["Texts", known.texts_from ?? "none"],
      ["Sparse layers", asCount(DATA.layers.length)],
      ["Experts", every(({ num_experts: experts }) => asCount(experts))],
      ["Router", every((layer) => ROUTER_TEXT[layer.chooser](layer))],
      ["Capacity", every(capacityText)],
    ]),
  );
  byId("dropped-note").textContent = [
    CHOOSERS.includes("tokens") ? "Dropped: the share of assignments for which an expert had no capacity. " : "",
    CHOOSERS.includes("experts") ? "Taken by none: the share of tokens that no expert chose. " : "",
  ].join("");
  byId("few-note").textContent =
    shown < given ? `To keep this file small, ${asCount(shown)} of the ${asCount(given)} images are here, evenly spaced.` : "";
  const versions = Object.entries(known.versions);
  byId("more-facts").replaceChildren(
    ...facts([["Weights (SHA-256)", known.weights], ["Data (SHA-256)", known.data_fingerprint], ...versions]),
  );
}

// ---- layers ----

function drawLayers() {
  const rows = DATA.layers.flatMap((layer, index) =>
    Object.keys(layer.tokens).map((modality) => {
      const kept = layer.kept[modality];
      const expert = sum(kept) > 0 ? kept.indexOf(Math.max(...kept)) : null;
      const share = expert === null ? null : kept[expert] / sum(layer.asked[modality]);
      return { layer, index, modality, kept, expert, share };
    }),
  );
  const layerButton = (index) =>
    make("button", { type: "button", class: "plain", onclick: () => choose({ layer: index }) }, LAYER_NAMES[index]);
  const dropped = column(DROPPED_TITLE, ({ layer, modality }) => layer.share_dropped[modality], asShare);
  drawTable(byId("layer-table"), {
    label: "Layers",
    chosen: ({ index }) => index === state.layer,
    key: ({ index, modality }) => `${index} ${modality}`,
    rows,
    columns: [
      column("Layer", ({ index }) => index, layerButton, { text: true }),
      column("Of", ({ modality }) => NOUN[modality], String, { text: true }),
      column("Tokens", ({ layer, modality }) => layer.tokens[modality], asCount),
      column("Experts", ({ layer }) => layer.num_experts, asCount),
      ...(DROPPED_TITLE === null ? [] : [dropped]),
      column("Gate entropy", ({ layer, modality }) => layer.entropy[modality], asFixed(3)),
      column("Idle experts", ({ kept }) => kept.filter((value) => value === 0).length, asCount),
      column("Largest load", ({ share }) => share, asShare),
      column("Of expert", ({ expert }) => expert, (expert) => (expert === null ? "–" : tag(expert))),
    ],
  });
}

function drawAgreement() {
  const boxes = Object.entries(DATA.agreement).map(([modality, matrix]) => {
    const box = make("div", { id: `agreement-${modality}` });
    drawTable(box, {
      label: `Agreement between layers, ${NOUN[modality]}`,
      rows: LAYER_NAMES.map((_, index) => index),
      columns: [
        column(capital(NOUN[modality]), (index) => index, (index) => LAYER_NAMES[index], { text: true }),
        ...LAYER_NAMES.map((name, other) => column(name, (index) => matrix[index][other], asFixed(2))),
      ],
    });
    return box;
  });
  byId("agreement").replaceChildren(...boxes);
}

// ---- experts ----

const LOAD_TEXT = {
  slots: "Load: the sum of the weights with which tokens were made of the expert's outputs.",
  experts: "Load: tokens that the expert chose, as a share of all choices; several experts may choose the same token.",
  tokens:
    "Load: assignments that the expert had capacity for, as a share of all assignments; dropped ones stand on top in grey.",
};

function expertButton(expert) {
  const properties = { type: "button", class: "plain", "aria-label": `Choose expert ${expert}` };
  return make("button", { ...properties, onclick: () => toggleExpert(expert) }, tag(expert));
}

function drawExperts() {
  const layer = DATA.layers[state.layer];
  const modalities = Object.keys(layer.tokens);
  const before = layer.chooser === "tokens" ? ", before anything is dropped" : "";
  byId("experts-note").textContent =
    `${LOAD_TEXT[layer.chooser]} Importance: the sum of the router's weights over all tokens${before}. ` +
    "Choose an expert by its number or bar.";
  const charts = modalities.flatMap((modality) => {
    const [kept, asked, importance] = [layer.kept[modality], layer.asked[modality], layer.importance[modality]];
    const load = [{ name: "taken", values: kept, colour: colourOf }];
    const dropped = asked.map((value, expert) => value - kept[expert]);
    if (sum(dropped) > 0) load.push({ name: "dropped", values: dropped, colour: () => DATA.dropped });
    const [loadBox, importanceBox] = [make("div"), make("div")];
    drawBars(loadBox, `Load, ${NOUN[modality]}`, load, sum(asked));
    const parts = [{ name: "importance", values: importance, colour: colourOf }];
    drawBars(importanceBox, `Importance, ${NOUN[modality]}`, parts, sum(importance));
    return [loadBox, importanceBox];
  });
  byId("expert-charts").replaceChildren(...charts);
  drawTable(byId("expert-table"), {
    label: `Experts of ${LAYER_NAMES[state.layer]}`,
    chosen: (expert) => expert === state.expert,
    rows: range(layer.num_experts),
    columns: [
      column("Expert", (expert) => expert, expertButton, { text: true }),
      ...modalities.flatMap((modality) => {
        const [kept, asked, importance] = [layer.kept[modality], layer.asked[modality], layer.importance[modality]];
        const [allAsked, allImportance] = [sum(asked), sum(importance)];
        const noun = capital(NOUN[modality]);
        const dropped = (expert) => ratio(asked[expert] - kept[expert], asked[expert]);
        return [
          column(`${noun}: load`, (expert) => kept[expert], asCount),
          column("load share", (expert) => ratio(kept[expert], allAsked), asShare, { id: `${noun} load` }),
          ...(layer.chooser === "tokens" ? [column("dropped", dropped, asShare, { id: `${noun} dropped` })] : []),
          column("importance", (expert) => importance[expert], asFixed(1), { id: `${noun} importance` }),
          column("its share", (expert) => ratio(importance[expert], allImportance), asShare, { id: `${noun} its share` }),
        ];
      }),
    ],
  });
}

// ---- typical patches ----

let sheet = null; // address of the image of the layer's patches

// A list of an expert's patches, `side` pixels large.
function patchList(expert, most, side, captions) {
  const { typical, num_experts: numExperts } = DATA.layers[state.layer];
  const [height, width] = typical.patch;
  const zoom = side / Math.max(height, width);
  const items = typical.patches[expert].slice(0, most).map(([sample, row, column, weight], index) => {
    const shown = DATA.sample_index.indexOf(sample);
    const name = shown < 0 ? `image ${sample} of the data` : DATA.samples[shown].path;
    const lines = [[expert, `weight ${asWeight(weight)}`]];
    const title = `${name}, row ${row}, column ${column}`;
    const style = {
      width: `${width * zoom}px`,
      height: `${height * zoom}px`,
      backgroundImage: "var(--sheet)",
      backgroundSize: `${typical.columns * width * zoom}px ${numExperts * height * zoom}px`,
      backgroundPosition: `${-index * width * zoom}px ${-expert * height * zoom}px`,
    };
    const patch = make("span", { class: "patch", role: "img", "aria-label": sentence(title, lines), style });
    const caption = captions ? make("figcaption", { "aria-hidden": "true" }, asFixed(2)(weight)) : null;
    return make("li", {}, make("figure", {}, explain(patch, title, lines), caption));
  });
  if (!items.length) return make("p", { class: "empty" }, "No patch went here.");
  return rove(make("ul", { class: "collage" }, ...items), items.map((item) => item.querySelector(".patch")));
}

function drawCollage() {
  const { typical, num_experts: numExperts } = DATA.layers[state.layer];
  const box = byId("collage");
  if (sheet) URL.revokeObjectURL(sheet);
  sheet = typical && URL.createObjectURL(new Blob([bytesOf(typical.sheet)], { type: "image/webp" }));
  box.style.setProperty("--sheet", `url("${sheet}")`);
  if (!typical) box.replaceChildren(make("p", { class: "empty" }, "This layer sees no images."));
  else if (state.expert !== null) box.replaceChildren(patchList(state.expert, Infinity, 64, true));
  else {
    const rows = range(numExperts).map((expert) => make("div", {}, expertButton(expert), patchList(expert, 11, 40, false)));
    box.replaceChildren(make("div", { class: "rows" }, ...rows));
  }
}

// ---- classes and text tokens ----

// Rows {name, index, counts (E), total, top, share} of a packed table with a row of counts per name, or per expert.
function countRows(names, counts, numExperts, expertsFirst) {
  return names.map((name, index) => {
    const own = range(numExperts).map((e) => counts[expertsFirst ? e * names.length + index : index * numExperts + e]);
    const total = sum(own);
    const top = total > 0 ? own.indexOf(Math.max(...own)) : null;
    return { name, index, counts: own, total, top, share: top === null ? null : own[top] / total };
  });
}

function countColumns(title) {
  const { expert } = state;
  const noun = DATA.layers[state.layer].chooser === "slots" ? "sum of weights" : "assignments";
  const columns = [
    column(title, ({ name }) => name, String, { text: true }),
    column(noun, ({ total }) => total, asCount, { id: "total" }),
    column("most to", ({ top }) => top, (top) => (top === null ? "–" : expertButton(top))),
    column("share to that", ({ share }) => share, asShare),
  ];
  if (expert === null) return columns;
  return [
    ...columns,
    column(`to expert ${expert}`, ({ counts }) => counts[expert], asCount, { id: "count" }),
    column(`share to expert ${expert}`, ({ counts, total }) => ratio(counts[expert], total), asShare, { id: "share" }),
  ];
}

// What the sums of the tables are, as the end of a sentence.
function countNote({ chooser, num_selected_experts: choices, share_dropped: dropped }, modality, token) {
  if (chooser === "slots") return ": sums of the weights of the experts' outputs.";
  if (chooser === "experts") return `; ${token} counts once for each expert that chose it.`;
  const each = choices > 1 ? `; ${token} asks for ${choices} experts, and counts for each that had capacity.` : ".";
  return each + (dropped[modality] > 0 ? ` Dropped assignments (${asShare(dropped[modality])}) are not counted.` : "");
}

function drawClasses() {
  const layer = DATA.layers[state.layer];
  const known = layer.expert_class !== null && DATA.class_names;
  const note = byId("classes-note");
  byId("class-parts").hidden = !known;
  if (!known) {
    note.textContent = layer.patches === null ? "This layer sees no images." : "The data has no classes.";
    return;
  }
  const rows = countRows(DATA.class_names, unpack(layer.expert_class), layer.num_experts, true);
  const seen = rows.filter(({ total }) => total > 0);
  const strength = ({ counts, total, share }) => (state.expert === null ? share : counts[state.expert] / total);
  const drawnRows = [...seen].sort((a, b) => strength(b) - strength(a)).slice(0, MAX_CLASSES);
  if (state.expert === null) drawnRows.sort((a, b) => a.top - b.top || b.share - a.share);
  note.textContent = `Where the patches of each class's images went${countNote(layer, "image", "a patch")} `;
  if (seen.length > drawnRows.length) {
    const where = state.expert === null ? "one expert" : expertName();
    const some = `${drawnRows.length} of ${asCount(seen.length)} classes`;
    note.textContent += `The map shows the ${some} with the largest share in ${where}; the table has all.`;
  } else {
    const partly = layer.share_dropped.image > 0 && layer.chooser === "tokens" ? " of what was not dropped" : "";
    note.textContent += `A row of the map adds up to 100%${partly}.`;
  }
  const experts = range(layer.num_experts);
  const strongest = Math.max(...drawnRows.flatMap(({ counts, total }) => counts.map((count) => count / total)));
  const cells = drawnRows.map(({ name, counts, total }) => {
    const shades = counts.map((count, expert) => {
      const share = count / total;
      const title = `${name}, expert ${expert}: ${asShare(share)} (${asCount(count)})`;
      return make("td", { title, style: { "--share": `${(100 * share) / strongest}%` } });
    });
    return make("tr", {}, make("th", { scope: "row", title: name }, name), ...shades);
  });
  const step = Math.ceil(experts.length / 16); // between two numbers
  const numbers = experts.map((expert) => make("th", { scope: "col" }, expert % step ? "" : String(expert)));
  const head = make("tr", {}, make("td"), ...numbers);
  const caption = make("caption", {}, `Share of each class that went to each expert; full colour: ${asShare(strongest)}`);
  byId("class-chart").replaceChildren(make("table", { class: "heat" }, caption, make("thead", {}, head), make("tbody", {}, ...cells)));
  const sort = { column: state.expert === null ? 3 : 5, direction: "descending" };
  const columns = countColumns("Class");
  drawTable(byId("class-table"), { label: "Classes and experts", rows, columns, sort, key: ({ index }) => index });
}

function drawTokens() {
  const layer = DATA.layers[state.layer];
  const { text_tokens: names, num_text_tokens: number } = layer;
  byId("token-table").hidden = !names.length;
  if (!names.length) {
    byId("tokens-note").textContent = DATA.facts.texts_from === null ? "No texts were read." : "This layer sees no texts.";
    return;
  }
  const listed = number > names.length ? `The ${names.length} most frequent of ${asCount(number)}` : `All ${names.length}`;
  byId("tokens-note").textContent =
    `Tokens of the ${DATA.facts.texts_from}, as the tokenizer cuts them${countNote(layer, "text", "a token")} ` +
    `${listed} are listed.`;
  const rows = countRows(names, unpack(layer.token_expert), layer.num_experts, false);
  const sort = { column: state.expert === null ? 1 : 4, direction: "descending" };
  drawTable(byId("token-table"), { label: "Text tokens and experts", rows, columns: countColumns("Text token"), sort });
}

// ---- choosing ----

const MAP_TEXT = {
  tokens:
    "Each patch has the colour and number of the first chosen expert that had capacity for it; hatched grey patches were " +
    "dropped by all that they chose.",
  experts:
    "Each patch has the colour and number of the expert that chose it with the largest weight; hatched grey patches were " +
    "chosen by none.",
  slots: "Each patch has the colour and number of the expert with the largest weight in its output.",
};

function drawLegend() {
  const { chooser, num_experts: numExperts } = DATA.layers[state.layer];
  byId("map-note").textContent = MAP_TEXT[chooser];
  const buttons = range(numExperts).map((expert) => {
    const pressed = { "aria-pressed": String(state.expert === expert), "data-expert": expert };
    const name = make("span", { class: numExperts > 16 ? "unseen" : null }, `expert ${expert}`);
    return make("button", { type: "button", ...pressed, onclick: () => toggleExpert(expert) }, tag(expert), name);
  });
  const swatch = make("span", { class: "hatch", style: { backgroundImage: `url(${hatch(1).toDataURL()})` } });
  const none = make("span", { class: "dropped" }, swatch, chooser === "tokens" ? "dropped" : "taken by none");
  byId("legend").replaceChildren(...buttons, ...(chooser === "slots" ? [] : [none]));
}

function choose({ layer = state.layer, expert = state.expert }) {
  const focused = document.activeElement;
  const part = focused?.closest("[id]:not(main, section)");
  const focusable = () => [...(part?.querySelectorAll("button, .patch") ?? [])];
  const index = focusable().indexOf(focused);
  const { num_experts: numExperts } = DATA.layers[layer];
  state.layer = layer;
  state.expert = expert !== null && expert < numExperts ? expert : null;
  const options = range(numExperts).map((number) => make("option", { value: number }, `expert ${number}`));
  byId("layer").value = String(layer);
  byId("expert").replaceChildren(make("option", { value: "" }, "all"), ...options);
  byId("expert").value = state.expert === null ? "" : String(state.expert);
  for (const element of document.querySelectorAll(".layer-name")) element.textContent = LAYER_NAMES[layer];
  for (const element of document.querySelectorAll(".expert-name")) element.textContent = expertName();
  for (const draw of [drawLayers, drawExperts, drawCollage, drawClasses, drawTokens, drawLegend, drawImages]) draw();
  if (!focused.isConnected) focusable()[index]?.focus(); // its part of the page was drawn again
  say(`${LAYER_NAMES[layer]}, ${expertName()}`);
}

function start() {
  drawHeader();
  byId("layer").replaceChildren(...LAYER_NAMES.map((name, index) => make("option", { value: index }, name)));
  byId("layer").addEventListener("change", ({ target }) => choose({ layer: Number(target.value) }));
  const expertOf = ({ value }) => (value === "" ? null : Number(value));
  byId("expert").addEventListener("change", ({ target }) => choose({ expert: expertOf(target) }));
  startImages();
  drawAgreement();
  choose({});
}

start();
