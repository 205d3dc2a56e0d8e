"""``ebft``: which command was asked for. A command's own file is imported when it runs, and torch by what it needs.

Exit code 0; 1 where an audit found faults; 2 with one sentence on standard error for what cannot be done.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cyclopts import App
from cyclopts.exceptions import CycloptsError, UnusedCliTokensError

from ebft.errors import EBFTError, on_one_line
from ebft.output.lasting import lasting_output
from ebft.version import __version__

if TYPE_CHECKING:
    from ebft.config import EBFTConfig

COMMANDS = {
    "run": "prune a model, recover its quality, save and measure it",
    "plan": "estimate the memory and time a run needs, without loading the model",
    "audit": "check that a finished folder is sound",
    "compress": "store a pruned model without its zeros",
    "export": "write a pruned or compressed model in another program's format",
    "eval": "measure any model: perplexity, divergence from another, zero-shot tasks",
    "sample": "compare what a pruned model and its dense original write",
    "report": "rebuild the report page, also of an unfinished run",
    "push": "upload a finished folder to the hub",
    "methods": "list the criteria, recoveries, losses and optimizers",
}
WITH_SETTINGS = ("run", "plan", "eval")
LEVELS = dict.fromkeys(("run", "plan"), "ebft {0} --help shows the settings that matter; ebft {0} --help all, all.")
HERE = "here"


@lasting_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line asks for (default: ``sys.argv``); gives the exit code."""
    tokens = list(sys.argv[1:] if argv is None else argv)
    everything = "all" in tokens[1:] and tokens[tokens.index("all") - 1] in ("--help", "-h")
    if everything:
        tokens.remove("all")
    try:
        code = _app(tokens, everything)(
            _with_device(tokens), exit_on_error=False, print_error=False, result_action="return_value"
        )
    except CycloptsError as error:
        print(f"ebft: {_sentence(error)}", file=sys.stderr)
        return 2
    except EBFTError as error:
        if str(error):
            print(f"ebft: {error}", file=sys.stderr)
        return 2
    return code if isinstance(code, int) else 0


def parse_args(argv: Sequence[str]) -> tuple[EBFTConfig, str | None]:
    """The settings that a command line of ``ebft run`` asks for; and where only its plan is wanted, on which device.

    Raises:
        EBFTError: there is no such run.
    """
    from ebft.cli.flags import config_of

    tokens = ["run", *argv]
    try:
        _, bound, *_ = _app(tokens, everything=False).parse_args(
            _with_device(tokens), exit_on_error=False, print_error=False
        )
    except CycloptsError as error:
        raise EBFTError(_sentence(error)) from None
    given = {name: value for name, value in bound.arguments.items() if value is not None}
    plan, _, _ = (given.pop(name, None) for name in ("plan", "quiet", "json"))
    return config_of(**given), plan


def _app(tokens: list[str], everything: bool) -> App:
    """The application; settings are only looked up for a command that has them."""
    wanted = next((token for token in tokens if not token.startswith("-")), None)
    shown = wanted if wanted in COMMANDS else "run"
    app = App(
        name="ebft",
        help="Prune a language model and recover its quality, block by block, on one small GPU or none.",
        version=__version__,
        help_format="plaintext",
        help_epilogue="" if everything or shown not in LEVELS else LEVELS[shown].format(shown),
    )
    for name, said in COMMANDS.items():
        if name in WITH_SETTINGS and name == wanted:
            from ebft.cli import evaluate, run
            from ebft.cli.flags import with_settings

            command = with_settings(
                evaluate.evaluate if name == "eval" else getattr(run, name),
                everything=everything or name == "eval",
                only=evaluate.SETTINGS if name == "eval" else None,
            )
            app.command(command, name=name, help=said)
        else:
            inside = {"eval": "evaluate:evaluate", "plan": "run:plan"}.get(name, f"{name}:{name}")
            app.command(f"ebft.cli.{inside}", name=name, help=said)
    app.register_install_completion_command()
    return app


def _with_device(tokens: list[str]) -> list[str]:
    """``--plan`` alone is ``--plan here``."""
    found = list[str]()
    for place, token in enumerate(tokens):
        found.append(token)
        if token == "--plan" and (place + 1 == len(tokens) or tokens[place + 1].startswith("-")):
            found.append(HERE)
    return found


def _sentence(error: CycloptsError) -> str:
    """What cyclopts says, on one line, without its full stop."""
    if isinstance(error, UnusedCliTokensError):
        return f"{' '.join(error.unused_tokens or [])} was not expected there; ebft COMMAND --help says what is"
    return on_one_line(error).removesuffix(".")
