// The page of the server: a conversation with the model, and what the engine does at the moment.
// All addresses are relative, so that the page works behind a prefix.

import { Timeline, drawRates } from "./sections.js";

const $ = (id) => document.getElementById(id);
const timeline = new Timeline($("timeline"), $("pace"));
const model = { id: null, maxContext: 0, meta: {}, chat: null };
let turns = [];                // messages of the conversation in chat mode
let running = null;            // AbortController of the answer under way

// ---- what the server is ----

function headers() {
  const key = $("api-key").value.trim();
  return key ? { "Content-Type": "application/json", Authorization: `Bearer ${key}` } : { "Content-Type": "application/json" };
}

async function describeServer() {
  const answer = await fetch("v1/models", { headers: headers() });
  if (answer.status === 401) return askForKey();
  if (!answer.ok) return;
  const [first] = (await answer.json()).data;
  Object.assign(model, { id: first.id, maxContext: first.max_model_len, meta: first.meta ?? {} });
  const { sections = 1, stages = 1, tensor = 1, parameters, precision } = model.meta;
  const facts = [plural(sections, "section"), `${plural(stages * tensor, "process", "processes")}`];
  const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });
  if (parameters) facts.push(`${compact.format(parameters)} parameters`);
  facts.push(precision, `${model.maxContext} positions`);
  $("model").textContent = `${model.id}: ${facts.filter(Boolean).join(" · ")}`;
  timeline.setModel(model.meta);
  $("timeline-text").textContent = explanation(timeline);
  if (model.chat !== (first.meta?.chat ?? true)) chooseMode();   // an engine that comes back keeps what was chosen
}

function explanation({ sections, stagger, takesTurns }) {
  if (sections === 1) return "This model has one section: one process computes every step.";
  if (takesTurns) return "The sections of this model take turns: each waits for the one before in every step.";
  const later = stagger === 1 ? "the next step" : `the step ${stagger} later`;
  return `${sections === 2 ? "Both" : `All ${sections}`} sections work on the same token at the same time. The output of a section, an arrow, is what ` +
    `the next section reads in ${later}.`;
}

/** Base models have no chat template: they continue text. */
function chooseMode() {
  model.chat = model.meta.chat ?? true;
  $(model.chat ? "mode-chat" : "mode-text").checked = true;
  showMode();
}

function showMode() {
  const text = mode() === "text";
  $("prompt").placeholder = text ? "A text to continue" : "A message to the model";
  $("empty").textContent = text
    ? "The model continues the text that you write. Tokens appear in the picture above as the sections make them."
    : "Ask something. Tokens appear in the picture above as the sections make them.";
  $("system").disabled = text;
}

function mode() {
  return document.querySelector("input[name=mode]:checked").value;
}

function askForKey() {
  $("model").textContent = "This server needs an API key: enter it under Options";
  $("options").open = true;
  $("api-key").focus();
}

// ---- the conversation ----

function requestBody(prompt) {
  const number = (id) => ($(id).value === "" ? undefined : Number($(id).value));
  const body = {
    model: model.id,
    stream: true,
    stream_options: { include_usage: true },
    temperature: number("temperature"),
    top_p: number("top-p"),
    max_tokens: number("max-tokens"),
    seed: number("seed"),
  };
  if (mode() === "text") return { ...body, prompt };
  const system = $("system").value.trim();
  return { ...body, messages: [...(system ? [{ role: "system", content: system }] : []), ...turns, { role: "user", content: prompt }] };
}

async function send() {
  const prompt = $("prompt").value;
  if (running || !prompt.trim()) return;
  const text = mode() === "text";
  $("empty").hidden = true;
  const turn = text ? addTurn("text", prompt, true) : (addTurn("user", prompt), addTurn("assistant"));
  $("prompt").value = "";
  setBusy(new AbortController(), turn);
  const result = { content: "", tokens: 0, begun: performance.now() };
  try {
    await stream(text ? "v1/completions" : "v1/chat/completions", requestBody(prompt), turn, result);
  } catch (error) {
    if (error.name === "AbortError") result.finish = "stopped";
    else fail(turn, error, prompt);
  }
  setBusy(null, turn);
  if (result.status === 401) askForKey();
  if (!turn.classList.contains("failed")) {
    showFacts(turn, result);
    if (!text) turns.push({ role: "user", content: prompt }, { role: "assistant", content: result.content });
  }
}

