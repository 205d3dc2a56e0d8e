"""Code that says that it ran: what hostile files carry."""

from __future__ import annotations

import os
import pickle
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Trap:
    """Code in every form that a file may hold it; each leaves ``canary`` behind when it is executed.

    Attributes:
        canary: an absolute path.
    """

    canary: Path

    @property
    def shell(self) -> str:
        """A command."""
        return f"touch {self.canary}"

    @property
    def module(self) -> str:
        """A Python module, with the classes that an ``auto_map`` of it may name."""
        return (
            f"from pathlib import Path\nPath({str(self.canary)!r}).touch()\n"
            "from transformers import LlamaConfig as Config, LlamaForCausalLM as Model\n"
            "from transformers import PreTrainedTokenizerFast as Tokenizer\n"
            "def generate(*args, **kwargs): pass\n"
        )

    @property
    def object(self) -> object:
        """What runs when its pickle is loaded."""
        return _Runs(self.shell)

    @property
    def pickled(self) -> bytes:
        """A pickle."""
        return pickle.dumps(self.object)

    @property
    def yaml(self) -> tuple[str, ...]:
        """Values of a YAML file."""
        return (
            f"!!python/object/apply:os.system ['{self.shell}']",
            f"!!python/object/new:os.system ['{self.shell}']",
            f"!!python/object/apply:subprocess.check_output [['touch', '{self.canary}']]",
        )

    @property
    def template(self) -> str:
        """A Jinja template."""
        return (
            f"{{{{ cycler.__init__.__globals__.os.system('{self.shell}') }}}}"
            f"{{{{ self.__init__.__globals__.__builtins__.__import__('os').system('{self.shell}') }}}}"
            f"{{{{ messages.__class__.__mro__[-1].__subclasses__() }}}}"
        )

    def sprung(self) -> bool:
        """Whether any of it ran."""
        return self.canary.exists()


class _Runs:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self.command,)
