"""What a checkpoint's tensors do not tell of the network that learned them."""

import pytest

from nlscale.config.mixers import network_of
from tests.tiny import tiny

ROW = "data.sequence=64"
SELF = ["model.mixer=self_modifying", "model.self_modifying"]
OTHERS = {
    "mixer": (["model.mixer=delta"], "model.mixer=linear"),
    "heads": ([], "model.heads=2"),
    "activation": ([], "model.activation=gelu"),
    "variant": ([], "model.variant=sequential"),
    "written": (["model.mixer=written"], "model.written.rule=linear"),
    "titans": (["model.mixer=titans_mag"], "model.titans.activation=gelu"),
    "units": (SELF[:1], f"{SELF[1]}.activation=gelu"),
    "erase": (SELF[:1], f"{SELF[1]}.erase=false"),
    "per_layer": (SELF[:1], f"{SELF[1]}.per_layer=true"),
    "unit_values": (SELF[:1], f"{SELF[1]}.unit_values=false"),
}
SAME = {  # how far and how often, not what: a run may go on with others
    "chunk": (SELF[:1], f"{SELF[1]}.chunk=4"),
    "rate": (SELF[:1], f"{SELF[1]}.rate=0.01"),
    "another mixer's": ([], f"{SELF[1]}.erase=false"),
    "positions": ([], "model.rope_base=500000"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_another_function_of_the_same_tensors_is_another_kind(case: str) -> None:
    said, change = OTHERS[case]
    was, now = network_of(tiny(*said, ROW).model), network_of(tiny(*said, ROW, change).model)
    key, value = change.split("=")
    assert [name for name in was if now.get(name) != was[name]] == [key]
    assert str(now[key]).lower() == value


@pytest.mark.parametrize("case", SAME)
def test_what_a_run_may_go_on_with_is_none(case: str) -> None:
    said, change = SAME[case]
    assert network_of(tiny(*said, ROW).model) == network_of(tiny(*said, ROW, change).model)
