"""Takes the rows of one evaluation set; gives each data-parallel rank its micro-batches, every row in exactly one.

All ranks get the same number of micro-batches of the same shape, so that the whole set goes through the pipeline in one
call; what is missing at the end is filler, which has no targets.
"""

import math
from collections.abc import Iterator

from pipeline.data.microbatch import MicroBatch, collate, rows_that_fit
from pipeline.data.split import Rows


class EvaluationBatches:
    """This rank's micro-batches of `rows`, read as they are asked for; `len` is the same on all ranks.

    A micro-batch has `micro_batch_size` rows, or as many as `batch_size_tokens` holds (UserError if that is none). Its
    `loss_scale` is 1, so a micro-batch's loss is a sum; the set's loss is the sum over ranks / `target_tokens`.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        micro_batch_size: int = 1,
        batch_size_tokens: int | None = None,
        dp_rank: int = 0,
        dp_world: int = 1,
    ) -> None:
        self.rows, self.dp_rank, self.dp_world = rows, dp_rank, dp_world
        width = rows.store.sequence_len
        self.shape = (rows_that_fit(rows.store, width, micro_batch_size, batch_size_tokens), width)
        self.target_tokens = len(rows) * (width - 1)

    def __len__(self) -> int:
        return math.ceil(len(self.rows) / (self.shape[0] * self.dp_world))

    def __iter__(self) -> Iterator[MicroBatch]:
        size = self.shape[0]
        for index in range(self.dp_rank, len(self) * self.dp_world, self.dp_world):
            chunks = self.rows.chunks[index * size : (index + 1) * size]
            rows = [(0, int(chunk)) for chunk in chunks]
            yield collate([self.rows.store], rows, *self.shape, loss_scale=1.0)