async function stream(path, body, turn, result) {
  const answer = await fetch(path, { method: "POST", headers: headers(), body: JSON.stringify(body), signal: running.signal });
  result.status = answer.status;
  if (!answer.ok) throw await problem(answer);
  for await (const data of events(answer.body)) {
    if (data.error) throw new Error(data.error.message);
    if (data.usage) result.usage = data.usage;
    const [choice] = data.choices;
    if (!choice) continue;
    const piece = choice.text ?? choice.delta?.content ?? "";
    result.finish = choice.finish_reason ?? result.finish;
    result.first ??= performance.now();
    result.tokens += choice.delta?.role ? 0 : 1;   // the role comes in a chunk of its own
    result.content += piece;
    append(turn, piece);
    if (piece) timeline.token(piece);
  }
  result.ended = performance.now();
}

/** The data of server-sent events as they arrive. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    buffer += part.value;
    const lines = buffer.split("\n");
    buffer = lines.pop();
    for (const line of lines) {
      const data = line.startsWith("data:") ? line.slice(5).trim() : "";
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

async function problem(answer) {
  const { error } = await answer.json().catch(() => ({}));
  const remedy = error?.code === "context_length_exceeded" && turns.length ? "; New begins another conversation" : "";
  return new Error(`${error?.message ?? `the server answered ${answer.status}`}${remedy}`);
}

function addTurn(kind, text = "", given = false) {
  const turn = document.createElement("div");
  turn.className = `turn ${kind}`;
  const pre = document.createElement("pre");
  const span = document.createElement("span");
  span.textContent = text;
  if (given) span.className = "given";
  pre.append(span, document.createTextNode(""));
  turn.append(pre);
  $("answers").append(turn);
  toEnd();
  return turn;
}

function append(turn, piece) {
  turn.querySelector("pre").lastChild.data += piece;
  toEnd();
}

function toEnd() {
  $("answers").scrollTop = $("answers").scrollHeight;
}

function fail(turn, error, prompt) {
  turn.classList.add("failed");
  append(turn, `${turn.textContent ? "\n" : ""}${error.message}`);
  if (!$("prompt").value) $("prompt").value = prompt;
}

function showFacts(turn, { usage, tokens, begun, first, ended, finish }) {
  const count = usage?.completion_tokens ?? tokens;
  const facts = [plural(count, "token")];
  if (first) facts.push(`first after ${Math.round(first - begun)} ms`);
  if (first && ended > first && count > 1) facts.push(`${Math.round((1000 * (count - 1)) / (ended - first))} tokens/s`);
  const cached = usage?.prompt_tokens_details?.cached_tokens;
  if (usage) facts.push(`prompt of ${usage.prompt_tokens}${cached ? `, ${cached} reused` : ""}`);
  facts.push({ length: "ended at the limit", stop: "ended by the model", stopped: "stopped" }[finish] ?? finish);
  const line = document.createElement("p");
  line.className = "facts";
  line.textContent = facts.filter(Boolean).join(" · ");
  turn.append(line);
  toEnd();
}

/** While an answer is written, a screen reader waits with reading it. */
function setBusy(controller, turn) {
  running = controller;
  $("send").disabled = Boolean(controller);
  $("stop").disabled = !controller;
  $("answers").setAttribute("aria-busy", Boolean(controller));
  turn.classList.toggle("busy", Boolean(controller));
  if (!controller) $("prompt").focus();
}

function clear() {
  running?.abort();
  turns = [];
  for (const turn of document.querySelectorAll(".turn")) turn.remove();
  $("empty").hidden = false;
  $("prompt").focus();
}

// ---- what the engine does ----

const rates = [];              // {at, rate} of the last minute
let previous = null;           // stats of the last event
let second = null;            // stats of a second ago, for the bars of the stages

function showState(state, reason) {
  $("state").dataset.state = state;
  $("state").textContent = reason ? `${state}: ${reason}` : state;
}

function showStats(stats) {
  const now = performance.now() / 1000;
  stats.at = now;
  if (previous && stats.operations >= previous.operations) {
    const passed = Math.max(0.05, now - previous.at);
    rates.push({ at: now, rate: (stats.generation_tokens_total - previous.generation_tokens_total) / passed });
    if (!running) timeline.steps(stats.steps - previous.steps);
  }
  while (rates.length && rates[0].at < now - 60) rates.shift();
  previous = stats;
  showNumbers(stats);
  showSlots(stats.slots);
  if (!second || now - second.at >= 1 || stats.operations < second.operations) {
    showStages(stats.stages, second?.stages ?? []);
    second = stats;
  }
  drawRates($("rates"), rates, now);
}

