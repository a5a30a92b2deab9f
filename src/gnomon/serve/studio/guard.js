// What the guard did: grey blocks for text it holds, marks for redacted parts, text taken back, a list of findings. Held
// text is never sent, only how long it is.

const REDACTED = /(\[REDACTED:[\w-]+\])/;

// A piece of text as nodes, placeholders marked.
export function marked(piece) {
  return piece.split(REDACTED).filter(Boolean).map((part) => {
    if (!REDACTED.test(part)) return document.createTextNode(part);
    const mark = document.createElement("mark");
    mark.className = "redacted";
    mark.textContent = part.slice(10, -1);
    mark.dataset.text = part;
    mark.title = `redacted by the rule ${mark.textContent}`;
    return mark;
  });
}

// As many grey blocks as characters are held, after what was said; they make way for what is cleared.
export function showHeld(element, count) {
  const blocks = element.querySelector(".held") ?? document.createElement("span");
  blocks.className = "held";
  blocks.textContent = "\u2591".repeat(count);
  blocks.title = `${count} characters are held by the guard`;
  blocks.setAttribute("role", "img");
  blocks.setAttribute("aria-label", blocks.title);
  if (count) element.append(blocks);
  else blocks.remove();
}

// The characters [start, end) of what was said vanish from the page; a mark says that something stood there.
export function takeBack(element, [start, end], rule) {
  let place = 0;
  const mark = document.createElement("del");
  mark.className = "retracted";
  mark.textContent = "taken back";
  mark.title = `taken back by the rule ${rule}`;
  let before = null;
  for (const child of [...element.childNodes]) {
    if (child.className === "retracted") continue;
    const characters = [...(child.dataset?.text ?? child.textContent)];
    const low = Math.max(start - place, 0);
    const high = Math.min(end - place, characters.length);
    place += characters.length;
    if (low >= high) {
      if (place > end) break;
      before = child;
      continue;
    }
    const rest = document.createTextNode(characters.slice(high).join(""));
    const kept = document.createTextNode(characters.slice(0, low).join(""));
    child.replaceWith(...(before === mark ? [rest] : [kept, mark, rest]));
    before = mark;
  }
  if (!mark.parentNode && start < end) element.append(mark);
}

// A fold-out list: rule, place, action, score. The text that was found is not in it.
export function findingsPanel(findings) {
  const panel = document.createElement("details");
  panel.className = "findings";
  const title = document.createElement("summary");
  title.textContent = findings.length === 1 ? "1 finding of the guard" : `${findings.length} findings of the guard`;
  const table = document.createElement("table");
  for (const finding of findings) {
    const row = table.insertRow();
    const where = finding.where === "input" ? "prompt" : "answer";
    for (const cell of [finding.rule, finding.action, `${where} ${finding.start}–${finding.end}`, finding.note ?? ""]) {
      row.insertCell().textContent = cell;
    }
  }
  panel.append(title, table);
  return panel;
}
