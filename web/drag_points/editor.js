// The editor of Drag Points: a toolbar, the picture with its points, a line that says what is going on. It knows
// nothing of ComfyUI: texts and pictures come in, texts go out.
import { Drawing } from "./drawing.js"
import { toPicture } from "./paint.js"
import { Stage } from "./stage.js"
import { statusText } from "./status.js"
import { Toolbar, addStyle, make } from "./toolbar.js"
import { onPicture, thinned } from "./value.js"

const CLICK_PX = 4 // a press that moves less is a click

export class Editor {
  #locked = false
  #json = false
  #mode = "points"
  #radius = 0.05
  #gesture = null // what the pressed pointer does: {kind: "move" | "place" | "paint", ...}
  #pending = null // a pair whose target is still to be placed
  #hover = null // where the pointer is, on the picture

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
    this.status = make("div", { className: "retrace-drag-status", role: "status" })
    this.stage = new Stage(() => this.#scene())
    const foot = make("div", { className: "retrace-drag-foot" }, this.status, this.toolbar.size)
    this.element = make("div", { className: "retrace-drag" }, this.toolbar.element, this.stage.element, foot)
    this.#listen()
    this.#refresh()
  }

  // -- from outside ---------------------------------------------------------------------------------------------------

  setText(text) {
    if (text === this.drawing.text) return
    this.#cancel()
    this.drawing.load(text)
    this.#refresh()
  }

  /** The picture to draw on and, from its transparency, the mask that comes with it; without one, a note says why. */
  setPicture(picture, alpha = null, note = "") {
    if (!picture) this.#cancel()
    Object.assign(this.stage, { picture, alpha })
    this.stage.note.textContent = picture ? "" : note
    this.#refresh()
  }

  /** The text comes from elsewhere: it shows, but cannot be edited here. */
  setLocked(locked) {
    if (locked === this.#locked) return
    this.#locked = locked
    this.#cancel()
    this.#refresh()
  }

  // -- state ----------------------------------------------------------------------------------------------------------

  get #paints() {
    return this.#mode !== "points" && this.#editable
  }

