"""Starting ranks. Nothing here imports torch."""
