"""Answers through stages: transformers' own generate is the oracle, token for token, for every family that it serves."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pipeline.console import UserError
from pipeline.generation import cache_check
from pipeline.generation.decoding import Answer, Asked, InOneProcess, Memory, answers, speaking
from pipeline.generation.sampling import Sampling
from pipeline.model import tiny_copy
from pipeline.model.cut_check import stages_of
from pipeline.model.neftune import apply as add_noise
from pipeline.model.router_loss import RouterLoss
from pipeline.model.stage import Stage
from pipeline.model.structure.parts import head_of_model, layers_of_model
from tests.helpers.builders import VOCABULARY, save_model
from tests.helpers.stages import CPU, build, chain
from tests.model.test_every_family import NEVER, NEVER_CUT, tiny

GREEDY = Sampling(temperature=0)
LENGTH = 16
# transformers' own generate fails on these, or they have a cache of their own kind: refused by cache_check.
NO_CACHE = {
    "dory": "reading token after token",
    "moshi": "otherwise than all at once",  # whose cache has a window, and whose attention has none
    "granitemoehybrid": "reading token after token",
    "minimax": "uses cache of its own",
    "bamba": "reading token after token",
    "openai-gpt": "takes no cache",
    "xlnet": "takes no cache",
}
# From a cache they go on by one token, and drop their state where it is several.
BY_ONE_ONLY = ("falcon_mamba", "jamba", "mamba", "recurrent_gemma")
QUICK = ("llama", "gpt_oss", "qwen3_next", "gemma3_text", "minimax", "moshi")
FAMILIES = [
    pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow)
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if kind not in NEVER
]


def ours(stages: list[Stage], prompt: list[int], sampling: Sampling = GREEDY, key: str = "", **given: Any) -> Answer:
    settings = {"stops": (), "max_new_tokens": LENGTH, **given}
    return answers(InOneProcess(stages, CPU), [Asked(prompt, sampling.noise(0, key))], sampling, **settings)[0]


def theirs(model: PreTrainedModel, prompt: Tensor, **given: Any) -> list[int]:
    """Without stops, so that it says as much."""
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    settings = {"max_new_tokens": LENGTH, "do_sample": False, "use_cache": True, **given}
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)[0, prompt.shape[1] :].tolist()  # type: ignore[operator,no-any-return]


@torch.no_grad()
def saying_text(model: PreTrainedModel) -> PreTrainedModel:
    """The tiny copy, whose logits of what is no text (an image, a sound) are 0, so that another is the largest."""
    head = head_of_model(model)
    head.weight[: tiny_copy.SPECIAL] = 0
    if head.bias is not None:
        head.bias[: tiny_copy.SPECIAL] = 0
    return model


@pytest.mark.parametrize("kind", FAMILIES)
def test_greedy_is_generates_token_for_token(kind: str) -> None:
    """In fp64, in which no rounding makes another token of a near tie; the check has compared it with no cache at all."""
    made = tiny(kind)
    if isinstance(made, str):
        pytest.skip(made[:200])
    whole = saying_text(cache_check.exact(deepcopy(made[0])))
    n_layers = len(layers_of_model(whole))
    cuts = [[(0, n_layers)], [(0, n_layers // 2), (n_layers // 2, n_layers)]]
    for ranges in cuts[: 1 if kind in NEVER_CUT else 2]:
        if kind in NO_CACHE:
            with pytest.raises(UserError, match=NO_CACHE[kind]):
                cache_check.check(whole.config, ranges, "[samples]: leave it out")
            continue
        assert cache_check.check(whole.config, ranges, "[samples]: leave it out") == (kind not in BY_ONE_ONLY)
        prompt = tiny_copy.token_ids()
        assert ours(stages_of(whole, ranges), prompt[0].tolist()).tokens == theirs(whole, prompt)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    root = tmp_path_factory.mktemp("models")
    changes: dict[str, dict[str, Any]] = {
        "cohere2": {"sliding_window": 8, "logit_scale": 0.25},
        "llama": {},
        "qwen2": {},
    }
    return {kind: (root / kind, save_model(root / kind, kind, **given)) for kind, given in changes.items()}


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7, top_k=40, top_p=0.9, min_p=0.02, seed=5),
        Sampling(temperature=1.3, min_p=0.1),
        Sampling(top_p=0.8),
    ],
    ids=["all", "min_p", "top_p"],
)
@pytest.mark.parametrize("kind", ["cohere2", "llama", "qwen2"])
def test_drawn_with_the_same_noise_it_is_generates(models: dict, kind: str, sampling: Sampling) -> None:
    """generate draws from torch's own generator, which is given the seed of ours."""
    folder, whole = models[kind]
    prompt = torch.randint(3, VOCABULARY, (1, 11), generator=torch.Generator().manual_seed(1))
    given = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    with torch.random.fork_rng():
        torch.manual_seed(sampling.noise(0, "x").initial_seed())
        right = theirs(whole, prompt, do_sample=True, min_p=sampling.min_p or None, **given)
    assert len(set(right)) > 3
    for cuts in ([0, 4], [0, 1, 4]):
        assert ours(chain(folder, cuts), prompt[0].tolist(), sampling, "x").tokens == right


