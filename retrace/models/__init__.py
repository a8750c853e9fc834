"""Networks that ship or that users load: CLIP, and Pebble, the demo model."""
