// The chat page: a conversation with the server that the page came from. Nothing is loaded from anywhere else.

import { call, chunks, Problem } from "./api.js";
import { expertPanel, loadExperts } from "./experts.js";
import { chosen, describe, openSettings, settingsDialog } from "./settings.js";
import { $ } from "./text.js";
import { begin, draw, drawProblem, take } from "./turn.js";

let model = {};
let messages = []; // of the conversation, as the API has them
let running = null; // the turn that is being answered

async function loadModel() {
  try {
    model = (await (await call("v1/models")).json()).data?.[0] ?? {};
    const room = model.max_model_len;
    $("model").textContent = [model.id, room && `${room.toLocaleString("en")} tokens`].filter(Boolean).join(" · ");
    describe(model);
    if (!running) $("status").textContent = "";
  } catch (problem) {
    $("model").textContent = problem.message;
    if (problem.kind === "key") openSettings("key");
  }
}

/** Show a question, and its answer as it comes. What fails is no part of the conversation. */
async function ask(question) {
  const turn = (running = begin(question));
  const talk = messages;
  talk.push({ role: "user", content: question });
  $("empty").hidden = true;
  draw(turn);
  $("log").scrollTop = $("log").scrollHeight;
  controls(true, "Answering");
  if (!model.id) await loadModel(); // the server was not there, or wanted a key
  const problem = await stream(turn, {
    model: model.id,
    messages: talk,
    stream: true,
    stream_options: { include_usage: true },
    ...chosen(model),
  });
  if (problem || !turn.text) talk.pop();
  else talk.push({ role: "assistant", content: turn.text });
  if (talk !== messages) return; // a new chat was begun
  running = null;
  if (problem) drawProblem(turn, problem, remedies(turn));
  if (problem) $("log").scrollTop = $("log").scrollHeight;
  controls(false, problem ? "" : turn.stopped ? "Answer stopped" : "Answer complete");
  if (!problem) loadExperts();
}

/** Draw what arrives, at most once a frame. The Problem that ended it, or null. */
async function stream(turn, body) {
  const waiting = setInterval(() => turn.first === undefined && draw(turn), 500);
  let frame = 0;
  let problem = null;
  try {
    for await (const chunk of chunks(body, turn.abort.signal)) {
      take(turn, chunk);
      frame ||= requestAnimationFrame(() => ((frame = 0), draw(turn)));
    }
  } catch (error) {
    turn.stopped = turn.abort.signal.aborted;
    if (!turn.stopped) problem = error instanceof Problem ? error : new Problem(`The page failed: ${error.message}.`);
  }
  clearInterval(waiting);
  cancelAnimationFrame(frame);
  turn.live = false;
  turn.failed = problem !== null;
  draw(turn);
  turn.answer.setAttribute("aria-busy", "false");
  return problem;
}

/** What a person can do about a failed turn. */
function remedies(turn) {
  const withdraw = () => (turn.asked.remove(), turn.answer.remove());
  return {
    key: () => openSettings("key"),
    again: () => running || (withdraw(), ask(turn.question)),
    edit: () => {
      withdraw();
      $("empty").hidden = messages.length > 0 || running !== null;
      $("question").value = [turn.question, $("question").value].filter(Boolean).join("\n");
      fit();
      $("question").focus();
    },
  };
}

function controls(busy, said) {
  $("send").hidden = busy;
  $("stop").hidden = !busy;
  $("status").textContent = said;
  writeOn();
}

/** Back to the text field, unless that brings up a keyboard on the screen or leaves a dialog. */
function writeOn() {
  if (matchMedia("(pointer: fine)").matches && !$("settings").open) $("question").focus();
}

function stop() {
  running?.abort.abort();
}

function newChat() {
  stop();
  running = null;
  messages = [];
  for (const shown of [...$("log").children]) if (shown.id !== "empty") shown.remove();
  $("empty").hidden = false;
  controls(false, "New chat");
}

function submit() {
  const question = $("question").value.trim();
  if (!question || running) return;
  $("question").value = "";
  fit();
  ask(question);
}

/** The text field as high as its text. */
function fit() {
  $("question").style.height = "auto";
  $("question").style.height = `${$("question").scrollHeight}px`;
}

$("composer").addEventListener("submit", (event) => (event.preventDefault(), submit()));
$("stop").addEventListener("click", stop);
$("new").addEventListener("click", newChat);
$("question").addEventListener("input", fit);
$("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !$("settings").open) stop();
});

const start = () => loadModel().then(loadExperts);
settingsDialog(start);
expertPanel();
start();
writeOn();
