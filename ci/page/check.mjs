// The chat page in a real browser, against a running server. Ends with 1 at the first thing that is not as it should be.
//
//   npm install --no-save playwright-core        # in a folder of its own; brings no browser
//   dsv3 serve --model DIR &
//   CHROMIUM=/usr/bin/chromium node ci/page/check.mjs http://127.0.0.1:8000 shots/ [KEY_FILE]
//
// PLAYWRIGHT names the folder that playwright-core was installed in, if it is not the current one. Screenshots go to the folder
// given. Answers, stopping and the expert picture are the server's; reasoning too, where its model thinks. What a server cannot
// be asked for (errors of all kinds, cut streams) is put in the place of its responses.

import assert from "node:assert/strict";
import { mkdirSync, readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join, resolve } from "node:path";

const [base, shots, keyFile] = process.argv.slice(2);
if (!base || !shots) {
  console.error("usage: node check.mjs URL FOLDER [KEY_FILE]");
  process.exit(2);
}
mkdirSync(shots, { recursive: true });
const { chromium } = createRequire(resolve(process.env.PLAYWRIGHT ?? ".", "x.js"))("playwright-core");
const key = keyFile ? readFileSync(keyFile, "utf8").trim() : "";
const LONG = "Tell me a long story about a dog, a cat and a boat on the sea.";
const ANSWER = "**/v1/chat/completions";

const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: process.getuid?.() === 0 ? ["--no-sandbox"] : [],
});

/** A page with what it complains of and asks for. */
async function open(options = {}, known = key) {
  const context = await browser.newContext({ viewport: { width: 1280, height: 800 }, ...options });
  const page = await context.newPage();
  const wrong = [];
  page.on("pageerror", (error) => wrong.push(`error: ${error.message}`));
  page.on("console", (message) => /Content Security Policy|Refused to/i.test(message.text()) && wrong.push(message.text()));
  page.on("request", (request) => /^(data|blob):/.test(request.url()) || request.url().startsWith(base) || wrong.push(request.url()));
  if (known) await page.addInitScript((k) => sessionStorage.setItem("dsv3.key", k), known);
  await page.goto(base);
  await page.waitForFunction(() => document.getElementById("model").textContent !== "");
  return { page, wrong, close: () => context.close() };
}

const shot = (page, name) => page.screenshot({ path: join(shots, `${name}.png`) });
const done = (page) => page.waitForSelector(".answer:last-of-type[aria-busy=false]", { timeout: 120_000 });

async function send(page, text) {
  await page.fill("#question", text);
  await page.press("#question", "Enter");
}

async function set(page, values) {
  if (!(await page.isVisible("#settings"))) await page.click("#settings-button");
  for (const [name, value] of Object.entries(values)) await page.fill(`#${name}`, value);
  await page.click("#settings-form button[type=submit]");
}

/** Responses in the place of the server's, of server-sent events unless said otherwise. */
async function canned(page, body, status = 200, headers = {}) {
  const type = status === 200 ? "text/event-stream" : "application/json";
  await page.route(ANSWER, (route) => route.fulfill({ status, headers: { "content-type": type, ...headers }, body }));
}

const event = (value) => `data: ${JSON.stringify(value)}\n\n`;
const delta = (fields, reason = null) => event({ choices: [{ index: 0, delta: fields, finish_reason: reason }], usage: null });

