// Takes out of a saved node what is no value of its inputs. Front end 1.27 saves the text that a node shows as one more
// value, which would land in an input that has been added since.

import { app } from "../../../scripts/app.js";

app.registerExtension({
  name: "TriLoRA.SavedValues",

  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!nodeData.name.startsWith("TriLoRA")) return;
    const inputs = { ...nodeData.input.required, ...nodeData.input.optional };
    const { configure } = nodeType.prototype;
    nodeType.prototype.configure = function (saved, ...others) {
      return configure.call(this, withoutSurplus(saved, this.widgets ?? [], inputs), ...others);
    };
  },
});

/** The saved node with the values of the inputs that it had: new inputs come last. */
function withoutSurplus(saved, widgets, inputs) {
  if (!Array.isArray(saved.widgets_values)) return saved;
  const own = widgets.filter((widget) => widget.name in inputs);
  // a widget may bring others along, such as what becomes of a seed after a run
  const count = saidToHave(saved.inputs ?? [], own).reduce((sum, widget) => sum + 1 + (widget.linkedWidgets?.length ?? 0), 0);
  return { ...saved, widgets_values: saved.widgets_values.slice(0, count) };
}

/**
 * The widgets that a saved node lists among its inputs. All supported front ends list all of them; other programs and
 * older front ends list none, or a few that links have replaced: then it may have had every one.
 */
function saidToHave(inputs, own) {
  const names = new Set(inputs.map((input) => input.widget?.name));
  const listed = own.filter((widget) => names.has(widget.name));
  if (!listed.length) return inputs.some((input) => "localized_name" in input) ? [] : own;
  return listed.every((widget, n) => widget === own[n]) ? listed : own;
}
