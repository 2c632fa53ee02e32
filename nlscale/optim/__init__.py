"""When a level moves and by how much: what this project exists for."""
