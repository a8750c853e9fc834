// Drag Points in ComfyUI: the picture with its points as a DOM widget, which both renderers of the frontend draw. The
// value stays in core's own text widget "points"; it is hidden until someone asks for it, and remains usable, linkable
// and promotable like any other text, also when this script is missing.
import { app } from "../../scripts/app.js"
import { api } from "../../scripts/api.js"
import { Editor } from "./drag_points/editor.js"
import { isLinked, loadedFile, sourceOf, textOf, viewQuery } from "./drag_points/upstream.js"

const NODE = "RetraceDragPoints"
const RESULT = "retrace_picture" // nodes/drag_points.py
const LOOK_MS = 400
const SIZE = [400, 500]

const pickers = new Set()
const rootGraph = () => app.rootGraph ?? app.graph.rootGraph ?? app.graph
const placeOf = (source) => source && `${source.node?.id} ${source.slot}`

class Picker {
  executed = null // the file that the last run showed, with the source that it came from
  restored = null
  shown = null

  constructor(node, text) {
    this.node = node
    this.text = text
    this.editor = new Editor({
      onChange: (value) => {
        text.value = value
        keepForUndo()
      },
      onJSON: (shown) => this.showText(shown),
    })
    this.widget = node.addDOMWidget("retrace_drag_points", "retrace_drag_points", this.editor.element, {
      getValue: () => "",
      setValue: () => {},
      getMinHeight: () => 300,
      hideOnZoom: false,
      serialize: false,
    })
    this.widget.serialize = false // the text is the value; this only shows it
    this.makeRoom()
    this.showText(false)
    const { callback } = text
    text.callback = (...given) => {
      callback?.apply(text, given)
      this.look()
    }
    this.editor.element.addEventListener("wheel", forwardWheel, { passive: false })
    for (const name of ["pointerdown", "pointermove", "pointerup"])
      this.editor.element.addEventListener(name, forwardMiddleButton)
    keepUndoApart(this.editor.element)
    node.setSize([Math.max(node.size[0], SIZE[0]), Math.max(node.size[1], SIZE[1])])
  }

  /** While the text is hidden it takes no room, and its input slot stands beside the picture. */
  makeRoom() {
    const { text, widget } = this
    const layout = text.computeLayoutSize
    const nothing = { minHeight: 0, maxHeight: 0, minWidth: 0 }
    text.computeLayoutSize = (node) => (text.hidden ? nothing : layout.call(text, node))
    let y = text.y
    Object.defineProperty(text, "y", {
      configurable: true,
      get: () => (text.hidden ? widget.y : y),
      set: (value) => {
        y = value
      },
    })
  }

  showText(shown) {
    const { node, text } = this
    text.hidden = !shown // for the canvas
    text.options.canvasOnly = !shown // for Nodes 2.0, which looks again when the list of widgets changes
    const index = node.widgets.indexOf(text)
    node.widgets.splice(index, 1)
    node.widgets.splice(index, 0, text)
    if (shown) node.setSize([node.size[0], Math.max(node.size[1], node.computeSize()[1])])
    node.setDirtyCanvas?.(true, true)
  }

  /** Follow what has changed around the node: links, files, zoom. No event tells of all of them. */
  look() {
    const { node, editor } = this
    if (!node.graph || !editor.element.isConnected) return
    const root = rootGraph()
    editor.setLocked(isLinked(node, "points"))
    editor.setText(textOf(node, "points", root) ?? "")
    const source = sourceOf(node, "image", root)
    const from = placeOf(source)
    this.restore(from)
    const file = loadedFile(source, root) ?? (this.executed?.from === from ? this.executed.file : null)
    const mask = sourceOf(node, "mask", root)
    const masked = mask?.slot === 1 ? loadedFile(mask, root) : null // the second output of Load Image is its mask
    this.show(file, masked && /\.(png|webp)$/i.test(masked.filename) ? masked : null, source)
    editor.stage.redrawAfterZoom()
  }

  /** What an earlier run showed: the frontend keeps it while another workflow is open. */
  restore(from) {
    const { graph, id } = this.node
    const key = graph.isRootGraph === false ? `${graph.id}:${id}` : String(id)
    const file = app.nodeOutputs?.[key]?.[RESULT]?.[0]
    if (!file || file.filename === this.restored) return
    this.restored = file.filename
    this.executed ??= { file, from }
  }

