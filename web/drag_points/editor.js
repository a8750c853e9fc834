// The editor of Drag Points: a toolbar, the picture with its points, a line that says what is going on. It knows
// nothing of ComfyUI: texts and pictures come in, texts go out.
import { Drawing } from "./drawing.js"
import { RADIUS, frameOf, paint, toCanvas, toPicture } from "./paint.js"
import { Toolbar, addStyle, make } from "./toolbar.js"
import { MOST_POINTS, onPicture, thinned } from "./value.js"

const CLICK_PX = 4 // a press that moves less is a click
const HIT_PX = 12

export class Editor {
  #picture = null
  #alpha = null
  #note = ""
  #locked = false
  #json = false
  #mode = "points"
  #radius = 0.05
  #gesture = null // what the pressed pointer does: {kind: "move" | "place" | "paint", ...}
  #pending = null // a pair whose target is still to be placed
  #hover = null // where the pointer is, on the picture
  #frame = null
  #scheduled = false

  /** `onChange(text)` after every edit; `onJSON(shown)` when the text should be shown or hidden. */
  constructor({ onChange, onJSON }) {
    addStyle()
    this.drawing = new Drawing(onChange)
    this.toolbar = new Toolbar({
      mode: (mode) => this.#setMode(mode),
      radius: (radius) => this.#setRadius(radius),
      add: () => this.#edit(() => this.drawing.add([0.45, 0.5], [0.55, 0.5])),
      undo: () => this.#edit(() => this.drawing.undo()),
      redo: () => this.#edit(() => this.drawing.redo()),
      remove: () => this.#edit(() => this.drawing.remove(this.drawing.selected.index)),
      clear: () => this.#edit(() => this.#clear()),
      json: () => {
        this.#json = !this.#json
        onJSON(this.#json)
        this.#refresh()
      },
    })
    this.canvas = make("canvas", {
      tabIndex: 0,
      role: "application",
      "aria-label": "Picture with drag points. Tab or [ and ] select a point, arrow keys move it by a pixel, with shift by ten, Delete removes it.",
    })
    this.note = make("div", { className: "retrace-drag-note" })
    this.status = make("div", { className: "retrace-drag-status", role: "status" })
    const stage = make("div", { className: "retrace-drag-stage" }, this.canvas, this.note)
    const foot = make("div", { className: "retrace-drag-foot" }, this.status, this.toolbar.size)
    this.element = make("div", { className: "retrace-drag" }, this.toolbar.element, stage, foot)
    this.#listen()
    new ResizeObserver(() => this.redraw()).observe(stage)
    this.#refresh()
  }

  // -- from outside ---------------------------------------------------------------------------------------------------

  setText(text) {
    if (text === this.drawing.text) return
    this.#gesture = this.#pending = null
    this.drawing.load(text)
    this.#refresh()
  }

  /** The picture to draw on and, from its transparency, the mask that comes with it; without one, a note says why. */
  setPicture(picture, alpha = null, note = "") {
    this.#picture = picture
    this.#alpha = alpha
    this.#note = note
    this.#refresh()
  }

  /** The text comes from elsewhere: it shows, but cannot be edited here. */
  setLocked(locked) {
    if (locked === this.#locked) return
    this.#locked = locked
    this.#refresh()
  }

  /** Paint again, as sharp as the zoom of the graph asks for. */
  redraw() {
    if (this.#scheduled) return
    this.#scheduled = true
    requestAnimationFrame(() => {
      this.#scheduled = false
      this.#paint()
    })
  }

  /** Paint again when the graph was zoomed since. */
  redrawAfterZoom() {
    if (this.canvas.width !== this.#sharpWidth()) this.redraw()
  }

  // -- state ----------------------------------------------------------------------------------------------------------

  get #editable() {
    return this.#picture !== null && !this.#locked && this.drawing.error === null
  }

  #edit(change) {
    this.#gesture = this.#pending = null
    change()
    this.canvas.focus({ preventScroll: true })
    this.#refresh()
  }

  #setMode(mode) {
    this.#mode = mode
    this.#pending = null
    if (mode !== "points") this.drawing.selected = null
    this.#refresh()
  }

  #setRadius(radius) {
    this.#radius = Math.min(0.25, Math.max(0.005, radius))
    this.#refresh()
  }

  #clear() {
    if (this.drawing.error !== null || this.#mode === "points") this.drawing.clearPoints()
    else this.drawing.clearStrokes()
  }

