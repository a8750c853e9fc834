"""Start a ComfyUI, run graphs in it, read what comes out; for tests and benchmarks."""
