"""Self-modifying Titans."""

from nlscale_kernels.self_modifying.parts import Gates, Memories, State, Still, Tokens, begin
from nlscale_kernels.self_modifying.reference import self_modifying

__all__ = ["Gates", "Memories", "State", "Still", "Tokens", "begin", "self_modifying"]
