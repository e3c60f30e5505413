/** Regions as the text that the node keeps, and what a pointer does to their boxes: no page, no state.
 *
 * A box is [left, top, right, bottom] in fractions of the picture, a point [x, y] in the same.
 */

// Those of modular_concepts/regions/preview.py, so that a region keeps its colour.
export const COLOURS = [
  [214, 72, 66], [46, 118, 190], [58, 152, 88], [222, 150, 32],
  [132, 82, 176], [22, 154, 160], [204, 92, 148], [112, 104, 60],
];
export const SMALLEST = 0.02; // a side below it is a click, not a box
const HANDLES = { n: [1], e: [2], s: [3], w: [0], nw: [0, 1], ne: [2, 1], se: [2, 3], sw: [0, 3] };
export const HANDLE_NAMES = Object.keys(HANDLES);

/** Entries of the text, boxes in fractions.  Throws an Error that says in words what is wrong. */
export function parsed(text, width, height) {
  let entries;
  try {
    entries = JSON.parse(text.trim() || "[]");
  } catch (error) {
    throw new Error("The regions of this node are no JSON: " + error.message);
  }
  if (entries && !Array.isArray(entries) && Array.isArray(entries.regions)) entries = entries.regions;
  const whole = Array.isArray(entries) && entries.every((entry) => entry && typeof entry === "object");
  if (!whole) throw new Error("The regions of this node are no list of objects");
  return entries.map((entry) => inFractions(entry, width, height));
}

/** One entry a line, so that a workflow's changes can be read. */
export function written(entries) {
  return entries.length ? "[\n" + entries.map((entry) => JSON.stringify(entry)).join(",\n") + "\n]" : "[]";
}

function inFractions(entry, width, height) {
  if (entry.units !== "pixels") return entry;
  const { units, ...kept } = entry;
  if (hasBox(kept)) kept.box = kept.box.map((edge, n) => rounded(edge / (n % 2 ? height : width)));
  if (kept.feather) kept.feather = rounded(kept.feather / Math.min(width, height));
  return kept;
}

/** Whether it has a box to draw: not a mask, not a place that the sampler finds. */
export function hasBox(entry) {
  return Array.isArray(entry.box) && entry.box.length === 4 && entry.box.every(Number.isFinite);
}

/** Names of the concepts that act in it, as Python finds them. */
export function conceptNames(entry) {
  if (Array.isArray(entry.concepts)) return entry.concepts.map(String);
  return [...String(entry.prompt ?? "").matchAll(/<([^<>\s]+)>/g)].map((found) => found[1]);
}

export function rounded(value) {
  return Math.round(value * 10000) / 10000;
}

const within = (value) => Math.min(1, Math.max(0, value));

/** The box between two points. */
export function boxBetween([a, b], [c, d]) {
  return [Math.min(a, c), Math.min(b, d), Math.max(a, c), Math.max(b, d)].map((edge) => rounded(within(edge)));
}

export function isBox([left, top, right, bottom]) {
  return right - left >= SMALLEST && bottom - top >= SMALLEST;
}

/** The box moved by (dx, dy), of the same size and wholly inside the picture. */
export function moved([left, top, right, bottom], dx, dy) {
  const x = Math.min(Math.max(dx, -left), 1 - right);
  const y = Math.min(Math.max(dy, -top), 1 - bottom);
  return [left + x, top + y, right + x, bottom + y].map(rounded);
}

/** The box with a handle (n, e, s, w or a corner such as se) at the point; no side goes below the smallest. */
export function resized(box, handle, point) {
  const changed = [...box];
  for (const edge of HANDLES[handle]) {
    const axis = edge % 2;
    const wanted = within(point[axis]);
    changed[edge] = rounded(
      edge < 2 ? Math.min(wanted, box[axis + 2] - SMALLEST) : Math.max(wanted, box[axis] + SMALLEST),
    );
  }
  return changed;
}

/** The point, each coordinate at an edge of a box or of the picture's halves where one is near, else at a whole step.
 *
 * near, step: [x, y] in fractions.  boxes: those whose edges attract.
 */
export function snapped(point, boxes, near, step) {
  return point.map((value, axis) => {
    const edges = [0, 0.5, 1, ...boxes.flatMap((box) => [box[axis], box[axis + 2]])];
    const closest = edges.reduce((best, edge) => (Math.abs(edge - value) < Math.abs(best - value) ? edge : best));
    if (Math.abs(closest - value) <= near[axis]) return closest;
    return rounded(within(Math.round(value / step[axis]) * step[axis]));
  });
}
