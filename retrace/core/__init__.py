"""The ground floor: what every method stands on. Nothing in here knows a method, a host or a node."""
