// The line below the picture: what is wrong, what is selected, or what to do next.

/** `places`: a first click has set a handle, and its target is still to come. */
export function statusText(drawing, { picture, mode, locked, places }) {
  const { pairs, strokes, selected, error } = drawing
  if (locked) return "The points come from outside this node."
  if (error !== null) return `${error.replace(/\.?$/, ".")} Correct it under JSON, or press Clear.`
  if (places) return `Now click where point ${pairs.length + 1} should go (Esc cancels).`
  const count = pairs.length === 1 ? "1 point" : `${pairs.length} points`
  const painted = strokes.length ? ", mask painted" : ""
  if (!picture) return pairs.length || strokes.length ? `${count}${painted}.` : ""
  if (mode === "brush") return "Paint the part that may change."
  if (mode === "erase") return "Erase the part that must stay."
  if (selected) {
    const [x, y] = pairs[selected.index][selected.end]
    const place = `x ${Math.round(x * picture.width)}, y ${Math.round(y * picture.height)} px`
    return `Point ${selected.index + 1} of ${pairs.length}, ${selected.end}: ${place}`
  }
  if (drawing.isFull) return `${count}, which is the maximum.`
  if (pairs.length) return `${count}${painted}. Drag a dot to move it; right-click to remove it.`
  return "Press on what should move and drag to where it should go."
}