def test_an_answer_does_not_depend_on_what_else_is_asked(models: dict) -> None:
    folder, _ = models["cohere2"]
    sampling = Sampling(temperature=0.8)
    prompts = [[5, 6, 7], list(range(3, 40)), [9], [100, 30, 2, 8, 7]]

    def asked(numbers: list[int]) -> list[Answer]:
        given = [Asked(prompts[n], sampling.noise(7, str(n))) for n in numbers]
        return answers(_Queue(chain(folder, [0, 2, 4])), given, sampling, {11, 60, 200}, LENGTH)

    together = asked([0, 1, 2, 3])
    assert together == [asked([n])[0] for n in range(4)]
    assert len({tuple(answer.tokens) for answer in together}) == 4


class _Queue(InOneProcess):
    """Stages that keep several prompts under way, as those over processes do."""

    in_flight = 3

    def __init__(self, stages: list[Stage]) -> None:
        super().__init__(stages, CPU)
        self.chosen: list[int] = []

    def forward(self, turn: Any, sampling: Sampling) -> None:
        super().forward(turn, sampling)
        self.chosen.append(self._token)

    def token(self, turn: Any) -> int:
        return self.chosen.pop(0)


def test_it_ends_at_a_stop_or_at_the_limit(models: dict) -> None:
    stages, sampling = [build(models["llama"][0], 0, 4)], Sampling()
    said = ours(stages, [7, 8, 9], sampling).tokens
    at = next(n for n, token in enumerate(said) if n > 2 and token not in said[:n])
    assert ours(stages, [7, 8, 9], sampling, stops={said[at]}) == Answer(said[:at], stop=said[at])
    assert ours(stages, [7, 8, 9], sampling, max_new_tokens=at) == Answer(said[:at], stop=None)


def test_logits_that_are_not_finite_end_it(models: dict) -> None:
    stage = build(models["llama"][0], 0, 4)
    with torch.no_grad():
        stage.head.weight[5, 0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        ours([stage], [7, 8])


def test_modes_noise_and_generators_are_left_as_they_were(models: dict) -> None:
    """In eval mode there is neither dropout nor NEFTune's noise, and nothing is drawn from torch's own generator."""
    quiet, stage = build(models["llama"][0], 0, 4), build(models["llama"][0], 0, 4).train()
    stage.model.base_model.norm.eval()
    modes = [module.training for module in stage.modules()]
    add_noise(stage, 5.0)
    before = torch.get_rng_state()
    with speaking([stage]):
        said = ours([stage], [7, 8, 9], Sampling(temperature=0.9), "x")
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in stage.modules()] == modes
    assert said == ours([quiet], [7, 8, 9], Sampling(temperature=0.9), "x")


def test_a_mixture_whose_routers_loss_is_trained_says_the_same(tmp_path: Path) -> None:
    save_model(tmp_path, "mixtral", num_local_experts=4, num_experts_per_tok=2)
    right = ours(chain(tmp_path, [0, 2, 4]), [7, 8, 9], Sampling(), "x")
    stages = chain(tmp_path, [0, 2, 4])
    routers = [RouterLoss(stage.train(), 0.1) for stage in stages]
    with speaking(stages):
        assert ours(stages, [7, 8, 9], Sampling(), "x") == right
    assert not any(router.measured() for router in routers)


def test_a_stage_that_forgets_is_refused(monkeypatch: pytest.MonkeyPatch, models: dict) -> None:
    """The check before a run compares what stages with caches say with the whole model's."""
    config = models["cohere2"][1].config
    cache_check.check(config, [(0, 2), (2, 4)], "[samples]: leave it out")
    forward = Stage.forward
    monkeypatch.setattr(Stage, "forward", lambda self, inputs, cache=None: forward(self, inputs))
    with pytest.raises(
        UserError, match=r"^\[samples\]: leave it out: model_type 'cohere2' reads token after token otherwise"
    ):
        cache_check.check(config, [(0, 2), (2, 4)], "[samples]: leave it out")


@pytest.mark.parametrize("kind", ["cohere2", "llama"])
def test_a_conversation_goes_on_from_its_cache_as_if_it_were_read_again(models: Any, kind: str) -> None:
    """Turns of 3 to 12 tokens, longer than cohere2's window, some answers stopped; only what is new goes through the stages."""
    folder, _ = models[kind]
    stages, memory = chain(folder, [0, 2, 4]), Memory()
    read: list[int] = []
    handle = stages[0].register_forward_pre_hook(lambda _, given: read.append(given[0][0].shape[1]))
    ids, generator = list[int](), torch.Generator().manual_seed(0)
    for turn, length in enumerate((7, 3, 12)):
        new = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        fresh = ours(stages, [*ids, *new])
        stops = {fresh.tokens[4]} if turn == 1 else set[int]()
        until = fresh.tokens.index(fresh.tokens[4]) if stops else LENGTH
        read.clear()
        said = answers(
            InOneProcess(stages, CPU), [Asked([*ids, *new], GREEDY.noise(0, ""), memory)], GREEDY, stops, LENGTH
        )[0]
        assert said == (fresh.tokens[:until], fresh.tokens[4] if stops else None)
        # The last token of an answer that reached the limit has not been through the stages yet.
        assert read[0] == length + (turn == 1)
        ids += [*new, *said.tokens]
        assert memory.ids == (ids if said.stopped else ids[:-1])
    other = [ids[0] + 1, *ids[1:]]
    read.clear()
    answers(InOneProcess(stages, CPU), [Asked(other, GREEDY.noise(0, ""), memory)], GREEDY, (), 1)
    assert read == [len(other)]  # what was said otherwise is read anew
    handle.remove()
