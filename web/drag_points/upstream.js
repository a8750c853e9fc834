// What arrives at an input of a node, as far as the graph alone can say: followed back through reroutes, bypassed nodes
// and the borders of subgraphs to a Load Image, or to a text that someone typed.

const SUBGRAPH_INPUT = "-10" // stands for the inputs of a subgraph in its links
const BYPASSED = 4
const LOADERS = new Set(["LoadImage", "LoadImageOutput"])

const findLink = (graph, id) => (id == null ? null : (graph.links?.get?.(id) ?? graph.links?.[id] ?? null))

const widgetValue = (node, name) => node.widgets?.find((widget) => widget.name === name)?.value

/** The node that a subgraph stands as in the graph around it. */
function hostOf(root, subgraph) {
  const graphs = [root, ...(root.subgraphs?.values() ?? [])]
  for (const graph of graphs) for (const node of graph.nodes ?? []) if (node.subgraph === subgraph) return node
  return null
}

/** What arrives at the input called `name`: `{node, slot}` of an output, `{value}` of a promoted widget, or null. */
export function sourceOf(node, name, root) {
  let graph = node.graph
  let id = node.inputs?.find((input) => input.name === name)?.link
  for (let steps = 0; graph && steps < 1000; steps++) {
    const link = findLink(graph, id)
    if (!link) return null
    if (String(link.origin_id) === SUBGRAPH_INPUT) {
      const host = hostOf(root, graph)
      const input = host?.inputs?.[link.origin_slot]
      if (input?.widget && input.link == null) return { value: widgetValue(host, input.name) }
      id = input?.link
      graph = host?.graph
      continue
    }
    const origin = graph.getNodeById(link.origin_id)
    if (!origin) return null
    if (origin.type === "Reroute") id = origin.inputs[0]?.link
    else if (origin.mode === BYPASSED) id = passedInput(origin, link.origin_slot)?.link
    else if (origin.subgraph) {
      graph = origin.subgraph
      id = graph.outputs?.[link.origin_slot]?.linkIds?.[0]
    } else return { node: origin, slot: link.origin_slot }
  }
  return null
}

/** The input that a bypassed node hands on as this output. */
function passedInput(node, slot) {
  const type = node.outputs[slot]?.type
  const fitting = (input) => input?.link != null && input.type === type
  return fitting(node.inputs[slot]) ? node.inputs[slot] : node.inputs.find(fitting)
}

export const isLinked = (node, name) => node.inputs?.some((input) => input.name === name && input.link != null)

/** The value of a widget, also where it was handed to the subgraph around it; null when nobody can know it yet. */
export function textOf(node, name, root) {
  if (!isLinked(node, name)) return widgetValue(node, name) ?? null
  const source = sourceOf(node, name, root)
  const typed = source?.node?.comfyClass?.startsWith("PrimitiveString")
  return (typed ? widgetValue(source.node, "value") : source?.value) ?? null
}

/** The file that a Load Image shows: `{filename, subfolder, type}`, or null for any other source. */
export function loadedFile(source, root) {
  if (!LOADERS.has(source?.node?.comfyClass)) return null
  const value = textOf(source.node, "image", root)
  if (typeof value !== "string" || !value) return null
  const [, path, type = "input"] = value.match(/^(.*?)(?: \[(input|output|temp)\])?$/s)
  const cut = path.replaceAll("\\", "/").lastIndexOf("/")
  return { filename: path.slice(cut + 1), subfolder: path.slice(0, Math.max(0, cut)), type }
}

/** The query of ComfyUI's /view for a file; `channel` "rgb" ignores transparency, "a" shows nothing else. */
export function viewQuery(file, channel) {
  const { filename, subfolder = "", type = "input" } = file
  return new URLSearchParams({ filename, subfolder, type, ...(channel && { channel }) }).toString()
}
