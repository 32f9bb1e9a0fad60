// The gallery of report.html. Text from data goes into the page through textContent and attributes only. However many
// samples there are, only the cards in view are in the document.
(() => {
  "use strict";
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("report-data").textContent);
  const pictures = JSON.parse($("report-pictures").textContent);
  const total = data.id.length;
  const compared = data.runs.length > 1;
  const GAP = 16;
  const OVERSCAN = 2; // rows of cards above and below the view
  const SHORT = 240; // characters of a text in a card; the whole text is one Enter away

  const make = (tag, className, text) => {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const short = (text) => (text.length > SHORT ? text.slice(0, SHORT) + "…" : text);
  const count = (number) => number.toLocaleString("en");
  const shown = (value) => (value === null ? "none" : Math.abs(value) <= 1 ? value.toFixed(3) : value.toFixed(2));

  // What a score means in words and as a mark, so that colour is never the only cue.
  const MARKS = { right: "✓", wrong: "✗", partly: "◐", scored: "•", open: "–" };
  const WORDS = { right: "right", wrong: "wrong", partly: "partly right", scored: "", open: "no score" };
  const verdict = (value, metric) => {
    if (value === null) return "open";
    if (!data.shares[metric]) return "scored";
    return value >= 1 ? "right" : value <= 0 ? "wrong" : "partly";
  };

  // Choosing and ordering -------------------------------------------------------------------------------------------
  const state = { query: "", kind: "", result: "", metric: data.primary, order: "worst", cell: null };
  let chosen = []; // samples that match, in order
  let folded = null; // lower-case text of each sample, made at the first search

  const scoreOf = (sample, run = 0) => data.runs[run].scores[state.metric][sample];
  const change = (sample) => {
    const [a, b] = [scoreOf(sample, 0), scoreOf(sample, 1)];
    return a === null || b === null ? 0 : a - b;
  };
  const RESULTS = {
    "": ["all", () => true],
    right: ["right", (s) => verdict(scoreOf(s), state.metric) === "right"],
    partly: ["partly right", (s) => verdict(scoreOf(s), state.metric) === "partly"],
    wrong: ["wrong", (s) => verdict(scoreOf(s), state.metric) === "wrong"],
    open: ["without a score", (s) => scoreOf(s) === null],
    ...(compared && {
      first: [data.runs[0].name + " better", (s) => change(s) > 0],
      second: [data.runs[1].name + " better", (s) => change(s) < 0],
      differ: ["answers differ", (s) => data.runs[0].prediction[s] !== data.runs[1].prediction[s]],
    }),
  };
  // Samples without a score come last, whichever way.
  const by = (key) => (a, b) => {
    const [x, y] = [key(a), key(b)];
    return x === y ? a - b : x === null ? 1 : y === null ? -1 : x - y;
  };
  const ORDERS = {
    worst: ["worst first", by((s) => scoreOf(s))],
    best: ["best first", by((s) => (scoreOf(s) === null ? null : -scoreOf(s)))],
    ...(compared && { change: ["largest change first", by((s) => -Math.abs(change(s)))] }),
    file: ["as in the file", (a, b) => a - b],
    longest: ["longest answer first", by((s) => -data.runs[0].prediction[s].length)],
  };

  const fold = () => {
    folded = data.id.map((id, s) =>
      [id, pictures.keys[data.image[s]][1], data.instructions[data.instruction[s]], ...data.references[s],
        ...data.runs.map((run) => run.prediction[s])].join("\n").toLowerCase());
  };

  // All samples in the order that is wanted: sorted when another is wanted, not at each letter of a search.
  let sorted = { key: null, samples: [] };
  const inOrder = () => {
    const key = `${state.order} ${state.metric}`;
    if (sorted.key !== key) sorted = { key, samples: data.id.map((_, s) => s).sort(ORDERS[state.order][1]) };
    return sorted.samples;
  };

  const choose = () => {
    const words = state.query.toLowerCase().split(/\s+/).filter(Boolean);
    if (words.length && folded === null) fold();
    const fits = RESULTS[state.result][1];
    chosen = [];
    for (const s of inOrder()) {
      if (state.kind !== "" && data.kind[s] !== state.kind) continue;
      if (state.cell && !(data.cell[s] && data.cell[s].every((n, at) => n === state.cell[at]))) continue;
      if (!fits(s)) continue;
      if (words.length && !words.every((word) => folded[s].includes(word))) continue;
      chosen.push(s);
    }
  };

  // The list, of which only what is in view exists ------------------------------------------------------------------
  const list = $("list");
  const cells = new Map(); // place in `chosen` -> its element
  let active = 0; // the place that Tab reaches
  let columns = 1;
  let width = 0;
  let height = 0;

  const picture = (sample, className) => {
    const source = pictures.sources[data.image[sample]];
    const frame = make("span", className);
    if (source.startsWith("data:image/")) {
      const image = make("img");
      image.alt = describe(sample);
      image.decoding = "async";
      // Tiny pictures stay made of pixels: blurring them would hide what the encoder saw.
      image.addEventListener("load", () => image.classList.toggle("tiny", image.naturalWidth <= 64 && image.naturalHeight <= 64));
      image.src = source;
      frame.append(image);
    } else {
      frame.append(make("span", "absent", source));
    }
    return frame;
  };
  const describe = (sample) => {
    const reference = data.references[sample][0];
    return `Image ${pictures.keys[data.image[sample]][1]}${reference ? `, reference: ${short(reference)}` : ""}`;
  };
  const isolated = (className, text) => {
    const node = make("bdi", className, text);
    if (text.trim() === "") {
      node.classList.add("empty");
      node.textContent = "(nothing)";
    }
    return node;
  };
  const badge = (sample, run) => {
    const value = scoreOf(sample, run);
    const result = verdict(value, state.metric);
    const node = make("span", `badge ${result}`);
    const mark = make("span", "", MARKS[result]);
    mark.setAttribute("aria-hidden", "true");
    node.append(mark, ` ${WORDS[result]}`.trimEnd(), value === null || (result !== "partly" && result !== "scored") ? "" : ` ${shown(value)}`);
    return node;
  };

  const card = (place) => {
    const sample = chosen[place];
    const item = make("li", "cell");
    item.setAttribute("aria-setsize", chosen.length);
    item.setAttribute("aria-posinset", place + 1);
    const button = make("button", "card");
    button.type = "button";
    button.tabIndex = place === active ? 0 : -1;
    button.dataset.place = place;
    const body = make("span", "body");
    const instruction = data.instructions[data.instruction[sample]];
    if (instruction) body.append(isolated("question", short(instruction)));
    data.runs.forEach((run, number) => {
      const line = make("span", "answer");
      if (compared) line.append(make("bdi", "who", run.name), " ");
      line.append(badge(sample, number), " ", isolated("said", short(run.prediction[sample])));
      body.append(line);
    });
    const references = data.references[sample];
    const right = data.runs.every((_, number) => verdict(scoreOf(sample, number), state.metric) === "right");
    if (references.length && !right) {
      const line = make("span", "expected", "expected ");
      line.append(isolated("", short([...new Set(references)].join(" | "))));
      body.append(line);
    }
    const foot = make("span", "foot");
    foot.append(make("bdi", "", data.id[sample]));
    if (data.kinds.length > 1) foot.append(" · ", make("bdi", "", data.kinds[data.kind[sample]]));
    button.append(picture(sample, "frame"), body, foot);
    item.append(button);
    return item;
  };

  // Cards are all of one height, so that the place of each is known without making any. Where no text needs a second line
  // (answers in one word), they are shorter.
  const terse = (texts) => texts.every((text) => text.length <= 24);
  const spare = [
    terse(data.instructions),
    ...data.runs.map((run) => terse(run.prediction) && run.name.length <= 8),
    data.references.every((texts) => [...new Set(texts)].join(" | ").length <= 20),
  ].filter(Boolean).length;

  const measure = () => {
    const style = getComputedStyle(list);
    const rem = parseFloat(getComputedStyle(document.documentElement).fontSize);
    const size = (name) => parseFloat(style.getPropertyValue(name)) * rem;
    const least = size("--card-width");
    height = size(compared ? "--card-height-two" : "--card-height") - spare * size("--lines");
    columns = Math.max(1, Math.floor((list.clientWidth + GAP) / (least + GAP)));
    width = (list.clientWidth - GAP * (columns - 1)) / columns;
    const rows = Math.ceil(chosen.length / columns);
    list.style.height = `${Math.max(0, rows * (height + GAP) - GAP)}px`;
  };

  const paint = () => {
    const top = list.getBoundingClientRect().top;
    const row = (y) => Math.floor((y - top) / (height + GAP));
    const first = Math.max(0, (row(0) - OVERSCAN) * columns);
    const last = Math.min(chosen.length, Math.max(0, (row(window.innerHeight) + 1 + OVERSCAN) * columns));
    const wanted = [];
    for (let place = first; place < last; place++) wanted.push(place);
    // The card that has the focus, or that Tab would reach, stays, wherever the view is: focus must not get lost.
    if (chosen.length && (active < first || active >= last)) {
      if (active < first) wanted.unshift(active); else wanted.push(active);
    }
    const keep = new Set(wanted);
    for (const [place, node] of cells) {
      if (!keep.has(place)) {
        node.remove();
        cells.delete(place);
      }
    }
    let before = list.firstChild;
    for (const place of wanted) {
      let node = cells.get(place);
      if (node === undefined) {
        node = card(place);
        cells.set(place, node);
      }
      if (node === before) before = before.nextSibling;
      else list.insertBefore(node, before);
      node.style.width = `${width}px`;
      node.style.height = `${height}px`;
      node.style.transform = `translate(${(place % columns) * (width + GAP)}px, ${Math.floor(place / columns) * (height + GAP)}px)`;
    }
  };

  let painting = false;
  const paintSoon = () => {
    if (painting) return;
    painting = true;
    requestAnimationFrame(() => {
      painting = false;
      paint();
    });
  };

  const update = () => {
    choose();
    active = 0;
    for (const node of cells.values()) node.remove();
    cells.clear();
    measure();
    paint();
    $("count").textContent = chosen.length === total ? `${count(total)} ${total === 1 ? "sample" : "samples"}` : `${count(chosen.length)} of ${count(total)} samples`;
    $("nothing").hidden = chosen.length > 0;
    $("cell").hidden = state.cell === null;
    if (state.cell) {
      const [matrix, expected, said] = state.cell;
      const { name, answers } = data.matrices[matrix];
      $("cell-text").textContent = `${name}: ${answers[expected]} expected, ${said < answers.length ? answers[said] : "something else"} answered.`;
    }
  };

  const goTo = (place) => {
    const old = cells.get(active);
    if (old) old.firstChild.tabIndex = -1;
    active = Math.min(chosen.length - 1, Math.max(0, place));
    const y = Math.floor(active / columns) * (height + GAP);
    const top = list.getBoundingClientRect().top + y;
    const margin = 24;
    if (top < margin) window.scrollBy(0, top - margin);
    else if (top + height > window.innerHeight - margin) window.scrollBy(0, top + height - window.innerHeight + margin);
    paint();
    const node = cells.get(active);
    node.firstChild.tabIndex = 0;
    node.firstChild.focus({ preventScroll: true });
  };

  list.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !chosen.length) return;
    const page = Math.max(1, Math.floor(window.innerHeight / (height + GAP))) * columns;
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns, PageDown: page, PageUp: -page };
    if (event.key in steps) {
      const target = active + steps[event.key];
      if (event.key.startsWith("Page") || (target >= 0 && target < chosen.length)) goTo(target);
      else if (event.key === "ArrowDown" && Math.floor(active / columns) < Math.floor((chosen.length - 1) / columns)) goTo(chosen.length - 1);
    } else if (event.key === "Home") goTo(0);
    else if (event.key === "End") goTo(chosen.length - 1);
    else return;
    event.preventDefault();
  });
  list.addEventListener("click", (event) => {
    const button = event.target.closest("button.card");
    if (button) open(Number(button.dataset.place));
  });
  list.addEventListener("focusin", (event) => {
    const button = event.target.closest("button.card");
    if (!button || Number(button.dataset.place) === active) return;
    const old = cells.get(active);
    if (old) old.firstChild.tabIndex = -1;
    active = Number(button.dataset.place);
    button.tabIndex = 0;
  });

  // One sample, whole -----------------------------------------------------------------------------------------------
  const dialog = $("detail");
  const fill = (place) => {
    const sample = chosen[place];
    $("detail-title").textContent = `Sample ${count(place + 1)} of ${count(chosen.length)}`;
    $("previous").disabled = place === 0;
    $("next").disabled = place === chosen.length - 1;
    const facts = make("dl");
    const add = (name, ...values) => {
      const group = make("div");
      group.append(make("dt", "", name));
      for (const value of values) {
        const entry = make("dd");
        entry.append(value);
        group.append(entry);
      }
      facts.append(group);
    };
    const instruction = data.instructions[data.instruction[sample]];
    if (instruction) add("Instruction", isolated("text", instruction));
    data.runs.forEach((run, number) => {
      const line = make("span");
      line.append(badge(sample, number), " ", isolated("text", run.prediction[sample]));
      add(compared ? `Answer of ${run.name}` : "Answer", line);
    });
    const references = new Map();
    for (const text of data.references[sample]) references.set(text, (references.get(text) || 0) + 1);
    if (references.size) {
      add(references.size > 1 ? "References" : "Reference", ...[...references].map(([text, times]) => {
        const line = make("span");
        line.append(isolated("text", text), times > 1 ? ` × ${times}` : "");
        return line;
      }));
    }
    data.metrics.forEach((metric, number) => {
      add(metric, data.runs.map((run) => (compared ? `${run.name}: ` : "") + shown(run.scores[number][sample])).join(", "));
    });
    add("Kind", isolated("", data.kinds[data.kind[sample]]));
    add("Sample", isolated("", data.id[sample]));
    add("Image", isolated("", pictures.keys[data.image[sample]][1]));
    if (sample in data.drawn) {
      const link = make("a", "", "Attention and loss");
      link.href = `#drawn-${data.drawn[sample]}`;
      link.addEventListener("click", (event) => {
        event.preventDefault();
        leave = () => {
          const drawn = $(`drawn-${data.drawn[sample]}`);
          drawn.open = true;
          drawn.scrollIntoView();
          drawn.firstElementChild.focus({ preventScroll: true });
        };
        dialog.close();
      });
      add("Inside the model", link);
    }
    $("detail-body").replaceChildren(picture(sample, "large"), facts);
    dialog.scrollTop = 0;
  };
  let detailed = 0; // the place that the dialog shows; `active` follows the focus, which goes back to the first when it closes
  const open = (place) => {
    detailed = place;
    fill(place);
    if (!dialog.open) dialog.showModal();
    $("detail-title").focus();
  };
  const step = (by) => {
    const place = detailed + by;
    if (place < 0 || place >= chosen.length) return;
    open(place);
  };
  $("previous").addEventListener("click", () => step(-1));
  $("next").addEventListener("click", () => step(1));
  $("close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  let leave = null; // where to go when the dialog closes, if not back to its card
  dialog.addEventListener("close", () => {
    const go = leave;
    leave = null;
    if (go) go(); else goTo(detailed);
  });
  dialog.addEventListener("keydown", (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    event.preventDefault();
    step(event.key === "ArrowLeft" ? -1 : 1);
  });

  // Controls --------------------------------------------------------------------------------------------------------
  const fillSelect = (select, entries) => {
    for (const [value, name] of entries) {
      const option = make("option", "", name);
      option.value = value;
      select.append(option);
    }
    select.closest("label").hidden = entries.length < 2;
  };
  const everyResult = () => {
    // Only results that some sample has; which, depends on the metric.
    const select = $("result");
    select.replaceChildren();
    const some = Object.entries(RESULTS).filter(([key, [, fits]]) => {
      if (key === "") return true;
      for (let s = 0; s < total; s++) if (fits(s)) return true;
      return false;
    });
    fillSelect(select, some.map(([key, [name]]) => [key, name]));
    if (!some.some(([key]) => key === state.result)) state.result = "";
    select.value = state.result;
  };
  fillSelect($("kind"), [["", "all"], ...data.kinds.map((name, number) => [number, name])].slice(data.kinds.length > 1 ? 0 : 1));
  fillSelect($("metric"), data.metrics.map((name, number) => [number, name]));
  fillSelect($("order"), Object.entries(ORDERS).map(([key, [name]]) => [key, name]));
  $("metric").value = state.metric;
  everyResult();

  const controls = () => {
    $("query").value = state.query;
    $("kind").value = data.kinds.length > 1 ? state.kind : 0;
    $("result").value = state.result;
    $("order").value = state.order;
  };
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  $("query").addEventListener("input", (event) => { state.query = event.target.value; update(); });
  $("kind").addEventListener("change", (event) => { state.kind = event.target.value === "" ? "" : Number(event.target.value); update(); });
  $("result").addEventListener("change", (event) => { state.result = event.target.value; update(); });
  $("order").addEventListener("change", (event) => { state.order = event.target.value; update(); });
  $("metric").addEventListener("change", (event) => { state.metric = Number(event.target.value); everyResult(); update(); });
  $("cell-off").addEventListener("click", () => { state.cell = null; update(); $("query").focus(); });
  const reset = () => {
    Object.assign(state, { query: "", kind: "", result: "", cell: null });
    controls();
    update();
  };
  $("reset").addEventListener("click", reset);
  $("nothing-reset").addEventListener("click", () => { reset(); $("query").focus(); });

  const showGallery = (filter) => {
    Object.assign(state, { query: "", kind: "", result: "", cell: null }, filter);
    controls();
    update();
    const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
    $("gallery").scrollIntoView({ behavior: calm ? "auto" : "smooth" });
    $("gallery").focus({ preventScroll: true });
  };
  for (const button of document.querySelectorAll("[data-kind]")) {
    button.addEventListener("click", () => showGallery({ kind: data.kinds.length > 1 ? Number(button.dataset.kind) : "" }));
  }

  // A matrix is one stop of Tab; arrows move between its numbers.
  for (const table of document.querySelectorAll("table.matrix")) {
    const buttons = [...table.querySelectorAll("button")];
    if (!buttons.length) continue;
    buttons[0].tabIndex = 0;
    const at = (button) => button.dataset.cell.split(",").map(Number);
    table.addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (button) showGallery({ cell: at(button) });
    });
    table.addEventListener("keydown", (event) => {
      const direction = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
      const from = event.target.closest("button");
      if (!direction || !from) return;
      event.preventDefault();
      const [, row, column] = at(from);
      const axis = direction[0] ? 1 : 2;
      const sign = direction[0] + direction[1];
      // The next number on this line, else the nearest of the next line: most cells of a good matrix are empty.
      const ahead = buttons.filter((b) => (at(b)[axis] - at(from)[axis]) * sign > 0);
      const distance = (b) => {
        const along = Math.abs(at(b)[axis] - at(from)[axis]);
        const across = Math.abs(axis === 1 ? at(b)[2] - column : at(b)[1] - row);
        return across * 1000 + along;
      };
      const next = ahead.sort((a, b) => distance(a) - distance(b))[0];
      if (!next) return;
      from.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    });
  }

  $("filters").hidden = false;
  $("keys").hidden = false;
  update();
  window.addEventListener("scroll", paintSoon, { passive: true });
  new ResizeObserver(() => { measure(); paintSoon(); }).observe(list);
  window.addEventListener("resize", () => { measure(); paintSoon(); });
})();
