// The studio page: one conversation, its settings, and the token view.

import { chat, models, onKeyNeeded } from "./api.js";
import { grammar, startGrammar } from "./grammar.js";
import { findingsPanel, marked, showHeld, takeBack } from "./guard.js";
import { tokenSpans, watchTokens } from "./tokens.js";

const $ = (id) => document.getElementById(id);
const conversation = $("conversation");
const message = $("message");
const form = $("settings-form");
const history = []; // {role, content}
let served = [];
let running = null; // AbortController of the answer under way

// -- settings -----------------------------------------------------------------------------------------------------

const SAVED = "gnomon.settings";

function restoreSettings() {
  const saved = JSON.parse(localStorage.getItem(SAVED) ?? "{}");
  for (const [name, value] of Object.entries(saved)) if (form.elements[name]) form.elements[name].value = value;
  showNumbers();
}

function showNumbers() {
  for (const output of form.querySelectorAll("output")) output.value = form.elements[output.htmlFor.value].value;
}

function options() {
  const values = Object.fromEntries(new FormData(form));
  const result = {};
  for (const name of ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed", "repetition_penalty"]) {
    if (values[name] !== "") result[name] = Number(values[name]);
  }
  if (values.stop) result.stop = [values.stop];
  return result;
}

form.addEventListener("input", () => {
  showNumbers();
  localStorage.setItem(SAVED, JSON.stringify(Object.fromEntries(new FormData(form))));
});
form.addEventListener("reset", () => setTimeout(() => { localStorage.removeItem(SAVED); showNumbers(); }));

// -- the page's own switches ----------------------------------------------------------------------------------------

function toggleSettings(open = $("settings").hidden) {
  $("settings").hidden = !open;
  $("settings-toggle").setAttribute("aria-expanded", String(open));
  if (open) toggleGrammar(false);
}

function toggleGrammar(open = $("grammar").hidden) {
  $("grammar").hidden = !open;
  $("grammar-toggle").setAttribute("aria-expanded", String(open));
  if (open) toggleSettings(false);
}

function toggleTokens() {
  const on = conversation.classList.toggle("show-tokens");
  $("tokens").setAttribute("aria-pressed", String(on));
  for (const span of conversation.querySelectorAll(".token")) span.tabIndex = on ? 0 : -1;
}

function toggleTheme() {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  localStorage.setItem("gnomon.theme", root.dataset.theme);
}

$("settings-toggle").addEventListener("click", () => toggleSettings());
$("grammar-toggle").addEventListener("click", () => toggleGrammar());
$("tokens").addEventListener("click", toggleTokens);
$("theme").addEventListener("click", toggleTheme);
watchTokens(conversation, () => conversation.classList.contains("show-tokens"));

// -- the conversation ---------------------------------------------------------------------------------------------

function bubble(role, text = "") {
  $("empty").hidden = true;
  const element = document.createElement("div");
  element.className = `message ${role}`;
  element.textContent = text;
  conversation.append(element);
  element.scrollIntoView({ block: "end" });
  return element;
}

function footnote(element, parts) {
  const line = document.createElement("div");
  line.className = "footnote";
  for (const part of parts) line.append(Object.assign(document.createElement("span"), { textContent: part }));
  element.append(line);
}

function busy(on) {
  $("send").hidden = on;
  $("stop").hidden = !on;
}

