// The row of buttons above the picture, and the style of the whole editor.

const ICONS = {
  add: "M8 3v10M3 8h10",
  undo: "M6 3 3 6l3 3M3 6h6a4 4 0 0 1 0 8H6",
  redo: "m10 3 3 3-3 3M13 6H7a4 4 0 0 0 0 8h3",
  remove: "M3 4.5h10M6.5 4.5V3h3v1.5M4.5 4.5 5 13h6l.5-8.5M7 7v3.5M9 7v3.5",
}

const STYLE = `
.retrace-drag { display: flex; flex-direction: column; gap: 4px; box-sizing: border-box; width: 100%; height: 100%;
  min-height: 260px; color: var(--input-text, #ddd); font: 12px/1.3 system-ui, sans-serif; user-select: none; }
.retrace-drag * { box-sizing: border-box; }
.retrace-drag-bar { display: flex; flex-wrap: wrap; gap: 4px; align-items: center; }
.retrace-drag-group { display: flex; }
.retrace-drag-space { flex: 1; }
.retrace-drag button { display: inline-flex; align-items: center; justify-content: center; min-width: 26px;
  height: 24px; margin: 0; padding: 0 7px; font: inherit; cursor: pointer; color: var(--input-text, #ddd);
  background: var(--comfy-input-bg, #222); border: 1px solid var(--border-color, #4e4e4e); border-radius: 5px; }
.retrace-drag-group button { border-radius: 0; margin-left: -1px; }
.retrace-drag-group button:first-child { border-radius: 5px 0 0 5px; margin-left: 0; }
.retrace-drag-group button:last-child { border-radius: 0 5px 5px 0; }
.retrace-drag button:hover:not(:disabled) { border-color: var(--descrip-text, #999); }
.retrace-drag button[aria-pressed="true"] { background: #2a7de1; border-color: #2a7de1; color: #fff; }
.retrace-drag button:disabled { opacity: .4; cursor: default; }
.retrace-drag button:focus-visible, .retrace-drag input:focus-visible, .retrace-drag canvas:focus-visible {
  outline: 2px solid #2a7de1; outline-offset: 1px; }
.retrace-drag svg { width: 14px; height: 14px; fill: none; stroke: currentColor; stroke-width: 1.6;
  stroke-linecap: round; stroke-linejoin: round; }
.retrace-drag-size { display: flex; align-items: center; gap: 5px; }
.retrace-drag-size input { width: 84px; height: 16px; margin: 0; accent-color: #2a7de1; }
.retrace-drag [hidden] { display: none !important; }
.retrace-drag-stage { position: relative; flex: 1 1 0; min-height: 180px; overflow: hidden; border-radius: 6px;
  background: var(--comfy-input-bg, #222); border: 1px solid var(--border-color, #4e4e4e); }
.retrace-drag canvas { position: absolute; inset: 0; width: 100%; height: 100%; border-radius: 5px;
  outline-offset: -2px; touch-action: none; cursor: crosshair; }
.retrace-drag canvas.idle { cursor: default; }
.retrace-drag canvas.brush { cursor: none; }
.retrace-drag-note { position: absolute; inset: 0; display: flex; align-items: center; justify-content: center;
  padding: 16px; text-align: center; color: var(--descrip-text, #999); pointer-events: none; }
.retrace-drag-foot { display: flex; gap: 8px; align-items: center; min-height: 18px; padding: 0 2px; }
.retrace-drag-status { flex: 1; min-width: 0; color: var(--descrip-text, #999); overflow: hidden;
  text-overflow: ellipsis; white-space: nowrap; }
.retrace-drag-status.error { color: var(--error-text, #ff4444); white-space: normal; }
`

let styled = false

/** Give the page our styles, once; every selector in them begins with our prefix. */
export function addStyle() {
  if (styled) return
  styled = true
  const sheet = new CSSStyleSheet()
  sheet.replaceSync(STYLE)
  document.adoptedStyleSheets.push(sheet)
}

/** An element with these properties and children. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag)
  for (const [name, value] of Object.entries(properties))
    if (name.includes("-") || name === "role") element.setAttribute(name, value)
    else element[name] = value
  element.append(...children)
  return element
}

function button(label, title, onclick, icon) {
  const element = make("button", { title, onclick, "aria-label": icon ? title : label })
  element.setAttribute("type", "button")
  if (icon) element.innerHTML = `<svg viewBox="0 0 16 16" aria-hidden="true"><path d="${ICONS[icon]}"/></svg>`
  else element.textContent = label
  return element
}

/** The buttons; `act` has one function for each of them. `show(state)` sets what is pressed and what can be pressed. */
export class Toolbar {
  constructor(act) {
    const mode = (name, label, title) => button(label, title, () => act.mode(name))
    this.modes = {
      points: mode("points", "Points", "Place points: press on what should move, drag to where it should go"),
      brush: mode("brush", "Brush", "Paint the part that may change"),
      erase: mode("erase", "Erase", "Remove from the part that may change"),
    }
    this.radius = make("input", { type: "range", min: 0.005, max: 0.25, step: "any" })
    this.radius.oninput = () => act.radius(Number(this.radius.value))
    const title = "Brush radius ([ and ] change it)"
    this.size = make("label", { className: "retrace-drag-size", title }, "Size", this.radius)
    this.add = button("", "Add a point in the middle; move it with the arrow keys", act.add, "add")
    this.undo = button("", "Undo (Ctrl+Z)", act.undo, "undo")
    this.redo = button("", "Redo (Ctrl+Shift+Z)", act.redo, "redo")
    this.remove = button("", "Remove the selected point (Delete)", act.remove, "remove")
    this.clear = button("Clear", "", act.clear)
    this.json = button("JSON", "Show the points as text", act.json)
    const group = (name, ...buttons) =>
      make("div", { className: "retrace-drag-group", role: "group", "aria-label": name }, ...buttons)
    this.element = make(
      "div",
      { className: "retrace-drag-bar", role: "toolbar", "aria-label": "Drag points" },
      group("Mouse mode", ...Object.values(this.modes)),
      make("span", { className: "retrace-drag-space" }),
      group("Edit", this.add, this.undo, this.redo, this.remove, this.clear),
      this.json,
    )
  }

  show({ mode, radius, canAdd, canUndo, canRedo, canRemove, canClear, locked, json }) {
    for (const [name, element] of Object.entries(this.modes))
      element.setAttribute("aria-pressed", String(name === mode))
    this.size.hidden = mode === "points"
    this.radius.value = radius
    this.add.hidden = this.remove.hidden = mode !== "points"
    const enabled = { add: canAdd, undo: canUndo, redo: canRedo, remove: canRemove, clear: canClear }
    for (const [name, can] of Object.entries(enabled)) this[name].disabled = locked || !can
    this.clear.title = mode === "points" ? "Remove all points" : "Remove everything painted"
    this.json.setAttribute("aria-pressed", String(json))
  }
}
