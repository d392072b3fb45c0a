// Draws how the sections of the model work: one column per step, one lane per section. Steps are faster than the eye,
// so they are drawn in slow motion, and left out where too many wait to be drawn.

const MOST_WAITING = 240;      // steps kept for drawing; more are left out
const SHORTEST_MS = 70;        // time to draw a step
const LONGEST_MS = 650;
const still = matchMedia("(prefers-reduced-motion: reduce)");

function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function shown(token) {
  return token.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "␣");
}

/** A canvas in units of CSS pixels, sharp on every screen. */
function context2d(canvas) {
  const { width, height } = canvas.getBoundingClientRect();
  const scale = window.devicePixelRatio || 1;
  const [pixels, rows] = [Math.round(width * scale), Math.round(height * scale)];
  if (canvas.width !== pixels || canvas.height !== rows) {
    canvas.width = pixels;
    canvas.height = rows;
  }
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  return { context, width, height };
}

/** The lanes of the sections. `token` and `steps` add what is to be drawn. */
export class Timeline {
  constructor(canvas, paceText) {
    this.canvas = canvas;
    this.paceText = paceText;
    this.sections = 2;
    this.stagger = 1;
    this.takesTurns = false;
    this.columns = [];         // drawn steps: {text, begun, lasts}
    this.waiting = [];         // texts of steps that are not drawn yet; null where the text is another client's
    this.leftOut = 0;
    this.running = false;
    this.redraw = () => this.begin();
    window.addEventListener("resize", this.redraw);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", this.redraw);
    this.begin();
  }

  /** Number of sections, steps between hand-off and use, and whether they take turns (the sequential baseline). */
  setModel({ sections, stagger, connection }) {
    this.sections = Math.max(1, sections ?? 1);
    this.stagger = stagger ?? 1;
    this.takesTurns = this.sections > 1 && (connection === "sequential" || this.stagger === 0);
    this.begin();
  }

  /** A step whose token this page has received. */
  token(text) {
    this.add([text]);
  }

  /** Steps of other clients' requests. They are drawn only while nothing of this page waits. */
  steps(count) {
    if (this.waiting.some((text) => text !== null)) return;
    const few = Math.min(count, 3);
    this.leftOut += count - few;
    this.add(Array(few).fill(null));
  }

  add(texts) {
    this.waiting.push(...texts);
    const over = this.waiting.length - MOST_WAITING;
    if (over > 0) {
      this.waiting.splice(0, over);
      this.leftOut += over;
    }
    this.begin();
  }

  begin() {
    if (this.running) return;
    this.running = true;
    requestAnimationFrame((now) => this.frame(now));
  }

  frame(now) {
    const last = this.columns.at(-1);
    const done = !last || now - last.begun >= last.lasts;
    if (done && this.waiting.length) {
      const lasts = Math.max(SHORTEST_MS, LONGEST_MS / (1 + this.waiting.length / 4));
      this.columns.push({ text: this.waiting.shift(), begun: now, lasts: still.matches ? 0 : lasts });
      this.columns.splice(0, this.columns.length - 60);
    }
    this.draw(now);
    this.describe();
    this.running = !done || this.waiting.length > 0;
    if (this.running) requestAnimationFrame((next) => this.frame(next));
  }

  describe() {
    const text = this.waiting.length > 4
      ? `in slow motion, ${this.waiting.length} steps behind`
      : this.leftOut ? "every step as it happens; some are left out" : "";
    if (this.paceText.textContent !== text) this.paceText.textContent = text;
    if (!this.waiting.length) this.leftOut = 0;
  }

  geometry(width, height) {
    const gutter = width < 520 ? 30 : 92;
    const step = width < 520 ? 50 : 66;
    const top = 26;
    const lane = (height - top - 26) / this.sections;
    return { gutter, step, top, lane, gap: Math.min(14, lane * 0.28), width, height };
  }

  draw(now) {
    const { context, width, height } = context2d(this.canvas);
    const place = this.geometry(width, height);
    context.font = "13px system-ui, sans-serif";
    context.textBaseline = "middle";
    this.drawLabels(context, place);
    const room = Math.floor((width - place.gutter - 8) / place.step);
    const visible = this.columns.slice(-room);
    context.save();
    context.beginPath();
    context.rect(place.gutter, 0, width - place.gutter, height);
    context.clip();
    for (let column = 0; column < room; column++) this.drawColumn(context, place, visible, column, now);
    visible.forEach((_, column) => this.drawHandoffs(context, place, visible, column, now));
    context.restore();
  }

