"use strict";
// The page to play with: asks the server (demo/play.py) for answers and shows them in the player, which is a frame of its
// own. What the sampler does is computed there; here is only what is asked and what is shown.

const $ = (id) => document.getElementById(id);
const player = () => $("player").contentWindow;
let options, race = { answers: [] }, plan = [], looked = null, running = null;

function element(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

function say(text, bad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", bad);
}

// ---------------------------------------------------------------- what is asked

const knobs = () => options.models[$("model").value].ways[$("way").value];
const turned = () => knobs().filter(({ name }) => name !== "plan"); // the plan has its own place

function chooseModel() {
  const { data, prompts, ways } = options.models[$("model").value];
  if ($("prompts").dataset.data !== data) { // else a prompt is kept, for another model to answer
    $("prompts").replaceChildren(...prompts.map((prompt) => new Option(prompt)));
    $("prompts").dataset.data = data;
    $("prompt").value = prompts[0] ?? "";
    plan = [];
  }
  $("way").replaceChildren(...Object.keys(ways).map((way) => new Option(way)));
  chooseWay();
}

function chooseWay(chosen = settings()) {
  $("knobs").replaceChildren(...turned().map((knob) => turnable(knob, chosen[knob.name] ?? knob.default)));
  showPlan();
}

function turnable({ name, kind, default: usual, help, among, limits }, value) {
  const bounds = Object.entries(limits).filter(([, limit]) => limit < 2 ** 31).map(([word, limit]) => `${word} ${limit}`);
  const text = [help, bounds.join(", ")].filter(Boolean).join("; ");
  const input = among.length ? element("select", {}, ...among.map((word) => new Option(word)))
    : element("input", { type: kind === "bool" ? "checkbox" : "number", step: kind === "int" ? 1 : 0.05 });
  if (kind === "bool") input.checked = value; else input.value = value;
  Object.assign(input, { id: `knob-${name}`, usual, ariaDescription: text });
  const row = element("div", { className: "knob" }, element("label", { htmlFor: input.id }, name), input, element("p", {}, text));
  input.oninput = () => row.classList.toggle("set", read(input) !== usual);
  input.oninput();
  return row;
}

const read = ({ type, checked, value }) => type === "checkbox" ? checked : type !== "number" ? value
  : value === "" ? null : Number(value);

// Those that are not as usual.
const settings = () => Object.fromEntries([...$("knobs").querySelectorAll("input, select")]
  .filter((input) => read(input) !== input.usual).map((input) => [input.id.slice(5), read(input)]));

// ---------------------------------------------------------------- answers

async function* lines(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (let text = "", part; !(part = await reader.read()).done;) {
    const whole = (text + part.value).split("\n");
    text = whole.pop();
    for (const line of whole) yield JSON.parse(line);
  }
}

const post = (path, what) => fetch(path, { method: "POST", headers: { "Content-Type": "application/json" },
  body: JSON.stringify(what) });

// Returns whether there was an answer.
async function ask(more = {}) {
  if (running) return false;
  if (!$("prompt").value.trim()) return say("Write a prompt first.", true);
  const sent = { id: crypto.randomUUID(), model: $("model").value, decode: $("way").value, prompt: $("prompt").value,
    settings: { ...settings(), ...more } };
  let answer = null, error = "The server ended before its answer: see its terminal, and start it again with make play.";
  busy(sent.id);
  say("…");
  try {
    for await (const line of lines((await post("/answer", sent)).body)) {
      ({ answer = null, error = error } = line);
      if (line.passes) say(`pass ${line.passes} …`);
      if (line.waiting) say("Another page has its turn: this answer waits.");
    }
  } catch (broken) { console.error(broken); }
  busy(null);
  say(answer ? "" : error.replace(/^--/, ""), !answer && error !== "Cancelled.");
  if (answer) add(answer, sent.prompt);
  return Boolean(answer);
}

function busy(id) {
  running = id;
  $("ask").disabled = Boolean(id);
  $("under").disabled = Boolean(id) || !plan.length;
  $("cancel").disabled = !id;
}

function add(answer, prompt) {
  if (race.asked !== prompt) {
    race = { asked: prompt, prompt: answer.prompt, answers: [] };
    plan = [];
  }
  race.answers = [...race.answers, answer].slice(-3);
  answer.tokens = new Map(answer.rounds.flatMap(({ text, topics, spans }) =>
    [text, ...topics.map(({ name, length }) => [...name, length]), ...spans.map(({ slots }) => slots)].flat())
    .map((token) => [token.part, token]));
  $("lesson").hidden = $("lesson").dataset.prompt !== prompt;
  show(answer.rounds[0]?.topics);
  if ($("lesson").hidden) $("player").scrollIntoView({ block: "nearest" }); else $("lesson").scrollIntoView();
}

function clear() {
  race = { prompt: "", answers: [] };
  plan = [];
  $("lesson").hidden = true;
  show();
}

function show(topics = []) {
  looked = null; // before the player shows a pass: its tokens are those of other answers
  player().load([race]);
  look(-1);
  const text = (tokens) => tokens.map(({ text }) => text).join("").trim();
  if (topics.length) plan = topics.map(({ name, length }) => ({ name: text(name), length: +length.text }));
  showPlan();
  const changed = differing(...race.answers.slice(-2)), lane = [...lanes()].at(-1);
  for (const part of changed) lane.querySelector(`[data-part="${part}"]`).classList.add("changed");
  player().document.getElementById("changed").hidden = !changed.length;
}

// ---------------------------------------------------------------- what differs from the answer before

// Names of the tokens whose words were not there before: in the span of the same topic, or of one that is no more in the
// same place.
function differing(before, now) {
  if (!now) return [];
  const old = pieces(before), fresh = pieces(now), known = new Map(old), kept = new Map(fresh);
  return fresh.flatMap(([key, tokens], i) => {
    const other = old[i] && !kept.has(old[i][0]) ? old[i][1] : [], same = known.get(key) ?? other;
    const comparable = same.length || (key.startsWith("span") && before.rounds[0]?.topics.length);
    return comparable ? added(words(same), words(tokens)).flatMap(({ parts }) => parts) : [];
  });
}

const pieces = ({ rounds }) => rounds.flatMap(({ text, spans }, r) => [[`text ${r}`, text],
  ...spans.map(({ topic, slots }) => [`span ${topic || r}`, slots])]);

function words(tokens) {
  const found = [];
  for (const { text, part } of tokens.filter(({ text }) => text)) {
    if (!found.length || /^\s/.test(text)) found.push({ word: "", parts: [] });
    found.at(-1).word += text;
    found.at(-1).parts.push(part);
  }
  return found;
}

// The words of b that are not in a longest common subsequence with a.
function added(a, b) {
  const same = (i, j) => a[i].word.trim() === b[j].word.trim();
  const longest = Array.from({ length: a.length + 1 }, () => Array(b.length + 1).fill(0)); // of a[i:] and b[j:]
  for (let i = a.length - 1; i >= 0; i--)
    for (let j = b.length - 1; j >= 0; j--)
      longest[i][j] = same(i, j) ? longest[i + 1][j + 1] + 1 : Math.max(longest[i + 1][j], longest[i][j + 1]);
  const found = [];
  for (let i = 0, j = 0; j < b.length;) {
    if (i < a.length && same(i, j)) { i++; j++; }
    else if (i < a.length && longest[i + 1][j] >= longest[i][j + 1]) i++;
    else found.push(b[j++]);
  }
  return found;
}

// ---------------------------------------------------------------- the plan of the next answer

function showPlan() {
  $("plan").hidden = !knobs().some(({ name }) => name === "plan");
  $("chips").replaceChildren(...plan.map(chip));
  $("under").disabled = !plan.length || Boolean(running);
}

function chip(topic, k) {
  const button = (textContent, ariaLabel, onclick) =>
    element("button", { type: "button", textContent, ariaLabel, title: ariaLabel, onclick });
  const handle = button("⠿", "Move: drag, or ← and →"), length = element("output", { textContent: topic.length });
  const input = element("input", { value: topic.name, ariaLabel: "Topic", size: Math.max(5, topic.name.length) });
  const longer = (n) => () => { length.textContent = topic.length = Math.max(1, topic.length + n); };
  const remove = () => { plan.splice(k, 1); showPlan(); $("add").focus(); };
  const node = element("li", { className: "chip", topic }, handle, input, button("−", "Shorter", longer(-1)), length,
    button("+", "Longer", longer(1)), button("✕", "Remove", remove));
  handle.className = "handle";
  handle.onkeydown = ({ key }) => {
    const to = k + ({ ArrowLeft: -1, ArrowRight: 1 }[key] ?? 0);
    if (to === k || !plan[to]) return;
    plan.splice(to, 0, ...plan.splice(k, 1));
    showPlan();
    $("chips").children[to].firstChild.focus();
  };
  handle.onpointerdown = ({ pointerId }) => { handle.setPointerCapture(pointerId); node.classList.add("dragged"); };
  handle.onpointermove = (event) => node.classList.contains("dragged") && drag(node, event);
  handle.onlostpointercapture = () => {
    plan = [...$("chips").children].map(({ topic }) => topic);
    showPlan();
  };
  input.oninput = () => { topic.name = input.value; };
  return node;
}

// The dragged chip stays in the document, or it would lose the pointer: those that it passes go to its other side.
function drag(node, { clientX, clientY }) {
  const other = document.elementFromPoint(clientX, clientY)?.closest(".chip");
  if (!other || other === node) return;
  const on = node.compareDocumentPosition(other) === Node.DOCUMENT_POSITION_FOLLOWING;
  for (let next; next !== other;) {
    next = on ? node.nextSibling : node.previousSibling;
    if (on) node.before(next); else node.after(next);
  }
}

// ---------------------------------------------------------------- a look inside

const lanes = () => player().document.querySelectorAll(".answer");

// At a token of an answer: what it sees and, at the pass that the player shows, what was likely.
function look(lane, part) {
  const page = player().document, node = lanes()[lane], answer = race.answers[lane];
  for (const marked of page.querySelectorAll(".seen, .looked, .looking")) marked.classList.remove("seen", "looked", "looking");
  looked = node ? { lane, part } : null;
  $("hint").hidden = Boolean(node);
  $("looked").replaceChildren();
  if (!node) return;
  const [, prefix, begin, end] = answer.rows.find(([name]) => name === part);
  const seen = answer.rows.map(([name], entry) => [name, entry < prefix || (entry >= begin && entry < end)]);
  const names = new Set(seen.filter(([, sees]) => sees).map(([name]) => name));
  node.classList.add("looking");
  for (const token of node.querySelectorAll("[data-part], [data-head]"))
    token.classList.toggle("seen", names.has(token.dataset.part ?? token.dataset.head));
  page.getElementById("prompt").classList.toggle("seen", names.has("prompt"));
  node.querySelector(`[data-part="${part}"]`).classList.add("looked");
  tell(answer, answer.tokens.get(part), +node.dataset.pass, seen);
}

function tell(answer, { part, text, since, looks = [] }, pass, seen) {
  const [kind, r, k, n] = part.split("-"), drawn = looks.filter(([n]) => n <= pass).at(-1);
  const place = { slot: () => `slot ${+n + 1} of ${spanName(answer, r, k)}`, text: () => "text" }[kind]?.() ?? "the plan";
  const state = pass < since ? `masked after pass ${pass}` : `${text ? `“${text.trim()}”` : "[PAD]"}, from pass ${since}`;
  let chance = pass < since ? "No pass has predicted it yet." : "No pass drew it: it was given, or nothing else was possible here.";
  if (drawn) chance = `Likeliest in pass ${drawn[0]}${drawn[0] < since ? `, where ${WHY[drawn[1]]}` : ""}:`;
  const bars = (drawn?.[2] ?? []).map(([text, p]) => {
    const bar = element("i");
    bar.style.setProperty("--p", p);
    return element("div", { className: "likely" }, text.trim() || (text ? "␣" : "[PAD]"), bar, p.toFixed(3));
  });
  $("looked").replaceChildren(element("div", {}, element("p", {}, `${place}: ${state}.`), ...sight(answer, part, seen)),
    element("div", {}, element("p", {}, chance), ...bars));
}

const WHY = { "": "other slots were filled first", neighbour: "it waited: a neighbour that would get the same token was surer",
  text: "it waited: [PAD] comes only after the text before it" };
const spanName = (answer, r, k) => `“${answer.rounds[r].spans[k].topic || `span ${+k + 1}`}”`;

// What of the answer a token sees, all or as far as itself, and what not.
function sight(answer, part, seen) {
  const [kind, r, k] = part.split("-"), groups = new Map();
  for (const [name, sees] of seen.filter(([name]) => name)) {
    const [what, round, span] = name.split("-"), spans = what === "slot" || what === "span";
    const group = what === "prompt" ? "the prompt" : +round < +r ? "earlier rounds" : +round > +r ? "later rounds"
      : !spans ? (what === "text" ? "the text" : "the plan")
      : kind === "slot" && span === k ? "its own span" : `the span ${spanName(answer, round, span)}`;
    groups.set(group, [...(groups.get(group) ?? []), sees]);
  }
  const lit = [...groups].filter(([, all]) => all.some(Boolean)), dark = [...groups].filter(([, all]) => !all.some(Boolean));
  const far = ([group, all]) => all.every(Boolean) ? group : `${group} up to itself`;
  return [element("p", {}, `It sees ${lit.map(far).join(", ")}.`),
    ...(dark.length ? [element("p", {}, `It does not see ${dark.map(([group]) => group).join(", ")}.`)] : [])];
}

function step(n) {
  const lane = looked?.lane ?? race.answers.length - 1;
  const shown = [...(lanes()[lane]?.querySelectorAll('[data-part]:not([data-state="hidden"])') ?? [])];
  const at = shown.findIndex(({ dataset }) => dataset.part === looked?.part), next = shown[Math.max(0, at + n)];
  if (!next) return;
  look(lane, next.dataset.part);
  next.scrollIntoView({ block: "nearest" });
}

// ---------------------------------------------------------------- lessons

async function lesson() {
  const { say: text, prompt, runs } = options.lessons[location.hash.slice(1)] ?? {};
  if (!runs || running) return;
  clear();
  $("lesson").textContent = text;
  $("lesson").dataset.prompt = prompt;
  for (const [model, way, { plan = "", ...chosen }] of runs) {
    $("model").value = model;
    chooseModel();
    $("prompt").value = $("prompts").value = prompt;
    $("way").value = way;
    chooseWay(chosen);
    if (!await ask(plan ? { plan } : {})) return;
  }
}

// ---------------------------------------------------------------- begin

async function begin() {
  options = await (await fetch("/options")).json();
  $("model").replaceChildren(...Object.keys(options.models).map((name) => new Option(name)));
  chooseModel();
  for (const [key, { title }] of Object.entries(options.lessons)) {
    const again = () => { if (location.hash === `#${key}`) lesson(); };
    $("lessons").append(element("a", { href: `#${key}`, onclick: again }, title));
  }
  $("more").open = !matchMedia("(max-width: 56rem)").matches;
  player().document.documentElement.classList.add("framed");
  const answers = player().document.getElementById("answers");
  answers.addEventListener("click", ({ target }) => {
    const token = target.closest(".token");
    look(token ? [...lanes()].indexOf(target.closest(".answer")) : -1, token?.dataset.part);
  });
  answers.addEventListener("pass", () => looked && look(looked.lane, looked.part));
  clear();
  lesson();
}

addEventListener("hashchange", lesson);
$("form").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
$("model").addEventListener("change", chooseModel);
$("way").addEventListener("change", () => chooseWay());
$("prompts").addEventListener("change", () => {
  $("prompt").value = $("prompts").value;
  plan = [];
  showPlan();
});
$("cancel").addEventListener("click", () => running && post("/cancel", { id: running }));
$("clear").addEventListener("click", clear);
$("add").addEventListener("click", () => {
  plan.push({ name: "", length: 2 });
  showPlan();
  $("chips").lastChild.querySelector("input").focus();
});
$("under").addEventListener("click", () => {
  const blank = plan.findIndex(({ name }) => !name.trim());
  if (blank < 0) ask({ plan: plan.map(({ name, length }) => `${name} ${length}`).join("; ") });
  else say(`Topic ${blank + 1} of the plan has no name.`, true);
});
$("before").addEventListener("click", () => step(-1));
$("after").addEventListener("click", () => step(1));
addEventListener("load", begin); // the player is there
