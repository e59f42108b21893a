"use strict";
// Plays recordings, those of the page or others: load(races). Each answer is built once, as it is at its end: a pass only
// changes which tokens are hidden, masked, new or known. #frame=12 in the address opens it after pass 12, standing still.

const $ = (id) => document.getElementById(id);
let races = [], lanes = [], pass = 0, last = 0, timer = 0;

function element(tag, kind, ...children) {
  const node = document.createElement(tag);
  if (kind) node.className = kind;
  node.append(...children);
  return node;
}

const counted = (n, one, many) => `${n} ${n === 1 ? one : many}`;

// ---------------------------------------------------------------- one answer

class Lane {
  constructor(answer, longest) {
    Object.assign(this, answer);
    this.tokens = [];
    this.later = []; // [node, the pass after which it is seen]
    this.at = new Map(); // name of a part -> its token
    this.count = element("b");
    this.doing = element("span");
    this.costs = element("span", "costs");
    this.bar = element("div", "bar", ...this.passes.map(({ denoises }) => element("i", denoises ? "denoise" : "")));
    this.bar.style.setProperty("--longest", longest);
    this.bar.setAttribute("aria-hidden", true);
    this.words = element("div", "words", ...this.rounds.flatMap((round) => [...this.round(round)]));
    Object.assign(this.words, { tabIndex: 0, role: "group", ariaLabel: "Answer" }); // the keyboard scrolls it
    this.node = element("section", "answer", this.bar, element("div", "head", element("h2", "", this.title), this.count),
      element("p", "doing", this.doing, this.costs), this.words);
    this.node.setAttribute("aria-label", this.title);
  }

  *round({ text, topics, spans }) {
    if (text.length) yield element("p", "text", ...text.flatMap((token) => this.token(token)));
    if (topics.length) {
      yield element("ul", "plan", ...topics.map(({ since, name, length }) =>
        this.from(since, element("li", "topic", ...[...name, length].flatMap((token) => this.token(token))))));
    }
    for (const { since, topic, slots } of spans) {
      const head = topic ? [element("strong", "", `${topic}:`)] : [];
      if (topic) head[0].dataset.head = slots[0].part.replace(/^slot(.*)-\d+$/, "span$1");
      const span = element("p", "", ...head, ...slots.flatMap((token) => this.token(token, since)));
      const final = element("div", "final", span.textContent);
      final.ariaHidden = true;
      yield this.from(since, element("div", "span", span, final));
    }
  }

  from(since, node) {
    this.later.push([node, since]);
    return node;
  }

  // The space before a token, and the token; a slot is masked from the pass `masked` on, until its token is known.
  token(data, masked = Infinity) {
    const [, space, text] = /^(\s*)(.*)$/s.exec(data.text || "·");
    const word = element("span", "word", text || space);
    const node = element("span", data.draft ? "token draft" : "token", word);
    node.dataset.part = data.part;
    const sure = data.probability === undefined ? "the grammar or the end of a span left no choice"
      : `probability ${data.probability}${data.draft ? ", an accepted draft" : ""}`;
    word.title = `${data.text ? `“${data.text.trim()}”` : "[PAD]"}: pass ${data.since}, ${sure}`;
    const gap = new Text(text ? space : "");
    const token = { ...data, node, gap, space: gap.data, masked, since: data.since ?? Infinity };
    this.tokens.push(token);
    this.at.set(data.part, token);
    return [gap, node];
  }

  show(now) {
    const n = Math.min(now, this.passes.length);
    if (n === this.shown) return;
    this.shown = n;
    for (const [node, since] of this.later) node.classList.toggle("future", n < since);
    for (const token of this.tokens) this.update(token, n);
    for (const [part, text, probability] of n ? this.passes[n - 1].rejected : []) {
      const node = this.at.get(part)?.node;
      if (!node) continue;
      node.dataset.rejected = text.trim();
      node.title = `✗ draft “${text.trim()}”: probability ${probability}`;
    }
    [...this.bar.children].forEach((step, i) => step.classList.toggle("done", i < n));
    this.tell(n);
  }

  update({ node, gap, space, since, masked, probability, unsure }, n) {
    const state = n > since ? "known" : n === since ? "new" : n >= masked ? "masked" : "hidden";
    const sure = { known: probability, new: probability, masked: unsure?.at(n - since) }[state] ?? 0;
    node.dataset.state = state;
    gap.data = state === "masked" ? " " : space; // masks do not tell where a word begins
    node.style.setProperty("--p", sure);
    delete node.dataset.rejected;
    node.removeAttribute("title");
  }

