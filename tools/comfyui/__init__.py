"""Start a ComfyUI, run graphs in it, read what comes out. Needs the standard library only."""
