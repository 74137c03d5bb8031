// A question and its answer on the page.

import { $, button, node, plural, show } from "./text.js";

/** An empty answer under its question. */
export function begin(question) {
  const turn = { question, text: "", thought: "", pieces: 0, start: performance.now(), live: true };
  turn.abort = new AbortController();
  turn.asked = node("div", "mine", question);
  turn.asked.prepend(node("span", "unseen", "You: "));
  turn.answer = node("article", "answer");
  turn.answer.setAttribute("aria-label", "Answer");
  turn.answer.setAttribute("aria-busy", "true"); // read aloud once it is whole
  turn.body = node("div", "text");
  turn.figures = node("div", "figures");
  turn.figures.setAttribute("aria-live", "off");
  turn.answer.append(turn.body, turn.figures);
  $("log").append(turn.asked, turn.answer);
  return turn;
}

/** Add a chunk of the answer. */
export function take(turn, chunk) {
  if (chunk.usage) turn.usage = chunk.usage;
  const choice = chunk.choices?.[0];
  const { content, reasoning_content: thought } = choice?.delta ?? {};
  if (content || thought) {
    turn.last = performance.now();
    turn.first ??= turn.last;
    turn.pieces += 1;
  }
  if (thought) turn.thought += thought;
  if (content) {
    turn.told ??= performance.now();
    turn.text += content;
  }
  if (choice?.finish_reason) turn.reason = choice.finish_reason;
}

/** Show the turn as it stands, and follow its end if one was there already. */
export function draw(turn) {
  const log = $("log");
  const following = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
  if (turn.thought) drawThought(turn);
  show(turn.body, turn.text);
  turn.figures.replaceChildren(...figures(turn).map(([text, title]) => Object.assign(node("span", "", text), { title })));
  if (following) log.scrollTop = log.scrollHeight;
}

function drawThought(turn) {
  if (!turn.details) {
    turn.details = node("details", "thought");
    turn.details.append(node("summary"), node("div", "text"));
    turn.answer.prepend(turn.details);
  }
  const [summary, text] = turn.details.children;
  const end = turn.told ?? (turn.live ? undefined : turn.last);
  const title = end ? `Thought for ${Math.max(1, Math.round((end - turn.first) / 1000))} s` : "Thinking…";
  if (summary.textContent !== title) summary.textContent = title;
  show(text, turn.thought);
}

const SETTLED = 500; // ms of answer after which a rate means something
const rate = (n) => `${n.toFixed(n < 10 ? 2 : n < 100 ? 1 : 0)} tokens/s`;

/** [text, explanation] of each figure under an answer: the server's own once it has sent them, before that what shows here. */
function figures(turn) {
  const { usage, first, last, pieces } = turn;
  const exact = usage?.dsv3;
  if (turn.live && first === undefined) return [[waiting(turn), ""]];
  const found = [...ending(turn)];
  if (usage) found.push([plural(usage.completion_tokens, "token"), `After ${plural(usage.prompt_tokens, "token")} of prompt`]);
  if (exact?.decode_tok_s) {
    found.push([rate(exact.decode_tok_s), "Of decoding, measured by the server"]);
  } else if (last - first > SETTLED) {
    const least = rate((1000 * (pieces - 1)) / (last - first));
    found.push([`≥ ${least}`, "Pieces of text that arrived; a piece is one token or more"]);
  }
  const begun = exact?.ttft_s ?? (first - turn.start) / 1000;
  const by = exact ? "Measured by the server" : "Measured here";
  if (Number.isFinite(begun)) found.push([`first token ${begun.toFixed(2)} s`, by]);
  if (exact?.drafted) {
    const share = `drafts ${Math.round((100 * exact.accepted) / exact.drafted)} % accepted`;
    const steps = exact.steps ? `, in ${plural(exact.steps, "step")}` : "";
    found.push([share, `${exact.accepted} of ${exact.drafted} tokens that MTP guessed${steps}`]);
  }
  if (exact?.cached_tokens) {
    found.push([`${plural(exact.cached_tokens, "prompt token")} cached`, "Known from before, not computed again"]);
  }
  return found;
}

function waiting(turn) {
  const seconds = Math.floor((performance.now() - turn.start) / 1000);
  return `Waiting for the first token${seconds ? `, ${seconds} s` : ""}`;
}

function ending(turn) {
  if (turn.stopped && !turn.text) return [["Stopped before an answer", "Left out of the conversation"]];
  if (turn.stopped) return [["Stopped", "The conversation goes on from what is here"]];
  if (turn.reason === "length") return [["Cut short", "The most tokens, or the model's room, were reached"]];
  return turn.live || turn.failed || turn.text ? [] : [["The answer is empty", "Left out of the conversation"]];
}

/** Say under the answer what failed. actions: {again, edit, key}, of which those are offered that may help. */
export function drawProblem(turn, problem, actions) {
  const box = node("div", "problem");
  box.setAttribute("role", "alert");
  const message = problem.message.replace(/[^.!?…]$/, "$&.");
  box.append(node("strong", "", message), problem.advice ? ` ${problem.advice}` : "", node("br"));
  if (problem.kind === "key") box.append(button("Enter the key", actions.key));
  if (problem.kind !== "change") box.append(button("Ask again", actions.again));
  box.append(button("Edit the message", actions.edit));
  turn.answer.append(box);
}
