"""Whole loops between sockets: what a node starts and waits for."""
