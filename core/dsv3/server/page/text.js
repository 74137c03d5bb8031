// Text on the page. It only ever becomes text nodes, whatever it says.

export const $ = (id) => document.getElementById(id);

/** An element with a class and a text. */
export function node(tag, style = "", text = "") {
  const made = document.createElement(tag);
  if (style) made.className = style;
  if (text) made.textContent = text;
  return made;
}

/** A button that does something. */
export function button(text, act) {
  const made = node("button", "", text);
  made.type = "button";
  made.addEventListener("click", act);
  return made;
}

/** A number with its noun. */
export const plural = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;

/** Fenced code and paragraphs: [{code, text}]. A fence that is not closed yet is code already. */
export function blocks(text) {
  const found = [];
  let code = false;
  let lines = [];
  const end = (next) => {
    const whole = lines.join("\n");
    if (code || whole.trim()) found.push({ code, text: whole });
    lines = [];
    code = next;
  };
  for (const line of text.split("\n")) {
    if (code ? /^\s*```\s*$/.test(line) : /^\s*```[^`]*$/.test(line)) end(!code);
    else if (!code && line.trim() === "") end(false);
    else lines.push(line);
  }
  if (lines.length) end(false);
  return found;
}

/** A text in an element; what has not changed since the last time is left alone. */
export function show(into, text) {
  const found = blocks(text);
  found.forEach((block, i) => {
    const tag = block.code ? "PRE" : "P";
    let place = into.children[i];
    if (place?.tagName !== tag) {
      const made = node(tag);
      if (block.code) made.tabIndex = 0; // it scrolls
      if (place) place.replaceWith(made);
      else into.append(made);
      place = made;
    }
    if (place.textContent !== block.text) place.textContent = block.text;
  });
  while (into.children.length > found.length) into.lastChild.remove();
}
