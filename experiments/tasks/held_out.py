"""The examples of the held-out loss."""

from experiments.options.training import TrainSettings
from jaxdiff.data import sources
from jaxdiff.data.example import Source
from jaxdiff.data.mixture import spread
from jaxdiff.training import multihost
from jaxdiff.training.distributed import once
from jaxdiff.training.held_out import HeldOutBatches
from jaxdiff.training.prefetch import Batches


def held_out_source(settings: TrainSettings, side: int) -> Source | None:
    """The held-out dataset, rasterised at `side` if it is synthetic; None if no held-out loss is measured."""
    split = settings.dataset.held_out_split()
    if settings.run.evaluate_every == 0 or split is None:
        return None
    data_dir = settings.dataset.data_dir
    return once(data_dir, lambda: sources.open(split[0], side, split[1], data_dir))


def in_full_batches(settings: TrainSettings, source: Source) -> Source | None:
    """--evaluate-n examples in full batches of --batch, at least one, for a loss of the batch instead of each example.
    None, with one printed line, for fewer examples than a batch."""
    batch = settings.run.batch
    count = max(batch, settings.dataset.evaluate_n // batch * batch)
    count = min(count, len(source) // batch * batch)
    if count:
        return spread(source, count)
    if multihost.index() == 0:
        print(f"no held-out loss: {len(source)} held-out examples are fewer than --batch {batch}")
    return None


def kept(stream: Batches, count: int) -> HeldOutBatches:
    """The first `count` batches of an endless stream, the same at each call."""
    batches = [next(stream) for _ in range(count)]
    return lambda: batches
