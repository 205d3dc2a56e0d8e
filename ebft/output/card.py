"""The model card: README.md of the saved model, where it comes from, its recipe, its figures."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any
from unicodedata import category

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined

from ebft.config import ORGANISATION
from ebft.output.figures import (
    STAGES,
    held_out,
    metrics_of,
    perplexity_table,
    plain_merge,
    without_folder,
    zero_shot_rows,
)
from ebft.registry import recoveries

_NOT_OF_THE_RECIPE = ORGANISATION | {"fused", "device"}


def model_card(summary: dict[str, Any]) -> str:
    """README.md of the saved model: where it comes from, the recipe, the figures."""
    config = summary["config"]
    shown = {name: value for name, value in config.items() if value is not None and name not in _NOT_OF_THE_RECIPE}
    if config["pattern"]:
        shown.pop("sparsity")
    headings, figures = perplexity_table(summary)
    names = [] if config["recover"] == "none" else config["recover"].split("+")
    text = _CARD.render(
        summary=summary,
        name=without_folder(summary["model"]),
        rounded=f"{summary['sparsity']:.0%}",
        share=f"{summary['sparsity']:.2%}",
        headings=headings,
        figures=[[without_folder(text), *cells] for text, *cells in figures],
        zero_shot=zero_shot_rows(summary),
        settings=[[name, without_folder(value)] for name, value in shown.items()],
        tuned=", then ".join(dict.fromkeys(recoveries[name].told for name in names)),
        use=summary["calibration"],
        source=without_folder(summary["calibration"]["source"]) if names else "",
        plain_merge=plain_merge(summary),
        held_out=[(name, told) for name, of in summary["whole_model"].items() if (told := held_out(of))],
    )
    return str(ModelCard(f"---\n{_card_data(summary).to_yaml()}\n---\n\n{text}"))


def compressed_card(source: str, layers: Mapping[str, Mapping[str, Any]], summary: Mapping[str, int]) -> str:
    """README.md of a compressed folder: what it is, how it is loaded, how small it is.

    Args:
        layers: as in the index (docs/layouts.md).
        summary: ``dense_bytes`` and ``bytes`` of these layers.
    """
    places = sum(layer["in_features"] * layer["out_features"] for layer in layers.values())
    text = _COMPRESSED.render(
        name=without_folder(source),
        share=f"{1 - sum(layer['kept'] for layer in layers.values()) / max(1, places):.0%}",
        before=f"{summary['dense_bytes'] / 2**20:.1f}",
        after=f"{summary['bytes'] / 2**20:.1f}",
        values=", ".join(sorted({layer["values"] for layer in layers.values()} - {"dense"})) or "dense",
    )
    data = ModelCardData(
        base_model=_on_the_hub(source),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["sparse", "pruned", "compressed", "ebft"],
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}"))


def _on_the_hub(model: str) -> str | None:
    """``model``, where it is the name of one on the hub."""
    return model if _HUB_ID.fullmatch(model) and not Path(model).exists() else None


def _card_data(summary: dict[str, Any]) -> ModelCardData:
    """What the hub reads of the card."""
    measured = [(text, "perplexity", values[_last(values)]) for text, values in summary["perplexity"].items()]
    measured += [(task, *of) for task, values in summary["zero_shot"].items() for of in metrics_of(values).items()]
    results = [
        EvalResult("text-generation", name, name, metric, value)
        for text, metric, value in measured
        if isfinite(value) and (name := one_line(without_folder(text)))
    ]
    return ModelCardData(
        base_model=_on_the_hub(summary["model"]),
        model_name=one_line(without_folder(summary["model"])) or "model",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["sparse", "pruned", "ebft"],
        eval_results=results or None,
    )


def _last(values: dict[str, float]) -> str:
    """The stage of the saved files."""
    return [stage for stage in STAGES if stage in values][-1]


def one_line(value: Any) -> str:
    """``value`` as text without line ends and characters that cannot be seen or stored."""
    return " ".join("".join(" " if category(letter) in _UNSEEN else letter for letter in str(value)).split())


def markdown(value: Any) -> str:
    """``value`` as a line of Markdown that shows it as it is, wherever it stands: no tag, link, column or emphasis."""
    return _MARKUP.sub(lambda found: f"&#{ord(found[0])};", one_line(value))


_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+", re.ASCII)
_UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp", "Zs"}
_MARKUP = re.compile(r"""[&<>"'`*|~\[\]{}\\$!@#^]|(?<![a-zA-Z0-9])_|_(?![a-zA-Z0-9])|:(?=//)""")
_CARDS = Environment(
    finalize=markdown, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
)
_COMPRESSED = _CARDS.from_string("""\
# {{ name }}, {{ share }} sparse, compressed

Compressed by [ebft](https://arxiv.org/abs/2402.12419): of the weights of the linear layers inside its blocks only the
survivors ({{ values }}) and one bit a place are stored, {{ after }} MiB in place of {{ before }} MiB.
It needs `pip install ebft`:

```python
import ebft  # teaches transformers to load it
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("this folder, or its name on the hub", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("this folder, or its name on the hub")
dense = ebft.to_dense(model)  # an ordinary model again, with the zeros in it
```
""")
_CARD = _CARDS.from_string("""\
# {{ name }}, {{ rounded }} sparse

Made by [ebft](https://arxiv.org/abs/2402.12419) {{ summary.versions.ebft }}: {{ summary.recipe }}.
It loads as any model of transformers does. Of the weights of the matrices inside its blocks {{ share }}
{% if summary.config.uniform %}
were taken away, by whole heads and channels.
{% else %}
are exactly zero; `masks.safetensors` says which.
{% endif %}
{% if tuned %}
The kept ones were tuned {{ tuned }}, on {{ use.tokens }} tokens of {{ source }} ({{ use.windows }}).
{% endif %}
{% if plain_merge %}
{{ plain_merge }}
{% endif %}
{% for name, told in held_out %}
{{ name }}, {{ told }}.
{% endfor %}

{% if figures %}
|{% for cell in headings %} {{ cell }} |{% endfor %}

|{% for cell in headings %} --- |{% endfor %}

{% for row in figures %}
|{% for cell in row %} {{ cell }} |{% endfor %}

{% endfor %}

{% endif %}
{% if zero_shot %}
| zero-shot, recovered | questions | metric | value | standard error |
| --- | --- | --- | --- | --- |
{% for row in zero_shot %}
|{% for cell in row %} {{ cell }} |{% endfor %}

{% endfor %}

{% endif %}
{% if "won back" in headings %}
"Won back" is the share of the lost log-perplexity; "recovered" was measured on these files.
{% endif %}

| setting | value |
| --- | --- |
{% for row in settings %}
|{% for cell in row %} {{ cell }} |{% endfor %}

{% endfor %}
""")
