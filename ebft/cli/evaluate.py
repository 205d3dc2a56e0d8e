"""``ebft eval``."""

from __future__ import annotations

import json as to_json
from typing import Annotated, Any

from cyclopts import Parameter

from ebft.cli.heavy import importing
from ebft.config import EBFTConfig
from ebft.data.texts import check_hub, check_texts
from ebft.model.locate import locate

# Of the settings of a run, by their flat names.
SETTINGS = (
    "model",
    "trust_remote_code",
    "eval",
    "eval_seqlen",
    "eval_tokens",
    "eval_tasks",
    "eval_limit",
    "device",
    "dtype",
)


def evaluate(
    *,
    against: Annotated[
        str | None, Parameter(help="another model, that the divergence is from", metavar="DENSE")
    ] = None,
    quiet: Annotated[bool | None, Parameter(help="no progress", negative=())] = None,
    json: Annotated[bool | None, Parameter(help="print the figures as JSON", negative=())] = None,
    **settings: Any,
) -> int:
    """Measure any model, pruned or not: perplexity, divergence from another one, zero-shot tasks."""
    config = EBFTConfig.of(prune="zeros", recover="none", **settings)  # no calibration text
    check_texts(config)
    locate(config.model.source)
    if against is not None:
        locate(against)
    check_hub(config)
    with importing():
        from ebft.output.terminal import Reporter
        from ebft.pipeline.context import name_of
        from ebft.pipeline.evaluate import evaluate_model

    reporter = Reporter(quiet=bool(quiet))
    figures = evaluate_model(config, against, reporter)
    if json:
        print(to_json.dumps(figures))
    else:
        reporter.figures(name_of(config.model.source), figures)
    return 0
