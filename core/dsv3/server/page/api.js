// The server: its answers, and what is wrong when there is none.

const KEY = "dsv3.key"; // in sessionStorage: gone with the tab
const BARE = "The connection broke off before the answer was complete.";

export const key = () => sessionStorage.getItem(KEY) ?? "";

export function setKey(text) {
  if (text) sessionStorage.setItem(KEY, text);
  else sessionStorage.removeItem(KEY);
}

/** What went wrong, in words for a person. kind: "key": a key would help; "again": asking again may; "change": it will not. */
export class Problem extends Error {
  constructor(message, advice = "", kind = "again") {
    super(message);
    Object.assign(this, { advice, kind });
  }
}

/** The response of a path of this server; a Problem if there is none, or it says no. */
export async function call(path, options = {}) {
  const headers = { ...(key() ? { Authorization: `Bearer ${key()}` } : {}), ...options.headers };
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store", credentials: "omit" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    if (/ISO-8859-1|ByteString/.test(error.message)) {
      throw new Problem("The API key has characters that no key has.", "Enter it anew.", "key");
    }
    throw new Problem("The server cannot be reached.", `Is it still running at ${location.host}?`);
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const body = await response.json().catch(() => null);
  const told = body?.error?.message || `The server answered ${response.status} ${response.statusText}`.trim();
  const wait = Number(response.headers.get("retry-after"));
  switch (response.status) {
    case 400:
      return new Problem(told, "Change the message or the settings, or start a new chat.", "change");
    case 401:
    case 403:
      return new Problem(key() ? "The server does not accept this API key." : "The server asks for an API key.", "", "key");
    case 404:
      return new Problem(told, "Reload the page if the server was started anew with another model.", "change");
    case 413:
      return new Problem(told, "Shorten the message, or start a new chat.", "change");
    case 429:
      return new Problem("The server has as much to do as it takes on.", wait ? `Try again in ${wait} s.` : "Try again soon.");
    case 503:
      return new Problem(told, "It is starting or being stopped; try again once it is ready.");
    default:
      return new Problem(told);
  }
}

/** The data of each server-sent event of a stream of bytes, which may be cut anywhere, also within a character or a line end. */
export async function* events(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let data = [];
  try {
    for (let done = false; !done; ) {
      const read = await reader.read();
      done = read.done;
      rest += done ? decoder.decode() : decoder.decode(read.value, { stream: true });
      const lines = rest.split(done ? /\r\n|\n|\r/ : /\r\n|\n|\r(?!$)/); // a \r at the end may be half of \r\n
      rest = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (data.join("")) yield data.join("\n");
          data = [];
        } else if (line === "data" || line.startsWith("data:")) {
          data.push(line.slice(5).replace(/^ /, ""));
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** The chunks of an answer. A Problem where the stream says so, or ends without [DONE]. */
export async function* chunks(body, signal) {
  const options = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal };
  const response = await call("v1/chat/completions", options);
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      const { error } = chunk;
      if (error) throw new Problem(error.message || "The server gave up on this answer.", "The server's log may say more.");
      yield chunk;
    }
  } catch (error) {
    if (error instanceof Problem || error.name === "AbortError") throw error;
    throw new Problem(error instanceof SyntaxError ? "The server sent something that is no answer." : BARE);
  }
  throw new Problem(BARE);
}