  tell(n) {
    const done = this.passes.slice(0, n), { critical_path = 0, positions = 0 } = done.at(-1) ?? {};
    const accepted = done.reduce((sum, step) => sum + step.accepted, 0);
    const rejected = done.reduce((sum, step) => sum + step.rejected.length, 0);
    const over = n === this.passes.length;
    this.node.dataset.pass = n;
    this.node.classList.toggle("over", over);
    this.count.textContent = counted(n, "pass", "passes");
    this.doing.textContent = over ? this.ending : this.passes[n - 1]?.action ?? "nothing yet";
    this.costs.textContent = `critical path ${critical_path} · ${counted(positions, "position", "positions")}`
      + (accepted + rejected ? ` · drafts ${accepted} ✓ ${rejected} ✗` : "");
    this.follow(over);
  }

  // Scrolls to what is new; a finished answer, to its beginning.
  follow(over) {
    const node = this.words.querySelector('[data-state="new"]'), { scrollTop, clientHeight } = this.words;
    const top = node?.offsetTop ?? 0, below = top + (node?.offsetHeight ?? 0) + 4;
    if (over || top < scrollTop || below > scrollTop + clientHeight) this.words.scrollTop = over ? 0 : below - clientHeight;
  }
}

// ---------------------------------------------------------------- the player

function choose(race) {
  last = Math.max(0, ...race.answers.map(({ passes }) => passes.length));
  lanes = race.answers.map((answer) => new Lane(answer, last));
  $("prompt").textContent = race.prompt;
  $("answers").replaceChildren(...lanes.map(({ node }) => node));
  $("drafts").hidden = !race.answers.some(({ passes }) => passes.some((p) => p.accepted + p.rejected.length));
  $("slider").max = last;
  $("speed").value = last > 60 ? 10 : 3;
  start();
}

function show(n) {
  pass = Math.max(0, Math.min(last, n));
  for (const lane of lanes) lane.show(pass);
  $("slider").value = pass;
  $("now").textContent = `pass ${pass} of ${last}`;
  $("slider").setAttribute("aria-valuetext", $("now").textContent);
  $("answers").dispatchEvent(new Event("pass")); // for the page that the player is in
}

function play(on) {
  clearTimeout(timer);
  if (on && pass === last) show(0);
  timer = on ? setTimeout(tick, 1000 / $("speed").value) : 0;
  $("play").textContent = on ? "❚❚" : "▶";
  $("play").setAttribute("aria-label", on ? "Pause" : "Play");
  $("now").setAttribute("aria-live", on ? "off" : "polite"); // a screen reader does not read out every pass
}

function tick() {
  show(pass + 1);
  play(pass < last);
}

function go(n) {
  play(false);
  show(n);
}

const KEYS = {
  " ": () => play(!timer), ArrowLeft: () => go(pass - 1), ArrowRight: () => go(pass + 1),
  Home: () => go(0), End: () => go(last),
};

document.addEventListener("keydown", (event) => {
  const { target, key } = event;
  const own = { SELECT: true, BUTTON: key === " ", SUMMARY: key === " " }[target.tagName]; // keys that it takes itself
  if (!KEYS[key] || own || event.altKey || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  KEYS[key]();
});
$("play").addEventListener("click", () => play(!timer));
$("back").addEventListener("click", () => go(pass - 1));
$("forth").addEventListener("click", () => go(pass + 1));
$("slider").addEventListener("input", () => go(+$("slider").value));
$("speed").addEventListener("change", () => timer && play(true));
$("race").addEventListener("change", () => choose(races[$("race").value]));
$("answers").addEventListener("click", ({ target }) => {
  const node = target.closest(".token");
  if (node && node.dataset.state !== "masked") $("detail").textContent = node.title || node.firstChild.title;
});
addEventListener("hashchange", start);

function start() {
  const frame = /^#frame=(\d+)$/.exec(location.hash);
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  go(frame ? +frame[1] : still ? last : 0);
  if (!frame && !still && last) play(true);
}

function load(recordings) {
  races = recordings;
  $("race").replaceChildren(...races.map(({ prompt }, i) => new Option(prompt, i)));
  $("choice").hidden = races.length === 1;
  $("prompt").hidden = !$("choice").hidden;
  if (races.length) choose(races[0]);
}

load(JSON.parse($("recording").textContent));
