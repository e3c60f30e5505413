/** Puts the editor of regions on the node Draw Regions; its text widget keeps what is drawn. */

import { app } from "../../scripts/app.js";
import { RegionEditor } from "./region_editor.js";

const NODE = "DrawRegions";
const LEAST = [400, 600]; // of the node, in canvas pixels
const EDITOR = 300; // least height of the editor

app.registerExtension({
  name: "modular-concepts.draw-regions",
  setup() {
    const style = document.createElement("link");
    Object.assign(style, { rel: "stylesheet", href: new URL("./region_editor.css", import.meta.url).href });
    document.head.append(style);
  },
  nodeCreated(node) {
    if (node.comfyClass === NODE) addEditor(node);
  },
});

function addEditor(node) {
  const widget = (name) => node.widgets.find((found) => found.name === name);
  const json = widget("json");
  const sides = [widget("width"), widget("height")];
  let ours = false; // a change of the text that comes from the editor
  const set = (text) => {
    ours = true;
    json.value = text; // calls back
    ours = false;
  };
  json.hidden = json.options.hidden = true;
  const editor = new RegionEditor({
    text: () => String(json.value ?? ""),
    size: () => sides.map((side) => Number(side.value) || 512),
    note: set,
    keep(text) {
      app.canvas.emitBeforeChange(); // what the undo history listens to
      set(text);
      app.canvas.emitAfterChange();
    },
  });
  // last, since a widget that is not saved would shift the values of those behind it
  node.addDOMWidget("regions_editor", "modular_concepts_regions", editor.element, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => EDITOR,
  }).serialize = false;
  for (const side of sides) after(side, "callback", () => editor.draw());
  after(json, "callback", () => ours || editor.load());
  after(node, "onConfigure", () => {
    editor.load();
    requestAnimationFrame(() => takePlace(node, editor.element));
  });
  node.setSize(node.size.map((side, axis) => Math.max(side, LEAST[axis])));
}

/** Undo makes a node anew, but in Nodes 2.0 the page goes on showing the editor of the one before it. */
function takePlace(node, element) {
  const shown = document.querySelector(`[data-node-id="${node.id}"] .mc-regions`);
  if (shown && shown !== element) shown.replaceWith(element);
}

function after(object, name, then) {
  const before = object[name];
  object[name] = function (...given) {
    const answer = before?.apply(this, given);
    then();
    return answer;
  };
}
