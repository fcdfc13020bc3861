"""Implementations that ship with the suite, by name; `conformance list implementations` shows them."""
