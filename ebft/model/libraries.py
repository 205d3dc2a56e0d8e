"""Around the calls of transformers, safetensors and the hub: quiet, and one sentence for whatever they raise."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Iterator

from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig
from transformers.utils import logging as transformers_logging

from ebft.errors import EBFTError, first_line
from ebft.model.locate import shown
from ebft.model.tensors import NotStreamable


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars and warnings off the terminal."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    hub = logging.getLogger("huggingface_hub")
    hub_level = hub.level
    hub.setLevel(logging.ERROR)
    try:
        yield
    finally:
        hub.setLevel(hub_level)
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def bars_on_terminals() -> Iterator[None]:
    """Keep what draws progress bars of its own, as transformers does over a GGUF file, off a standard error that is no
    terminal."""
    with contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO()):
        yield


@contextlib.contextmanager
def by_libraries(
    source: str | None, config: PretrainedConfig | None = None, what: str = "model", pickle: str | None = None
) -> Iterator[None]:
    """Around calls of transformers, safetensors and the hub, and of nothing else: whatever they raise is one sentence.

    Args:
        config: the configuration from which they build a model.
        pickle: a file that they unpickle, of which damage can be the cause of any error.
    """
    try:
        with quiet():
            yield
    except (EBFTError, NotStreamable):
        raise
    except Exception as error:
        fault = _fault(error, config)
        if pickle:
            fault = f"cannot be loaded: {pickle} is damaged, or holds more than tensors, which might be code"
        raise EBFTError(f"{what} {shown(source)} {fault}") from error


def _fault(error: Exception, config: PretrainedConfig | None) -> str:
    """What is wrong with a checkpoint of which a library says ``error``."""
    said = str(error)
    if "Unrecognized configuration class" in said:
        return "is not a decoder (a causal language model)"
    if "trust_remote_code" in said:
        return "comes with code of its own, which runs only with --trust-remote-code"
    if "Padding_idx must be within" in said and config is not None:
        text = config.get_text_config()
        said = f"its config.json has pad_token_id {text.pad_token_id}; expected less than {text.vocab_size}, vocab_size"
    elif "ignore_mismatched_sizes" in said:
        said = "its weights are stored in other shapes than its config.json gives"
    elif isinstance(error, StrictDataclassError) and error.__cause__ is not None:
        said = f"its config.json does not hold together: {first_line(error.__cause__)}"
    elif isinstance(error, LookupError | ArithmeticError | TypeError | AttributeError | AssertionError):
        # not meant to be read by a user
        said = f"one of its files does not hold what it should ({type(error).__name__}: {first_line(error)})"
    else:
        said = first_line(error)
    return f"cannot be loaded: {said}"
