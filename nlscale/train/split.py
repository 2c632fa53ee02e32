"""Ad-hoc level stacking (spec 2.5): a trained level's units become several levels, and the network computes the same.

A level that says `of: all` begins as a part of level `all` of the checkpoint: its units, in the order of the run's
levels. Weights and moments are read from the old tensors' rows. Whole layers become levels of their own by `match`.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from nlscale.config.errors import require
from nlscale.config.levels import Level
from nlscale.train.pieces import Pieces, Stored

Parts = dict[str, tuple[str, int]]  # leaf -> the checkpoint's leaf that it is a part of, and its first row there


def units(line: str) -> int:
    """Rows of a leaf, from its line of the identity."""
    return int(line.split("x", 1)[0].split(" ", 1)[0])


def parts_of(now: Mapping[str, str], then: Mapping[str, str], levels: Sequence[Level]) -> Parts:
    """What is to be read as a part of something else; nothing where the checkpoint has the levels already.

    Raises UserError where parts do not fill the level that they are of.
    """
    found: Parts = {}
    held = {name.split(".")[3] for name in then if ".continuum." in name}
    for level in (each for each in levels if each.of):
        require(
            level.of in held or level.name in held,
            f"levels.{level.name}.of={level.of}: the checkpoint has no such level; it has "
            f"{', '.join(sorted(held - {'norm', 'gains'}))}",
        )
    for old in {level.of for level in levels if level.of}:
        members = [level.name for level in levels if level.of == old]
        for name in (name for name in then if f".continuum.{old}." in name and then[name] != now.get(name)):
            names = [name.replace(f".continuum.{old}.", f".continuum.{member}.") for member in members]
            if not all(each in now for each in names) or (name in now and units(now[name]) == units(then[name])):
                continue
            sizes = [units(now[each]) for each in names]
            require(
                sum(sizes) == units(then[name]),
                f"levels {', '.join(members)} are `of: {old}` with {' + '.join(map(str, sizes))} units of {name}, which has "
                f"{units(then[name])}; together they must be the whole of it",
            )
            found |= {each: (name, sum(sizes[:i])) for i, each in enumerate(names)}
    return found


def divided(then: Mapping[str, str], now: Mapping[str, str], parts: Parts) -> dict[str, str]:
    """The checkpoint's identity as if its levels had been parted already."""
    olds = {old for old, _ in parts.values()}
    lines = {name: line for name, line in then.items() if name not in olds}
    for name, (old, _) in parts.items():
        shape = now[name].split(" ", 1)[0]
        lines[name] = f"{shape} {then[old].split(' ', 1)[1]}"
    return lines


def redirected(pieces: Mapping[str, Pieces], parts: Parts, there: Mapping[str, Stored]) -> dict[str, Pieces]:
    """The same rectangles, to be read where the checkpoint has them."""
    found: dict[str, Pieces] = {}
    for key, each in pieces.items():
        kind, _, leaf = key.partition("/")
        if leaf not in parts:
            found[key] = each
            continue
        old, first = parts[leaf]
        source = f"{kind}/{old}"
        if source in there:
            shifted: list[tuple[tuple[int, ...], Tensor]] = [
                ((offset[0] + first, *offset[1:]), values) for offset, values in each.rectangles
            ]
            found.setdefault(source, Pieces(there[source].shape, [], False)).rectangles.extend(shifted)
    return found
