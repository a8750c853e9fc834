"""Frameworks that run a model for the methods: ComfyUI and diffusers."""
