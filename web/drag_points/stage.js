// The canvas of the editor: as sharp as the screen and the zoom of the graph ask for, and where the pointer is on it.
import { RADIUS, frameOf, paint, toCanvas, toPicture } from "./paint.js"
import { make } from "./toolbar.js"

const HIT_PX = 12 // on the screen
const SHARPEST = 4 // pixels of the canvas per CSS pixel, times those of the screen

const LABEL =
  "Image with drag points. Tab or [ and ] select a point, the arrow keys move it by one pixel, or by ten with Shift, " +
  "and Delete removes it."

export class Stage {
  picture = null
  /** The mask that comes with the picture, as an image that is clear there; or null. */
  alpha = null
  #scheduled = false

  /** `scene()` gives what to paint on the picture, see paint.js. */
  constructor(scene) {
    this.scene = scene
    this.canvas = make("canvas", { tabIndex: 0, role: "application", "aria-label": LABEL })
    this.note = make("div", { className: "retrace-drag-note" })
    this.element = make("div", { className: "retrace-drag-stage" }, this.canvas, this.note)
    new ResizeObserver(() => this.redraw()).observe(this.element)
  }

  /** Where the picture lies on the canvas; null without one. */
  get frame() {
    return this.picture && frameOf(this.picture, this.canvas.clientWidth, this.canvas.clientHeight)
  }

  /** Where an event lies: on the canvas in its own CSS pixels, whatever the zoom of the graph, and on the picture. */
  at(event) {
    const rectangle = this.canvas.getBoundingClientRect()
    const zoom = rectangle.width / this.canvas.clientWidth
    const point = [(event.clientX - rectangle.left) / zoom, (event.clientY - rectangle.top) / zoom]
    return { point, zoom, place: toPicture(point, this.frame) }
  }

  /** The nearest point of `pairs` under the pointer: `{index, end, offset}` or null. */
  hit(pairs, { point, zoom }) {
    let [best, nearest] = [null, Infinity]
    pairs.forEach((pair, index) => {
      for (const end of ["target", "handle"]) {
        const [x, y] = toCanvas(pair[end], this.frame)
        const offset = [x - point[0], y - point[1]]
        const distance = Math.hypot(...offset)
        const reach = Math.max(RADIUS[end] + 3, HIT_PX / zoom)
        if (distance <= reach && distance < nearest) [best, nearest] = [{ index, end, offset }, distance]
      }
    })
    return best
  }

  redraw() {
    if (this.#scheduled) return
    this.#scheduled = true
    requestAnimationFrame(() => {
      this.#scheduled = false
      this.#paint()
    })
  }

  redrawAfterZoom() {
    if (this.canvas.width !== this.#sharpWidth()) this.redraw()
  }

  #sharpWidth() {
    const { clientWidth } = this.canvas
    const zoom = clientWidth ? this.canvas.getBoundingClientRect().width / clientWidth : 1
    return Math.round(clientWidth * Math.min(SHARPEST, Math.max(0.5, zoom)) * (window.devicePixelRatio || 1))
  }

  #paint() {
    const { canvas, picture, alpha, frame } = this
    if (!canvas.clientWidth || !canvas.clientHeight) return
    canvas.width = this.#sharpWidth() // which also wipes it
    const scale = canvas.width / canvas.clientWidth
    canvas.height = Math.round(canvas.clientHeight * scale)
    if (!picture) return
    const context = canvas.getContext("2d")
    context.setTransform(scale, 0, 0, scale, 0, 0)
    paint(context, { ...this.scene(), picture, alpha, frame })
  }
}
