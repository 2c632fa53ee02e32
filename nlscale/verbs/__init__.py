"""The verbs of `nlscale`: each reads what the user said and calls one function."""