async function conversation() {
  const { page, wrong, close } = await open();
  await page.keyboard.type("line one"); // the field has the focus
  await page.keyboard.press("Shift+Enter");
  assert.equal(await page.inputValue("#question"), "line one\n");
  await set(page, { max_tokens: "120", temperature: "0.7", seed: "1" });
  const asked = page.waitForRequest(ANSWER);
  await send(page, LONG);
  const body = (await asked).postDataJSON();
  assert.deepEqual([body.stream, body.max_tokens, body.temperature, body.seed], [true, 120, 0.7, 1]);
  assert.deepEqual(body.messages, [{ role: "user", content: LONG }]);
  await page.waitForSelector(".answer .figures span");
  assert.equal(await page.isVisible("#stop"), true);
  await done(page);
  const text = await page.textContent(".answer");
  assert.match(text, /\d tokens?/);
  assert.match(text, /tokens\/s/);
  assert.match(text, /first token \d+\.\d\d s/);
  assert.ok((await page.textContent(".answer > .text")).length > 20, "no text arrived");
  await page.waitForFunction(() => /Busiest expert .*× even load/.test(document.getElementById("load-summary").textContent));
  await page.focus("#heat");
  await page.keyboard.press("ArrowRight");
  await page.keyboard.press("ArrowRight");
  assert.match(await page.textContent("#cell"), /^Layer \d+, expert 1: [\d,]+ tokens?, \d+\.\d\d× even load$/);
  await page.hover("#heat");
  await shot(page, "light");
  const second = page.waitForRequest(ANSWER);
  await send(page, "And then?");
  assert.deepEqual((await second).postDataJSON().messages.map((m) => m.role), ["user", "assistant", "user"]);
  await done(page);
  await page.click("#new");
  assert.equal(await page.locator(".answer").count(), 0);
  assert.deepEqual(wrong, []);
  await close();
}

/** The answer comes so slowly that it can be stopped. */
async function stopping() {
  const { page, wrong, close } = await open({ colorScheme: "dark" });
  const network = await page.context().newCDPSession(page);
  await network.send("Network.emulateNetworkConditions", {
    offline: false, latency: 0, uploadThroughput: -1, downloadThroughput: 3000,
  }); // prettier-ignore
  for (const how of ["key", "button"]) {
    await send(page, LONG);
    await page.waitForFunction(() => document.querySelector(".answer:last-of-type > .text").textContent.length > 10);
    if (how === "key") await shot(page, "streaming-dark");
    if (how === "key") await page.keyboard.press("Escape");
    else await page.click("#stop");
    await done(page);
    assert.match(await page.textContent(".answer:last-of-type .figures"), /^Stopped/);
    assert.equal(await page.isVisible("#send"), true);
    assert.equal(await page.evaluate(() => document.activeElement.id), "question");
  }
  assert.deepEqual(wrong, []);
  await close();
}

async function reasoning() {
  const { page, wrong, close } = await open();
  const models = await page.evaluate(async (k) => {
    return (await fetch("v1/models", { headers: k ? { Authorization: `Bearer ${k}` } : {} })).json();
  }, key);
  const real = models.data[0].thinking === true;
  if (!real) {
    await canned(page, delta({ role: "assistant", content: "" }) + delta({ reasoning_content: "Let me count: 2, 4.\n\nYes." }) +
      delta({ content: "The answer:\n\n```py\nprint('<b>4</b>')\n```\n" }) + delta({ content: "<img src=x onerror=alert(1)>" }, "stop") +
      ": ping\n\n" + event({ choices: [], usage: { prompt_tokens: 9, completion_tokens: 12, dsv3: {
        ttft_s: 0.214, decode_tok_s: 31.4, drafted: 40, accepted: 26, cached_tokens: 4, steps: 30 } } }) + "data: [DONE]\n\n"); // prettier-ignore
  }
  await send(page, "What is two plus two?");
  await done(page);
  assert.match(await page.textContent(".thought summary"), /^Thought for \d+ s$/);
  assert.equal(await page.locator(".thought[open]").count(), 0);
  await page.focus(".thought summary");
  await page.keyboard.press("Enter");
  assert.equal(await page.isVisible(".thought .text"), true);
  if (!real) {
    assert.equal(await page.textContent(".answer pre"), "print('<b>4</b>')");
    assert.equal(await page.locator(".answer img, .answer b").count(), 0); // markup stays text
    const figures = await page.textContent(".answer .figures");
    for (const text of ["12 tokens", "31.4 tokens/s", "first token 0.21 s", "drafts 65 % accepted", "4 prompt tokens cached"]) {
      assert.ok(figures.includes(text), `${text} is not in ${figures}`);
    }
  }
  await shot(page, "reasoning");
  assert.deepEqual(wrong, []);
  await close();
}

