// What a person sets. An empty setting is left to the server and not sent.

import { key, setKey } from "./api.js";
import { $ } from "./text.js";

const KEPT = "dsv3.settings"; // in localStorage
const NUMBERS = ["temperature", "top_p", "max_tokens", "seed", "draft_tokens"]; // named as the API names them
const ALL = [...NUMBERS, "thinking"];

function kept() {
  try {
    return JSON.parse(localStorage.getItem(KEPT)) ?? {};
  } catch {
    return {};
  }
}

/** The fields of a request that are set. */
export function chosen(model) {
  const now = kept();
  const numbers = NUMBERS.filter((name) => now[name] !== undefined).map((name) => [name, Number(now[name])]);
  const thinking = now.thinking !== undefined && model.thinking === true;
  return {
    ...Object.fromEntries(numbers),
    ...(thinking ? { thinking: now.thinking === "true" } : {}),
  };
}

export function openSettings(focused = "temperature") {
  const now = kept();
  for (const name of ALL) $(name).value = now[name] ?? "";
  $("key").value = key();
  if (!$("settings").open) $("settings").showModal();
  $(focused).focus();
}

/** What the model says of itself, in the settings' words. */
export function describe(model) {
  const room = model.max_model_len;
  $("max_tokens-help").textContent = room ? `In tokens; with the conversation at most ${room.toLocaleString("en")}.` : "In tokens.";
  $("thinking-row").hidden = model.thinking !== true;
}

/** Wire the dialog. rekeyed: called when the key has changed. */
export function settingsDialog(rekeyed) {
  $("settings-button").addEventListener("click", () => openSettings());
  $("defaults").addEventListener("click", () => {
    for (const name of [...ALL, "key"]) $(name).value = "";
  });
  $("settings-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const given = ALL.map((name) => [name, $(name).value]).filter(([, value]) => value !== "");
    localStorage.setItem(KEPT, JSON.stringify(Object.fromEntries(given)));
    const before = key();
    setKey($("key").value.trim());
    $("settings").close();
    if (key() !== before) rekeyed();
  });
}
