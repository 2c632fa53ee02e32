"""What a level keeps of the tasks that it learned before (spec 1, rows 29 and 33).

    anchor    after every move, w <- w* + (w - w*) / (1 + rate anchor F): the implicit step of the penalty
              anchor / 2 sum F (w - w*)^2 of elastic weight consolidation (Kirkpatrick et al., 2017), stable however
              strong it is. F is AdamW's second moment of gradients when the task ended, scaled to mean 1 over the leaves
              of the level (or of its phase) that follow AdamW; it is 1 for leaves of other rules, where moments were just
              reset (nested), and while no task has ended. Of several tasks F adds up.
    project   a move is made orthogonal to directions kept of earlier tasks: orthogonal gradient descent (Farajtabar et
              al., 2020), on the update instead of the gradient, so that it holds under any rule. The level remembers its
              latest mean gradients; when a task ends, the strongest half of the free places is filled with orthonormal
              directions that span them best, and the others gather anew.

A task ends where a resume finds other data (`checkpoint.data=change`), or one of these switches newly on. All tensors are
like the master and follow its shards; dot products are agreed on over all ranks.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from nlscale.config.errors import require
from nlscale.config.levels import Level
from nlscale.optim.levels import Group
from nlscale.optim.rules import Rule
from nlscale.runtime.world import World

if TYPE_CHECKING:
    from nlscale.optim.mover import Mover

ANCHOR, IMPORTANCE, DIRECTION = "anchor", "importance", "direction"


def state_names(level: Level) -> list[str]:
    """What a level's switches add to the state of its rule."""
    anchored = [ANCHOR, IMPORTANCE] if level.anchor else []
    return anchored + [f"{DIRECTION}{i}" for i in range(level.project)]


