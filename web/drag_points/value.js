// The text of Drag Points: pairs of points and brush strokes as JSON, in shares of the picture's width and height.
// What is refused here is what retrace/drag/points.py refuses.

export const MOST_POINTS = 100

/** An x and a y on the picture, each cut to 0..1. */
export const onPicture = (point) => point.map((share) => Math.min(1, Math.max(0, share)))

const isList = Array.isArray
const isPoint = (value) => isList(value) && value.length === 2 && value.every((share) => typeof share === "number")

function readPoint(name, value) {
  if (!isPoint(value)) throw new Error(`${name}: two numbers [x, y] are needed.`)
  if (value.some((share) => share < 0 || share > 1)) throw new Error(`${name}: x and y must be between 0 and 1.`)
  return [...value]
}

function readPair(entry, index) {
  const name = `Pair ${index + 1}`
  if (isList(entry) && entry.length === 4) entry = [entry.slice(0, 2), entry.slice(2)]
  if (isList(entry) && entry.length === 2) entry = { handle: entry[0], target: entry[1] }
  if (entry === null || typeof entry !== "object" || isList(entry)) throw new Error(`${name} is not a pair of points.`)
  for (const key of ["handle", "target"]) if (!(key in entry)) throw new Error(`${name} has no "${key}".`)
  return { handle: readPoint(`${name}, handle`, entry.handle), target: readPoint(`${name}, target`, entry.target) }
}

function readStroke(entry, index) {
  const name = `Stroke ${index + 1}`
  if (!isList(entry?.points) || !entry.points.length) throw new Error(`${name} has no points.`)
  if (!(typeof entry.radius === "number" && entry.radius > 0 && entry.radius <= 1))
    throw new Error(`${name}: the radius must be a fraction of the width, 0 to 1.`)
  const points = entry.points.map((point, i) => readPoint(`${name}, point ${i + 1}`, point))
  return { points, radius: entry.radius, erase: Boolean(entry.erase) }
}

/** `{pairs, strokes}` of a text; throws an Error that says what is wrong with it. */
export function read(text) {
  if (!text.trim()) return { pairs: [], strokes: [] }
  let value
  try {
    value = JSON.parse(text)
  } catch (error) {
    throw new Error(`The text is not valid JSON: ${error.message}`)
  }
  if (isList(value)) value = { points: value }
  if (value === null || typeof value !== "object") throw new Error('The text should look like {"points": [...]}.')
  const { points = [], strokes = [] } = value
  if (!isList(points) || !isList(strokes)) throw new Error('"points" and "strokes" must be lists.')
  if (points.length > MOST_POINTS) throw new Error(`${points.length} pairs are too many; the limit is ${MOST_POINTS}.`)
  return { pairs: points.map(readPair), strokes: strokes.map(readStroke) }
}

const rounded = (point, digits) => point.map((share) => Number(share.toFixed(digits)))

/** The text of pairs and strokes; nothing at all is an empty text. */
export function write({ pairs, strokes }) {
  if (!pairs.length && !strokes.length) return ""
  const value = {
    points: pairs.map(({ handle, target }) => ({ handle: rounded(handle, 5), target: rounded(target, 5) })),
  }
  if (strokes.length)
    value.strokes = strokes.map(({ points, radius, erase }) => ({
      points: points.map((point) => rounded(point, 4)),
      radius: Number(radius.toFixed(5)),
      ...(erase && { erase }),
    }))
  return JSON.stringify(value)
}

/**
 * A path with fewer points that is nowhere further than `tolerance` away (Ramer, Douglas and Peucker). Distances are
 * in shares of the picture's width; `aspect` is its height divided by its width.
 */
export function thinned(path, tolerance, aspect) {
  if (path.length < 3) return path
  const [first, last] = [path[0], path[path.length - 1]]
  const [dx, dy] = [last[0] - first[0], (last[1] - first[1]) * aspect]
  const length = Math.hypot(dx, dy)
  let [farthest, distance] = [0, 0]
  for (let i = 1; i < path.length - 1; i++) {
    const [x, y] = [path[i][0] - first[0], (path[i][1] - first[1]) * aspect]
    const along = length && Math.min(1, Math.max(0, (x * dx + y * dy) / length ** 2))
    const off = Math.hypot(x - along * dx, y - along * dy)
    if (off > distance) [farthest, distance] = [i, off]
  }
  if (distance <= tolerance) return [first, last]
  const head = thinned(path.slice(0, farthest + 1), tolerance, aspect)
  return [...head.slice(0, -1), ...thinned(path.slice(farthest), tolerance, aspect)]
}
