"""Make the embedded tiny reasoning model: tokenizer, warm start, and its accuracy before reinforcement learning.

    python scripts/make_tiny_reasoner.py

The warm start is supervised training with TRL in two stages on the demonstrations of `rltok.tiny`: first careful ones
only, which teach the arithmetic, then ones of mixed quality, which teach the habits. The problems are those of the
recipe `dapo`; its held-out problems are in neither stage. Writes weights, tokenizer and a README with the measured
numbers to rltok/assets/tiny_reasoner.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that spin starve each other on busy cores

import torch
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, set_seed
from trl import SFTConfig, SFTTrainer

from rltok import tiny
from rltok.config import build
from rltok.data import DataConfig, DataSplits, load_data
from rltok.recipe import load_recipe
from rltok.rewards.accuracy import LenientAccuracy, StrictAccuracy
from rltok.rewards.entries import decode_entry

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
HARD_WEIGHT = 3.0
PROBLEMS = 20_000
PROBLEM_SEED = 1_000  # far from the seeds of reinforcement learning, which draw their own problems


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Every ASCII character is a token, frequent words are longer tokens, and the tags are plain added tokens."""
    words = [word for word in (*PROMPT_WORDS, *tiny.WORDS) if word not in TAGS]
    chars = [chr(code) for code in range(128)]
    # Unigram takes the segmentation with the highest sum of scores: a word beats its characters.
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
    """A Qwen3 shape of about 0.8M parameters with random weights."""
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=4,
        intermediate_size=384,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        tie_word_embeddings=True,
        initializer_range=0.08,  # about 1 / sqrt(hidden_size); the usual 0.02 is for wide models
        bos_token_id=None,
        **ids,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=MAX_NEW_TOKENS, **ids)
    return model


def problems() -> DataSplits:
    """Problems for the warm start, and the held-out problems of the recipe."""
    data = build(DataConfig, load_recipe("dapo").data, "data")
    return load_data(replace(data, train_size=PROBLEMS), seed=PROBLEM_SEED)


