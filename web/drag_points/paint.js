// Paints the picture, the mask and the arrows on a canvas. Lengths are CSS pixels of the canvas before any zoom.

const COLOURS = { handle: "#e5322d", target: "#2a7de1", mask: "#ff3fa4", line: "#fff", outline: "rgba(0,0,0,.75)" }
export const RADIUS = { handle: 8, target: 6.5 }
const MASK_OPACITY = 0.5

/** Where a picture of that size lies on a canvas of that size: as large as possible, in the middle. */
export function frameOf(picture, width, height) {
  const margin = 2
  const scale = Math.min((width - 2 * margin) / picture.width, (height - 2 * margin) / picture.height)
  const size = { width: picture.width * scale, height: picture.height * scale }
  return { x: (width - size.width) / 2, y: (height - size.height) / 2, ...size }
}

export const toCanvas = ([x, y], frame) => [frame.x + x * frame.width, frame.y + y * frame.height]
export const toPicture = ([x, y], frame) => [(x - frame.x) / frame.width, (y - frame.y) / frame.height]

/**
 * Paint everything. `scene` holds `frame`, `picture` (an image), `alpha` (an image that is clear where the incoming
 * mask is, or null), `pairs`, `strokes`, `selected`, `pending` ({handle, target}: a pair that is being placed), and
 * `brush` ({point, radius}: the circle under the pointer).
 */
export function paint(context, scene) {
  const { frame } = scene
  context.imageSmoothingQuality = "high"
  context.drawImage(scene.picture, frame.x, frame.y, frame.width, frame.height)
  paintMask(context, scene)
  const pairs = scene.pending ? [...scene.pairs, scene.pending] : scene.pairs
  for (const pair of pairs) if (pair.target) arrow(context, toCanvas(pair.handle, frame), toCanvas(pair.target, frame))
  pairs.forEach((pair, index) => {
    for (const end of ["handle", "target"]) {
      if (!pair[end]) continue
      const selected = scene.selected?.index === index && scene.selected.end === end
      dot(context, toCanvas(pair[end], frame), end, selected, end === "handle" ? index + 1 : null)
    }
  })
  if (scene.brush) circle(context, toCanvas(scene.brush.point, frame), scene.brush.radius * frame.width)
}

function paintMask(context, { frame, strokes, alpha }) {
  if (!strokes.length && !alpha) return
  const { a: scale } = context.getTransform()
  const layer = document.createElement("canvas")
  layer.width = Math.max(1, Math.round(frame.width * scale))
  layer.height = Math.max(1, Math.round(frame.height * scale))
  const pen = layer.getContext("2d")
  pen.fillStyle = pen.strokeStyle = COLOURS.mask
  pen.lineCap = pen.lineJoin = "round"
  const onlyErases = strokes.every((stroke) => stroke.erase)
  if (alpha || onlyErases) pen.fillRect(0, 0, layer.width, layer.height)
  if (alpha) {
    pen.globalCompositeOperation = "destination-out"
    pen.drawImage(alpha, 0, 0, layer.width, layer.height)
  }
  for (const { points, radius, erase } of strokes) {
    pen.globalCompositeOperation = erase ? "destination-out" : "source-over"
    pen.lineWidth = Math.max(1, 2 * radius * layer.width)
    pen.beginPath()
    points.forEach(([x, y], i) => pen[i ? "lineTo" : "moveTo"](x * layer.width, y * layer.height))
    if (points.length === 1) pen.lineTo(points[0][0] * layer.width + 0.01, points[0][1] * layer.height)
    pen.stroke()
  }
  context.globalAlpha = MASK_OPACITY
  context.drawImage(layer, frame.x, frame.y, frame.width, frame.height)
  context.globalAlpha = 1
  context.drawImage(rimOf(layer, scale), frame.x, frame.y, frame.width, frame.height)
}

/** A thin white line around what is painted on a layer, so that it shows on any colour. */
function rimOf(layer, width) {
  const rim = document.createElement("canvas")
  Object.assign(rim, { width: layer.width, height: layer.height })
  const pen = rim.getContext("2d")
  for (let eighth = 0; eighth < 8; eighth++) {
    const angle = (eighth * Math.PI) / 4
    pen.drawImage(layer, width * Math.cos(angle), width * Math.sin(angle))
  }
  pen.globalCompositeOperation = "source-in"
  pen.fillStyle = COLOURS.line
  pen.fillRect(0, 0, rim.width, rim.height)
  pen.globalCompositeOperation = "destination-out"
  pen.drawImage(layer, 0, 0)
  return rim
}

function arrow(context, [x0, y0], [x1, y1]) {
  const length = Math.hypot(x1 - x0, y1 - y0)
  const gap = RADIUS.target + 2 // the head ends at the rim of the target's dot
  if (length < RADIUS.handle + gap + 4) return
  const [ux, uy] = [(x1 - x0) / length, (y1 - y0) / length]
  const [tipX, tipY] = [x1 - ux * gap, y1 - uy * gap]
  const head = Math.min(11, length - RADIUS.handle - gap)
  const wing = (side) => [tipX - head * (ux + side * 0.55 * uy), tipY - head * (uy - side * 0.55 * ux)]
  const strokeLine = (colour, width) => {
    context.strokeStyle = colour
    context.lineWidth = width
    context.lineCap = context.lineJoin = "round"
    context.beginPath()
    context.moveTo(x0, y0)
    context.lineTo(tipX, tipY)
    context.moveTo(...wing(1))
    context.lineTo(tipX, tipY)
    context.lineTo(...wing(-1))
    context.stroke()
  }
  strokeLine(COLOURS.outline, 5)
  strokeLine(COLOURS.line, 2.5)
}

function dot(context, [x, y], end, selected, number) {
  const disc = (radius, colour) => {
    context.fillStyle = colour
    context.beginPath()
    context.arc(x, y, radius, 0, 2 * Math.PI)
    context.fill()
  }
  const radius = RADIUS[end]
  if (selected) disc(radius + 6, "rgba(255, 214, 10, .95)")
  disc(radius + 2.5, COLOURS.outline)
  disc(radius + 1.5, "#fff")
  disc(radius, COLOURS[end])
  if (number === null) return
  context.fillStyle = "#fff"
  context.font = `bold ${number > 9 ? 9 : 11}px system-ui, sans-serif`
  context.textAlign = "center"
  context.textBaseline = "middle"
  context.fillText(String(number), x, y + 0.5)
}

function circle(context, [x, y], radius) {
  for (const [colour, width] of [[COLOURS.outline, 3], [COLOURS.line, 1.5]]) {
    context.strokeStyle = colour
    context.lineWidth = width
    context.beginPath()
    context.arc(x, y, radius, 0, 2 * Math.PI)
    context.stroke()
  }
}