  get #editable() {
    return this.stage.picture !== null && !this.#locked && this.drawing.error === null
  }

  /** Give up what the pointer was doing. */
  #cancel() {
    if (this.#gesture?.kind === "move") this.drawing.revert()
    this.#gesture = this.#pending = null
  }

  #edit(change) {
    this.#cancel()
    change()
    this.stage.canvas.focus({ preventScroll: true })
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
    this.stage.canvas.className = !this.#editable ? "idle" : this.#mode === "points" ? "" : "brush"
    this.status.className = `retrace-drag-status${drawing.error !== null && !this.#locked ? " error" : ""}`
    const places = this.#pending !== null
    const said = statusText(drawing, { picture: this.stage.picture, mode: this.#mode, locked: this.#locked, places })
    this.status.textContent = this.status.title = said
    this.stage.redraw()
  }

  #scene() {
    const { pairs, strokes, selected } = this.drawing
    const gesture = this.#gesture
    return {
      pairs,
      selected,
      strokes: gesture?.kind === "paint" ? [...strokes, gesture.stroke] : strokes,
      pending: this.#pending && { handle: this.#pending.handle, target: this.#pending.target ?? this.#hover },
      brush: this.#paints && this.#hover ? { point: this.#hover, radius: this.#radius } : null,
    }
  }

  // -- pointer --------------------------------------------------------------------------------------------------------

  #listen() {
    const { canvas } = this.stage
    canvas.addEventListener("pointerdown", (event) => this.#press(event))
    canvas.addEventListener("pointermove", (event) => this.#move(event))
    canvas.addEventListener("pointerup", (event) => this.#release(event))
    canvas.addEventListener("pointercancel", (event) => this.#release(event))
    canvas.addEventListener("pointerleave", () => {
      this.#hover = null
      this.stage.redraw()
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

  #press(event) {
    if (event.button !== 0 && event.button !== 2) return
    this.stage.canvas.focus({ preventScroll: true })
    if (!this.#editable || this.#gesture) return
    const at = this.stage.at(event)
    if (event.button === 2) return this.#pressRight(at)
    this.stage.canvas.setPointerCapture(event.pointerId)
    if (this.#mode !== "points") {
      const stroke = { points: [onPicture(at.place)], radius: this.#radius, erase: this.#mode === "erase" }
      this.#gesture = { kind: "paint", stroke }
    } else if (this.#pending) {
      this.#pending.target = onPicture(at.place)
      this.#gesture = { kind: "place", start: at.point, moved: true }
    } else this.#pressPoint(at, event.altKey)
    this.#refresh()
  }

  /** Take hold of a point, or begin a new one; with Alt also on top of an old one. */
  #pressPoint(at, begins) {
    const hit = begins ? null : this.stage.hit(this.drawing.pairs, at)
    this.drawing.selected = hit && { index: hit.index, end: hit.end }
    if (hit) this.#gesture = { kind: "move", offset: hit.offset, start: at.point, moved: false }
    else if (at.place.every((share) => share >= 0 && share <= 1) && !this.drawing.isFull) {
      this.#pending = { handle: at.place }
      this.#gesture = { kind: "place", start: at.point, moved: false }
    }
  }

  #pressRight(at) {
    if (this.#mode !== "points") return
    const hit = this.#pending ? null : this.stage.hit(this.drawing.pairs, at)
    this.#pending = null
    if (hit) this.drawing.remove(hit.index)
    this.#refresh()
  }

  #move(event) {
    const { frame } = this.stage
    if (!frame) return
    const { point, place } = this.stage.at(event)
    this.#hover = onPicture(place)
    const gesture = this.#gesture
    if (!gesture) return this.stage.redraw()
    if (gesture.kind === "paint") this.#extend(gesture.stroke.points, frame)
    else {
      const [dx, dy] = [point[0] - gesture.start[0], point[1] - gesture.start[1]]
      gesture.moved ||= Math.hypot(dx, dy) > CLICK_PX
      const [ox, oy] = gesture.offset ?? [0, 0]
      if (gesture.moved && gesture.kind === "place") this.#pending.target = this.#hover
      else if (gesture.moved) this.drawing.drag(toPicture([point[0] + ox, point[1] + oy], frame))
    }
    this.#refresh()
  }

  #extend(points, frame) {
    const [x, y] = points[points.length - 1]
    const distance = Math.hypot((this.#hover[0] - x) * frame.width, (this.#hover[1] - y) * frame.height)
    if (distance >= 1) points.push(this.#hover)
  }

  #release(event) {
    const gesture = this.#gesture
    this.#gesture = null
    if (!gesture) return
    if (gesture.kind === "move" && gesture.moved) this.drawing.drop()
    if (gesture.kind === "paint") {
      const { stroke } = gesture
      const { width, height } = this.stage.picture
      const tolerance = Math.min(0.05 * stroke.radius, 0.002)
      this.drawing.paint({ ...stroke, points: thinned(stroke.points, tolerance, height / width) })
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
    if (event.target !== this.stage.canvas || event.altKey) return false
    if (key === "delete" || key === "backspace") {
      if (this.#editable && this.drawing.selected) this.#edit(() => this.drawing.remove(this.drawing.selected.index))
      return true // never the node, by one press too many
    }
    if (!this.#editable) return false
    if (key === "escape" && (this.#pending || this.drawing.selected)) {
      this.#cancel()
      this.drawing.selected = null
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
    const { width, height } = this.stage.picture
    const [dx, dy] = direction.map((way) => way * (event.shiftKey ? 10 : 1))
    this.drawing.push(dx / width, dy / height)
    this.#refresh()
    return true
  }
}
