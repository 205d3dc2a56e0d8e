"""docs/settings.md, made from the settings themselves: ``python -m ebft.cli.reference > docs/settings.md``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from ebft.cli.flags import TITLES, groups
from ebft.config import PRESETS, SECTIONS, flag, flat_name
from ebft.registry import ALL, summary_of

_BEGINNING = """\
# Settings

Made from the code by `python -m ebft.cli.reference`; `tests/test_cli.py` holds it to that.

Every setting is a flag of `ebft run`, a key of a YAML file (`--config run.yaml`) and an argument in Python. Later beats
earlier: preset, file, flags. With no `--preset` it is `best` with `--time`, `paper` where a model is named, and `demo`
where none is.

```yaml
preset: light
model: {source: meta-llama/Llama-3.2-1B}
prune: {criterion: sparsegpt, sparsity: 0.6}     # sections, or flat keys: sparsity: 0.6
recover: {method: layerwise+ebft, lr: 0.01}
evaluate: {texts: [wikitext2, mine.txt], seqlen: 2048}
```

```python
EBFTConfig(prune=Prune(sparsity=0.6), recover=Recover(method="ebft"))  # sections
EBFTConfig.preset("light", sparsity=0.6, lr=0.01)  # flat names, those of the flags
```

A setting of a method that is not chosen, or that others leave without effect, is refused by name.
"""


def page() -> str:
    """The page."""
    return "\n".join([_BEGINNING, *_settings(), *_methods(), *_presets()]) + "\n"


def _settings() -> Iterator[str]:
    of_title = {title: name for name, title in TITLES.items()}
    for title, fields in groups():
        section = of_title.get(title)
        where = f" (`{section}:` in YAML, `{SECTIONS[section].__name__}` in Python)" if section else ""
        yield f"## {title if section else f'`{title}`'}{where}\n"
        yield "| flag | in its section | meaning | default |"
        yield "| --- | --- | --- | --- |"
        for field in fields:
            meaning = field.metadata["help"].replace("|", "\\|")
            choices = field.metadata["choices"]
            said = f" (`{'`, `'.join(choices)}`)" if choices else ""
            yield f"| `{flag(flat_name(field))}` | `{field.name}` | {meaning}{said} | {_shown(field.default)} |"
        yield ""


def _shown(value: Any) -> str:
    if value in (None, ()):
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"`{','.join(map(str, value)) if isinstance(value, tuple) else value}`"


def _methods() -> Iterator[str]:
    yield "## Methods\n"
    yield "| chosen by | name | what it is | its settings |"
    yield "| --- | --- | --- | --- |"
    for registry in ALL:
        for method in registry:
            own = ", ".join(f"`{flag(flat_name(field))}`" for field in dataclasses.fields(method.Settings))
            what = summary_of(method).replace("|", "\\|")
            yield f"| `{registry.flag}` | `{method.name}` | {what} | {own} |"
    yield ""


def _presets() -> Iterator[str]:
    yield "## Presets\n"
    yield "| preset | settings over the defaults |"
    yield "| --- | --- |"
    for name, settings in PRESETS.items():
        said = " ".join(f"`{flag(of)} {value}`" for of, value in settings.items())
        yield f"| `{name}` | {said or 'the defaults: the published recipe'} |"


if __name__ == "__main__":
    print(page(), end="")
