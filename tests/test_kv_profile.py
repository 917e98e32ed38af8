"""Tables of cache policies: needles, head scores, layer errors, files, and the command that makes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from kv_support import LAYERS, build
from tests_support import build_tokenizer
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from rltok import kv_profile
from rltok.cli import main
from rltok.config import ConfigError
from rltok.kv import CompressKV, LayerView, SnapKV, attach, build_kv, build_policy, kv_settings
from rltok.kv.compress_kv import budgets_of
from rltok.kv.compress_profile import (
    first_heads,
    full_layers,
    head_scores,
    layer_errors,
    normalised_errors,
    relative_errors,
    sample_head_scores,
)
from rltok.kv.needles import Needle, encode_sentences, make_needles, sentences_of, token_recall
from rltok.kv.tables import (
    CompressTable,
    ModelFacts,
    RazorTable,
    full_heads_of,
    read_compress_table,
    read_razor_table,
    write_table,
)
from rltok.kv_profile import ProfileOptions, embedded_texts

HEADS, KEY_HEADS, SIZE = 4, 2, 16


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def model(request: pytest.FixtureRequest) -> Any:
    return build(request.param)


@pytest.fixture(scope="module")
def needles() -> list[Needle]:
    generator = torch.Generator().manual_seed(5)
    sentences = [torch.randint(5, 97, (12,), generator=generator).tolist() for _ in range(20)]
    return make_needles(sentences, 3, 70, seed=1, cue=3)


# Needles


def test_a_needle_lies_where_it_is_said_to() -> None:
    generator = torch.Generator().manual_seed(0)
    sentences = [torch.randint(5, 999, (7 + i % 5,), generator=generator).tolist() for i in range(60)]
    head, tail = [1, 2], [3]
    made = make_needles(sentences, 5, 150, seed=4, head=head, tail=tail, cue=3)
    for needle in made:
        first, last = needle.span
        hidden = needle.prompt[first:last]
        assert hidden in sentences and hidden == needle.prompt[-3:] + needle.answer
        assert needle.prompt[:2] == head and needle.prompt[-4] == 3
        assert 135 < len(needle.prompt) <= 150
    spans = [needle.span[0] for needle in made]
    assert spans == sorted(spans) and spans[0] == len(head)
    assert made[-1].span[1] == len(made[-1].prompt) - len(tail) - 3  # right before the tail
    assert [round(needle.depth, 1) for needle in made] == pytest.approx([0, 0.25, 0.5, 0.75, 1], abs=0.06)
    again = make_needles(sentences, 5, 150, seed=4, head=head, tail=tail, cue=3)
    other = make_needles(sentences, 5, 150, seed=5, head=head, tail=tail, cue=3)
    assert made == again and made != other


def test_no_other_sentence_begins_like_the_needle() -> None:
    twins = [[7, 8, 9, 10 + i, 20 + i, 30 + i, 40 + i, 50 + i] for i in range(9)]
    rest = [[100 + i] * 6 for i in range(40)]
    for needle in make_needles([*twins, *rest], 6, 120, seed=0, cue=3, longest_answer=5):
        text = " ".join(map(str, needle.prompt))
        assert text.count("7 8 9") == 2  # in the needle and as the cue


def test_texts_that_make_no_needles_are_refused() -> None:
    with pytest.raises(ValueError, match="no sentence of 2 has 8 to 48 tokens"):
        make_needles([[1] * 5, [2] * 6], 1, 100, 0)
    with pytest.raises(ValueError, match="3 distinct sentences fill"):
        make_needles([list(range(i, i + 12)) for i in (0, 20, 40)], 1, 400, 0)
    with pytest.raises(ValueError, match="8 to 10 tokens"):
        make_needles([list(range(i, i + 12)) for i in (0, 20, 40)], 1, 30, 0, longest_answer=6)


def test_sentences_of_texts() -> None:
    text = "One is here.  Two? Yes!\n3.5 is a number\n\n one "
    assert sentences_of(text) == ["One is here.", "Two?", "Yes!", "3.5 is a number", "one"]
    tokenizer = build_tokenizer()
    ids = encode_sentences(tokenizer, ["ab. cd.", "ab."])
    assert [tokenizer.decode(row).replace(" ", "") for row in ids] == ["ab.", "cd."]
    assert all(row[0] == tokenizer.convert_tokens_to_ids(" ") for row in ids)


def test_token_recall_by_hand() -> None:
    assert token_recall([5, 6, 6, 7], [6, 5, 9]) == 0.5
    assert token_recall([5, 6], [6, 6, 5]) == 1.0
    assert token_recall([5], []) == 0.0


# Head scores


def eager_rows(model: Any, needle: Needle, answer: list[int]) -> list[Tensor]:
    """Layer -> (steps, H, P) attention rows over the prompt, decoded token by token with eager attention."""
    name = model.config._attn_implementation
    model.set_attn_implementation("eager")
    cache, rows = DynamicCache(config=model.config), []
    try:
        with torch.no_grad():
            for ids in ([needle.prompt], *([[token]] for token in answer[:-1])):
                out = model(input_ids=torch.tensor(ids), past_key_values=cache, output_attentions=True)
                rows.append([weights[0, :, -1, : len(needle.prompt)] for weights in out.attentions])
    finally:
        model.set_attn_implementation(name)
    return [torch.stack(layer) for layer in zip(*rows, strict=True)]


def test_head_scores_are_those_of_eager_decoding(model: Any, needles: list[Needle]) -> None:
    answers = [needle.answer[:2] + [4] + needle.answer[2:6] for needle in needles]
    answers[2] = [4] * 9  # holds nothing of the needle
    expected = torch.zeros(LAYERS, HEADS)
    for needle, answer in zip(needles[:2], answers[:2], strict=True):
        first, last = needle.span
        for layer, rows in enumerate(eager_rows(model, needle, answer)):
            for step, token in enumerate(answer):
                for at in range(first, last):
                    if needle.prompt[at] == token:
                        expected[layer] += rows[step, :, first:last].sum(-1)
    found = head_scores(model, needles, answers)
    assert found.counted == 2 and found.recalls[2] == 0 and found.recalls[0] > 0.5
    torch.testing.assert_close(torch.stack([found.scores[i] for i in range(LAYERS)]), expected / 2, atol=1e-5, rtol=0)
    assert (expected > 0).all() and expected.unique().numel() == LAYERS * HEADS


def test_a_model_with_eager_attention_is_read_alike_and_left_as_it_was(model: Any, needles: list[Needle]) -> None:
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    found = head_scores(model, needles[:1], [needles[0].answer])
    errors = layer_errors(model, needles[:1], [needles[0].answer], {})
    model.set_attn_implementation("eager")
    try:
        again = head_scores(model, needles[:1], [needles[0].answer])
        errors_again = layer_errors(model, needles[:1], [needles[0].answer], {})
        assert model.config._attn_implementation == "eager"
    finally:
        model.set_attn_implementation("sdpa")
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before
    assert errors_again == pytest.approx(errors, abs=1e-5)
    for layer, score in found.scores.items():
        torch.testing.assert_close(again.scores[layer], score, atol=1e-5, rtol=0)


def test_weak_answers_are_refused(model: Any, needles: list[Needle]) -> None:
    with pytest.raises(ValueError, match="no answer of 3 holds more than 50% of its needle"):
        head_scores(model, needles, [[4] * 5] * 3)


def copying_model() -> LlamaForCausalLM:
    """One layer whose head 1 attends to equal tokens and whose head 0 attends to all alike."""
    config = LlamaConfig(
        vocab_size=12,
        hidden_size=32,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        rope_parameters={"rope_type": "default", "rope_theta": 1e30},  # channels 4 to 15 do not turn
    )
    model = LlamaForCausalLM(config).eval()
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
        model.model.embed_tokens.weight[:, :12] = torch.eye(12)
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight.zero_()
            projection.weight[32 + 4 : 32 + 16, :12] = 3 * torch.eye(12)
    return model


def test_the_head_that_copies_is_found() -> None:
    model = copying_model()
    needle = Needle([1, 2, 1, 7, 8, 9, 10, 3, 1, 2, 7], span=(3, 7), answer=[8, 9, 10], depth=0.3)
    score = sample_head_scores(model, needle, needle.answer, [0])[0]
    # head 0: the needle's 4 of 11, 12, 13 visible tokens; head 1: of two equal tokens one lies in the needle
    assert score.tolist() == pytest.approx([4 / 11 + 4 / 12 + 4 / 13, 1.5], abs=1e-4)
    assert first_heads({0: score}, 1) == {0: [1]}


def test_first_heads_are_sorted_and_ties_go_to_the_lower() -> None:
    scores = {1: torch.tensor([0.1, 0.9, 0.5, 0.9]), 0: torch.zeros(4)}
    assert first_heads(scores, 3) == {0: [0, 1, 2], 1: [1, 3, 2]}
    assert first_heads(scores, 9)[1] == [1, 3, 2, 0]


def test_sliding_layers_are_left_out(needles: list[Needle]) -> None:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        use_sliding_window=True,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    hybrid = Qwen3ForCausalLM(config).eval()
    assert full_layers(config) == [1]
    answers = [needle.answer for needle in needles]
    assert list(head_scores(hybrid, needles, answers).scores) == [1]
    assert list(layer_errors(hybrid, needles, answers, {})) == [1]


# Layer errors


def direct_errors(model: Any, needle: Needle, answer: list[int], heads: dict[int, list[int]], budget: int) -> list:
    """Errors of every layer from the modules' own projections, kept sets from plain loops, keys gathered."""
    width, window, half = len(needle.prompt), 8, 2
    seen: dict[int, tuple[Tensor, Any, Tensor]] = {}

    def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        seen[module.layer_idx] = (kwargs["hidden_states"], kwargs["position_embeddings"], output[0])

    handles = [
        layer.self_attn.register_forward_hook(hook, with_kwargs=True, always_call=True) for layer in model.model.layers
    ]
    with torch.no_grad():
        model(input_ids=torch.tensor([[*needle.prompt, *answer][:-1]]), use_cache=False)
    for handle in handles:
        handle.remove()
    errors = []
    for index, layer in enumerate(model.model.layers):
        module, (hidden, rotary, output) = layer.self_attn, seen[index]
        with torch.no_grad():
            query, key, value = (
                getattr(module, f"{name}_proj")(hidden).view(1, -1, count, SIZE)
                for name, count in (("q", HEADS), ("k", KEY_HEADS), ("v", KEY_HEADS))
            )
            if hasattr(module, "q_norm"):
                query, key = module.q_norm(query), module.k_norm(key)
            query, key = apply_rotary_pos_emb(query.transpose(1, 2), key.transpose(1, 2), *rotary)
            query, key, value = query[0], key[0], value[0].transpose(0, 1)

            def weights(head: int, at: int, among: list[int], query: Any = query, key: Any = key) -> Tensor:
                return (key[head // 2, among] @ query[head, at] * SIZE**-0.5).softmax(-1)

            votes = torch.zeros(HEADS, width)
            for head in range(HEADS):
                for at in range(width - window, width):
                    votes[head, : at + 1] += weights(head, at, list(range(at + 1)))
            votes[:, width - window :] = 0
            wide = torch.nn.functional.pad(votes, (half, half))
            pooled = torch.stack([wide[:, i : i + 2 * half + 1].sum(-1) / (2 * half + 1) for i in range(width)], 1)
            score = pooled[heads[index]].mean(0).tolist()
            best = sorted(range(width - window), key=lambda i: -score[i])[: budget - window]
            kept = sorted([*best, *range(width - window, width)])
            total = 0.0
            for at in range(width, width + len(answer) - 1):
                among = [*kept, *range(width, at + 1)]
                heads_out = [weights(head, at, among) @ value[head // 2, among] for head in range(HEADS)]
                compressed = module.o_proj(torch.cat(heads_out))
                full = output[0, at]
                total += float((compressed - full).norm() / (full.norm() + 1e-5))
        errors.append(total)
    return errors


def test_layer_errors_are_those_of_a_direct_recomputation(model: Any, needles: list[Needle]) -> None:
    heads = {0: [1], 1: [3, 0], 2: [2, 1, 0]}
    answers = [needle.answer for needle in needles]
    found = layer_errors(model, needles, answers, heads, budget=20)
    expected = torch.zeros(LAYERS)
    for needle, answer in zip(needles, answers, strict=True):
        expected += torch.tensor(direct_errors(model, needle, answer, heads, 20))
    assert [found[layer] for layer in range(LAYERS)] == pytest.approx(expected.tolist(), rel=2e-4)
    assert min(found.values()) > 0.1
    other = layer_errors(model, needles, answers, {0: [0], 1: [1], 2: [3]}, budget=20)
    assert all(abs(other[layer] - found[layer]) > 1e-3 for layer in range(LAYERS))
    more = layer_errors(model, needles, answers, heads, budget=60)
    assert all(more[layer] < found[layer] for layer in range(LAYERS))


def test_what_has_no_error_is_refused(model: Any, needles: list[Needle]) -> None:
    with pytest.raises(ValueError, match="budget=99 keeps all of every prompt"):
        layer_errors(model, needles, [needle.answer for needle in needles], {}, budget=99)
    with pytest.raises(ValueError, match="no answer has two tokens"):
        layer_errors(model, needles, [[6]] * 3, {}, budget=20)


def test_errors_by_hand() -> None:
    full, compressed = torch.tensor([[[3.0, 4.0], [0.0, 0.0]]]), torch.tensor([[[3.0, 1.0], [0.0, 0.0]]])
    assert relative_errors(full, compressed)[0].tolist() == pytest.approx([3 / (5 + 1e-5), 0])
    assert normalised_errors([(1, 3), (1, 1)]) == pytest.approx([0.375, 0.625])
    assert normalised_errors([(2, 2, 4)]) == pytest.approx([0.25, 0.25, 0.5])
    for sets in ([], [(1, 1), (0, 0)]):
        with pytest.raises(ValueError, match="error above 0"):
            normalised_errors(sets)


# Budgets and the choice


def test_budgets_of_errors() -> None:
    assert budgets_of([0.5, 0.3, 0.15, 0.05], 64) == [97, 70, 51, 38]
    assert budgets_of([0.5, None, 0.3, 0.15, None, 0.05], 64) == [97, 64, 70, 51, 64, 38]
    assert budgets_of([0.5, 0.3, 0.15, 0.05], 20) == [20] * 4
    errors = [0.7, 0.1, 0.05, 0.1, 0.05]
    for budget in (33, 64, 100, 1000):
        budgets = budgets_of(errors, budget)
        assert sum(budgets) == 5 * budget
        assert min(budgets) >= 32 and max(budgets) <= 3 * budget
        assert budgets[0] == max(budgets)


def view(key_heads: int, slots: int = 40, window: int = 8) -> LayerView:
    generator = torch.Generator().manual_seed(2)
    keys = torch.randn(2, key_heads, slots, SIZE, generator=generator)
    counts = torch.tensor([slots, slots - 7])
    positions = (torch.arange(slots) - (slots - counts)[:, None]).clamp(min=-1)
    return LayerView(
        index=0,
        budget=20,
        keys=keys,
        values=keys,
        positions=positions[:, None].expand(-1, key_heads, -1).to(torch.int32),
        counts=counts,
        lengths=counts,
        scaling=0.5,
        queries=torch.randn(2, HEADS, window, SIZE, generator=generator),
    )


def test_all_heads_choose_as_snap_kv_averaged_over_heads() -> None:
    one_group = view(key_heads=1)  # where SnapKV's mean over the group is that over all heads
    everyone = CompressKV({0: list(range(HEADS))}, [20])
    assert torch.equal(everyone.select(one_group), SnapKV(20, window=8).select(one_group))
    assert torch.equal(CompressKV(budgets=[20]).select(one_group), everyone.select(one_group))
    few = CompressKV({0: [2]}, [20]).select(one_group)
    assert not torch.equal(few, everyone.select(one_group))


def test_key_heads_keep_the_same_tokens_and_the_window() -> None:
    kept = CompressKV({0: [1, 2]}, [20]).select(view(key_heads=2))
    assert torch.equal(kept[:, 0], kept[:, 1]) and kept.shape == (2, 2, 20)
    assert (kept[..., -8:] == torch.arange(32, 40)).all()


# Tables


FACTS = ModelFacts("qwen3", layers=LAYERS, query_heads=HEADS, kv_heads=KEY_HEADS)
TABLE = CompressTable(
    FACTS,
    heads={0: [1], 1: [3, 0], 2: [2]},
    errors=[0.5, 0.3, 0.2],
    scores=[[0.1, 0.4, 0.2, 0.0]] * 3,
    made={"seed": 0},
)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "table.json"
    write_table(path, TABLE)
    return path


def test_tables_come_back_as_they_were(table: Path, tmp_path: Path) -> None:
    assert read_compress_table(table) == TABLE
    hybrid = CompressTable(FACTS, {1: [0]}, [None, 1.0, None], [None, [0.1] * 4, None])
    write_table(tmp_path / "hybrid.json", hybrid)
    assert read_compress_table(tmp_path / "hybrid.json") == hybrid
    razor = RazorTable(FACTS, {0: [1], 2: [0, 1]}, {"echo": [[0.1, 0.2]] * 3}, {"k": 9})
    write_table(tmp_path / "razor.json", razor)
    assert read_razor_table(tmp_path / "razor.json") == razor
    assert full_heads_of(tmp_path / "razor.json") == {0: [1], 2: [0, 1]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"policy": "razor_attention"}, "is for policy 'razor_attention', not 'compress_kv'"),
        ({"format": 2}, "has format=2, this version reads 1"),
        ({"errors": [0.5, 0.5]}, "errors has 2 numbers for layers=3"),
        ({"errors": [0.5, -0.5, 1.0]}, r"errors\[1\]=-0.5"),
        ({"errors": [0.5, "much", 1.0]}, r"errors\[1\]='much'"),
        ({"errors": [0, None, 0]}, "none above 0"),
        ({"errors": None}, "errors=None is no list"),
        ({"heads": {"3": [0]}}, "heads has layer '3', the model has 0 to 2"),
        ({"heads": {"0": [4]}}, r"heads\[0\]=\[4\] are not distinct heads from 0 to 3"),
        ({"heads": {"0": [1, 1]}}, r"heads\[0\]=\[1, 1\]"),
        ({"heads": {"0": 1}}, r"heads\[0\]=1"),
        ({"model": {"model_type": "qwen3", "layers": 3, "query_heads": 0, "kv_heads": 2}}, "query_heads=0"),
    ],
)
def test_a_table_that_is_wrong_is_refused_by_name(table: Path, change: dict[str, Any], words: str) -> None:
    table.write_text(json.dumps(json.loads(table.read_text()) | change))
    with pytest.raises(ConfigError, match=words) as caught:
        read_compress_table(table)
    assert str(table) in str(caught.value) and "rltok profile compress_kv" in str(caught.value)


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        read_compress_table(tmp_path / "none.json")
    for text, words in (("{", "cannot be read as JSON"), ("[]", "is no table"), ("{}", "is no table")):
        (tmp_path / "file.json").write_text(text)
        with pytest.raises(ConfigError, match=words):
            read_compress_table(tmp_path / "file.json")


def test_a_recipe_names_a_table_and_a_budget(table: Path) -> None:
    section = {"policy": "compress_kv", "table": str(table), "budget": 64, "interval": 16}
    policy = build_policy(section)
    assert isinstance(policy, CompressKV)
    assert policy.heads == TABLE.heads and list(policy.budgets) == [80, 61, 51] and policy.interval == 16
    assert sum(policy.budgets) == 3 * 64
    config = build_kv(section)
    assert config is not None
    wider = config.at(100)
    assert isinstance(wider, CompressKV) and sum(wider.budgets) == 300 and wider.heads == TABLE.heads
    settings = kv_settings(section, "rollout.kv")
    assert settings["table"] == str(table) and settings["budget"] == 64
    assert not {"heads", "budgets", "made_of"} & set(settings)
    assert build_policy(settings) == policy


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"budget": 64}, "table=None names none"),
        ({"table": "none.json", "budget": 64}, "none.json: there is no such file"),
        ({"table": "TABLE"}, "give `table` .* and `budget`"),
        ({"table": "TABLE", "budget": 8}, r"min\(budgets\)=8 must be above window=8"),
        ({"table": "TABLE", "budget": 64, "heads": {0: [1]}}, "both say"),
    ],
)
def test_a_recipe_without_what_it_needs_is_refused(table: Path, section: dict[str, Any], words: str) -> None:
    section = {key: str(table) if value == "TABLE" else value for key, value in section.items()}
    with pytest.raises(ConfigError, match=words):
        build_policy({"policy": "compress_kv", **section})


