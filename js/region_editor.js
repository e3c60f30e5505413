/** The editor of regions: a picture to drag boxes on, and the words and numbers of the one that is chosen. */

import {
  boxBetween, COLOURS, conceptNames, HANDLE_NAMES, hasBox, isBox, moved, parsed, resized, rounded, snapped, written,
} from "./region_boxes.js";

const NEAR = 9; // screen pixels within which an edge attracts
const STEPS = 64; // to the longer side, where nothing attracts
const PAUSE = 500; // milliseconds without a letter, after which what was typed is one step of undo
const NUMBERS = [
  { field: "strength", usual: 1, most: 1, title: "How far this prompt replaces the global one inside" },
  { field: "feather", usual: 0, most: 0.5, title: "Width of the soft edge, in parts of the shorter side" },
];

export class RegionEditor {
  /** text(): the regions; size(): [width, height] in pixels; keep(text): a finished change, one step of undo;
   * note(text): a change that goes on, a letter typed for instance. */
  constructor({ text, size, keep, note }) {
    Object.assign(this, { text, size, keep, note });
    this.entries = [];
    this.chosen = -1;
    this.drag = null;
    this.build();
    this.load();
  }

  build() {
    this.stage = made("div", "mc-stage", { tabIndex: 0, title: "Drag to draw a box; with Shift also inside another" });
    this.hint = made("div", "mc-hint", { textContent: "Drag a box where somebody should be" });
    this.tabs = made("div", "mc-tabs");
    this.prompt = made("textarea", "mc-prompt", { placeholder: "who is in this region: a <tom> on the beach" });
    this.numbers = NUMBERS.map(({ field, usual, most, title }) => {
      const input = made("input", "mc-number", { type: "number", min: 0, max: most, step: 0.05, title });
      input.addEventListener("change", () => this.setNumber(field, input, usual, most));
      const label = made("label", "mc-label", { title });
      label.append(field, input);
      return { input, label, field, usual };
    });
    this.front = button("to front", "Later regions lie on top where they overlap", () => this.toFront());
    this.remove = button("delete", "Delete this region", () => this.delete());
    this.row = made("div", "mc-row");
    this.row.append(...this.numbers.map(({ label }) => label), this.front, this.remove);
    const frame = made("div", "mc-frame");
    frame.append(this.stage);
    this.element = made("div", "mc-regions");
    this.element.append(frame, this.tabs, this.prompt, this.row);
    this.stage.addEventListener("pointerdown", (event) => this.press(event));
    this.stage.addEventListener("pointermove", (event) => this.pull(event));
    this.stage.addEventListener("pointerup", () => this.release());
    this.stage.addEventListener("pointercancel", () => this.cancel());
    this.stage.addEventListener("keydown", (event) => this.key(event));
    this.prompt.addEventListener("input", () => {
      if (!this.entry) return this.show(); // the browser's own undo reaches fields that nobody is in
      this.entry.prompt = this.prompt.value;
      this.note(written(this.entries));
      this.draw();
      clearTimeout(this.typing);
      this.typing = setTimeout(() => this.commit(), PAUSE);
    });
    this.prompt.addEventListener("change", () => this.commit());
  }

  /** Read the text anew: after undo, after a workflow was opened, after a script changed it. */
  load() {
    this.cancel();
    clearTimeout(this.typing); // what was typed is no longer there
    try {
      this.entries = parsed(this.text(), ...this.size());
      this.problem = "";
    } catch (error) {
      this.entries = [];
      this.problem = error.message + ". Draw a box to begin anew.";
    }
    if (this.chosen >= this.entries.length) this.chosen = this.entries.length - 1;
    this.show();
  }

  get entry() {
    return this.entries[this.chosen];
  }

  commit() {
    clearTimeout(this.typing);
    this.problem = "";
    this.keep(written(this.entries));
    this.show();
  }

  choose(index) {
    this.chosen = index;
    this.show();
  }

  add(box) {
    this.entries.push({ prompt: "", box });
    this.chosen = this.entries.length - 1;
    this.commit();
    this.prompt.focus();
  }

  delete() {
    if (!this.entry) return;
    this.entries.splice(this.chosen, 1);
    this.chosen = Math.min(this.chosen, this.entries.length - 1);
    this.commit();
  }

  toFront() {
    this.entries.push(...this.entries.splice(this.chosen, 1));
    this.chosen = this.entries.length - 1;
    this.commit();
  }

  setNumber(field, input, usual, most) {
    const value = Number.isFinite(input.valueAsNumber) ? Math.min(most, Math.max(0, input.valueAsNumber)) : usual;
    if (value === usual) delete this.entry[field];
    else this.entry[field] = rounded(value);
    this.commit();
  }

  // --- the pointer

  /** [x, y] in fractions; getBoundingClientRect counts the canvas's zoom in. */
  point(event) {
    const place = this.stage.getBoundingClientRect();
    return [(event.clientX - place.left) / place.width, (event.clientY - place.top) / place.height];
  }

  snap(point, event) {
    if (event.altKey) return point.map((value) => rounded(Math.min(1, Math.max(0, value))));
    const place = this.stage.getBoundingClientRect();
    const [width, height] = this.size();
    const step = [width, height].map((side) => Math.max(width, height) / STEPS / side);
    const others = this.entries.filter((entry, index) => hasBox(entry) && index !== this.drag?.index);
    return snapped(point, others.map((entry) => entry.box), [NEAR / place.width, NEAR / place.height], step);
  }

