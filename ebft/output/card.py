"""The model card: README.md of the saved model, where it comes from, its figures, how to use it and make it again."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import isfinite
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined

from ebft.model.provenance import is_hub_id
from ebft.output.figures import (
    STAGES,
    held_out,
    metrics_of,
    one_line,
    perplexity_table,
    plain_merge,
    size,
    text_samples,
    without_folder,
    zero_shot_rows,
)
from ebft.output.recipe import changed_settings, command_again
from ebft.registry import recoveries


def model_card(summary: dict[str, Any]) -> str:
    """README.md of the saved model."""
    config, preset = summary["config"], changed_settings(summary)
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
        preset=preset[0],
        settings=preset[1],
        command=_Code(command_again(summary)),
        tuned=", then ".join(dict.fromkeys(recoveries[name].told for name in names)),
        use=summary["calibration"],
        source=without_folder(summary["calibration"]["source"]) if names else "",
        plain_merge=plain_merge(summary),
        held_out=[(name, told) for name, of in summary["whole_model"].items() if (told := held_out(of))],
        samples=text_samples(summary),
        size=size,
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
        base_model=source if is_hub_id(source) else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["sparse", "pruned", "compressed", "ebft"],
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}"))


def _card_data(summary: dict[str, Any]) -> ModelCardData:
    """What the hub reads of the card."""
    measured = [(text, "perplexity", values[_last(values)]) for text, values in summary["perplexity"].items()]
    measured += [(task, *of) for task, values in summary["zero_shot"].items() for of in metrics_of(values).items()]
    results = [
        EvalResult("text-generation", path or name, name, metric, value, **of_dataset)
        for text, metric, value in measured
        for path, of_dataset in [_on_hub(summary, text)]
        if isfinite(value) and (name := one_line(without_folder(text)))
    ]
    source, texts = summary["source"], summary["datasets"]
    datasets = [texts[name]["path"] for name in summary["calibration_texts"] if name in texts]
    return ModelCardData(
        base_model=source.get("base_model"),
        license=source.get("license"),
        license_name=source.get("license_name"),
        license_link=source.get("license_link"),
        language=source.get("language"),
        datasets=datasets or None,
        model_name=one_line(without_folder(summary["model"])) or "model",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[*dict.fromkeys([*source.get("tags", []), "sparse", "pruned", "ebft"])],
        eval_results=results or None,
    )


def _on_hub(summary: dict[str, Any], text: str) -> tuple[str, dict[str, Any]]:
    """The dataset of the hub that a text is a part of, and which part; nothing where there is none."""
    dataset = summary["datasets"].get(text)
    return (
        (dataset["path"], {"dataset_config": dataset["name"], "dataset_split": dataset["split"]})
        if dataset
        else ("", {})
    )


def _last(values: dict[str, float]) -> str:
    """The stage of the saved files."""
    return [stage for stage in STAGES if stage in values][-1]


class _Code(str):
    """Stands on a line of a fenced block, where nothing is markup."""


def markdown(value: Any) -> str:
    """``value`` as a line of Markdown that shows it as it is, wherever it stands: no tag, link, column or emphasis."""
    if isinstance(value, _Code):
        return one_line(value)
    return _MARKUP.sub(lambda found: f"&#{ord(found[0])};", one_line(value))


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
{% if summary.config.uniform %}
Whole heads and channels, {{ share }} of the weights of the matrices inside its blocks, were taken away.
{% else %}
Of the weights of the matrices inside its blocks {{ share }} are exactly zero; `masks.safetensors` says which.
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

Size: {{ size(summary.size.saved) }}, as the dense model's {{ size(summary.size.dense) }}
{%- if summary.size.compressed %}
; about {{ size(summary.size.compressed) }} without its zeros (`ebft compress`)
{%- endif %}
.

{% if samples %}
## Text samples

Each model's likeliest tokens ({{ summary.continuations.tokens }} at most), as they come.

{% for prompt, texts in samples %}
- “{{ prompt }}”
{% for stage, text in texts %}
  - {{ stage }}: {{ text or "(nothing)" }}
{% endfor %}
{% endfor %}

{% endif %}
## How to use it

Put the name or the folder of this model in place of `MODEL`. To everything but ebft it is an ordinary dense model.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("MODEL", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("MODEL")
```

```sh
vllm serve MODEL                                   # vLLM
python convert_hf_to_gguf.py MODEL                 # llama.cpp; MODEL is a folder
{% if not summary.config.uniform %}
ebft compress MODEL small                          # without its zeros; ebft.load_compressed("small") loads it
{% endif %}
```

## How to make it again

```sh
{{ command }}
```

{% if settings %}
It starts from the preset `{{ preset }}`, with other values for:

{% for name, value in settings.items() %}
- {{ name }}: {{ value }}
{% endfor %}
{% else %}
These are the settings of the preset `{{ preset }}`.
{% endif %}
""")
