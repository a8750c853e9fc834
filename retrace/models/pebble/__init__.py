"""Pebble, the demo model that ships: architecture, weights and the scenes it was trained on."""