  press(event) {
    if (event.button !== 0) return;
    event.stopPropagation();
    const index = event.shiftKey ? NaN : Number(event.target.closest("[data-region]")?.dataset.region ?? NaN);
    const handle = event.target.dataset.handle;
    const start = this.point(event);
    if (Number.isNaN(index)) this.drag = { kind: "draw", start: this.snap(start, event), index: -1 };
    else this.drag = { kind: handle ? "resize" : "move", handle, index, start, before: this.entries[index].box };
    this.stage.setPointerCapture(event.pointerId);
    this.stage.focus({ preventScroll: true });
    this.choose(Number.isNaN(index) ? -1 : index);
  }

  pull(event) {
    if (!this.drag) return;
    const { kind, start, before, handle, index } = this.drag;
    const point = this.point(event);
    if (kind === "draw") this.drag.box = boxBetween(start, this.snap(point, event));
    else if (kind === "resize") this.entries[index].box = resized(before, handle, this.snap(point, event));
    else this.entries[index].box = this.snappedMove(before, point[0] - start[0], point[1] - start[1], event);
    this.draw();
  }

  /** Whichever of the opposite edges is pulled farther to something near decides. */
  snappedMove(box, dx, dy, event) {
    const free = moved(box, dx, dy);
    const [low, high] = [this.snap(free.slice(0, 2), event), this.snap(free.slice(2), event)];
    const change = [0, 1].map((axis) => {
      const [a, b] = [low[axis] - free[axis], high[axis] - free[axis + 2]];
      return Math.abs(a) <= Math.abs(b) ? a : b;
    });
    return moved(free, ...change);
  }

  release() {
    const drag = this.drag;
    this.drag = null;
    if (!drag) return;
    if (drag.kind === "draw") {
      if (drag.box && isBox(drag.box)) this.add(drag.box);
      else this.show();
    } else if (String(this.entries[drag.index].box) !== String(drag.before)) this.commit();
  }

  cancel() {
    if (this.drag?.before) this.entries[this.drag.index].box = this.drag.before;
    this.drag = null;
  }

  key(event) {
    const by = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (event.key === "Escape") {
      this.cancel();
      this.show();
    } else if (!this.entry) return;
    else if (event.key === "Delete" || event.key === "Backspace") this.delete();
    else if (by && hasBox(this.entry)) {
      const [width, height] = this.size();
      const step = Math.max(width, height) / STEPS;
      this.entry.box = moved(this.entry.box, (by[0] * step) / width, (by[1] * step) / height);
      this.commit();
    } else return;
    event.preventDefault();
    event.stopPropagation(); // else Delete takes the node away
  }

  // --- what is seen

  show() {
    const entry = this.entry;
    if (this.prompt.value !== String(entry?.prompt ?? "")) this.prompt.value = String(entry?.prompt ?? "");
    for (const control of [this.prompt, this.front, this.remove]) control.disabled = !entry;
    for (const { input, field, usual } of this.numbers) {
      input.disabled = !entry;
      input.value = entry ? (entry[field] ?? usual) : "";
    }
    this.draw();
  }

  draw() {
    const [width, height] = this.size();
    this.stage.style.aspectRatio = `${width} / ${height}`;
    this.stage.style.setProperty("--mc-shape", width / height);
    const drawing = this.drag?.box ? [this.box({ box: this.drag.box }, this.entries.length)] : [];
    const boxes = this.entries.map((entry, index) => hasBox(entry) && this.box(entry, index)).filter(Boolean);
    this.hint.textContent = this.problem || "Drag a box where somebody should be";
    this.hint.classList.toggle("mc-problem", Boolean(this.problem));
    this.stage.replaceChildren(...(boxes.length || drawing.length ? [] : [this.hint]), ...boxes, ...drawing);
    this.tabs.replaceChildren(
      ...this.entries.map((entry, index) => this.tab(entry, index)),
      button("+ box", "Add a region in the middle", () => this.add([0.25, 0.25, 0.75, 0.75])),
    );
  }

  box(entry, index) {
    const [left, top, right, bottom] = entry.box;
    const shown = made("div", "mc-box");
    shown.dataset.region = index;
    shown.style.setProperty("--mc-colour", colour(index));
    Object.assign(shown.style, {
      left: `${left * 100}%`, top: `${top * 100}%`,
      width: `${(right - left) * 100}%`, height: `${(bottom - top) * 100}%`,
    });
    if (index < this.entries.length) shown.append(made("span", "mc-name", { textContent: title(entry, index, true) }));
    if (index === this.chosen && this.drag?.kind !== "draw") {
      shown.classList.add("mc-chosen");
      for (const handle of HANDLE_NAMES) {
        const knob = made("div", `mc-handle mc-${handle}`);
        knob.dataset.handle = handle;
        shown.append(knob);
      }
    }
    return shown;
  }

  tab(entry, index) {
    const tab = button(title(entry, index), String(entry.prompt ?? ""), () => this.choose(index));
    tab.style.setProperty("--mc-colour", colour(index));
    tab.classList.add("mc-tab");
    tab.classList.toggle("mc-chosen", index === this.chosen);
    return tab;
  }
}

function colour(index) {
  return `rgb(${COLOURS[index % COLOURS.length].join(" ")})`;
}

/** "2 tom + hat", or whole "2 tom + hat: a <tom> with a <hat>". */
function title(entry, index, whole = false) {
  const names = conceptNames(entry).join(" + ");
  const prompt = String(entry.prompt ?? "").trim();
  const place = hasBox(entry) ? "" : entry.mask === undefined ? " (automatic)" : " (mask)";
  if (!whole) return `${index + 1} ${names || "no concept"}${place}`;
  return `${index + 1} ${[names, prompt].filter(Boolean).join(": ")}`;
}

function made(kind, name, properties = {}) {
  return Object.assign(document.createElement(kind), { className: name, ...properties });
}

function button(text, hint, press) {
  const found = made("button", "mc-button", { type: "button", textContent: text, title: hint });
  found.addEventListener("click", press);
  return found;
}
