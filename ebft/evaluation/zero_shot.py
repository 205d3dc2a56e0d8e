"""Zero-shot tasks by the stock lm-evaluation-harness (``pip install ebft[tasks]``).

Beside the harness's own tasks there is ``local:TEXT``, for machines without a network: multiple choice made from a text
of one's own. 32 words of it are given, and of four continuations of 4 words the one that follows them is to be found;
the others follow elsewhere in the text. The harness scores it as it does its own, by log-likelihood: ``acc``, and
``acc_norm`` per character.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ebft.data.calibration import read_documents
from ebft.errors import EBFTError, first_line

LOCAL = "local:"
CONTEXT, CONTINUATION, CHOICES = 32, 4, 4  # words, words, continuations to choose from
LOCAL_QUESTIONS = 1000  # at most
BATCH = 8  # requests that go through the model together
RESAMPLINGS = 1000  # for the standard errors that have no formula


@dataclass(frozen=True)
class ZeroShot:
    """What ``--eval-tasks`` asks for, looked up and read before the run begins.

    Attributes:
        names: tasks, groups and tags of the harness.
        local: task -> its questions, of those made from a text.
        limit: questions of each task that are asked; None for all.
    """

    names: list[str]
    local: dict[str, list[dict[str, Any]]]
    limit: int | None

    @classmethod
    def prepare(cls, tasks: list[str], limit: int | None) -> ZeroShot:
        """The tasks of those names; their data are loaded once, so that what cannot be had is said now.

        Raises:
            EBFTError: the harness is not installed, or there is no such task or no data for it.
        """
        if find_spec("lm_eval") is None:
            raise EBFTError(
                "--eval-tasks needs lm-evaluation-harness, which is not installed (pip install ebft[tasks])"
            )
        names = [task for task in tasks if not task.startswith(LOCAL)]
        local = {
            task: cloze(task, read_documents(task.removeprefix(LOCAL), "evaluation"))
            for task in tasks
            if task.startswith(LOCAL)
        }
        if names:
            _look_up(names)
        return cls(names, local, limit)

    def fingerprint(self) -> dict[str, str]:
        """Task -> digest of the questions made here; the harness's own tasks are known by their names."""
        return {
            task: hashlib.sha256(json.dumps(questions).encode()).hexdigest() for task, questions in self.local.items()
        }

    def measure(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, device: torch.device
    ) -> dict[str, dict[str, float]]:
        """Task -> its metrics, standard errors (``acc_stderr``) and the number of ``documents`` that were asked about.

        Args:
            model: whole, in evaluation mode; it is moved to ``device``.
        """
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        wrapped = import_module("lm_eval.models.huggingface").HFLM(
            pretrained=model.to(device), tokenizer=tokenizer, batch_size=BATCH
        )
        own = import_module("lm_eval.api.task").ConfigurableTask
        found = import_module("lm_eval.evaluator").simple_evaluate(
            wrapped,
            tasks=[*self.names, *(own(config=_as_task(*item)) for item in self.local.items())],
            limit=self.limit,
            bootstrap_iters=RESAMPLINGS,
            log_samples=False,
        )
        counts = {task: {"documents": count["effective"]} for task, count in found["n-samples"].items()}
        return {task: counts.get(task, {}) | _metrics(values) for task, values in found["results"].items()}


def cloze(task: str, documents: Iterable[str]) -> list[dict[str, Any]]:
    """Questions made from a text, always the same: ``context``, four ``choices``, and which is the ``answer``.

    Raises:
        EBFTError: the text is too short for four different continuations.
    """
    length = CONTEXT + CONTINUATION
    passages = [
        (" ".join(words[start : start + CONTEXT]), " ".join(words[start + CONTEXT : start + length]))
        for words in map(str.split, documents)
        for start in range(0, len(words) - length + 1, length)
    ]
    continuations = sorted({continuation for _, continuation in passages})
    if len(continuations) < CHOICES:
        raise EBFTError(
            f"--eval-tasks {task} has {len(passages)} passages of {length} words, with {len(continuations)} different "
            f"ends; expected at least {CHOICES}"
        )
    choose, questions = random.Random(0), []
    choose.shuffle(passages)  # those that a limit leaves are from all over the text
    for context, continuation in passages[:LOCAL_QUESTIONS]:
        others = [other for other in choose.sample(continuations, CHOICES) if other != continuation]
        answer = choose.randrange(CHOICES)
        choices = others[: CHOICES - 1]
        choices.insert(answer, continuation)
        questions.append({"context": context, "choices": choices, "answer": answer})
    return questions


def _as_task(name: str, questions: list[dict[str, Any]]) -> dict[str, Any]:
    """The harness's configuration of a task with these questions; fields are named, so that nothing is a template."""

    def dataset(**_: Any) -> dict[str, Any]:
        return {"test": import_module("datasets").Dataset.from_list(questions)}

    measures = [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")]
    return {
        "task": name,
        "custom_dataset": dataset,
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": measures,
        "metadata": {"version": 1.0},
    }


def _look_up(names: list[str]) -> None:
    """Whether the harness knows the tasks, has their data and runs no code of the model's for them."""
    fails = (
        OSError,
        ValueError,
        KeyError,
        ImportError,
        RuntimeError,
        import_module("datasets").exceptions.DatasetsError,
    )
    manager = import_module("lm_eval.tasks").TaskManager()
    known = set(manager.all_tasks)
    for name in names:
        if name not in known:
            raise EBFTError(
                f"--eval-tasks names {name!r}; expected tasks of lm-evaluation-harness, or {LOCAL}TEXT for one made "
                "from a text"
            )
        try:
            tasks = manager.load([name])["tasks"]
        except fails as error:
            raise EBFTError(f"--eval-tasks {name} cannot be loaded: {first_line(error)}") from None
        if any(task.get_config("unsafe_code") for task in tasks.values()):
            raise EBFTError(f"--eval-tasks {name} would run code that the model writes; expected other tasks")


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    """The harness's ``acc,none`` as ``acc``; those of other filters keep their filter's name."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in values.items()
        if "," in key and isinstance(value, int | float)
    }