  /** Take the picture of a run that has just ended. */
  take(output) {
    const file = output?.[RESULT]?.[0]
    if (!file) return
    this.executed = { file, from: placeOf(sourceOf(this.node, "image", rootGraph())) }
    this.look()
  }

  show(file, masked, source) {
    const note = !source ? "Connect an image." : file ? "" : "The image appears here after the first run: press Run."
    const wanted = JSON.stringify([note, file, masked])
    if (wanted === this.shown) return
    this.shown = wanted
    if (!file) return this.editor.setPicture(null, null, note)
    // A PNG may be transparent where its mask is; a JPEG is left as it is, for it may carry a rotation.
    const picture = loadImage(file, /\.png$/i.test(file.filename) ? "rgb" : "")
    const alpha = masked && loadImage(masked, "a").then(unlessOpaque, () => null)
    Promise.all([picture, alpha]).then(
      ([image, mask]) => this.shown === wanted && this.editor.setPicture(image, mask),
      () => this.shown === wanted && this.editor.setPicture(null, null, `'${file.filename}' cannot be loaded.`),
    )
  }
}

function loadImage(file, channel) {
  const image = new Image()
  image.src = api.apiURL(`/view?${viewQuery(file, channel)}${app.getRandParam?.() ?? ""}`)
  return image.decode().then(() => image)
}

/** An image that is clear somewhere; null for one that is not: Load Image then gives no mask. */
function unlessOpaque(image) {
  const canvas = document.createElement("canvas")
  canvas.width = canvas.height = 256
  const context = canvas.getContext("2d", { willReadFrequently: true })
  context.drawImage(image, 0, 0, 256, 256)
  return context.getImageData(0, 0, 256, 256).data.some((value, i) => i % 4 === 3 && value < 255) ? image : null
}

/** The node that runs under this id: its own, after those of the nodes that the subgraphs around it stand as. */
function executedNode(id) {
  let graph = rootGraph()
  let node
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById(part)
    graph = node?.subgraph
  }
  return node
}

/** Make the edit a step of the graph's own undo, as the frontend does after clicks. */
function keepForUndo() {
  const tracker = app.extensionManager?.workflow?.activeWorkflow?.changeTracker
  if (tracker?.captureCanvasState) tracker.captureCanvasState()
  else tracker?.checkState?.()
}

/** The frontend's undo keys pass by what calls itself a text area: the editor has its own, as a text area has. */
function keepUndoApart(element) {
  for (const part of element.querySelectorAll("canvas, button"))
    Object.defineProperty(part, "type", { value: "textarea" })
}

/** The wheel zooms the graph, also over the picture. */
function forwardWheel(event) {
  event.preventDefault()
  event.stopPropagation()
  app.canvas.processMouseWheel(event)
}

/** The middle button moves the graph, also over the picture. */
function forwardMiddleButton(event) {
  const ends = event.type === "pointermove" ? event.buttons & 4 : event.button === 1
  if (!ends) return
  const process = { pointerdown: "processMouseDown", pointermove: "processMouseMove", pointerup: "processMouseUp" }
  app.canvas[process[event.type]](event)
}

app.registerExtension({
  name: "retrace.DragPoints",
  setup() {
    setInterval(() => pickers.forEach((picker) => picker.look()), LOOK_MS)
    // A run that fails for lack of points still brings the picture to place them on.
    api.addEventListener("retrace.drag_points", ({ detail }) => {
      const node = executedNode(detail.node)
      for (const picker of pickers) if (picker.node === node) picker.take(detail)
    })
  },
  nodeCreated(node) {
    if (node.comfyClass !== NODE) return
    const text = node.widgets?.find((widget) => widget.name === "points")
    if (!text) return
    const picker = new Picker(node, text)
    const { onAdded, onRemoved, onExecuted, onConnectionsChange } = node
    node.onAdded = function () {
      onAdded?.apply(this, arguments)
      pickers.add(picker)
    }
    node.onRemoved = function () {
      onRemoved?.apply(this, arguments)
      pickers.delete(picker)
    }
    node.onExecuted = function (output) {
      onExecuted?.apply(this, arguments)
      picker.take(output)
    }
    node.onConnectionsChange = function () {
      onConnectionsChange?.apply(this, arguments)
      picker.look()
    }
  },
})
