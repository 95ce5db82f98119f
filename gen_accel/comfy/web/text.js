// Shows the text of our output nodes on the node itself; it is neither saved nor sent.
import { app } from "../../scripts/app.js";
import { ComfyWidgets } from "../../scripts/widgets.js";

app.registerExtension({
  name: "gen_accel.text",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!nodeData.name.startsWith("GenAccel") || !nodeData.output_node) return;
    const onExecuted = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (message) {
      onExecuted?.apply(this, arguments);
      let shown = this.widgets?.find((widget) => widget.name === "shown");
      if (!shown) {
        const options = { multiline: true, socketless: true };
        shown = ComfyWidgets.STRING(this, "shown", ["STRING", options], app).widget;
        shown.inputEl.readOnly = true;
        shown.serialize = shown.options.serialize = false;
        const lines = Math.min(message.text.join("\n").split("\n").length, 16);
        this.setSize([Math.max(this.size[0], 420), this.computeSize()[1] + 18 * lines]);
      }
      shown.value = message.text.join("\n");
    };
  },
});
