"""One file a choice: recipes name one file a section and say what differs."""
