"use strict";
// The explorer. What a model wrote is only ever set as text (textContent, Text nodes), never as markup.

(() => {
  const AROUND = 8; // rows kept drawn above and below what is seen of the list
  const VERDICTS = {
    r: { sign: "✓", word: "right" },
    w: { sign: "✗", word: "wrong" },
    u: { sign: "?", word: "undecided" },
  };
  const FILTERS = ["wrong", "right", "undecided", "rule", "where"];
  const at = (id) => document.getElementById(id);
  const wide = matchMedia("(min-width: 52.01rem)");

  let data; // what kd/report/explorer.py packed
  let haystacks; // per question everything that can be searched, in lower case
  let readings; // per experiment, what the chosen reader took
  let matching = []; // questions (from 0) that pass the filters, in order
  let cursor = 0; // a place in `matching`
  let opened = null; // the question shown, or null
  let drawn = ""; // what of the list is drawn

  // Let the browser paint tables and charts before anything is unpacked.
  requestAnimationFrame(() => setTimeout(start));

  async function start() {
    try {
      data = await unpack();
    } catch (error) {
      at("status").textContent = `The responses cannot be unpacked here (${error.message}); use a browser of 2023 or later.`;
      return;
    }
    haystacks = data.questions.map((question, q) => [question[0], ...data.responses[q]].join("\n").toLowerCase());
    fillFilters();
    listen();
    at("status").textContent = "";
    at("browser").hidden = false;
    measureBar();
    filter();
    route();
  }

  async function unpack() {
    const packed = atob(at("packed").textContent);
    const bytes = new Uint8Array(packed.length);
    for (let i = 0; i < packed.length; i++) bytes[i] = packed.charCodeAt(i);
    at("packed").remove();
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"))).json();
  }

  // --- Elements -------------------------------------------------------------------------------------------------

  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }

  function fillFilters() {
    const options = (id, first, names) =>
      at(id).replaceChildren(...first, ...names.map((name, place) => new Option(name, place)));
    for (const id of ["wrong", "right", "undecided"]) options(id, [new Option("–", "")], data.experiments);
    options("rule", [new Option("any rule", "")], data.rules);
    options("where", [new Option("any experiment", "")], data.experiments);
    options("reader", [], data.readers);
    at("columns").replaceChildren(
      ...data.students.map(([name], place) => make("span", { title: name }, String(place + 1))),
    );
    at("more").open = wide.matches;
  }

  // --- Filters --------------------------------------------------------------------------------------------------

  function filter() {
    readings = data.readings[Number(at("reader").value)];
    const tests = [];
    const has = (id, verdict) => {
      if (at(id).value === "") return;
      const verdicts = readings[Number(at(id).value)].verdicts;
      tests.push((q) => verdicts[q] === verdict);
    };
    has("wrong", "w");
    has("right", "r");
    has("undecided", "u");
    if (at("rule").value !== "") {
      const rule = Number(at("rule").value);
      const looked = at("where").value === "" ? readings : [readings[Number(at("where").value)]];
      tests.push((q) => looked.some((reading) => reading.rules[q] === rule));
    }
    const phrase = sought();
    if (phrase) tests.push((q) => haystacks[q].includes(phrase));

    const before = matching[cursor];
    matching = [];
    for (let q = 0; q < data.questions.length; q++) if (tests.every((test) => test(q))) matching.push(q);
    cursor = Math.max(0, matching.indexOf(opened ?? before));
    const active = FILTERS.filter((id) => at(id).value !== "").length;
    for (const id of FILTERS) at(id).classList.toggle("set", at(id).value !== "");
    at("active").textContent = active ? ` (${active} set)` : "";
    const all = data.questions.length;
    at("count").textContent = matching.length === all ? `${all} questions` : `${matching.length} of ${all} questions`;
    drawn = "";
    at("space").style.height = `${matching.length * rowHeight()}px`;
    reveal();
    draw();
    if (opened !== null) showDetail();
  }

  function sought() {
    return at("text").value.toLowerCase();
  }

  // --- The list: only what is seen of it is drawn -----------------------------------------------------------------

  function rowHeight() {
    return 3.4 * parseFloat(getComputedStyle(document.documentElement).fontSize);
  }

  function draw() {
    const list = at("list");
    const height = rowHeight();
    const first = Math.max(0, Math.floor(list.scrollTop / height) - AROUND);
    const last = Math.min(matching.length, Math.ceil((list.scrollTop + list.clientHeight) / height) + AROUND);
    const now = `${first} ${last} ${cursor} ${opened}`;
    if (now === drawn) return;
    drawn = now;
    const rows = [];
    for (let place = first; place < last; place++) rows.push(drawRow(place, height));
    at("space").replaceChildren(...rows);
    if (matching.length) list.setAttribute("aria-activedescendant", `row-${matching[cursor]}`);
    else list.removeAttribute("aria-activedescendant");
  }

  function drawRow(place, height) {
    const q = matching[place];
    const row = make(
      "div",
      {
        id: `row-${q}`,
        class: place === cursor ? "row cursor" : "row",
        role: "option",
        "aria-selected": q === opened,
        "aria-setsize": matching.length,
        "aria-posinset": place + 1,
      },
      make("span", { class: "number" }, String(q + 1)),
      make("span", { class: "question" }, data.questions[q][0]),
      make("span", { class: "marks" }, ...data.students.map(([name, runs]) => mark(name, runs, q))),
    );
    row.style.transform = `translateY(${place * height}px)`;
    return row;
  }

  // What a student's runs come to on a question: their verdict, or how many of them are right.
  function mark(name, runs, q) {
    const verdicts = runs.map((e) => readings[e].verdicts[q]);
    const right = verdicts.filter((verdict) => verdict === "r").length;
    const same = verdicts.every((verdict) => verdict === verdicts[0]);
    const { sign, word } = same ? VERDICTS[verdicts[0]] : { sign: String(right), word: `${right} of ${runs.length} right` };
    const said = `${name}: ${word}`;
    return make("span", { class: same ? verdicts[0] : "some", role: "img", title: said, "aria-label": said }, sign);
  }

  function reveal() {
    const list = at("list");
    const top = cursor * rowHeight();
    const bottom = top + rowHeight();
    if (top < list.scrollTop) list.scrollTop = top;
    else if (bottom > list.scrollTop + list.clientHeight) list.scrollTop = bottom - list.clientHeight;
  }

  // --- One question -----------------------------------------------------------------------------------------------

  function showDetail() {
    const detail = at("detail");
    if (opened === null) {
      detail.replaceChildren(make("p", { class: "empty" }, "Choose a question to read the responses to it."));
      return;
    }
    const [text, worked, truth] = data.questions[opened];
    const back = make("button", { type: "button", class: "only-narrow" }, "← All questions");
    back.addEventListener("click", close);
    detail.replaceChildren(
      make("div", { class: "steps" }, back, stepButton("Previous", -1), stepButton("Next", 1)),
      make("h3", {}, make("a", { href: `#q=${opened + 1}` }, `Question ${opened + 1}`)),
      make("p", { class: "asked" }, ...marked(text, null)),
      make("p", { class: "truth" }, "True answer: ", make("b", {}, truth)),
      make("details", {}, make("summary", {}, "Worked answer"), make("p", { class: "worked" }, worked)),
      make("div", { class: "cards" }, ...data.experiments.map((_, e) => card(opened, e))),
    );
  }

  function stepButton(label, by) {
    const button = make("button", { type: "button" }, label);
    const place = matching.indexOf(opened);
    const next = matching[place + by];
    if (place < 0 || next === undefined) button.disabled = true;
    button.addEventListener("click", () => step(by));
    return button;
  }

  function card(q, e) {
    const reading = readings[e];
    const verdict = reading.verdicts[q];
    const { sign, word } = VERDICTS[verdict];
    const response = data.responses[q][e];
    const back = reading.back[q];
    const length = `${data.tokens[e][q]} tokens${data.cut[e][q] === "1" ? ", cut at the limit" : ""}`;
    const about = make("p", { class: "about" });
    if (verdict === "u") about.append(`No rule settles it · ${length}`);
    else about.append("Took ", make("b", {}, answer(reading, q)), ` by ${data.rules[reading.rules[q]]} · ${length}`);
    const parts = [
      make(
        "h4",
        {},
        make("span", {}, `${data.students.findIndex(([, runs]) => runs.includes(e)) + 1} ${data.experiments[e]}`),
        make("span", { class: `badge ${verdict}` }, `${sign} ${word}`),
      ),
      about,
    ];
    if (back) {
      const link = make("a", { href: `#q=${q - back + 1}` }, `question ${q - back + 1}`);
      parts.push(make("p", { class: "about" }, "The number stands in the response to ", link, ", an earlier row."));
    }
    const body = response ? marked(response, back ? null : reading.spans[q]) : ["The response is empty."];
    parts.push(make("p", { class: response ? "response" : "response empty" }, ...body), readers(q, e));
    return make("section", { class: `card is-${verdict}` }, ...parts);
  }

  function answer(reading, q) {
    return reading.answers[q] === "-1" && reading.spans[q] === null ? "no answer" : reading.answers[q];
  }

  function readers(q, e) {
    const rows = data.readers.map((name, r) => {
      const reading = data.readings[r][e];
      const verdict = reading.verdicts[q];
      const took = verdict === "u" ? "–" : `${answer(reading, q)} (${data.rules[reading.rules[q]]})`;
      const { sign, word } = VERDICTS[verdict];
      return make(
        "tr",
        {},
        make("th", { scope: "row" }, name),
        make("td", {}, took),
        make("td", { class: verdict }, `${sign} ${word}`),
      );
    });
    return make("details", {}, make("summary", {}, "As other rules read it"), make("table", {}, make("tbody", {}, ...rows)));
  }

  // The text with the answer's span marked, and what is searched for marked otherwise.
  function marked(text, span) {
    const [start, stop] = span ?? [text.length, text.length];
    const parts = [...withHits(text.slice(0, start))];
    if (span) parts.push(make("mark", { class: "answer" }, text.slice(start, stop)), ...withHits(text.slice(stop)));
    return parts;
  }

  function* withHits(text) {
    const phrase = sought();
    const lower = text.toLowerCase();
    let from = 0;
    if (phrase && lower.length === text.length) {
      for (let hit = lower.indexOf(phrase); hit >= 0; hit = lower.indexOf(phrase, from)) {
        yield text.slice(from, hit);
        from = hit + phrase.length;
        yield make("mark", { class: "hit" }, text.slice(hit, from));
      }
    }
    yield text.slice(from);
  }

  // --- Where we are: #q=12 is question 12, so that the back button and links work -------------------------------------

  function route() {
    const asked = /^#q=(\d+)$/.exec(location.hash);
    const q = asked ? Number(asked[1]) - 1 : null;
    const known = q !== null && q >= 0 && q < data.questions.length;
    at("status").textContent = q === null || known ? "" : `There is no question ${q + 1}; they go from 1 to ${data.questions.length}.`;
    opened = known ? q : null;
    at("browser").classList.toggle("open", known);
    if (known && matching.includes(q)) cursor = matching.indexOf(q);
    showDetail();
    reveal();
    draw();
    if (known) {
      at("detail").focus({ preventScroll: true });
      if (wide.matches) at("browser").scrollIntoView();
      else at("detail").scrollIntoView();
    }
  }

  function open(q) {
    if (q !== undefined) location.hash = `q=${q + 1}`; // the browser calls route()
  }

  function close() {
    if (opened === null) return;
    history.pushState(null, "", "#explorer");
    route();
    at("list").focus({ preventScroll: true });
    if (!wide.matches) at("browser").scrollIntoView();
  }

  // Move the cursor; an open question gives place to the next without an entry in the history.
  function step(by) {
    if (!matching.length) return;
    cursor = Math.min(matching.length - 1, Math.max(0, cursor + by));
    if (opened === null) {
      reveal();
      draw();
    } else {
      history.replaceState(null, "", `#q=${matching[cursor] + 1}`);
      route();
    }
  }

  // --- Events -------------------------------------------------------------------------------------------------------

  function listen() {
    const form = at("filters");
    form.addEventListener("input", filter);
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("reset", () => setTimeout(filter));
    at("list").addEventListener("scroll", draw, { passive: true });
    at("list").addEventListener("click", (event) => {
      const row = event.target.closest(".row");
      if (row) open(Number(row.id.slice("row-".length)));
    });
    addEventListener("hashchange", route);
    addEventListener("resize", () => {
      measureBar();
      filter();
    });
    wide.addEventListener("change", () => (at("more").open = wide.matches));
    document.addEventListener("keydown", onKey);
  }

  function onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = event.target.closest("input, select, textarea");
    if (event.key === "Escape") {
      if (typing) typing.blur();
      else close();
    } else if (typing) {
      if (event.key === "Enter" && typing.id === "text") open(matching[cursor]);
      else if (event.key === "ArrowDown" && typing.id === "text") at("list").focus();
      else return;
    } else if (event.key === "/") {
      at("text").focus();
      at("text").select();
    } else if (event.key === "j" || (event.key === "ArrowDown" && inList(event))) step(1);
    else if (event.key === "k" || (event.key === "ArrowUp" && inList(event))) step(-1);
    else if (event.key === "Enter" && (inList(event) || event.target === document.body)) open(matching[cursor]);
    else return;
    event.preventDefault();
  }

  function inList(event) {
    return event.target === at("list") || event.target === at("detail");
  }

  // The list ends where the window does, below a filter bar of one line or several.
  function measureBar() {
    document.documentElement.style.setProperty("--bar", `${at("filters").offsetHeight}px`);
  }
})();