def test_another_model_is_refused(table: Path) -> None:
    policy = build_policy({"policy": "compress_kv", "table": str(table), "budget": 64})
    policy.check_model(build("qwen3").config)
    with pytest.raises(ConfigError, match=r"table\.json was made of a model with model_type='qwen3', this one has"):
        policy.check_model(build("llama").config)
    other = build("qwen3").config
    other.num_attention_heads = 8
    with pytest.raises(ConfigError, match="query_heads=4, this one has query_heads=8"):
        policy.check_model(other)
    with pytest.raises(ValueError, match="budgets has 2 numbers, the model has 3 layers"):
        CompressKV(budgets=[20, 20]).check_model(build("llama").config)
    with pytest.raises(ValueError, match=r"heads\[1\]=\[4\]"):
        CompressKV({1: [4]}, [20] * 3).check_model(build("llama").config)
    with pytest.raises(ConfigError, match="model_type"), attach(llama := build("llama"), policy):
        llama.generate(torch.ones(1, 80, dtype=torch.long), max_new_tokens=2, pad_token_id=0)


# The command


def run_profile(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["profile", *arguments])
    return int(caught.value.code or 0)


SMALL = ("--samples", "3", "--length", "110", "--max-new-tokens", "24", "--heads", "1")


def test_compress_kv_of_the_embedded_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "table.json"
    assert run_profile("compress_kv", "tiny-reasoner", "--out", str(out), "--teacher-forced", *SMALL) == 0
    shown = capsys.readouterr().out
    assert "policy: compress_kv" in shown and "6 of 6 count" in shown and str(out) in shown
    found = read_compress_table(out)
    assert found.model == ModelFacts("qwen3", 4, 4, 2)
    assert list(found.heads) == [0, 1, 2, 3] and all(len(heads) == 1 for heads in found.heads.values())
    for layer, (head,) in found.heads.items():
        assert found.scores[layer][head] == max(found.scores[layer])
    assert sum(found.errors) == pytest.approx(1, abs=1e-9) and min(found.errors) > 0
    assert found.made["data_sets"] == {"chain_sum": 3, "countdown": 3}
    again = tmp_path / "again.json"
    assert run_profile("compress_kv", "tiny-reasoner", "--out", str(again), "--teacher-forced", *SMALL) == 0
    assert again.read_text() == out.read_text()
    other = tmp_path / "other.json"
    run_profile("compress_kv", "tiny-reasoner", "--out", str(other), "--teacher-forced", *SMALL, "--seed", "1")
    assert read_compress_table(other).errors != found.errors


