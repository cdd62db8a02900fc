"""What is asked, as ids: plain text as the tokenizer has it, conversations as the chat template writes them; and what ends."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.console import UserError
from pipeline.generation.prompts import Asker, asker, keys_of_noise, read_prompts, stop_ids
from tests.helpers.chat import source, tokenizer


def model_folder(folder: Path, generation: Any = None, **config: Any) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return str(folder)


def asks(folder: Path, name: str = "", **given: Any) -> Asker:
    made = tokenizer(name or "inst")
    made.chat_template = source(name) if name else None
    return asker(made, model_folder(folder), **{"chat": bool(name), "system": "", **given})


def test_stops_are_the_generation_configs_and_the_tokenizers(tmp_path: Path) -> None:
    made = tokenizer("inst")
    eos = made.eos_token_id
    assert stop_ids(made, model_folder(tmp_path, eos_token_id=3)) == {3, eos}
    assert stop_ids(made, model_folder(tmp_path, eos_token_id=None)) == {eos}
    assert stop_ids(made, model_folder(tmp_path, {"eos_token_id": [7, 9]}, eos_token_id=3)) == {7, 9, eos}


def test_a_plain_prompt_is_what_the_tokenizer_makes_of_it(tmp_path: Path) -> None:
    asking = asks(tmp_path)
    assert asking.ids("salt and water") == asking.tokenizer("salt and water")["input_ids"]
    assert asking.text(asking.ids("salt and  water .")) == "salt and  water ."
    with pytest.raises(UserError, match="empty prompt"):
        asking.ids("")


@pytest.mark.parametrize("name", ["none_at_the_end", "inst"])
def test_a_conversation_is_what_the_template_writes(tmp_path: Path, name: str) -> None:
    """Without the special tokens that a tokenizer adds, and up to where the model answers."""
    asking = asks(tmp_path, name)
    user = [{"role": "user", "content": "What is salt?"}]
    history = [*user, {"role": "assistant", "content": "A mineral."}, *user]
    for messages, ids in ((user, asking.ids("What is salt?")), (history, asking.conversation(history))):
        right = asking.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ids == right


def test_the_systems_message_comes_first(tmp_path: Path) -> None:
    asking = asks(tmp_path, "none_at_the_end", system="Be brief.")
    text = asking.tokenizer.decode(asking.ids("Why?"))
    assert text == "<|bos|><|system|>Be brief.<|user|>Why?<|assistant|>"


def test_what_a_template_cannot_say_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot render the prompt: Only user and assistant roles are supported"):
        asks(tmp_path, "inst", system="Be brief.").ids("Why?")
    with pytest.raises(UserError, match="the model's tokenizer has no chat template"):
        asks(tmp_path, chat=True)


def test_a_datasets_template_and_its_rules_are_taken(tmp_path: Path) -> None:
    """As the dataset that is trained has them."""
    asking = asks(tmp_path, chat=True, chat_template="{{ mood }}{% for m in messages %}[{{ m.content }}]{% endfor %}")
    assert asking.tokenizer.decode(asking.ids("Why?")) == "[Why?]"
    given = {"chat_template": source("inst"), "system": "Be brief.", "merge_system": True}
    asking = asks(tmp_path, chat=True, **given)
    assert asking.tokenizer.decode(asking.ids("Why?")) == "<|bos|>[INST] Be brief.\n\nWhy? [/INST]"
    loud = asks(tmp_path, chat=True, chat_template="{{ mood }}{{ messages[0].content }}", template_kwargs={"mood": "!"})
    assert loud.tokenizer.decode(loud.ids("Why?")) == "!Why?"


def test_prompts_are_read_a_line_each(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffWhat is salt?\r\n\r\n  Wo ist Süden? \n".encode())
    assert read_prompts(file, "--prompts") == ["What is salt?", "Wo ist Süden?"]
    for content, said in ((b"\n \n", "holds no prompt"), (b"\xff\xfe", "not UTF-8")):
        file.write_bytes(content)
        with pytest.raises(UserError, match=f"^--prompts: .*{said}"):
            read_prompts(file, "--prompts")
    with pytest.raises(UserError, match="No such file"):
        read_prompts(tmp_path / "none.txt", "--prompts")


def test_noise_goes_by_the_prompt_and_not_by_its_place() -> None:
    assert set(keys_of_noise(["a", "b"])) == set(keys_of_noise(["b", "a"]))
    assert len(set(keys_of_noise(["a", "a", "b"]))) == 3
