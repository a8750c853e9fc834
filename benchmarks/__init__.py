"""Measurements that take minutes: quality of Pebble and of the methods on it, seconds, memory. No test asserts them."""