async function answer() {
  let wanted;
  try {
    wanted = await grammar();
  } catch (error) {
    history.pop();
    bubble("error", error.message);
    return;
  }
  const element = bubble("assistant");
  const text = document.createElement("span");
  element.append(text);
  text.classList.add("waiting");
  running = new AbortController();
  busy(true);
  const system = form.elements.system.value.trim();
  const body = {
    model: $("model").value,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...history],
    stream: true,
    stream_options: { include_usage: true },
    logprobs: true,
    top_logprobs: 5,
    guard: { show_held: true },
    ...options(),
    ...(wanted ? { grammar: wanted } : {}),
  };
  const started = performance.now();
  let said = "";
  let last = {};
  let reason = "";
  const findings = [];
  let held = 0;
  try {
    for await (const event of chat(body, running.signal)) {
      last = { ...last, ...event };
      const choice = event.choices[0];
      if (!choice) continue;
      reason = choice.finish_reason ?? reason;
      const piece = choice.delta.content ?? "";
      const entries = choice.logprobs?.content ?? [];
      showHeld(text, 0);
      held = choice.guard?.held ?? held;
      for (const { retract, rule } of choice.guard?.findings ?? []) {
        if (!retract) continue;
        takeBack(text, retract, rule);
        said = [...said].filter((_, place) => place < retract[0] || place >= retract[1]).join("");
      }
      said += piece;
      const near = conversation.scrollHeight - conversation.scrollTop - conversation.clientHeight < 80;
      findings.push(...(choice.guard?.findings ?? []));
      const spelt = entries.map((entry) => entry.token).join("") === piece; // not where the guard replaced something
      if (entries.length && (spelt || !piece.includes("[REDACTED:"))) text.append(...tokenSpans(piece, entries));
      else if (piece) text.append(...marked(piece));
      showHeld(text, held);
      if (near) conversation.scrollTop = conversation.scrollHeight;
    }
  } catch (error) {
    if (error.name === "AbortError") reason = "stopped";
    else bubble("error", error.message);
  } finally {
    text.classList.remove("waiting");
    showHeld(text, 0);
    busy(false);
    running = null;
  }
  if (said) history.push({ role: "assistant", content: said });
  else if (!reason) element.remove();
  if (last.usage) {
    const seconds = (performance.now() - started) / 1000;
    const speed = (last.usage.completion_tokens / seconds).toFixed(1);
    footnote(element, [`${last.usage.completion_tokens} tokens`, `${speed}/s`, `seed ${last.seed}`, last.system_fingerprint]);
  }
  const kept = last.usage?.grammar?.kept_mass;
  if (kept) footnote(element, [`the grammar kept ${(100 * kept.mean).toFixed(1)} % of the model's probability`]);
  for (const warning of last.usage?.grammar?.warnings ?? []) footnote(element, [warning]);
  if (findings.length) element.append(findingsPanel(findings));
  if (reason === "content_filter") footnote(element, ["ended by the guard"]);
  if (reason === "length") footnote(element, [last.usage?.grammar?.completed ? "closed at the token limit" : "cut at the token limit"]);
  if (reason === "stopped") footnote(element, ["stopped"]);
  if (conversation.classList.contains("show-tokens")) for (const span of text.querySelectorAll(".token")) span.tabIndex = 0;
}

function send(event) {
  event?.preventDefault();
  const text = message.value.trim();
  if (!text || running) return;
  message.value = "";
  grow();
  history.push({ role: "user", content: text });
  bubble("user", text);
  answer();
}

function clear() {
  running?.abort();
  history.length = 0;
  for (const element of [...conversation.querySelectorAll(".message")]) element.remove();
  $("empty").hidden = false;
  message.focus();
}

function grow() {
  message.style.height = "auto";
  message.style.height = `${message.scrollHeight + 2}px`;
}

$("composer").addEventListener("submit", send);
$("stop").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", clear);
message.addEventListener("input", grow);
message.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running ? running.abort() : (toggleSettings(false), toggleGrammar(false));
  if (event.altKey && event.key.toLowerCase() === "g") toggleGrammar();
  if (event.altKey && event.key.toLowerCase() === "s") toggleSettings();
  if (event.altKey && event.key.toLowerCase() === "t") toggleTokens();
});

// -- beginning ----------------------------------------------------------------------------------------------------

function showModel() {
  const model = served.find((entry) => entry.id === $("model").value);
  $("fingerprint").textContent = model ? [model.profile, model.fingerprint].filter(Boolean).join(" · ") : "";
}

async function begin() {
  const theme = localStorage.getItem("gnomon.theme");
  if (theme) document.documentElement.dataset.theme = theme;
  restoreSettings();
  startGrammar((on) => $("grammar-toggle").setAttribute("aria-pressed", String(on)));
  onKeyNeeded(() => new Promise((resolve) => {
    const dialog = $("key-dialog");
    dialog.addEventListener("close", () => resolve($("key").value), { once: true });
    dialog.showModal();
  }));
  try {
    served = (await models()).filter((entry) => entry.kind !== "embedding");
    for (const entry of served) $("model").append(new Option(entry.id, entry.id));
    showModel();
    if (!served.some((entry) => entry.chat)) bubble("error", "No model here has a chat template: use /v1/completions.");
  } catch (error) {
    bubble("error", error.message);
  }
}

$("model").addEventListener("change", showModel);
begin();
