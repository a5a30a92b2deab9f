// The grammar panel: what the answer must be, checked by the server while it is typed. Knows nothing of the conversation.

import { checkGrammar } from "./api.js";

const SAVED = "gnomon.grammar";
const PAUSE = 250; // milliseconds without a key before the server is asked
const $ = (id) => document.getElementById(id);
const EXAMPLES = {
  schema: JSON.stringify({
    type: "object",
    properties: {
      city: { type: "string", maxLength: 30 },
      country: { type: "string", maxLength: 30 },
      population: { type: "integer", minimum: 0 },
      tags: { type: "array", items: { enum: ["capital", "coastal", "old"] }, uniqueItems: true },
    },
    required: ["city", "country"],
    additionalProperties: false,
  }, null, 2),
  choices: "yes\nno\nit depends",
  regex: "20[0-9]{2}-(0[1-9]|1[0-2])",
  lark: 'start: NAME " is " WORD "."\nNAME: /[A-Z][a-z]+/\nWORD: /[a-z ]{3,30}/',
  gbnf: 'root ::= "- " item "\\n- " item\nitem ::= [a-z ]{3,40}',
};
let texts = { ...EXAMPLES };
let usable = false;
let waiting = 0;
let asking = null; // AbortController of the check under way

// The `grammar` field of a request, or null when none is to be used. Throws when what was typed cannot be used.
export async function grammar() {
  if (!$("grammar-on").checked) return null;
  clearTimeout(waiting);
  await check();
  if (!usable) throw new Error(`The grammar cannot be used. ${$("grammar-status").textContent}`);
  return read();
}

// What was typed as the option's value. Throws where the text is no JSON.
function read() {
  const kind = $("grammar-kind").value;
  const text = $("grammar-source").value;
  if (kind === "schema") return { schema: JSON.parse(text) };
  if (kind === "choices") return { choices: text.split("\n").map((line) => line.trim()).filter(Boolean) };
  return { [kind]: text };
}

function status(text, kind = "") {
  $("grammar-status").textContent = text;
  $("grammar-status").className = kind;
  $("grammar-source").classList.toggle("wrong", kind === "wrong");
  usable = kind === "right";
}

function report(found) {
  const rows = found ? found.entries.filter((entry) => entry.status !== "enforced") : [];
  const table = document.createElement("table");
  for (const entry of rows) {
    const line = table.insertRow();
    line.title = entry.note;
    line.insertCell().textContent = `${entry.path.slice(1)}/${entry.keyword}`;
    line.insertCell().textContent = entry.status === "post-validated" ? "checked when its value closes" : entry.status;
  }
  $("grammar-report").replaceChildren(...(rows.length ? [table] : []));
}

async function check() {
  asking?.abort();
  asking = new AbortController();
  let wanted;
  try {
    wanted = read();
  } catch (error) {
    report(null);
    status(`Not JSON yet: ${error.message}`, "wrong");
    return;
  }
  try {
    const found = await checkGrammar(wanted, asking.signal);
    report(found);
    if (found.unsatisfiable) return status("No text satisfies this: its constraints contradict each other.", "wrong");
    const shortest = found.shortest === null ? "no shortest text was found" : `shortest: ${found.shortest}`;
    const counts = found.counts.enforced ? `${found.counts.enforced} keywords enforced; ` : "";
    status(counts + shortest, "right");
  } catch (error) {
    if (error.name === "AbortError") return;
    report(null);
    status(error.message, "wrong");
  }
}

function changed() {
  status("checking");
  texts[$("grammar-kind").value] = $("grammar-source").value;
  localStorage.setItem(SAVED, JSON.stringify({ kind: $("grammar-kind").value, on: $("grammar-on").checked, texts }));
  clearTimeout(waiting);
  waiting = setTimeout(check, PAUSE);
}

// switched: told whether a grammar is in use.
export function startGrammar(switched) {
  const saved = JSON.parse(localStorage.getItem(SAVED) ?? "{}");
  texts = { ...EXAMPLES, ...saved.texts };
  $("grammar-kind").value = saved.kind ?? "schema";
  $("grammar-on").checked = saved.on ?? false;
  $("grammar-source").value = texts[$("grammar-kind").value];
  switched($("grammar-on").checked);
  $("grammar-kind").addEventListener("change", () => {
    $("grammar-source").value = texts[$("grammar-kind").value];
    changed();
  });
  $("grammar-source").addEventListener("input", changed);
  $("grammar-on").addEventListener("change", () => {
    switched($("grammar-on").checked);
    const now = JSON.parse(localStorage.getItem(SAVED) ?? "{}");
    localStorage.setItem(SAVED, JSON.stringify({ ...now, on: $("grammar-on").checked }));
  });
  check();
}
