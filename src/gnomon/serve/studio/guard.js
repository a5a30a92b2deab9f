// What the guard did: marks for redacted parts, a list of findings. Held text is never sent, so there is nothing to show of it.

const REDACTED = /(\[REDACTED:[\w-]+\])/;

// A piece of text as nodes, placeholders marked.
export function marked(piece) {
  return piece.split(REDACTED).filter(Boolean).map((part) => {
    if (!REDACTED.test(part)) return document.createTextNode(part);
    const mark = document.createElement("mark");
    mark.className = "redacted";
    mark.textContent = part.slice(10, -1);
    mark.title = `redacted by the rule ${mark.textContent}`;
    return mark;
  });
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
