"""The model card: README.md of the saved model, where it comes from, its recipe, its figures."""

from __future__ import annotations

import re
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


def _card_data(summary: dict[str, Any]) -> ModelCardData:
    """What the hub reads of the card."""
    measured = [(text, "perplexity", values[_last(values)]) for text, values in summary["perplexity"].items()]
    measured += [(task, *of) for task, values in summary["zero_shot"].items() for of in metrics_of(values).items()]
    results = [
        EvalResult("text-generation", name, name, metric, value)
        for text, metric, value in measured
        if isfinite(value) and (name := one_line(without_folder(text)))
    ]
    of_the_hub = _HUB_ID.fullmatch(summary["model"]) and not Path(summary["model"]).exists()
    return ModelCardData(
        base_model=summary["model"] if of_the_hub else None,
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
_CARD = Environment(
    finalize=markdown, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
).from_string("""\
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
