// The server's API: models, and one streamed chat. Knows nothing of the page.

const KEY = "gnomon.key";
let askForKey = async () => "";

export function onKeyNeeded(ask) {
  askForKey = ask;
}

async function call(path, options = {}, retried = false) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...(options.body ? { "Content-Type": "application/json" } : {}), ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  const reply = await fetch(path, { ...options, headers });
  if (reply.status === 401 && !retried) {
    sessionStorage.setItem(KEY, await askForKey());
    return call(path, options, true);
  }
  if (!reply.ok) {
    const body = await reply.json().catch(() => null);
    throw new Error(body?.error?.message ?? `HTTP ${reply.status}`);
  }
  return reply;
}

export async function models() {
  return (await (await call("/v1/models")).json()).data;
}

// What becomes of each keyword of a grammar; throws with the server's words when it is wrong.
export async function checkGrammar(grammar, signal) {
  return (await call("/v1/grammar/check", { method: "POST", body: JSON.stringify(grammar), signal })).json();
}

// Yields parsed chat.completion.chunk objects. An AbortSignal ends it, which ends the decoding too.
export async function* chat(body, signal) {
  const reply = await call("/v1/chat/completions", { method: "POST", body: JSON.stringify(body), signal });
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    buffer += value;
    const lines = buffer.split("\n");
    buffer = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}
