"""``ebft eval``."""

from __future__ import annotations

import json as to_json
from typing import Annotated

from cyclopts import Parameter


def evaluate(
    model: Annotated[str, Parameter(help="hub id, folder or .gguf file", metavar="MODEL")],
    /,
    *,
    against: Annotated[
        str | None, Parameter(help="another model, that the divergence is from", metavar="DENSE")
    ] = None,
    eval: Annotated[
        str, Parameter(help="texts: wikitext2, c4, builtin, or files; none for none", metavar="NAME_OR_FILE,…")
    ] = "wikitext2",
    eval_seqlen: Annotated[int, Parameter(help="tokens in a window", metavar="N")] = 2048,
    eval_tokens: Annotated[
        int | None, Parameter(help="tokens of each text at most (default: all)", metavar="N")
    ] = None,
    eval_tasks: Annotated[
        str, Parameter(help="zero-shot tasks of lm-evaluation-harness, or local:TEXT", metavar="NAME,…")
    ] = "",
    eval_limit: Annotated[int | None, Parameter(help="questions of each task (default: all)", metavar="N")] = None,
    device: Annotated[str, Parameter(help="cpu, cuda, cuda:1 …; auto takes the GPU where there is one")] = "auto",
    dtype: Annotated[str, Parameter(help="of the products", metavar="auto|float32|bfloat16|float16")] = "auto",
    trust_remote_code: Annotated[
        bool, Parameter(help="let transformers run code that comes with the models", negative=())
    ] = False,
    quiet: Annotated[bool, Parameter(help="no progress", negative=())] = False,
    json: Annotated[bool, Parameter(help="print the figures as JSON", negative=())] = False,
) -> int:
    """Measure any model, pruned or not: perplexity, divergence from another one, zero-shot tasks."""
    from ebft.config import EBFTConfig
    from ebft.output.terminal import Reporter
    from ebft.pipeline.evaluate import evaluate_model

    config = EBFTConfig.of(
        model=model,
        eval=eval,
        eval_seqlen=eval_seqlen,
        eval_tokens=eval_tokens,
        eval_tasks=eval_tasks,
        eval_limit=eval_limit,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        prune="zeros",  # nothing is pruned or recovered: no calibration text
        recover="none",
    )
    reporter = Reporter(quiet=quiet)
    figures = evaluate_model(config, against, reporter)
    if json:
        print(to_json.dumps(figures))
    else:
        reporter.figures(model, figures)
    return 0
