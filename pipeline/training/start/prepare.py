"""What a run's files must be, before any row or weight is read: the model's weights, its tokenizer, the output folder."""

from pathlib import Path
from typing import Any

from pipeline.console import warn
from pipeline.data import tokenizer as tokenizers
from pipeline.files import check_writable
from pipeline.formats.base_model import config_ties, read_base, warn_of_remarks
from pipeline.model import unsupported, weights
from pipeline.model.stage import tied_head
from pipeline.names import HEAD
from pipeline.training.data import fits as data_fits
from pipeline.training.stage.meta_model import MetaModel
from pipeline.training.start.resolved import Resolved


def check_files(model: str, output_dir: str, meta_model: MetaModel) -> None:
    """UserError if a weight of the model is not there, or nothing can be written to output_dir. No weight is read."""
    check_writable(Path(output_dir), "output_dir")
    base = read_base(Path(model), "model")
    with unsupported.named(meta_model.config.model_type, "finding its weights in the folder's files"):
        weights.check_complete(meta_model.shared, base)
    warn_of_remarks(base)
    if config_ties(base.config) and not tied_head(meta_model.shared) and base.find(HEAD):
        warn(
            f"{model}: config.json ties the head to the embedding, but {base.taken} holds two different tensors. Both "
            "are kept, as in transformers; tie_word_embeddings = false would say so."
        )


def tokenizer_for(plan: Resolved, folder: str) -> Any:
    """The tokenizer in `folder`; UserError if its BOS or EOS has no trained row in the model's embedding."""
    tokenizer = tokenizers.load(folder)
    data_fits.check_tokenizer(tokenizer, folder, data_fits.embedding_rows(plan.meta_model.shared))
    return tokenizer
