"""lm-evaluation-harness's tasks through the stages: a model in its interface whose log-probabilities are ours.

Takes names of tasks, and a folder of YAML files with one's own; gives each task's figures for each document. The harness runs on
the first process, which tells the others what to score. It is no requirement: it is imported when tasks are asked for, and
INSTALL says how to get it.
"""

import importlib.util
import logging
import math
import numbers
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from pipeline.console import UserError, log_if_slow
from pipeline.evaluation.scoring import Scorer
from pipeline.evaluation.units import Row
from pipeline.foreign import printable
from pipeline.generation.positions import positions

INSTALL = (
    "pip install --no-deps 'lm_eval>=0.4.13,<0.5', then pip install -c constraints.txt evaluate jsonlines more_itertools "
    "pytablewriter rouge-score sacrebleu scikit-learn sqlitedict word2number"
)
SCORED = ("multiple_choice", "loglikelihood", "loglikelihood_rolling")
WITHOUT_LIMIT = 2048  # tokens, where a model's config has no limit: the harness's own default
SEED = 42  # of its few-shot examples


class Document(NamedTuple):
    """One document of a task under one adapter: its hash, each figure that the task makes of it alone with its weight, and the
    log-probabilities that these are made of."""

    hash: str
    figures: dict[str, tuple[float, float]]
    logprobs: tuple[float, ...]


class TaskResult(NamedTuple):
    """One task under one adapter: its documents in order, which of their figures are better when larger (1, else −1), and what
    the harness says of all."""

    adapter: str
    task: str
    documents: list[Document]
    better: dict[str, int]
    summary: dict[str, Any]


def load(tasks: Sequence[str], folder: Path | None) -> dict[str, Any]:
    """The harness's tasks by name. `folder`: with YAML files of tasks of one's own.

    UserError where the harness is not installed, a task is not known or cannot be read, or asks for generated text.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"tasks: lm-evaluation-harness is not installed: {INSTALL}")
    if folder is not None and not folder.is_dir():
        raise UserError(f"tasks_folder = '{printable(folder)}': no such folder")
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with log_if_slow("reading the tasks"):
        manager = TaskManager(include_path=folder, include_defaults=False)
        if not all(
            manager.match_tasks([name]) for name in tasks
        ):  # the shipped ones are 14 000 files, read for minutes
            manager = TaskManager(include_path=folder)
        if unknown := [name for name in tasks if not manager.match_tasks([name])]:
            own = f", nor in {folder}" if folder else "; tasks of your own are in a tasks_folder"
            raise UserError(f"tasks: lm-evaluation-harness knows no '{printable(unknown[0])}'{own}")
        try:
            found: dict[str, Any] = manager.load(list(tasks))["tasks"]
        except Exception as error:  # whatever a task's data, its code or the Hub raises
            raise UserError(f"tasks: cannot be read: {printable(f'{type(error).__name__}: {error}')}") from error
    for name, task in found.items():
        if task.OUTPUT_TYPE not in SCORED:
            raise UserError(f"tasks: '{name}' asks for {task.OUTPUT_TYPE}; here run tasks of {', '.join(SCORED)}")
    return found


def run(
    adapter: str, scorer: Scorer, tokenizer: Any, model: PreTrainedModel, tasks: dict[str, Any], num_fewshot: int | None
) -> list[TaskResult]:
    """What each of `tasks` says of the model as it stands, with `adapter`. All processes must come here, others than the first
    without tasks; the first one has the results."""
    if not scorer.is_first:
        while (rows := scorer.share(None)) is not None:
            scorer.score(rows, greedy=True)
        return []
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    def score(rows: list[Row]) -> list[tuple[float, bool]]:
        return [(one.logprob, one.greedy) for one in scorer.score(scorer.share(rows), greedy=True)]

    said = simple_evaluate(
        _stages_model(score, tokenizer, positions(model.config) or WITHOUT_LIMIT),
        tasks=list(tasks.values()),
        task_manager=TaskManager(include_defaults=False),  # it would read all that are shipped, for minutes
        num_fewshot=num_fewshot,
        bootstrap_iters=0,  # its intervals are by row, and of one model
        fewshot_random_seed=SEED,
    )
    scorer.share(None)
    return [_result(said, adapter, name, task) for name, task in tasks.items()]


def _stages_model(score: Callable[[list[Row]], list[tuple[float, bool]]], tokenizer: Any, most: int) -> Any:
    """An LM of the harness. `score`: the log-probability of rows and whether it is greedy. `most`: tokens that are read at once.

    The class is made here because what it derives from is there only where the harness is.
    """
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM

    class StagesModel(TemplateLM):  # type: ignore[misc]
        """Encodes as the harness's HFLM does, and cuts what is too long at its beginning."""

        def __init__(self) -> None:
            super().__init__()
            self.tokenizer, self.max_length = tokenizer, most

        @property
        def eot_token_id(self) -> int:
            return int(tokenizer.eos_token_id)

        @property
        def prefix_token_id(self) -> int:
            return int(tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            given = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
            if add_special_tokens is None and string.startswith(tokenizer.decode(self.prefix_token_id)):
                given = {"add_special_tokens": False}
            return list(tokenizer.encode(string, **given))

        def _loglikelihood_tokens(
            self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
        ) -> list[tuple[float, bool]]:
            rows = []
            for _text, context, continuation in requests:
                ids = (context + continuation)[-(most + 1) :]
                start = max(1, len(ids) - len(continuation))
                rows.append(Row(ids, [(start, len(ids))], 0))
            return score(rows)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            windows = [
                [
                    utils.make_disjoint_window(window)
                    for window in utils.get_rolling_token_windows(
                        token_list=self.tok_encode(request.args[0]),
                        prefix_token=self.prefix_token_id,
                        max_seq_len=most,
                        context_len=1,
                    )
                ]
                for request in requests
            ]
            scores = iter(self._loglikelihood_tokens([(None, *window) for of_one in windows for window in of_one]))
            return [sum(next(scores)[0] for _ in of_one) for of_one in windows]

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            raise NotImplementedError("refused by load")

    return StagesModel()


def _result(said: Any, adapter: str, name: str, task: Any) -> TaskResult:
    better = {metric: 1 if larger else -1 for metric, larger in task.higher_is_better().items()}
    documents: dict[int, Document] = {}
    for sample in said["samples"][name]:
        figures = {metric: found for metric in better if (found := _figure(metric, sample.get(metric))) is not None}
        logprobs = tuple(
            float(answer[0] if isinstance(answer, tuple | list) else answer) for answer in _answers(sample)
        )
        documents.setdefault(sample["doc_id"], Document(str(sample["doc_hash"]), figures, logprobs))
    summary = {
        key.partition(",")[0]: value for key, value in said["results"][name].items() if isinstance(value, int | float)
    }
    return TaskResult(adapter, name, [documents[number] for number in sorted(documents)], better, summary)


def _answers(sample: dict[str, Any]) -> list[Any]:
    """What the model said to each request of a document: (log-probability, whether greedy), or a log-probability alone."""
    return [answer for of_request in sample["resps"] for answer in of_request]


def _figure(metric: str, value: Any) -> tuple[float, float] | None:
    """A document's figure and its weight; None of what only all documents together have (a perplexity)."""
    if "perplexity" in metric:  # of a document there is the log-probability under this name
        return None
    if isinstance(value, numbers.Real):
        return float(value), 1.0
    if metric == "bits_per_byte" and isinstance(value, tuple | list):
        logprob, n_bytes = value
        return -float(logprob) / math.log(2), float(n_bytes)
    return None
