// The text of a response as coloured tokens. Text is put into text nodes only: it is never HTML.
//
// Long responses: tokens lie in chunks, and the browser lays out those that are seen (content-visibility).

import { el } from "./dom.js";

export const LEVELS = 10; // steps of the colour scale on each side of 0; see responses.css
const CHUNK = 400; // tokens, then a chunk ends at the next line break
const LONGEST_CHUNK = 4000; // tokens without a line break
const SPECIAL = /^<[^<>\s]{1,40}>$/; // <|im_end|>, <think>, </s>

// The colour class of a value on a scale from -limit to limit, "" at 0 or unknown.
export function level(value, limit) {
  if (value === null || value === undefined || limit <= 0) return "";
  const step = Math.min(LEVELS, Math.round((Math.abs(value) / limit) * LEVELS));
  return step === 0 ? "" : `${value < 0 ? "n" : "p"}${step}`;
}

// A limit that a few extreme tokens do not decide: of all sizes the one that 1 in 200 exceeds.
export function automaticLimit(values) {
  const sizes = values.filter((value) => value !== null).map(Math.abs).sort((a, b) => a - b);
  if (!sizes.length) return 1;
  return sizes[Math.min(sizes.length - 1, Math.floor(sizes.length * 0.995))] || sizes[sizes.length - 1] || 1;
}

// What is drawn: `detail` of the API. `onPoint(token)` is called for the token under the pointer or the
// keyboard, by its index among all tokens after the prompt; `onPick(token)` for a click or Enter.
export class TokenText {
  constructor(detail, onPoint, onPick) {
    this.spans = new Array(detail.token_ids.length);
    this.sampledOf = new Int32Array(detail.token_ids.length).fill(-1); // token -> index among the sampled ones
    this.tokenOf = new Int32Array(detail.length); // and back
    this.detail = detail;
    this.current = -1;
    this.onPoint = onPoint;
    this.element = el("div", { class: "tokens", tabindex: "0", role: "group", "aria-label": "Response, token by token: arrow keys move" });
    let turn = 0, before = null;
    for (const block of detail.blocks) {
      if (block.writer === "policy") {
        for (let i = block.start; i < block.end; i++) {
          this.sampledOf[i] = block.sampled_before + i - block.start;
          this.tokenOf[this.sampledOf[i]] = i;
        }
      }
      // a thought and what is said after it are one turn
      if (block.writer !== before?.writer) turn += 1;
      before = block;
      this.element.append(this.block(block, turn));
    }
    this.element.addEventListener("pointerover", (event) => this.point(indexOf(event.target)));
    this.element.addEventListener("click", (event) => {
      const token = indexOf(event.target);
      if (token >= 0) { this.point(token); onPick(token); }
    });
    this.element.addEventListener("keydown", (event) => this.key(event, onPick));
    this.element.addEventListener("focus", () => { if (this.current < 0 && this.spans.length) this.point(0); });
  }

  block(block, turn) {
    const count = block.end - block.start;
    const name = block.thinking ? "policy, thinking" : block.writer;
    const label = `turn ${turn} · ${name} · ${count} ${count === 1 ? "token" : "tokens"}${block.writer === "policy" ? "" : ", given: not trained"}`;
    const body = el("div", { class: "block-text" }, this.chunks(block));
    const attributes = { class: `block ${block.writer}${block.thinking ? " thinking" : ""}`, "data-writer": block.writer };
    if (!block.thinking) return el("section", attributes, el("h3", {}, label), body);
    return el("details", { ...attributes, open: true }, el("summary", {}, label), body);
  }

  chunks(block) {
    const chunks = [];
    let chunk = null;
    for (let i = block.start; i < block.end; i++) {
      chunk ??= el("div", { class: "chunk" });
      this.spans[i] = this.span(i);
      chunk.append(this.spans[i]);
      const size = chunk.childElementCount;
      if ((size >= CHUNK && (this.detail.pieces[i] ?? "").endsWith("\n")) || size >= LONGEST_CHUNK) {
        chunks.push(chunk);
        chunk = null;
      }
    }
    if (chunk) chunks.push(chunk);
    return chunks;
  }

  span(index) {
    const piece = this.detail.pieces[index];
    const span = document.createElement("span");
    span.dataset.t = index;
    const classes = [];
    if (piece === null) {
      classes.push("special");
      span.textContent = `[${this.detail.token_ids[index]}]`;
    } else if (piece === "") {
      classes.push("partial");
    } else {
      if (SPECIAL.test(piece)) classes.push("special");
      if (/^ +$/.test(piece)) classes.push("blank");
      else if (piece.startsWith(" ")) classes.push("space");
      appendVisible(span, piece);
    }
    span.dataset.base = classes.join(" ");
    span.className = span.dataset.base;
    return span;
  }

  // Colours every sampled token by `classOf(index among the sampled)`.
  paint(classOf) {
    for (let n = 0; n < this.tokenOf.length; n++) {
      const span = this.spans[this.tokenOf[n]];
      const base = span.dataset.base;
      const marked = span.classList.contains("current") ? " current" : "";
      const colored = classOf(n);
      span.className = colored ? `${base} ${colored}${marked}` : base + marked;
    }
  }

  // Marks a token; nothing happens for -1 or the same one again.
  point(token, tell = true) {
    if (token < 0 || token === this.current || token >= this.spans.length) return;
    this.spans[this.current]?.classList.remove("current");
    this.current = token;
    this.spans[token].classList.add("current");
    if (tell) this.onPoint(token);
  }

  // Brings a token into view and opens the thought that it lies in.
  reveal(token) {
    const span = this.spans[token];
    if (span === undefined) return;
    const fold = span.closest("details");
    if (fold) fold.open = true;
    span.scrollIntoView({ block: "center" });
  }

  key(event, onPick) {
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10 };
    if (event.key === "Enter" && this.current >= 0) onPick(this.current);
    else if (event.key in steps) {
      event.preventDefault();
      const next = Math.max(0, Math.min(this.spans.length - 1, this.current + steps[event.key]));
      this.point(next);
      this.spans[next]?.scrollIntoView({ block: "nearest" });
    }
  }
}

function indexOf(target) {
  const span = target.closest?.("[data-t]");
  return span ? Number(span.dataset.t) : -1;
}

// Line breaks and tabs get a mark before them. It is generated by CSS, so that copied text is the text.
function appendVisible(span, piece) {
  for (const part of piece.split(/(\n+|\t+|\r+)/)) {
    if (part === "") continue;
    const mark = { "\n": "⏎", "\t": "⇥", "\r": "␍" }[part[0]];
    if (mark) span.append(el("i", { class: "mark", "data-mark": mark.repeat(part.length) }));
    span.append(part);
  }
}

// A token for people: its text in quotes, with escapes for what cannot be seen.
export function quoted(piece, id) {
  if (piece === null) return `token ${id}`;
  return piece === "" ? "(a part of a letter)" : JSON.stringify(piece);
}
