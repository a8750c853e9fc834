// What is drawn on the picture, with undo: pairs of points, strokes, and which point is selected.
import { MOST_POINTS, onPicture, read, write } from "./value.js"

const MERGE_MS = 1000 // pushes with an arrow key that follow each other this fast are undone together

export class Drawing {
  pairs = []
  strokes = []
  /** Why the text cannot be read; it stays as it is until someone corrects or clears it. */
  error = null
  /** `{index, end}` with end "handle" or "target", or null. */
  selected = null
  text = ""
  #past = []
  #future = []
  #lastEdit = { key: null, time: 0 }

  /** `onChange(text)` is called after every change that was made here, and not after `load`. */
  constructor(onChange) {
    this.onChange = onChange
  }

  /** Take a text from outside; the same text changes nothing, another one forgets what could be undone. */
  load(text) {
    if (text === this.text) return
    this.#past = []
    this.#future = []
    this.#show(text)
  }

  #show(text) {
    this.text = text
    try {
      Object.assign(this, read(text), { error: null })
    } catch (error) {
      Object.assign(this, { pairs: [], strokes: [], error: error.message })
    }
    if (this.selected?.index >= this.pairs.length) this.selected = null
    this.#lastEdit.key = null
  }

  #commit(key = null) {
    const text = write(this)
    if (text === this.text) return
    const now = performance.now()
    const merges = key !== null && key === this.#lastEdit.key && now - this.#lastEdit.time < MERGE_MS
    if (!merges) this.#past.push(this.text)
    this.#future = []
    this.#lastEdit = { key, time: now }
    this.text = text
    this.error = null
    this.onChange(text)
  }

  get canUndo() {
    return this.#past.length > 0
  }

  get canRedo() {
    return this.#future.length > 0
  }

  undo() {
    this.#travel(this.#past, this.#future)
  }

  redo() {
    this.#travel(this.#future, this.#past)
  }

  #travel(from, to) {
    if (!from.length) return
    to.push(this.text)
    this.#show(from.pop())
    this.onChange(this.text)
  }

  get isFull() {
    return this.pairs.length >= MOST_POINTS
  }

  add(handle, target) {
    if (this.isFull) return
    this.pairs.push({ handle: onPicture(handle), target: onPicture(target) })
    this.selected = { index: this.pairs.length - 1, end: "target" }
    this.#commit()
  }

  /** Move the selected point without keeping it for undo: a drag that goes on, until `drop`. */
  drag(point) {
    this.pairs[this.selected.index][this.selected.end] = onPicture(point)
  }

  drop() {
    this.#commit()
  }

  /** Forget a drag that has not ended. */
  revert() {
    this.#show(this.text)
  }

  /** Move the selected point by that much, in shares of the picture. */
  push(dx, dy) {
    const { index, end } = this.selected
    const [x, y] = this.pairs[index][end]
    this.drag([x + dx, y + dy])
    this.#commit(`push ${index} ${end}`)
  }

  remove(index) {
    this.pairs.splice(index, 1)
    this.selected = null
    this.#commit()
  }

  paint(stroke) {
    this.strokes.push(stroke)
    this.#commit()
  }

  clearPoints() {
    this.pairs = []
    this.selected = null
    this.#commit()
  }

  clearStrokes() {
    this.strokes = []
    this.#commit()
  }

  /** Select the next (1) or previous (-1) point: handle, target, next handle. False beyond the last or first one. */
  step(direction, around) {
    const count = 2 * this.pairs.length
    if (!count) return false
    const at = this.selected ? 2 * this.selected.index + (this.selected.end === "target") : direction > 0 ? -1 : count
    let next = at + direction
    if (next < 0 || next >= count) {
      if (!around) {
        this.selected = null
        return false
      }
      next = (next + count) % count
    }
    this.selected = { index: Math.floor(next / 2), end: next % 2 ? "target" : "handle" }
    return true
  }
}
