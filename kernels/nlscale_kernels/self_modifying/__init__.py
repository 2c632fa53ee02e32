"""Self-modifying Titans."""

from nlscale_kernels.self_modifying.reference import Gates, Memories, State, Still, Tokens, begin, self_modifying

__all__ = ["Gates", "Memories", "State", "Still", "Tokens", "begin", "self_modifying"]