class Tasks:
    """The memory of tasks of all groups on this rank."""

    def __init__(self, groups: Sequence[Group], movers: Mapping[str, "Mover"], world: World) -> None:
        self.world = world
        self.movers = {name: mover for name, mover in movers.items() if state_names(mover.group.level)}
        self.groups = [group for group in groups if state_names(group.level)]
        self.ended = {group.name: 0 for group in self.groups}  # tasks that anchors speak of
        self.kept = {group.name: 0 for group in self.groups}  # directions
        self.moves = {group.name: 0 for group in self.groups}  # whose gradients were gathered
        for mover in self.movers.values():
            for rule, _ in held(mover):
                if mover.group.level.anchor:
                    rule.state |= {ANCHOR: rule.master.clone(), IMPORTANCE: torch.ones_like(rule.master)}
                for i in range(mover.group.level.project):
                    rule.state[f"{DIRECTION}{i}"] = torch.zeros_like(rule.master)

    def pull(self, mover: "Mover", rate: float) -> None:
        """After the rule's step: back towards the anchor."""
        strength = rate * mover.group.level.anchor
        for rule, _ in held(mover) if strength else ():
            anchor, weight = rule.state[ANCHOR], rule.master
            weight.copy_(torch.addcdiv(anchor, weight - anchor, 1 + strength * rule.state[IMPORTANCE]))

    def gather(self, mover: "Mover", grads: Sequence[Sequence[Tensor]]) -> None:
        """Notes a move's mean gradients in the next free place."""
        kept, places = self.kept.get(mover.group.name, 0), mover.group.level.project
        flat = [grad for shard in grads for grad in shard]
        if kept >= places:
            return
        place = kept + self.moves[mover.group.name] % (places - kept)
        for (rule, _), grad in zip(held(mover), flat, strict=True):
            rule.state[f"{DIRECTION}{place}"].copy_(grad)
        self.moves[mover.group.name] += 1

    def keep_off(self, group: Group, mover: "Mover | None", before: Sequence[Tensor]) -> None:
        """Takes the kept directions out of a move from `before`. A collective where any are kept."""
        kept = self.kept.get(group.name, 0)
        if not kept:
            return
        moves = [rule.master - old for (rule, _), old in zip(held(mover), before, strict=True)] if mover else []
        parts = self.agreed([dot(moves, directions(mover, i), mover) for i in range(kept)], kept)
        for i, part in enumerate(parts.tolist()):
            for (rule, _), direction in zip(held(mover), directions(mover, i), strict=True):
                rule.master.sub_(direction, alpha=part)

    def end(self, levels: Sequence[str]) -> list[str]:
        """Ends the task for these levels; gives the groups that keep something of it. A collective over all ranks."""
        ending = [group for group in self.groups if group.level.name in levels]
        for group in ending:
            mover = self.movers.get(group.name)
            if group.level.anchor:
                self.weigh(group, mover)
                self.ended[group.name] += 1
            if group.level.project:
                self.keep(group, mover)
        return [group.name for group in ending]

    def weigh(self, group: Group, mover: "Mover | None") -> None:
        """Anchors a group where it is, by how much each weight mattered."""
        pairs, kinds = held(mover), nested_flats(mover)
        # Sums of moments, and how many there are: of leaves that are not nested, and of those that are.
        sums = torch.zeros(4, dtype=torch.float64)
        for (rule, spans), nested in zip(pairs, kinds, strict=True):
            for span in spans if "exp_avg_sq" in rule.state else ():
                moment = rule.state["exp_avg_sq"][span]
                sums[2 * nested : 2 * nested + 2] += torch.tensor([float(moment.double().sum()), float(moment.numel())])
        agreed = self.agreed(list(sums), 4).tolist()
        for (rule, _), nested in zip(pairs, kinds, strict=True):
            total, count = agreed[2 * nested : 2 * nested + 2]
            known = "exp_avg_sq" in rule.state and total > 0
            new = rule.state["exp_avg_sq"] * (count / total) if known else torch.ones_like(rule.master)
            rule.state[IMPORTANCE].copy_(rule.state[IMPORTANCE] + new if self.ended[group.name] else new)
            rule.state[ANCHOR].copy_(rule.master)

    def keep(self, group: Group, mover: "Mover | None") -> None:
        """Fills half of the free places with directions that span the gathered gradients best."""
        places, kept = group.level.project, self.kept[group.name]
        pairs = [(i, j) for i in range(places) for j in range(i + 1)]
        products = [dot(directions(mover, i), directions(mover, j), mover) for i, j in pairs]
        gram = torch.zeros(places, places, dtype=torch.float64)
        for (i, j), product in zip(pairs, self.agreed(products, len(pairs)).tolist(), strict=True):
            gram[i, j] = gram[j, i] = product
        across, inner = gram[:kept, kept:], gram[kept:, kept:]
        strengths, ways = torch.linalg.eigh(inner - across.mT @ across)  # of what is orthogonal to those kept
        found = [i for i in range(places - kept) if strengths[i] > 1e-9 * inner.diagonal().max()]
        chosen = found[-((places - kept + 1) // 2) :]
        mixing = ways[:, chosen] / strengths[chosen].sqrt()
        mixing = torch.cat([-across @ mixing, mixing])  # (places, chosen): directions as sums of what is there
        for rule, _ in held(mover):
            all_of_them = torch.stack([rule.state[f"{DIRECTION}{i}"] for i in range(places)])
            new = mixing.mT.to(all_of_them) @ all_of_them
            for i in range(kept, places):
                rule.state[f"{DIRECTION}{i}"].copy_(new[i - kept] if i - kept < len(chosen) else 0 * new[:1].sum())
        self.kept[group.name] += len(chosen)

    def agreed(self, values: list[Tensor], count: int) -> Tensor:
        """The sums over all ranks of `count` float64 scalars, on the host."""
        total = torch.stack(values) if values else torch.zeros(count, dtype=torch.float64)
        total = total.to(self.world.device)
        dist.all_reduce(total)
        return total.cpu()

    def facts(self) -> dict[str, list[int]]:
        """What a checkpoint says beside the tensors, by group: tasks ended, directions kept, gradients gathered."""
        return {name: [self.ended[name], self.kept[name], self.moves[name]] for name in self.ended}

    def apply_facts(self, facts: Mapping[str, list[int]]) -> None:
        """Takes over what `facts` gave; raises UserError where a level has fewer places than directions kept."""
        for group in self.groups:
            name, places = group.name, group.level.project
            self.ended[name], kept, self.moves[name] = facts.get(name, [0, 0, 0])
            require(
                not places or kept <= places,
                f"levels.{group.level.name}.project={places}, but {kept} directions of earlier tasks are kept; {kept} or "
                "more would work, or 0 to forget them",
            )
            self.kept[name] = kept if places else 0


def held(mover: "Mover | None") -> list[tuple[Rule, list[slice]]]:
    """The rules of a group on this rank, and which elements of each count here."""
    if mover is None:
        return []
    spans = [span for shard in mover.counted for span in shard]
    return list(zip([rule for shard in mover.shards for rule in shard.rules], spans, strict=True))


def nested_flats(mover: "Mover | None") -> list[bool]:
    """Whether each of `held` is of leaves that start anew from a slow copy, moments included."""
    return [flat.kind.nested for shard in mover.shards for flat in shard.flats] if mover else []


def directions(mover: "Mover | None", index: int) -> list[Tensor]:
    """One direction, by rule."""
    return [rule.state[f"{DIRECTION}{index}"] for rule, _ in held(mover)]


def dot(left: Sequence[Tensor], right: Sequence[Tensor], mover: "Mover | None") -> Tensor:
    """This rank's part of a dot product: a float64 scalar."""
    total = torch.zeros((), dtype=torch.float64)
    for a, b, (_, spans) in zip(left, right, held(mover), strict=True):
        for span in spans:
            total = total + (a[span].double() @ b[span].double()).cpu()
    return total
