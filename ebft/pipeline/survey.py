"""A pass of the dense model over the calibration tokens, block by block, before anything is pruned."""

from __future__ import annotations

from functools import partial
from typing import Any

from ebft.data.streams import Store, Stream
from ebft.pipeline.context import RunContext
from ebft.pruning.masker import Surveyor
from ebft.pruning.statistics import InputObserver, sum_over_ranks_


def survey(context: RunContext, surveyor: Surveyor) -> Any:
    """What ``surveyor`` concludes from the dense blocks and what flows into their matrices."""
    assert context.calibration is not None
    decoder, tokens = context.decoder, context.calibration.ids[context.sharing.share(len(context.calibration.ids))]
    store = Store(decoder.device, context.store.kind, context.store.dtype, context.output, owner=context.store.owner)
    stream, seen = Stream.entering(decoder, tokens, context.config.recover.batch_size, store, "survey"), []
    with context.reporter.progress("survey", len(decoder)) as advance:
        for index, (name, matrices) in enumerate(zip(decoder.names, decoder.matrices, strict=True)):
            block = decoder.working_block(index)
            observer = InputObserver(block, matrices, surveyor.needs)
            with observer.watching():
                stream.through(partial(decoder.run_block, index, block), out=stream)
            sum_over_ranks_(observer.statistics, context.sharing)
            seen.append(surveyor.look(name, block, matrices, observer.statistics))
            advance(index + 1)
    store.drop(stream.name)
    return surveyor.conclude(seen)