function showNumbers(stats) {
  const recent = rates.slice(-5);
  const rate = recent.reduce((sum, sample) => sum + sample.rate, 0) / Math.max(1, recent.length);
  $("rate").textContent = rate < 10 ? rate.toFixed(rate ? 1 : 0) : Math.round(rate);
  $("step-ms").textContent = stats.step_s ? (1000 * stats.step_s).toFixed(1) : "–";
  $("running").textContent = stats.running;
  $("waiting").textContent = stats.waiting;
  const asked = stats.prefix_queries_total;
  $("reused").textContent = asked ? `${Math.round((100 * stats.prefix_hits_total) / asked)} %` : "–";
}

function showSlots(slots) {
  const list = $("slots");
  while (list.children.length > slots.length) list.lastChild.remove();
  while (list.children.length < slots.length) list.append(slotTile());
  slots.forEach((slot, index) => {
    const tile = list.children[index];
    const held = slot.phase === "free" ? slot.cached : slot.position;
    const words = { free: held ? "free, keeps" : "free", prefill: "reads prompt", decode: "decodes" };
    tile.dataset.phase = slot.phase;
    tile.firstChild.textContent = `${index} ${words[slot.phase] ?? slot.phase} ${held || ""}`;
    tile.querySelector("i").className = { free: "token", prefill: "memory" }[slot.phase] ?? "";
    tile.querySelector("i").style.width = `${Math.min(100, (100 * held) / (model.maxContext || held || 1))}%`;
  });
}

function slotTile() {
  const tile = document.createElement("li");
  const bar = document.createElement("div");
  bar.className = "bar";
  bar.append(document.createElement("i"));
  tile.append(document.createElement("span"), bar);
  return tile;
}

/** Shares since the last report, per rank: differences of what the ranks have added up since they started. */
function showStages(stages, before) {
  const kinds = [["compute", "compute_s"], ["memory", "wait_memory_s"], ["token", "wait_token_s"], ["send", "send_s"]];
  const rows = stages.map((stage) => {
    const old = before.find((one) => one.rank === stage.rank);
    const spent = kinds.map(([kind, field]) => [kind, Math.max(0, stage[field] - (old?.[field] ?? 0))]);
    const sum = spent.reduce((total, [, seconds]) => total + seconds, 0);
    return { stage, spent, sum };
  });
  if (!rows.some((row) => row.sum > 0) && $("stages").children.length === rows.length) return;
  $("stages").replaceChildren(...rows.map(stageRow));
}

function stageRow({ stage, spent, sum }) {
  const row = document.createElement("tr");
  const [name, bars, busy] = ["th", "td", "td"].map((tag) => row.appendChild(document.createElement(tag)));
  name.scope = "row";
  name.textContent = `${stage.stage} (rank ${stage.rank})`;
  bars.className = "bars";
  const bar = bars.appendChild(document.createElement("div"));
  bar.className = "bar";
  for (const [kind, seconds] of spent) {
    const piece = bar.appendChild(document.createElement("i"));
    piece.className = kind;
    if (kind === "compute") piece.style.background = `var(--section-${sectionOf(stage) % 4})`;
    piece.style.width = sum ? `${(100 * seconds) / sum}%` : "0";
  }
  busy.textContent = sum ? `${Math.round((100 * spent[0][1]) / sum)} %` : "–";
  bar.title = spent.map(([kind, seconds]) => `${kind} ${(1000 * seconds).toFixed(0)} ms`).join(", ");
  return row;
}

/** The first section of a stage. */
function sectionOf({ stage }) {
  return stage * ((model.meta.sections ?? 1) / (model.meta.stages ?? 1));
}

function listen() {
  const source = new EventSource("live/events");
  source.onmessage = ({ data }) => {
    const { state, reason, stats } = JSON.parse(data);
    if (state !== $("state").dataset.state) {
      showState(state, reason);
      describeServer();
    }
    if (stats) showStats(stats);
  };
  source.onerror = () => {
    showState("lost", "no connection");
    if (source.readyState === EventSource.CLOSED) setTimeout(listen, 3000);
  };
}

// ---- wiring ----

function plural(count, one, many = `${one}s`) {
  return `${count} ${count === 1 ? one : many}`;
}

$("form").addEventListener("submit", (event) => { event.preventDefault(); send(); });
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
$("stop").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", clear);
for (const radio of document.querySelectorAll("input[name=mode]")) radio.addEventListener("change", showMode);
$("api-key").addEventListener("change", describeServer);
showMode();
listen();