def test_greedy_answers_of_texts_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The embedded model repeats little, so any token of the needle is made to count."""
    lines = embedded_texts(seed=3, rows=20)["chain_sum"]
    split = [line.partition("<think>") for line in lines]
    rows = [{"prompt": [{"role": "user", "content": a}], "completion": b + c} for a, b, c in split]
    for name, table in (("one.jsonl", rows), ("two.jsonl", [{"text": line} for line in lines])):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in table))
    files = ("--texts", str(tmp_path / "one.jsonl"), "--texts", str(tmp_path / "two.jsonl"))
    out = tmp_path / "table.json"
    common = ("compress_kv", "tiny-reasoner", "--out", str(out), *files, *SMALL, "--question", "")
    assert run_profile(*common) == 2
    assert "--teacher-forced does" in capsys.readouterr().err and not out.exists()
    assert run_profile(*common, "--recall", "0", "--chat") == 0
    found = read_compress_table(out)
    assert found.made["data_sets"] == {"one.jsonl": 3, "two.jsonl": 3}
    assert found.made["answers"] == "greedy" and 1 <= found.made["counted"] <= 6


def test_an_adapter_is_profiled_with_what_lies_below_it(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    from rltok.models import ModelConfig, load_model, load_tokenizer

    config = ModelConfig("tiny-reasoner")
    settings = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(0)
    for part in (get_peft_model(load_model(config), settings), load_tokenizer(config)):
        part.save_pretrained(tmp_path / "adapter")
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"text": line}) + "\n" for line in embedded_texts(0, 20)["chain_sum"])
    )
    given = ("--texts", str(tmp_path / "texts.jsonl"), "--question", "", "--teacher-forced", *SMALL)
    for name, checkpoint in (("bare", "tiny-reasoner"), ("adapter", str(tmp_path / "adapter"))):
        assert run_profile("compress_kv", checkpoint, "--out", str(tmp_path / f"{name}.json"), *given) == 0
    bare, adapter = (read_compress_table(tmp_path / f"{name}.json") for name in ("bare", "adapter"))
    assert adapter.model == bare.model and adapter.scores != bare.scores


def test_razor_attention_of_the_embedded_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "razor.json"
    assert run_profile("razor_attention", "tiny-reasoner", "--out", str(out), "--tokens", "20", "--copies", "3") == 0
    assert "1 of 8 key-value heads" in capsys.readouterr().out
    found = read_razor_table(out)
    assert found.model == ModelFacts("qwen3", 4, 4, 2) and found.made["k"] == 20
    induction = found.scores["induction"]
    best = max((induction[layer][head], layer, head) for layer in range(4) for head in range(2))
    assert found.full_heads == {best[1]: [best[2]]}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("h2o", "tiny-reasoner"), "POLICY 'h2o' has no table"),
        (("compress_kv", "some/model"), "--texts: missing"),
        (("compress_kv", "tiny-reasoner", "--copies", "3"), "--copies only goes with razor_attention"),
        (("razor_attention", "tiny-reasoner", "--teacher-forced"), "--teacher-forced only goes with compress_kv"),
        (("compress_kv", "tiny-reasoner", "--samples", "0"), "--samples 0 must be >= 1"),
        (("compress_kv", "tiny-reasoner", "--recall", "1"), r"--recall 1.0 must be in \[0, 1\)"),
        (("compress_kv", "tiny-reasoner", "--error-budget", "8"), "--error-budget 8 must be >= 9"),
        (("compress_kv", "tiny-reasoner", "--length", "250"), "--length 206 is the most"),
        (("compress_kv", "tiny-reasoner", "--length", "30"), "--length 30 must be above --error-budget 32"),
        (("compress_kv", "tiny-reasoner", "--max-new-tokens", "240"), "leaves 16 of the model's 256 positions"),
        (("compress_kv", "tiny-reasoner", "--heads", "5"), "the model has 4 query heads"),
        (("compress_kv", "tiny-reasoner", "--texts", "none.jsonl"), "there is no such file"),
        (("compress_kv", "tiny-reasoner", "--texts", "COLUMNS"), "no column text, prompt or completion; found: answer"),
        (("compress_kv", "tiny-reasoner", "--texts", "SHORT"), "no sentence of 1 has 8 to"),
        (("razor_attention", "tiny-reasoner", "--tokens", "100"), "--tokens 64 is the most"),
    ],
)
def test_bad_input_is_refused_before_the_model_is_loaded(
    arguments: tuple[str, ...], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(config: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(kv_profile, "load_policy", load)
    (tmp_path / "COLUMNS.jsonl").write_text('{"answer": 1}\n')
    (tmp_path / "SHORT.jsonl").write_text('{"text": "ab"}\n')
    given = [str(tmp_path / f"{a}.jsonl") if a in ("COLUMNS", "SHORT") else a for a in arguments]
    with pytest.raises(ConfigError, match=words):
        call(given, tmp_path / "out.json")


def call(arguments: list[str], out: Path) -> None:
    """The command without the wrapper that turns errors into an exit status."""
    from rltok.cli import app

    app(args=["profile", *arguments, "--out", str(out)], standalone_mode=False)


def test_the_file_must_be_json(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"name a file that ends in \.json"):
        ProfileOptions("compress_kv", "tiny-reasoner", tmp_path / "table.yaml")
