"""The tables of a config that name data: [[datasets]] and [[eval_datasets]], and which of their keys goes with which type.

Every key with its default, unit, bound and meaning, as in pipeline/config/schema.py, which has the top level.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt

from pipeline.config.tables import Section

_CONVERT = "books are read from .txt and .md files, dataset_type = 'textfile': convert them first"
# dataset_type as others would write it → what to do.
_OTHER_TYPES = {
    ("chat_template", "sharegpt", "messages", "conversations", "chatml", "instruct"): "write dataset_type = 'chat'",
    ("alpaca", "instruction", "input_output"): "write dataset_type = 'completion'",
    ("csv", "tsv", "table", "arrow", "json", "jsonl", "parquet"): (
        "write what the rows are: dataset_type = 'doclist' (texts), 'chat', 'completion' or 'pretokenized'; each reads .json, "
        ".jsonl, .parquet, .csv and .arrow"
    ),
    (
        "dpo",
        "ipo",
        "orpo",
        "simpo",
        "cpo",
        "pairs",
        "pairwise",
        "rm",
        "chatml.intel",
        "chatml.argilla",
        "chatml.icr",
        "chatml.ultra",
    ): ("write dataset_type = 'preference'"),
    ("kto", "prompt_completion_label"): "write dataset_type = 'unpaired'",
    ("ranking", "nectar", "zephyr.nectar"): "write dataset_type = 'ranked'",
    ("epub", "pdf", "html", "docx", "mobi"): _CONVERT,
    ("text", "txt", "md", "markdown", "raw", "plain", "book", "books"): "write dataset_type = 'textfile'",
}


DatasetType = Literal["textfile", "doclist", "chat", "completion", "pretokenized", "preference", "unpaired", "ranked"]
BOOKS = ("textfile", "doclist")


def _other_types(value: Any) -> Any:
    """Types that other trainers have are refused with what to write instead."""
    for values, what in _OTHER_TYPES.items():
        if isinstance(value, str) and value.lower() in values:
            raise ValueError(what)
    return value


class _Data(Section):
    """What both tables have."""

    name: str | None = Field(
        None, pattern=r"^[A-Za-z0-9_.-]+$", description="prefix of its metrics; default dataset0, dataset1, …, or eval0, eval1, …")  # fmt: skip
    dataset_type: Annotated[DatasetType, BeforeValidator(_other_types)] = Field(
        description="'textfile': .txt and .md files, one document each. The others are rows of .json, .jsonl, .parquet, .csv or .arrow, also packed (.gz, .zst): 'doclist' a document each, 'chat' conversations, 'completion' prompts with their completion or instructions, 'pretokenized' token ids (docs/data-chat.md and its neighbours); 'preference' pairs of answers, 'unpaired' answers that are good or bad, 'ranked' several answers in order (docs/data-preference.md). 'axolotl' stands for the datasets that the YAML file at dataset_path names (docs/data-chat.md)")  # fmt: skip
    dataset_path: str = Field(
        description="a file or a glob, ** descends into folders; for all types but 'textfile' also a folder, with all that fits in it, or one written by save_to_disk; hub:OWNER/NAME[@REVISION][:[CONFIG/]SPLIT] on the Hub, or an address (s3://, gs://, hf://, https://): docs/data-text.md")  # fmt: skip
    sequence_len: int = Field(
        ge=2, description="tokens per chunk of 'textfile' and 'doclist', exactly; of the other types' rows at most"
    )
    subsample: float | None = Field(
        None, gt=0, le=1, description="fraction of the rows to keep (of those held out too), after a seeded shuffle"
    )
    join_lines: bool = Field(
        False, description="join line breaks inside paragraphs, as Project Gutenberg's texts have them; verse, lists, tables, headings, quotations, code and indented lines keep theirs (datasets/README.md)")  # fmt: skip
    field_text: str = Field("text", min_length=1, description="doclist: the field or column with a document's text")
    field_messages: str | None = Field(
        None, min_length=1, description="chat: the field with the list of messages; default 'messages', else 'conversations' (ShareGPT)")  # fmt: skip
    message_property_mappings: dict[Literal["role", "content"], str] = Field(
        {}, description="chat: what a message calls its role and content, { role = 'from', content = 'value' }; ShareGPT's are found without")  # fmt: skip
    roles: dict[Literal["user", "assistant", "system", "tool"], list[str]] = Field(
        {}, description="chat: further names of roles, { user = ['customer'] }"
    )
    field_system: str | None = Field(
        None, min_length=1, description="chat: a field with a system text for the conversation"
    )
    field_tools: str | None = Field(
        None, min_length=1, description="chat: the field with the definitions of tools; default 'tools'"
    )
    field_prompt: str = Field(
        "prompt", min_length=1, description="completion, preference, unpaired, ranked: the field with what is read"
    )
    field_completion: str = Field("completion", min_length=1, description="completion: the field with what is trained; unpaired, and with score_weights: the field with the answer")  # fmt: skip
    field_chosen: str = Field("chosen", min_length=1, description="preference: the field with the better answer, as text or messages")  # fmt: skip
    field_rejected: str = Field("rejected", min_length=1, description="preference: the field with the worse answer")
    field_label: str | None = Field(
        None, min_length=1, description="unpaired: the field that says whether the answer is good (true, 1) or bad; default 'label'. preference: a field that says whether field_chosen's answer is the better one; default none, it always is")  # fmt: skip
    field_answers: str = Field(
        "answers", min_length=1, description="ranked: the field with the answers, best first, or as objects of answer and rank (1 the best; of equal ranks the first counts)")  # fmt: skip
    ranks: int = Field(2, ge=2, description="ranked: how many answers of each prompt, the best ones; rows with fewer are bad rows")  # fmt: skip
    score_weights: dict[str, float] = Field(
        {}, description="preference, ranked: rows are one answer each (field_completion), whose score is the sum of these fields times these weights; a pair is a prompt's best answer and a random one that scores less, ranks are by score: { helpfulness = 1, verbosity = -1 }")  # fmt: skip
    conversational: bool = Field(
        False, description="preference, unpaired, ranked: texts are messages of user and assistant, written by the chat template; else prompt and answer are plain text, with EOS behind. Messages, and rows with a text in field_system, always go through the template")  # fmt: skip
    truncation_mode: Literal["keep_start", "drop"] = Field(
        "keep_start", description="preference, unpaired, ranked: rows longer than sequence_len lose their end, as in TRL (a unit whose prompt alone is as long is left out), or their units are left out")  # fmt: skip
    chat_template: str | None = Field(
        None, min_length=1, description="chat, and completion's instructions: a file, a text of Jinja, 'chatml', 'llama3', 'gemma' or 'alpaca'; default the tokenizer's own. 'none' (completion only) takes instructions as plain text")  # fmt: skip
    chat_template_kwargs: dict[str, bool | int | float | str] = Field(
        {}, description="chat: variables for the template, { enable_thinking = false }"
    )
    train_on: Literal["all", "last"] = Field(
        "all", description="chat: train all turns of the assistant, or each conversation's last; `weight` (0, 1) or `train` of a message goes before")  # fmt: skip
    train_on_eos: Literal["turn", "last", "none"] = Field(
        "turn", description="chat, completion: train the end of every trained turn, of a row's last one only, or none"
    )
    merge_system: bool = Field(
        False, description="chat: put the system text and a blank line before the first question, for templates that have no place for it")  # fmt: skip
    history: Literal["split", "refuse"] = Field(
        "split", description="chat: where a template rewrites earlier turns (leaves out their thinking), a row for each trained turn with the history a server would show, or a bad row")  # fmt: skip
    too_long: Literal["drop", "truncate_left", "error"] = Field(
        "drop", description="rows longer than sequence_len are left out, begin later (oldest turns go, the system text stays; of a completion the prompt's beginning; no answer is ever cut), or are an error")  # fmt: skip
    allow_empty_answers: bool = Field(False, description="chat, completion: an empty answer is trained to stop at once; else it is a bad row")  # fmt: skip
    allow_special_text: bool = Field(
        False, description="chat, completion: text in which the template's own marks of turns are spelled out is taken as it is; else it is a bad row")  # fmt: skip
    deduplicate: bool = Field(False, description="leave out rows that are the same as an earlier one; they are counted in any case")  # fmt: skip
    max_bad_rows: float | None = Field(
        None, ge=0, le=1, description="part of the rows that may be bad (they are left out, counted by reason, and the first are named) before it is an error; default 0.01, for pretokenized 0")  # fmt: skip
    packing: Literal["none", "best_fit", "stream"] = Field(
        "none", description="puts several rows into one of sequence_len tokens, 'best_fit' without cutting any, 'stream' one after the other, cut at the end of each (not for evaluation); what a dataset of 'best_fit' holds out is packed too. Books are a stream in any case")  # fmt: skip
    document_mask: bool | None = Field(
        None, description="documents that share a row do not see each other; models that cannot keep them apart are refused; default true where rows are packed, false for books, as in qlora-pipe")  # fmt: skip

    @property
    def keeps_apart(self) -> bool:
        """Whether documents that share a row must not see each other."""
        if self.dataset_type in BOOKS:
            return bool(self.document_mask)
        return self.packing != "none" and self.document_mask is not False


class Dataset(_Data):
    """[[datasets]]"""

    eval_size: float | int = Field(
        0,
        ge=0,
        description="held out for evaluation: a fraction below 1, or a number of chunks (documents if eval_split = 'document'; conversations, with all their rows, of the types of rows)",
    )
    eval_split: Literal["chunk", "document"] = Field(
        "chunk", description="'chunk' holds out chunks as qlora-pipe does; 'document' holds out whole documents, which is the honest test, since neighbouring chunks of one book share it")  # fmt: skip
    sample_weight: PositiveFloat = Field(
        1.0, description="weight of this dataset when datasets are interleaved; of what, says mix_by"
    )
    rejected: Literal["given", "generate"] = Field(
        "given", description="preference: 'given' is in field_rejected; 'generate': before each step the model itself, as it then is, answers the prompts of the step, with [sampling], and these are the rejected answers (docs/preference.md)")  # fmt: skip
    num_repeats: PositiveFloat = Field(
        1.0, description="how many times an epoch goes through this dataset; of 0.5 two epochs together have every row, of 2.5 five times")  # fmt: skip
    stream: Literal["breaker", "retain"] | None = Field(
        None, description="of [objective] type = 'circuit_breaker', for all types but preference data: whether the rows' hidden states are to be broken or to stay as they are")  # fmt: skip
    max_tokens: PositiveInt | None = Field(
        None, description="most tokens of this dataset's rows to train on (one pass); which rows, a seeded shuffle decides")  # fmt: skip
    streaming: bool = Field(
        False, description="rows are read as they are trained on, in windows of which a few are on disk, and are shuffled within a window; for a dataset that shall not be stored. The run's only dataset; needs max_steps (docs/data-streaming.md)")  # fmt: skip
    window_rows: PositiveInt = Field(
        10_000, description="with streaming: rows, or documents of 'textfile' and 'doclist', of a window"
    )

    @property
    def generates(self) -> bool:
        """Whether the model gives the rejected answers itself."""
        return self.rejected == "generate"


class EvalDataset(_Data):
    """[[eval_datasets]]"""


_CHAT = ("chat",)
_TEXTS, _ROWS = ("chat", "completion"), ("chat", "completion", "pretokenized")
UNITS = ("preference", "unpaired", "ranked")
# Key → the types for which it has a meaning.
MEANT_FOR = {
    "streaming": (*BOOKS, *_ROWS),
    "join_lines": BOOKS,
    "eval_split": BOOKS,
    "field_text": ("doclist",),
    **dict.fromkeys(("message_property_mappings", "roles", "field_system", "merge_system"), _CHAT + UNITS),
    **dict.fromkeys(("field_messages", "field_tools", "train_on", "history"), _CHAT),
    **dict.fromkeys(("field_prompt", "field_completion"), ("completion", *UNITS)),
    **dict.fromkeys(("chat_template", "chat_template_kwargs", "allow_special_text"), _TEXTS + UNITS),
    **dict.fromkeys(("train_on_eos", "allow_empty_answers"), _TEXTS),
    **dict.fromkeys(("too_long", "packing"), _ROWS),
    **dict.fromkeys(("deduplicate", "max_bad_rows"), _ROWS + UNITS),
    **dict.fromkeys(("field_chosen", "field_rejected", "field_label"), ("preference", "unpaired")),
    "rejected": ("preference",),
    "score_weights": ("preference", "ranked"),
    **dict.fromkeys(("field_answers", "ranks"), ("ranked",)),
    **dict.fromkeys(("conversational", "truncation_mode"), UNITS),
}


def conflicts(table: str, dataset: Dataset | EvalDataset) -> Iterator[str]:
    """One line for each key of `table` (`datasets.0`) that does not go with the dataset's type."""
    kind = dataset.dataset_type
    for key, types in MEANT_FOR.items():
        field = type(dataset).model_fields.get(key)
        if kind not in types and field is not None and getattr(dataset, key) != field.get_default():
            has = " and ".join(f"'{one}'" for one in types)
            yield f"{table}.{key}: has a meaning for {has} only, not for '{kind}'; remove it"
    if kind == "chat" and dataset.chat_template == "none":
        yield f"{table}.chat_template: 'none' goes with 'completion' only; a conversation needs a template"
    if kind in UNITS and dataset.conversational and dataset.chat_template == "none":
        yield f"{table}.conversational: needs a chat template, and chat_template = 'none' is none; remove one of them"
    if kind == "preference" and dataset.score_weights and dataset.field_label:
        yield f"{table}.field_label: with score_weights the score says which answer is better; remove one of them"
    if isinstance(dataset, Dataset) and dataset.generates:
        yield from _conflicts_of_generated(table, dataset)
    if kind == "pretokenized" and dataset.too_long == "truncate_left":
        yield f"{table}.too_long: 'truncate_left' needs to know where turns begin, which 'pretokenized' does not; use 'drop'"
    if kind not in BOOKS and dataset.document_mask is not None and dataset.packing == "none":
        yield f"{table}.document_mask: has a meaning with packing only: without it every row is alone; remove it, or pack"
    if isinstance(dataset, Dataset) and dataset.stream is not None:
        for key, plain in (("packing", "none"), ("num_repeats", 1), ("sample_weight", 1)):
            if getattr(dataset, key) != plain:
                yield f"{table}.{key}: has no meaning for one of two streams (stream = '{dataset.stream}'); remove it"
    if isinstance(dataset, Dataset):
        yield from _streaming_conflicts(table, dataset)
    if isinstance(dataset, EvalDataset) and dataset.packing == "stream":
        yield f"{table}.packing: 'stream' would score what it cuts without its beginning; use 'best_fit'"


def _streaming_conflicts(table: str, dataset: Dataset) -> Iterator[str]:
    """What does not go with a dataset of which nobody knows how many rows it has."""
    if not dataset.streaming:
        if dataset.window_rows != Dataset.model_fields["window_rows"].default:
            yield f"{table}.window_rows: has a meaning with streaming = true only; remove it"
        return
    if dataset.eval_size:
        yield f"{table}.eval_size: nothing is held out of a stream; give what to evaluate on as [[eval_datasets]]"
    for key in ("subsample", "num_repeats", "max_tokens"):
        if getattr(dataset, key) != Dataset.model_fields[key].default:
            yield f"{table}.{key}: is of a dataset's rows together, which a stream does not know; remove it"


def _conflicts_of_generated(table: str, dataset: Dataset) -> Iterator[str]:
    """What does not go with rejected = 'generate'."""
    why = {
        "score_weights": "a pair of scored answers has both",
        "field_label": "which answer is better is known: the one that is there",
        "eval_size": "an answer that the model gives tells nothing of a set that is held out; give [[eval_datasets]] with both answers",
    }
    for key, reason in why.items():
        if getattr(dataset, key):
            yield f"{table}.{key}: does not go with rejected = 'generate': {reason}"
