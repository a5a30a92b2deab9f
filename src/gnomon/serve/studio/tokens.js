// The token view: each token of an answer with its probability and the best alternatives, on hover or focus.

const tip = document.getElementById("tip");
const percent = (logprob) => `${(100 * Math.exp(logprob)).toFixed(logprob > -4.6 ? 1 : 3)} %`;
const visible = (text) => text.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥") || "∅";

// entry: one element of OpenAI's logprobs.content.
export function tokenSpan(text, entry) {
  const span = document.createElement("span");
  span.className = "token";
  span.textContent = text;
  span.style.setProperty("--p", Math.exp(entry.logprob).toFixed(4));
  if (entry.grammar) span.classList.add(entry.grammar.kind);
  span.entry = entry;
  return span;
}

// A piece of text may hold several tokens, and a token only part of a character: pair them up by bytes.
export function tokenSpans(text, entries) {
  if (entries.length === 1) return [tokenSpan(text, entries[0])];
  const encoder = new TextEncoder();
  const characters = [...text];
  const spans = [];
  let used = 0;
  let bytes = 0;
  let end = 0;
  entries.forEach((entry, index) => {
    end += entry.bytes?.length ?? encoder.encode(entry.token).length;
    let piece = "";
    while (used < characters.length && (bytes < end || index === entries.length - 1)) {
      const size = encoder.encode(characters[used]).length;
      if (bytes + size > end && index < entries.length - 1) break;
      piece += characters[used++];
      bytes += size;
    }
    spans.push(tokenSpan(piece, entry));
  });
  return spans;
}

function show(span) {
  const { entry } = span;
  const rows = [...entry.top_logprobs];
  if (!rows.some((row) => row.token_id === entry.token_id)) rows.push(entry);
  const table = document.createElement("table");
  for (const row of rows) {
    const line = table.insertRow();
    line.insertCell().textContent = visible(row.token);
    line.insertCell().textContent = percent(row.logprob);
    if (row.token_id === entry.token_id) line.className = "chosen";
  }
  for (const [name, vote] of Object.entries(entry.ensemble?.votes ?? {})) {
    const line = table.insertRow();
    line.className = "vote";
    line.insertCell().textContent = name;
    line.insertCell().textContent = vote === null ? "not asked" : percent(vote);
  }
  if (entry.grammar) {
    const line = table.insertRow();
    line.className = "vote";
    line.insertCell().textContent = `${entry.grammar.kind}, kept by the grammar`;
    line.insertCell().textContent = percent(Math.log(entry.grammar.kept_mass));
  }
  tip.replaceChildren(table);
  tip.hidden = false;
  const box = span.getBoundingClientRect();
  const left = Math.min(box.left, innerWidth - tip.offsetWidth - 8);
  const below = box.bottom + tip.offsetHeight + 8 < innerHeight;
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${below ? box.bottom + 6 : box.top - tip.offsetHeight - 6}px`;
}

export function watchTokens(container, active) {
  const on = (event) => {
    const span = event.target.closest?.(".token");
    if (span && active()) show(span);
    else tip.hidden = true;
  };
  for (const kind of ["pointerover", "pointerdown", "focusin"]) container.addEventListener(kind, on);
  container.addEventListener("pointerleave", () => { tip.hidden = true; });
  container.addEventListener("scroll", () => { tip.hidden = true; });
}