async function failures() {
  const { page, wrong, close } = await open();
  const told = (message) => JSON.stringify({ error: { message, type: "x", param: null, code: null } });
  for (const [name, body, status, headers, expected] of [
    ["full", told("queue"), 429, { "retry-after": "7" }, /as much to do as it takes on\. Try again in 7 s\./],
    ["wrong", told("max_tokens 9 is more than 8"), 400, {}, /max_tokens 9 is more than 8\. Change/],
    ["draining", told("shutting down"), 503, {}, /shutting down\. It is starting or being stopped/],
    ["plain", "<h1>Bad gateway</h1>", 502, {}, /The server answered 502/],
    ["midway", delta({ content: "Half an" }) + event({ error: { message: "The engine failed." } }), 200, {}, /The engine failed\./],
    ["cut", delta({ content: "Half an" }), 200, {}, /broke off before the answer was complete/],
    ["odd", "data: {nothing\n\n", 200, {}, /something that is no answer/],
    ["key", told("no key"), 401, {}, /API key\.? ?/],
  ]) {
    await canned(page, body, status, headers);
    await send(page, `Fail: ${name}`);
    await page.waitForSelector(".answer:last-of-type .problem");
    assert.match(await page.textContent(".answer:last-of-type .problem"), expected, name);
    if (name === "midway") await shot(page, "error");
    await page.unroute(ANSWER);
  }
  await page.click(".answer:last-of-type .problem button:has-text('Edit the message')");
  assert.equal(await page.inputValue("#question"), "Fail: key");
  await page.route(ANSWER, (route) => route.abort());
  const next = page.waitForRequest(ANSWER);
  await send(page, "Hello?");
  assert.deepEqual((await next).postDataJSON().messages, [{ role: "user", content: "Hello?" }]); // what failed is left out
  await page.waitForSelector(".problem:has-text('cannot be reached')");
  await page.unroute(ANSWER);
  await page.click(".answer:last-of-type .problem button:has-text('Ask again')");
  await done(page);
  assert.equal(await page.locator(".answer:last-of-type .problem").count(), 0);
  assert.deepEqual(wrong, []);
  await close();
}

async function keys() {
  const { page, close } = await open({}, ""); // a server that wants a key has opened the settings
  const typed = key || "sk-typed";
  assert.equal(await page.isVisible("#settings"), key !== "");
  await set(page, { key: typed });
  const asked = page.waitForRequest(ANSWER);
  await send(page, "Hello");
  assert.equal((await asked).headers().authorization, `Bearer ${typed}`);
  const kept = await page.evaluate(() => [JSON.stringify(localStorage), document.cookie, sessionStorage.getItem("dsv3.key")]);
  assert.ok(!kept[0].includes(typed) && kept[1] === "" && kept[2] === typed);
  await close();
}

async function phone() {
  const { page, wrong, close } = await open({ viewport: { width: 390, height: 780 }, hasTouch: true, isMobile: true });
  assert.equal(await page.isVisible("#load"), false);
  await send(page, "Tell me a short story.");
  await done(page);
  const over = await page.evaluate(() => Math.max(document.documentElement.scrollWidth, innerWidth) - 390);
  assert.ok(over <= 0, `${over} pixels wider than the screen`);
  await shot(page, "phone");
  await page.click("#load-button");
  await page.waitForFunction(() => /even load/.test(document.getElementById("load-summary").textContent));
  await page.tap("#heat");
  assert.match(await page.textContent("#cell"), /^Layer \d+, expert \d+: /);
  await shot(page, "phone-experts");
  await page.keyboard.press("Escape");
  assert.equal(await page.isVisible("#load"), false);
  assert.equal(await page.evaluate(() => document.activeElement.id), "load-button");
  await page.click("#settings-button");
  await shot(page, "phone-settings");
  assert.deepEqual(wrong, []);
  await close();
}

let code = 0;
for (const part of [conversation, stopping, reasoning, failures, keys, phone]) {
  try {
    await part();
    console.log(`ok ${part.name}`);
  } catch (error) {
    console.error(`FAILED ${part.name}: ${error.stack}`);
    code = 1;
    break;
  }
}
await browser.close();
process.exit(code);
