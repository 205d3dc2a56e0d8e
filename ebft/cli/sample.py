"""``ebft sample``."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from ebft.cli.heavy import importing
from ebft.model.locate import DEFAULT_MODEL, locate


def sample(
    model: Annotated[str, Parameter(help="the folder of a finished run, or any model", metavar="OUT")],
    /,
    *prompts: Annotated[str, Parameter(help="what the models go on from (default: three built-in ones)")],
    against: Annotated[
        str | None, Parameter(help="another model beside it: hub id, folder or .gguf file", metavar="DENSE")
    ] = None,
    tokens: Annotated[
        int, Parameter(help="at most so many after each prompt", validator=Number(gte=1, lte=4096), metavar="N")
    ] = 40,
    device: Annotated[str, Parameter(help="cpu, cuda, cuda:1 …; auto takes the GPU where there is one")] = "auto",
    trust_remote_code: Annotated[
        bool, Parameter(help="allow transformers to run code shipped with the models", negative=())
    ] = False,
) -> int:
    """Let a model, and another one beside it, go on from prompts, greedily."""
    models = [model, *([] if against is None else [against])]
    sources = [None if name == DEFAULT_MODEL else name for name in models]
    for source in sources:
        locate(source)
    with importing():
        from ebft.evaluation.continuations import BUILTIN
        from ebft.output.terminal import Reporter
        from ebft.pipeline.samples import sample_models

    asked = list(prompts or BUILTIN)
    written = sample_models(sources, asked, tokens=tokens, device=device, trust_remote_code=trust_remote_code)
    Reporter().samples(asked, dict(zip(models, written, strict=True)))
    return 0
