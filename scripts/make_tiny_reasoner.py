"""Make the embedded tiny reasoning model: tokenizer, warm start, measured accuracy before any reinforcement learning.

    python scripts/make_tiny_reasoner.py

writes config, weights, tokenizer and a README with the measured numbers to rltok/assets/tiny_reasoner.
The warm start is supervised training with TRL on the demonstrations of `rltok.tiny`.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import reasoning_gym
import torch
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, set_seed
from trl import SFTConfig, SFTTrainer

from rltok import tiny

SPECIAL = ("<pad>", "<eos>", "<unk>", "<|user|>", "<|system|>", "<|assistant|>")
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
PROMPT_WORDS = ("compute ", "make ", " from ", " + ", " - ", ", ")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
MAX_NEW_TOKENS = 80
BATCH = 64


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Every ASCII character is a token, frequent words are longer tokens, and the tags are plain added tokens."""
    words = [word for word in (*PROMPT_WORDS, *tiny.WORDS) if word not in TAGS]
    chars = [chr(code) for code in range(128)]
    # Unigram takes the segmentation with the highest sum of scores: one word beats its characters.
    vocab = [(token, 0.0) for token in SPECIAL] + [(word, -1.0) for word in words] + [(char, -2.0) for char in chars]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=SPECIAL.index("<unk>"), byte_fallback=False))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=4,
        intermediate_size=384,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.08,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, do_sample=True, max_new_tokens=80
    )
    return model


def problems(size: int, seed: int, exclude: set[str] = frozenset()) -> dict[str, list[tiny.Entry]]:
    """About `size` different problems by level, none of whose prompts is in `exclude`."""
    found: dict[str, list[tiny.Entry]] = {}
    for name, level in tiny.LEVELS.items():
        wanted = round(size * level.weight)
        data = reasoning_gym.create_dataset(level.task, size=4 * wanted, seed=seed, **level.params)
        seen = set(exclude)
        found[name] = []
        for i in range(4 * wanted):
            entry = data[i]
            if (prompt := tiny.prompt_of(entry)) not in seen:
                seen.add(prompt)
                found[name].append(entry)
            if len(found[name]) == wanted:
                break
    return found


def chat(tokenizer: PreTrainedTokenizerFast, entries: Sequence[tiny.Entry]) -> list[str]:
    turns = [[{"role": "user", "content": tiny.prompt_of(entry)}] for entry in entries]
    return [tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]


def demonstrations(
    tokenizer: PreTrainedTokenizerFast,
    levels: Mapping[str, list[tiny.Entry]],
    size: int,
    seed: int,
    habits: Mapping[str, float] | None,
) -> Dataset:
    """`size` tokenized prompt-completion pairs in the proportions of the levels; problems recur with new habits."""
    rng = random.Random(seed)
    weights = [tiny.LEVELS[name].weight for name in levels]
    entries = [rng.choice(levels[name]) for name in rng.choices(list(levels), weights, k=size)]
    prompts = tokenizer(chat(tokenizer, entries))["input_ids"]
    texts = [tiny.write_demonstration(entry, rng, habits) + tokenizer.eos_token for entry in entries]
    completions = tokenizer(texts)["input_ids"]
    ids = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    labels = [[-100] * len(prompt) + completion for prompt, completion in zip(prompts, completions, strict=True)]
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


@torch.no_grad()
def complete(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, entries: Sequence[tiny.Entry], **generate: Any
) -> list[str]:
    model.eval()
    texts: list[str] = []
    for start in range(0, len(entries), 256):
        inputs = tokenizer(chat(tokenizer, entries[start : start + 256]), return_tensors="pt", padding=True)
        output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, **generate)
        texts += tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def measure(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, levels: Mapping[str, list[tiny.Entry]], seed: int
) -> dict[str, dict[str, float]]:
    """Level -> strict and lenient accuracy, greedy and sampled at temperature 1."""
    rows: dict[str, dict[str, float]] = {}
    entries = [entry for group in levels.values() for entry in group]
    names = [name for name, group in levels.items() for _ in group]
    for mode, settings in (
        ("greedy", {"do_sample": False}),
        ("sampled", {"do_sample": True, "temperature": 1.0, "top_k": 0}),
    ):
        set_seed(seed)
        texts = complete(model, tokenizer, entries, **settings)
        for kind, judge in (("strict", tiny.is_strict), ("lenient", tiny.is_lenient)):
            verdicts = [judge(text, entry) for text, entry in zip(texts, entries, strict=True)]
            for name in levels:
                own = [verdict for verdict, other in zip(verdicts, names, strict=True) if other == name]
                rows.setdefault(name, {})[f"{kind} {mode}"] = sum(own) / len(own)
            rows.setdefault("all", {})[f"{kind} {mode}"] = sum(verdicts) / len(verdicts)
    rows["all"] = rows.pop("all")
    return rows


def train(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, data: Dataset, steps: int, rate: float, seed: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=50,
            weight_decay=0.01,
            adam_beta2=0.98,
            max_grad_norm=1.0,
            use_cpu=True,
            bf16=False,
            train_sampling_strategy="group_by_length",
            gradient_checkpointing=False,
            max_length=None,
            logging_steps=100,
            save_strategy="no",
            report_to="none",
            seed=seed,
        )
        SFTTrainer(model=model, args=config, train_dataset=data, processing_class=tokenizer).train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=tiny.tiny_reasoner_path(), help="folder for the assets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skill-steps", type=int, default=1500, help="updates on careful demonstrations")
    parser.add_argument("--habit-steps", type=int, default=400, help="updates on demonstrations of mixed quality")
    parser.add_argument("--skill-rate", type=float, default=3e-3)
    parser.add_argument("--habit-rate", type=float, default=5e-4)
    parser.add_argument("--start", type=Path, help="skip the first stage: start from this folder")
    args = parser.parse_args()

    start = time.monotonic()
    set_seed(args.seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens")
    held_out = problems(1000, seed=10_000_000)
    exclude = {tiny.prompt_of(entry) for group in held_out.values() for entry in group}
    known = problems(20_000, seed=1_000_000 * (args.seed + 1), exclude=exclude)
    print({name: len(group) for name, group in known.items()}, f"{time.monotonic() - start:.0f} s")
    careful: dict[str, float] = {}
    if args.start:
        model = Qwen3ForCausalLM.from_pretrained(args.start, dtype=torch.float32)
    else:
        skills = demonstrations(tokenizer, known, args.skill_steps * BATCH, args.seed, careful)
        train(model, tokenizer, skills, args.skill_steps, args.skill_rate, args.seed)
        model.save_pretrained("/tmp/skill")
        print("after skills:", measure(model, tokenizer, held_out, args.seed))
    mixed = demonstrations(tokenizer, known, args.habit_steps * BATCH, args.seed + 1, None)
    train(model, tokenizer, mixed, args.habit_steps, args.habit_rate, args.seed + 1)
    model.to(torch.float16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    model.float()
    rows = measure(model, tokenizer, held_out, args.seed)
    for name, row in rows.items():
        print(f"{name:14}", " ".join(f"{key} {value:.3f}" for key, value in row.items()))
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
