"""What a network says of rows as it reads them: the loss of every target, and what it would answer.

B rows, T tokens of a row, D width, V vocabulary, K answers.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from nlscale.model.hope import Hope
from nlscale.model.reader import Reader, reader
from nlscale.tasks.trial import Trial

ALIVE = 2**24  # logits at a time, of this rank's part of the vocabulary

Place = tuple[slice, slice]


def heard(model: Hope, tokens: Tensor, starts: Tensor, rows: int, piece: int) -> Iterator[tuple[Place, Reader, Tensor]]:
    """Reads rows (B, T), `rows` of them together, `piece` tokens at once: the place, and the last states (t, b, D) there."""
    for i in range(0, len(tokens), rows):
        reading = reader(model, len(tokens[i : i + rows]))
        for first in range(0, tokens.shape[1], piece):
            here = slice(i, i + rows), slice(first, first + piece)
            yield here, reading, reading.read(tokens[here], starts[here])


def losses(model: Hope, tokens: Tensor, targets: Tensor, starts: Tensor, rows: int, piece: int) -> Tensor:
    """Loss of every target (B, T) in float64, NaN where there is none; see `heard`."""
    found = torch.full(targets.shape, torch.nan, dtype=torch.float64)
    for (some, span), reading, x in heard(model, tokens, starts, rows, piece):
        wanted = targets[some, span]
        size = max(1, ALIVE // (len(wanted) * model.head.weight.shape[0]))
        for first in range(0, x.shape[0], size) if bool((wanted >= 0).any()) else ():
            part = slice(first, first + size)
            logits = reading.predicted(x[part]).permute(1, 2, 0)
            each = F.cross_entropy(logits, wanted[:, part], reduction="none", ignore_index=-1).double()
            found[some, span][:, part] = each.masked_fill(wanted[:, part] < 0, torch.nan).cpu()
    return found


def answers(model: Hope, trial: Trial, rows: int, piece: int) -> tuple[Tensor, Tensor | None]:
    """Losses (B, T) of what a trial asks, NaN elsewhere, and whether the right one of its choices is the likeliest."""
    device, targets = model.cosine.device, trial.targets_BT
    tokens, loss = trial.tokens_BT.to(device), torch.full(targets.shape, torch.nan, dtype=torch.float64)
    right = torch.zeros(targets.shape, dtype=torch.bool)
    for (some, span), reading, x in heard(model, tokens, torch.zeros_like(tokens, dtype=torch.bool), rows, piece):
        asked = targets[some, span] >= 0
        wanted, states = targets[some, span][asked].to(device), x.transpose(0, 1)[asked.to(device)]
        told, chosen, size = [], [], max(1, ALIVE // model.head.weight.shape[0])
        for first in range(0, len(wanted), size):
            logits = reading.predicted(states[first : first + size, None])[:, 0]
            told.append(F.cross_entropy(logits, wanted[first : first + size], reduction="none").double())
            if trial.choices_BTK is not None:
                choices = trial.choices_BTK[some, span][asked][first : first + size].to(device)
                best = logits.gather(1, choices).argmax(1, keepdim=True)
                chosen.append(choices.gather(1, best)[:, 0] == wanted[first : first + size])
        if told:
            loss[some, span][asked] = torch.cat(told).cpu()
        if chosen:
            right[some, span][asked] = torch.cat(chosen).cpu()
    return loss, None if trial.choices_BTK is None else right
