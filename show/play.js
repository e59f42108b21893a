"use strict";
// The page to play with: asks the server (demo/play.py) for answers and shows them in the player, which is a frame of its
// own. What the sampler does is computed there; here is only what is asked and what is shown.

const $ = (id) => document.getElementById(id);
const player = () => $("player").contentWindow;
let options, race = { prompt: null, answers: [] }, plan = [], looked = null, running = null;

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
  const { prompts, ways } = options.models[$("model").value], kept = prompts.includes($("prompt").value);
  $("prompts").replaceChildren(...prompts.map((prompt) => new Option(prompt)));
  if (kept) $("prompts").value = $("prompt").value;
  else $("prompt").value = prompts[0] ?? "";
  $("way").replaceChildren(...Object.keys(ways).map((way) => new Option(way)));
  chooseWay();
}

function chooseWay(chosen = settings()) {
  $("knobs").replaceChildren(...turned().map((knob) => turnable(knob, chosen[knob.name] ?? knob.default)));
  showPlan();
}

function turnable({ name, kind, default: usual, help, among, limits }, value) {
  const id = `knob-${name}`, bounds = Object.entries(limits).filter(([, limit]) => limit < 2 ** 31);
  const input = among.length ? element("select", {}, ...among.map((word) => new Option(word)))
    : element("input", kind === "bool" ? { type: "checkbox", checked: value } : { type: "number", inputMode: "decimal" });
  if (kind !== "bool") input.value = value;
  if (input.type === "number") Object.assign(input, { step: kind === "int" ? 1 : 0.05, min: limits["at least"] ?? "", max: limits["at most"] ?? "" });
  const text = `${help}${bounds.length ? `; ${bounds.map(([word, limit]) => `${word} ${limit}`).join(", ")}` : ""}`;
  Object.assign(input, { id, ariaDescription: text });
  const row = element("div", { className: "knob" }, element("label", { htmlFor: id }, name), input, element("p", {}, text));
  const mark = () => row.classList.toggle("set", read(input) !== usual);
  input.addEventListener("input", mark);
  mark();
  return row;
}

const read = ({ type, checked, value }) => type === "checkbox" ? checked : type !== "number" ? value
  : value === "" ? null : Number(value);

function settings() { // those that are not as usual
  const all = [...$("knobs").querySelectorAll("input, select")].map((input) => [input.id.slice(5), read(input)]);
  const usual = Object.fromEntries(Object.values(options.models).flatMap(({ ways }) => Object.values(ways).flat())
    .map((knob) => [knob.name, knob.default]));
  return Object.fromEntries(all.filter(([name, value]) => value !== usual[name]));
}

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
  say(answer ? "" : error, !answer && error !== "Cancelled.");
  if (answer) add(answer, sent.prompt);
  return Boolean(answer);
}

function busy(id) {
  running = id;
  for (const name of ["ask", "under"]) $(name).disabled = Boolean(id);
  $("cancel").disabled = !id;
}

function add(answer, prompt) {
  if (race.asked !== prompt) race = { asked: prompt, prompt: answer.prompt, answers: [] };
  race.answers = [...race.answers, answer].slice(-3);
  player().load([race]);
  showPlan(race.answers.at(-1).rounds[0]?.topics);
}

function clear() {
  race = { asked: null, answers: [] };
  player().load([{ prompt: "", answers: [] }]);
  showPlan();
}

function showPlan() { $("plan").hidden = true; }

// ---------------------------------------------------------------- begin

async function begin() {
  options = await (await fetch("/options")).json();
  $("model").replaceChildren(...Object.keys(options.models).map((name) => new Option(name)));
  chooseModel();
}

$("form").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
$("model").addEventListener("change", chooseModel);
$("way").addEventListener("change", () => chooseWay());
$("prompts").addEventListener("change", () => { $("prompt").value = $("prompts").value; });
$("cancel").addEventListener("click", () => running && post("/cancel", { id: running }));
$("clear").addEventListener("click", clear);
addEventListener("load", begin); // the player is there
