// Hangs the slider panel on the node Block Weights. The text of its input `weights` is all that is stored.

import { app } from "../../../scripts/app.js";
import { BlockPanel } from "./block_panel.js";
import { PresetMenu } from "./block_presets.js";

const NODE = "TriLoRABlockWeights";
const LOOK_EVERY = 100; // ms
const SIZE = [440, 640];

let tables; // layouts and presets, shared by all panels
const views = new Map(); // node id -> the view of a panel that has just gone

app.registerExtension({
  name: "TriLoRA.BlockWeights",

  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name === NODE) tables = nodeData.input.required.weights[1].trilora_blocks;
  },

  nodeCreated(node) {
    if (node.comfyClass === NODE) attach(node);
  },
});

function attach(node) {
  const widget = (name) => node.widgets.find((entry) => entry.name === name);
  const set = (name, value) => {
    widget(name).value = value;
    widget(name).callback?.(value);
  };
  const isLinked = (name) => node.inputs?.find((slot) => slot.widget?.name === name)?.link != null;
  const presets = new PresetMenu(NODE, tables);
  const panel = new BlockPanel({
    state: () => ({
      text: widget("weights").value ?? "",
      dialect: widget("dialect").value,
      layout: isLinked("model_family") ? undefined : tables.layouts[widget("model_family").value],
      get presets() {
        return presets.texts;
      },
      linked: isLinked("weights"),
    }),
    write: (text, isCanonical) => {
      set("weights", text);
      if (isCanonical && widget("dialect").value !== "native") set("dialect", "auto");
    },
    done: () => remember(),
    menu: (button) => presets.open(button, panel),
  });
  leaveToCanvas(panel.root, panel.scroll);
  const added = node.addDOMWidget("panel", "trilora_blocks", panel.root, {
    serialize: false, // not in the prompt
    getMinHeight: () => panel.minHeight,
    margin: 4,
  });
  added.serialize = false; // nor in the workflow
  // the text stays small where there is room for more rows
  widget("weights").options.getMinHeight = () => 60;
  widget("weights").options.getMaxHeight = () => 90;
  node.setSize([Math.max(node.size[0], SIZE[0]), Math.max(node.size[1], SIZE[1])]);

  const { onExecuted } = node;
  node.onExecuted = function (output) {
    panel.ran(output.weights[0], output.block_weights.length === 1 ? output.block_weights[0] : "", output.summary[0]);
    return onExecuted?.apply(this, arguments);
  };

  // Undo, links, subgraphs and scripts change a widget's value in ways of which only some tell: so it is looked at.
  const looking = setInterval(() => {
    panel.refresh();
    if (panel.root.isConnected) return panel.scroll.clientHeight && resume(node, panel);
    // Undo makes the node anew; the newer front end goes on showing the panel of the old one.
    document.querySelector(`.trilora-blocks[data-left="${node.id}"]`)?.replaceWith(panel.root);
  }, LOOK_EVERY);
  const { onRemoved } = node;
  node.onRemoved = function () {
    clearInterval(looking);
    presets.close();
    views.set(node.id, panel.view);
    panel.root.dataset.left = node.id;
    return onRemoved?.apply(this, arguments);
  };
}

/** The wheel zooms where there is nothing to scroll, and with Ctrl everywhere; the middle button drags the canvas. */
function leaveToCanvas(root, scroll) {
  root.addEventListener("wheel", (event) => {
    event.stopPropagation();
    if (!event.ctrlKey && scroll.contains(event.target) && scroll.scrollHeight > scroll.clientHeight) return;
    event.preventDefault();
    app.canvas.processMouseWheel(event);
  });
  root.addEventListener("pointerdown", (event) => event.button === 1 && app.canvas.processMouseDown(event));
  root.addEventListener("pointermove", (event) => event.buttons & 4 && app.canvas.processMouseMove(event));
  root.addEventListener("pointerup", (event) => event.button === 1 && app.canvas.processMouseUp(event));
}

/** Scroll and fold as the panel of this node was before undo made it anew. */
function resume(node, panel) {
  const view = views.get(node.id);
  if (view && views.delete(node.id)) panel.view = view;
}

/** One step for Ctrl+Z. */
function remember() {
  const tracker = app.extensionManager.workflow.activeWorkflow?.changeTracker;
  if (tracker?.captureCanvasState) tracker.captureCanvasState();
  else tracker?.checkState();
}
