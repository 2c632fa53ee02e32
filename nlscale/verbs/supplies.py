"""What a run needs that lies elsewhere, as `nlscale check` finds it: rows to train on, a place for its saves."""

import importlib
from collections.abc import Iterator

from nlscale.config.run import Run
from nlscale.data.card import check_data, check_replay
from nlscale.plan.report import several


def rows_there(run: Run) -> str:
    """Of the dataset, and how often a run goes over them: over each stream of a mixture by its weight."""
    given, whole = run.train.steps * run.train.global_batch, sum(source.weight for source in run.data.sources)
    cards = zip(run.data.sources, check_data(run.data, False), strict=True)
    rows = [(source.path, given * source.weight / whole, card.rows["train"]) for source, card in cards]
    times = [
        (f"{path} " if len(rows) > 1 else "") + f"{taken / max(there, 1):,.2f} times" for path, taken, there in rows
    ]
    return f"{several(sum(there for *_, there in rows), 'row')} for training, gone over {', '.join(times)}"


def too_few(run: Run, count: int) -> Iterator[str]:
    """What a start on so many replicas would say of datasets with fewer rows than a step takes of them."""
    rows = sum(card.rows["train"] for card in check_data(run.data, False))
    needs = [("the dataset", rows, "train.global_batch", run.train.global_batch)]
    if run.data.replay:
        earlier = check_replay(run.data)[1].rows["train"]
        needs.append((f"data.replay={run.data.replay}", earlier, "data.replay_batch", run.data.replay_batch))
    unit = count * run.train.micro_batch
    for what, rows, name, batch in needs:
        if rows < batch:
            fewer = f"{name}={rows // unit * unit} or " if rows >= unit else ""
            yield (
                f"{what} has {several(rows, 'row')} for training, fewer than {name}={batch}; {fewer}more data would work"
            )


def unreachable(run: Run) -> Iterator[str]:
    """Why no save can be sent to `checkpoint.upload`: nothing that fsspec knows by this name, or its package is missing.

    What another interpreter, which ranks may have on a cluster, has installed is not known here.
    """
    upload = run.checkpoint.upload
    chain = upload.split("::")
    try:
        for link in chain:
            protocol, named, _ = link.partition("://")
            importlib.import_module("fsspec").get_filesystem_class(protocol if named or len(chain) > 1 else "file")
    except ImportError as error:
        if not run.cluster.python:
            yield f"checkpoint.upload={upload}: {error}"
    except ValueError as error:
        yield f"checkpoint.upload={upload}: {error}"