  #refresh() {
    const { drawing } = this
    const filled = this.#mode === "points" ? drawing.pairs : drawing.strokes
    this.toolbar.show({
      mode: this.#mode,
      radius: this.#radius,
      locked: this.#locked,
      json: this.#json,
      canAdd: this.#editable && !drawing.isFull,
      canUndo: drawing.canUndo,
      canRedo: drawing.canRedo,
      canRemove: drawing.selected !== null,
      canClear: filled.length > 0 || drawing.error !== null,
    })
    this.canvas.className = !this.#editable ? "idle" : this.#mode === "points" ? "" : "brush"
    this.note.textContent = this.#picture ? "" : this.#note
    this.status.className = `retrace-drag-status${drawing.error !== null && !this.#locked ? " error" : ""}`
    this.status.textContent = this.status.title = this.#statusText()
    this.redraw()
  }

  #statusText() {
    const { pairs, strokes, selected, error } = this.drawing
    if (this.#locked) return "The points come from outside this node."
    if (error !== null) return `${error.replace(/\.?$/, ".")} Correct it under JSON, or press Clear.`
    if (this.#pending) return `Now click where point ${pairs.length + 1} should go (Esc cancels).`
    const count = pairs.length === 1 ? "1 point" : `${pairs.length} points`
    const painted = strokes.length ? ", mask painted" : ""
    if (!this.#picture) return pairs.length || strokes.length ? `${count}${painted}.` : ""
    if (this.#mode === "brush") return "Paint the part that may change; without paint all of it may."
    if (this.#mode === "erase") return "Erase what may not change."
    if (selected) {
      const [x, y] = pairs[selected.index][selected.end]
      const [column, row] = [Math.round(x * this.#picture.width), Math.round(y * this.#picture.height)]
      return `Point ${selected.index + 1} of ${pairs.length}, ${selected.end}: x ${column}, y ${row} px`
    }
    if (pairs.length >= MOST_POINTS) return `${count}: more are not possible.`
    if (pairs.length) return `${count}${painted}. Drag a dot to move it, right-click removes it.`
    return "Press on what should move and drag to where it should go."
  }

  // -- painting -------------------------------------------------------------------------------------------------------

  #sharpWidth() {
    const { clientWidth } = this.canvas
    const zoom = clientWidth ? this.canvas.getBoundingClientRect().width / clientWidth : 1
    return Math.round(clientWidth * Math.min(4, Math.max(0.5, zoom)) * (window.devicePixelRatio || 1))
  }

  #paint() {
    const { clientWidth: width, clientHeight: height } = this.canvas
    if (!width || !height) return
    this.canvas.width = this.#sharpWidth()
    const scale = this.canvas.width / width
    this.canvas.height = Math.round(height * scale)
    this.#frame = this.#picture && frameOf(this.#picture, width, height)
    if (!this.#picture) return
    const context = this.canvas.getContext("2d")
    context.setTransform(scale, 0, 0, scale, 0, 0)
    const { pairs, selected } = this.drawing
    const paints = this.#mode !== "points" && this.#editable
    paint(context, {
      frame: this.#frame,
      picture: this.#picture,
      alpha: this.#alpha,
      pairs,
      strokes: this.#gesture?.kind === "paint" ? [...this.drawing.strokes, this.#gesture.stroke] : this.drawing.strokes,
      selected,
      pending: this.#pending && { handle: this.#pending.handle, target: this.#pending.target ?? this.#hover },
      brush: paints && this.#hover ? { point: this.#hover, radius: this.#radius } : null,
    })
  }

  // -- pointer --------------------------------------------------------------------------------------------------------

  #listen() {
    const { canvas } = this
    canvas.addEventListener("pointerdown", (event) => this.#press(event))
    canvas.addEventListener("pointermove", (event) => this.#move(event))
    canvas.addEventListener("pointerup", (event) => this.#release(event))
    canvas.addEventListener("pointercancel", (event) => this.#release(event))
    canvas.addEventListener("pointerleave", () => {
      this.#hover = null
      this.redraw()
    })
    this.element.addEventListener("contextmenu", (event) => {
      event.preventDefault()
      event.stopPropagation()
    })
    this.element.addEventListener("keydown", (event) => {
      if (!this.#key(event)) return
      event.preventDefault()
      event.stopPropagation()
    })
  }

  /** Where an event lies on the canvas in its own CSS pixels, whatever the zoom of the graph. */
  #at(event) {
    const rectangle = this.canvas.getBoundingClientRect()
    const zoom = rectangle.width / this.canvas.clientWidth
    return { point: [(event.clientX - rectangle.left) / zoom, (event.clientY - rectangle.top) / zoom], zoom }
  }

  /** The point under a place on the canvas, the nearest one: `{index, end}` or null. */
  #hit({ point: [x, y], zoom }) {
    let best = null
    this.drawing.pairs.forEach((pair, index) => {
      for (const end of ["target", "handle"]) {
        const [px, py] = toCanvas(pair[end], this.#frame)
        const distance = Math.hypot(px - x, py - y)
        if (distance <= Math.max(RADIUS[end] + 3, HIT_PX / zoom) && !(best?.distance <= distance)) best = { index, end, distance }
      }
    })
    return best && { index: best.index, end: best.end }
  }

  #press(event) {
    if (event.button === 1) return
    this.canvas.focus({ preventScroll: true })
    if (!this.#editable || !this.#frame || this.#gesture) return
    const at = this.#at(event)
    const place = toPicture(at.point, this.#frame)
    const inside = place.every((share) => share >= 0 && share <= 1)
    if (event.button === 2) return this.#pressRight(at)
    this.canvas.setPointerCapture(event.pointerId)
    if (this.#mode !== "points") {
      const stroke = { points: [onPicture(place)], radius: this.#radius, erase: this.#mode === "erase" }
      this.#gesture = { kind: "paint", stroke }
    } else if (this.#pending) {
      this.#pending.target = onPicture(place)
      this.#gesture = { kind: "place", start: at.point, second: true }
    } else {
      const hit = event.altKey ? null : this.#hit(at) // with Alt a new point may start on an old one
      this.drawing.selected = hit
      if (hit) {
        const [x, y] = toCanvas(this.drawing.pairs[hit.index][hit.end], this.#frame)
        this.#gesture = { kind: "move", offset: [x - at.point[0], y - at.point[1]], start: at.point, moved: false }
      } else if (inside && !this.drawing.isFull) {
        this.#pending = { handle: place }
        this.#gesture = { kind: "place", start: at.point }
      }
    }
    this.#refresh()
  }

  #pressRight(at) {
    if (this.#mode !== "points") return
    const hit = this.#pending ? null : this.#hit(at)
    this.#pending = null
    if (hit) this.drawing.remove(hit.index)
    this.#refresh()
  }

  #move(event) {
    if (!this.#frame) return
    const { point } = this.#at(event)
    const place = onPicture(toPicture(point, this.#frame))
    this.#hover = place
    const gesture = this.#gesture
    const far = gesture?.start && Math.hypot(point[0] - gesture.start[0], point[1] - gesture.start[1]) > CLICK_PX
    if (gesture?.kind === "paint") this.#extend(gesture.stroke, place)
    if (gesture?.kind === "place" && (far || gesture.second)) this.#pending.target = place
    if (gesture?.kind === "move" && (far || gesture.moved)) {
      gesture.moved = true
      this.drawing.drag(toPicture([point[0] + gesture.offset[0], point[1] + gesture.offset[1]], this.#frame))
    }
    if (gesture) this.#refresh()
    else this.redraw()
  }

  #extend(stroke, place) {
    const [x, y] = stroke.points[stroke.points.length - 1]
    const distance = Math.hypot((place[0] - x) * this.#frame.width, (place[1] - y) * this.#frame.height)
    if (distance >= 1) stroke.points.push(place)
  }

  #release(event) {
    const gesture = this.#gesture
    this.#gesture = null
    if (!gesture) return
    if (gesture.kind === "move" && gesture.moved) this.drawing.drop()
    if (gesture.kind === "paint") {
      const { stroke } = gesture
      const aspect = this.#frame.height / this.#frame.width
      this.drawing.paint({ ...stroke, points: thinned(stroke.points, Math.min(0.05 * stroke.radius, 0.002), aspect) })
    }
    if (gesture.kind === "place" && this.#pending?.target) {
      this.drawing.add(this.#pending.handle, this.#pending.target)
      this.#pending = null
    }
    if (event.type === "pointercancel") this.#pending = null
    this.#refresh()
  }

  // -- keyboard -------------------------------------------------------------------------------------------------------

  /** Whether the key was for the editor. */
  #key(event) {
    const key = event.key.toLowerCase()
    if (event.ctrlKey || event.metaKey) {
      const undo = key === "z" && !event.shiftKey
      const redo = key === "y" || (key === "z" && event.shiftKey)
      if (undo && !this.#locked) this.#edit(() => this.drawing.undo())
      if (redo && !this.#locked) this.#edit(() => this.drawing.redo())
      return undo || redo
    }
    if (event.target !== this.canvas || event.altKey) return false
    if (key === "delete" || key === "backspace") {
      if (this.#editable && this.drawing.selected) this.#edit(() => this.drawing.remove(this.drawing.selected.index))
      return true // never the node, by one press too many
    }
    if (!this.#editable) return false
    if (key === "escape" && (this.#pending || this.drawing.selected)) {
      this.#pending = this.#gesture = this.drawing.selected = null
      this.#refresh()
      return true
    }
    if (this.#mode !== "points") {
      if (key === "[" || key === "]") this.#setRadius(this.#radius * (key === "[" ? 1 / 1.2 : 1.2))
      return key === "[" || key === "]"
    }
    if (key === "tab" || key === "[" || key === "]") {
      const found = this.drawing.step(key === "[" || (key === "tab" && event.shiftKey) ? -1 : 1, key !== "tab")
      this.#refresh()
      return found
    }
    const direction = { arrowleft: [-1, 0], arrowright: [1, 0], arrowup: [0, -1], arrowdown: [0, 1] }[key]
    if (!direction || !this.drawing.selected) return false
    const step = event.shiftKey ? 10 : 1
    this.drawing.push((direction[0] * step) / this.#picture.width, (direction[1] * step) / this.#picture.height)
    this.#refresh()
    return true
  }
}