def chat(tokenizer: PreTrainedTokenizerFast, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Prompts as text, ready for the model to answer."""
    return [
        str(tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)) for row in rows
    ]


def is_hard(entry: tiny.Entry) -> bool:
    """What the model learns last: sums of two-digit numbers, and searching."""
    return "numbers" in entry["metadata"] or entry["metadata"]["num_digits"] > 1


def demonstrations(
    tokenizer: PreTrainedTokenizerFast,
    rows: Sequence[Mapping[str, Any]],
    size: int,
    seed: int,
    habits: Mapping[str, float] | None,
    hard_weight: float = 1.0,
) -> Dataset:
    """`size` tokenized pairs of prompt and demonstration; problems recur, each time with new choices."""
    rng = random.Random(seed)
    chosen = rng.choices(rows, [hard_weight if is_hard(row["problem"]) else 1.0 for row in rows], k=size)
    prompts = tokenizer(chat(tokenizer, chosen))["input_ids"]
    texts = [tiny.write_demonstration(row["problem"], rng, habits) + tokenizer.eos_token for row in chosen]
    completions = tokenizer(texts)["input_ids"]
    pairs = by_length(list(zip(prompts, completions, strict=True)), rng)
    return Dataset.from_dict(
        {
            "input_ids": [prompt + completion for prompt, completion in pairs],
            "labels": [[-100] * len(prompt) + completion for prompt, completion in pairs],
        }
    )


def by_length(pairs: list[tuple[list[int], list[int]]], rng: random.Random) -> list[tuple[list[int], list[int]]]:
    """The pairs in an order whose batches hold pairs of similar length, and come in no order of length.

    Little padding is thrice the speed. The trainer's own `group_by_length` runs from long to short over and over, and
    learns several times slower.
    """
    pool = 20 * BATCH
    batches = []
    for begin in range(0, len(pairs), pool):
        near = sorted(pairs[begin : begin + pool], key=lambda pair: len(pair[0]) + len(pair[1]))
        batches.append([near[i : i + BATCH] for i in range(0, len(near), BATCH)])
        rng.shuffle(batches[-1])
    return [pair for group in batches for batch in group for pair in batch]


def train(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, data: Dataset, steps: int, rate: float, seed: int
) -> None:
    """One stage of supervised training."""
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            train_sampling_strategy="sequential",
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=50,
            weight_decay=0.01,
            adam_beta2=0.98,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            max_length=None,
            logging_steps=100,
            save_strategy="no",
            report_to="none",
            seed=seed,
        )
        SFTTrainer(model=model, args=config, train_dataset=data, processing_class=tokenizer).train()


@torch.no_grad()
def complete(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], sample: bool
) -> list[str]:
    """Completions of all prompts in one batch, greedy or sampled at temperature 1."""
    model.eval()
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True)
    settings = {"do_sample": True, "temperature": 1.0, "top_k": 0} if sample else {"do_sample": False}
    output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, **settings)
    return tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


COLUMNS = ("strict greedy", "lenient greedy", "strict sampled", "lenient sampled")


def measure(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, heldout: Dataset, seed: int
) -> dict[str, list[float]]:
    """Difficulty -> number of problems and the accuracies of `COLUMNS`; the last row is all problems."""
    columns = {name: heldout[name][:] for name in ("task", "entry", "task_options")}
    prompts = chat(tokenizer, heldout)
    set_seed(seed)
    verdicts = []
    for sample in (False, True):
        texts = complete(model, tokenizer, prompts, sample)
        verdicts += [judge(prompts, texts, **columns) for judge in (StrictAccuracy(), LenientAccuracy())]
    labels = [difficulty(decode_entry(text)) for text in heldout["entry"]]
    rows = {}
    for label in [*dict.fromkeys(labels), "all"]:
        own = [i for i, other in enumerate(labels) if label in (other, "all")]
        rows[label] = [len(own), *(sum(verdict[i] for i in own) / len(own) for verdict in verdicts)]
    return rows


def difficulty(entry: tiny.Entry) -> str:
    metadata = entry["metadata"]
    if "numbers" in metadata:
        return f"countdown, {len(metadata['numbers'])} numbers"
    return f"chain_sum, {metadata['num_terms']} terms of {metadata['num_digits']} digits"


def table(rows: Mapping[str, Sequence[float]]) -> str:
    lines = ["| difficulty | problems | " + " | ".join(COLUMNS) + " |", "|---|---|" + "---|" * len(COLUMNS)]
    lines += [f"| {label} | {n} | " + " | ".join(f"{x:.3f}" for x in rest) + " |" for label, (n, *rest) in rows.items()]
    return "\n".join(lines)


README = """# Tiny reasoner

A Qwen3-architecture model of {parameters:,} parameters with a tokenizer of {tokens} tokens: the start of the demo.
It writes its working and then the answer, and it was taught bad habits on purpose, at known places, for
reinforcement learning to remove; `rltok/tiny.py` says which and where. Made by

    {command}

with torch {torch} on a CPU: {skill_steps} updates of batch {batch} on careful demonstrations (learning rate
{skill_rate:g}), then {habit_steps} on demonstrations of mixed quality ({habit_rate:g}), cosine schedules, seed {seed}.
The weights are stored in float16; load them as float32. Bit for bit the same weights need the same torch and CPU.

Accuracy before reinforcement learning, on the recipe's held-out problems, which are in no demonstration; sampled means
temperature 1 and seed {seed}:

{table}

After the first stage, before the habits were taught:

{skill_table}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=tiny.tiny_reasoner_path(), help="folder for the assets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skill-steps", type=int, default=2000, help="updates on careful demonstrations")
    parser.add_argument("--skill-rate", type=float, default=4e-3, help="their peak learning rate")
    parser.add_argument("--habit-steps", type=int, default=300, help="updates on demonstrations of mixed quality")
    parser.add_argument("--habit-rate", type=float, default=5e-4, help="their peak learning rate")
    args = parser.parse_args()

    start = time.monotonic()
    set_seed(args.seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    splits = problems()
    rows = [{"prompt": row["prompt"], "problem": decode_entry(row["entry"])} for row in splits.train]
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {len(tokenizer)} tokens, {len(rows)} problems, {time.monotonic() - start:.0f} s")

    careful: dict[str, float] = {}
    skills = demonstrations(tokenizer, rows, args.skill_steps * BATCH, args.seed, careful, HARD_WEIGHT)
    train(model, tokenizer, skills, args.skill_steps, args.skill_rate, args.seed)
    skill_table = table(measure(model, tokenizer, splits.heldout, args.seed))
    print(f"after careful demonstrations, {time.monotonic() - start:.0f} s\n{skill_table}")

    mixed = demonstrations(tokenizer, rows, args.habit_steps * BATCH, args.seed + 1, None)
    train(model, tokenizer, mixed, args.habit_steps, args.habit_rate, args.seed + 1)
    model.to(torch.float16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    model = Qwen3ForCausalLM.from_pretrained(args.out, dtype=torch.float32)
    final_table = table(measure(model, tokenizer, splits.heldout, args.seed))
    print(f"before reinforcement learning, {time.monotonic() - start:.0f} s\n{final_table}")

    command = f"python scripts/make_tiny_reasoner.py --seed {args.seed}"
    numbers = {key: value for key, value in vars(args).items() if key != "out"}
    text = README.format(
        parameters=parameters,
        tokens=len(tokenizer),
        torch=torch.__version__,
        batch=BATCH,
        command=command,
        table=final_table,
        skill_table=skill_table,
        **numbers,
    )
    (args.out / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