  drawLabels(context, place) {
    const narrow = place.gutter < 60;
    context.textAlign = "left";
    context.fillStyle = color("--soft");
    context.fillText(narrow ? "in" : "token in", 0, place.top / 2);
    context.fillText(narrow ? "out" : "token out", 0, place.height - 12);
    for (let section = 0; section < this.sections; section++) {
      context.fillStyle = color(`--section-${section % 4}`);
      const y = place.top + place.lane * (section + 0.5);
      context.fillText(narrow ? `S${section + 1}` : `section ${section + 1}`, 0, y);
    }
  }

  /** Share of a section's work in a step that is done: all sections at once, or one after the other. */
  share(column, section, now) {
    const elapsed = column.lasts ? Math.min(1, (now - column.begun) / column.lasts) : 1;
    if (!this.takesTurns) return Math.min(1, elapsed / 0.8);
    return Math.min(1, Math.max(0, elapsed * this.sections - section));
  }

  drawColumn(context, place, visible, index, now) {
    const column = visible[index];
    const x = place.gutter + index * place.step;
    const width = place.step - 14;
    for (let section = 0; section < this.sections; section++) {
      const y = place.top + place.lane * section + place.gap / 2;
      const high = place.lane - place.gap;
      context.fillStyle = color("--idle");
      context.beginPath();
      context.roundRect(x, y, width, high, 5);
      context.fill();
      if (!column) continue;
      context.fillStyle = color(`--section-${section % 4}`);
      context.globalAlpha = index === visible.length - 1 ? 1 : 0.62;
      context.beginPath();
      context.roundRect(x, y, Math.max(0.01, width * this.share(column, section, now)), high, 5);
      context.fill();
      context.globalAlpha = 1;
    }
    if (column) this.drawTokens(context, place, visible, index, x + width / 2, now);
  }

  drawTokens(context, place, visible, index, middle, now) {
    const column = visible[index];
    context.textAlign = "center";
    context.font = "12px ui-monospace, monospace";
    context.fillStyle = color("--text");
    const fits = (text) => (text.length > 7 ? `${text.slice(0, 6)}…` : text);
    const before = index > 0 ? visible[index - 1].text : null;
    context.fillText(before === null ? "·" : fits(shown(before)), middle, place.top / 2);
    if (this.share(column, this.sections - 1, now) === 1) {
      context.fillText(column.text === null ? "·" : fits(shown(column.text)), middle, place.height - 12);
    }
    context.font = "13px system-ui, sans-serif";
  }

  /** From each section to the next one: into a later step, or within the step where sections take turns. */
  drawHandoffs(context, place, visible, index, now) {
    const column = visible[index];
    const behind = this.takesTurns ? 0 : this.stagger;
    for (let section = 0; section + 1 < this.sections; section++) {
      if (this.share(column, section, now) < 1) continue;
      const x = place.gutter + index * place.step + place.step - 14 - (behind ? 4 : place.step / 2 - 7);
      const y = place.top + place.lane * (section + 1) - place.gap / 2 - 3;
      const toX = behind ? place.gutter + (index + behind) * place.step + 5 : x;
      const toY = place.top + place.lane * (section + 1) + place.gap / 2 + 4;
      drawArrow(context, x, y, toX, toY);
    }
  }
}

function drawArrow(context, x, y, toX, toY) {
  const angle = Math.atan2(toY - y, toX - x);
  context.strokeStyle = context.fillStyle = color("--text");
  context.lineWidth = 1.6;
  context.beginPath();
  context.moveTo(x, y);
  context.lineTo(toX, toY);
  context.stroke();
  context.beginPath();
  context.moveTo(toX, toY);
  context.lineTo(toX - 7 * Math.cos(angle - 0.45), toY - 7 * Math.sin(angle - 0.45));
  context.lineTo(toX - 7 * Math.cos(angle + 0.45), toY - 7 * Math.sin(angle + 0.45));
  context.fill();
}

/** Tokens per second over the last minute as a line. */
export function drawRates(canvas, samples, now, seconds = 60) {
  const { context, width, height } = context2d(canvas);
  const most = Math.max(1, ...samples.map((sample) => sample.rate));
  const x = (sample) => width * (1 - (now - sample.at) / seconds);
  const y = (sample) => height - 2 - (height - 18) * (sample.rate / most);
  context.strokeStyle = color("--line");
  context.beginPath();
  context.moveTo(0, height - 1);
  context.lineTo(width, height - 1);
  context.stroke();
  context.strokeStyle = color("--section-0");
  context.lineWidth = 2;
  context.beginPath();
  samples.forEach((sample, index) => (index ? context.lineTo(x(sample), y(sample)) : context.moveTo(x(sample), y(sample))));
  context.stroke();
  context.fillStyle = color("--soft");
  context.font = "12px system-ui, sans-serif";
  context.fillText(`${Math.round(most)} tokens/s at most`, 0, 11);
}
