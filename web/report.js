// Shows the text that a Retrace node reports (ui.text) inside the node. A DOM widget, because that is what both
// renderers of the frontend draw.
import { app } from "../../scripts/app.js"

const REPORTING = new Set([
  "RetraceDDIMInverter",
  "RetraceNullTextOptimizer",
  "RetraceEditFriendlyInverter",
  "RetracePromptToPrompt",
  "RetraceAttentionMask",
  "RetraceBackgroundReconstruction",
  "RetraceEditReport",
  "RetraceIdentityLoRA",
  "RetraceDragLatentOptimizer",
  "RetraceWarpAndInpaint",
])

function addReport(node) {
  const element = document.createElement("pre")
  element.style.cssText =
    "margin:0;padding:6px 8px;overflow:auto;white-space:pre;font:11px/1.4 ui-monospace,monospace;" +
    "background:var(--comfy-input-bg);color:var(--input-text);border-radius:6px;user-select:text;box-sizing:border-box"
  element.textContent = "The report appears here after a run."
  const widget = node.addDOMWidget("retrace_report", "retrace_report", element, {
    getValue: () => element.textContent,
    setValue: () => {},
    getMinHeight: () => 120,
    hideOnZoom: false,
    serialize: false,
  })
  widget.serialize = false // neither in the workflow nor in the prompt: it is a result
  const onExecuted = node.onExecuted
  node.onExecuted = function (output) {
    onExecuted?.apply(this, arguments)
    if (output?.text) element.textContent = [output.text].flat().join("\n")
  }
}

app.registerExtension({
  name: "retrace.Report",
  nodeCreated(node) {
    if (REPORTING.has(node.comfyClass)) addReport(node)
  },
})
