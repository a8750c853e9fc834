"""The recipe of Pebble, one seeded command: python -m retrace.training.pebble."""
