"""The run as data: frozen dataclasses hold every default and check. Nothing here imports torch."""
