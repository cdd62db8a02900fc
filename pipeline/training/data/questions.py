"""The prompts of [samples] as token ids: checked, with all else of the data, before a weight is read.

Takes what the config resolves to and the tokenizer; gives ids, or one UserError.
"""

from typing import Any, NamedTuple

from transformers import PreTrainedModel

from pipeline.console import UserError, log
from pipeline.generation import positions
from pipeline.generation.prompts import Asker, asker
from pipeline.training.data import fits as data_fits
from pipeline.training.start.resolved import SampleSpec


class Questions(NamedTuple):
    """What is asked: `ids` of each prompt, in the order of the config's."""

    asker: Asker
    ids: list[list[int]]


def questions_of(spec: SampleSpec, tokenizer: Any, model: PreTrainedModel | None = None) -> Questions:
    """The prompts, encoded. With the model, UserError for ids it has no row for, or positions that it cannot have."""
    making = asker(
        tokenizer,
        spec.folder,
        chat=spec.chat,
        system=spec.system,
        chat_template=spec.chat_template,
        template_kwargs=spec.template_kwargs,
        merge_system=spec.merge_system,
    )
    ids = []
    for number, prompt in enumerate(spec.prompts):
        try:
            ids.append(making.ids(prompt))
        except UserError as error:
            raise UserError(f"samples.prompts.{number}: {error}") from None
    longest = max(len(prompt) for prompt in ids)
    if model is not None:
        rows = data_fits.embedding_rows(model)
        if (largest := max(max(prompt) for prompt in ids)) >= rows:
            raise UserError(
                f"samples.prompts: a prompt holds the token with the id {largest:,}, but the model's embedding has {rows:,} "
                "rows: the tokenizer is not this model's"
            )
        what = f"samples.max_new_tokens = {spec.max_new_tokens:,} after a prompt of {longest:,} tokens"
        positions.check(what, longest + spec.max_new_tokens, model, lower="samples.max_new_tokens")
    when = [
        *(["before the first step"] if spec.at_start else []),
        *([f"every {spec.every_steps} steps"] if spec.every_steps else []),
        *(["at the end"] if spec.at_end else []),
    ]
    how = "greedy" if spec.sampling.temperature == 0 else f"temperature {spec.sampling.temperature:g}"
    log(
        f"samples:  {len(ids)} prompt(s) {'in the chat template, ' if spec.chat else ''}{', '.join(when)}; {how}, at most "
        f"{spec.max_new_tokens} tokens each"
    )
    return Questions(making, ids)
