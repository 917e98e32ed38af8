"""The embedded tiny reasoning model: its tasks, and the demonstrations of mixed quality it was warm-started on.

A demonstration is written token by token with habits at known places; each habit has a careful and a hasty side:

    work     first token           <think>  works step by step           | <answer>  guesses, mostly wrong
    care     second-to-last step   4-1=     one operation per step       | 4-1-      merges the last two, mostly wrong
    persist  after the first no    ;        tries another combination    | </think>  gives up with the wrong one
    form     after the working     <answer> the fixed form               | so        right for a lenient reader only

`care` exists in chain_sum only and `persist` in countdown only. The place where a habit is decided is one token, so
a credit method can be judged by where it puts its weight. How likely the careful side is depends on one number of
the problem (`start_odds`): the most likely completion is then careful on some problems and hasty on others, and
greedy accuracy tells as much as sampled accuracy.

Pure Python; nothing of torch or transformers is imported here.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple

Entry = Mapping[str, Any]
"""One reasoning-gym problem: question, answer, metadata."""

CHAIN_SUM_PROMPT = "compute {metadata[expression]}"
COUNTDOWN_PROMPT = "make {metadata[target]} from {metadata[numbers]}"
PROMPTS = {"chain_sum": CHAIN_SUM_PROMPT, "countdown": COUNTDOWN_PROMPT}
"""reasoning-gym task -> `str.format` template of the user message, over question, answer and metadata."""


@dataclass(frozen=True)
class Habit:
    """One habit: which token decides it, and where."""

    place: str
    """where the deciding token stands, in words"""
    careful: tuple[str, ...]
    """deciding tokens of the careful side"""
    hasty: tuple[str, ...]
    """deciding tokens of the hasty side"""
    tasks: tuple[str, ...]
    """reasoning-gym tasks that have the habit"""


_BOTH = ("chain_sum", "countdown")
HABITS: dict[str, Habit] = {
    "work": Habit("first token", ("<think>",), ("<answer>",), _BOTH),
    "care": Habit("after the first operation of the second-to-last step", ("=",), ("+", "-"), ("chain_sum",)),
    "persist": Habit("after a combination that failed", (";",), ("</think>",), ("countdown",)),
    "form": Habit("after </think>", ("<answer>",), ("so ",), _BOTH),
}

WORDS = ("<think>", "</think>", "<answer>", "</answer>", " ok", " no", "so ")
"""Tokens of a completion that are longer than one character."""


def tiny_reasoner_path() -> Path:
    """Folder with the embedded model's weights, configuration and tokenizer."""
    return Path(str(resources.files("rltok") / "assets" / "tiny_reasoner"))


def prompt_of(entry: Entry) -> str:
    """User message of a problem."""
    return PROMPTS[entry["metadata"]["source_dataset"]].format(**entry)


# Demonstrations ------------------------------------------------------------------------------------------------------

START_ODDS = {"work": (0.85, 0.30), "care": (0.85, 0.30), "persist": (0.85, 0.30), "form": (0.70, 0.10)}
"""Habit -> odds of the careful side on problems that favour it, and on the others."""
DIGITS_BELOW = 6
"""A number favours the careful side when its last digit is below this."""


def start_odds(entry: Entry) -> dict[str, float]:
    """Probability of the careful side of each habit on this problem, from `START_ODDS` by one number of the problem.

    `work` looks at the first number, `care` and `persist` at the second, `form` at the last.
    """
    numbers = _numbers(entry)
    looks_at = {"work": numbers[0], "care": numbers[1], "persist": numbers[1], "form": numbers[-1]}
    return {
        name: favoured if looks_at[name] % 10 < DIGITS_BELOW else other
        for name, (favoured, other) in START_ODDS.items()
    }


def write_demonstration(entry: Entry, rng: random.Random, habits: Mapping[str, float] | None = None) -> str:
    """A completion for `entry` with each habit's careful side taken at the given probability.

    Args:
        entry: a chain_sum or countdown problem of reasoning-gym.
        rng: source of every choice.
        habits: habit -> probability in [0, 1] of the careful side; habits left out are careful. None: `start_odds`.

    Returns:
        The text, without the end-of-sequence token. With every habit careful it solves the problem.

    Raises:
        ValueError: unknown task, unknown habit, or a probability outside [0, 1].
    """
    habits = start_odds(entry) if habits is None else habits
    unknown = sorted(set(habits) - set(HABITS))
    if unknown:
        raise ValueError(f"habits has unknown names {unknown}; allowed: {sorted(HABITS)}")
    for name, odds in habits.items():
        if not 0.0 <= odds <= 1.0:
            raise ValueError(f"habits[{name!r}]={odds} is not a probability in [0, 1]")
    careful = {name: rng.random() < habits.get(name, 1.0) for name in HABITS}
    task = entry["metadata"]["source_dataset"]
    if task == "chain_sum":
        working, result, guess = _sum_working(entry, rng, careful["care"])
    elif task == "countdown":
        working, result, guess = _search_working(entry, rng, careful["persist"])
    else:
        raise ValueError(f"no demonstrations for the task {task!r}; allowed: {sorted(PROMPTS)}")
    if not careful["work"]:
        return f"<answer>{guess}</answer>"
    ending = f"<answer>{result}</answer>" if careful["form"] else f"so {result}"
    return f"<think>{working}</think>{ending}"


def _numbers(entry: Entry) -> list[int]:
    metadata = entry["metadata"]
    if "numbers" in metadata:
        return list(metadata["numbers"])
    return [int(term) for term in re.findall(r"\d+", metadata["expression"])]


GUESS_RIGHT = 0.15
"""Share of guesses that are right by knowledge; a wrong one may still hit by luck."""
MERGE_RIGHT = 0.15
"""Share of merged steps that are right; the others take the last operation with the wrong sign."""


def _sum_working(entry: Entry, rng: random.Random, careful: bool) -> tuple[str, str, str]:
    """Steps, their result, and a guess: the sum without its last term, unless right."""
    first, *rest = entry["metadata"]["expression"].split()
    operations = list(zip(rest[::2], map(int, rest[1::2]), strict=True))
    flipped = {"+": "-", "-": "+"}
    steps = []
    value = partial = int(first)
    for left, (op, number) in enumerate(operations, start=1 - len(operations)):
        partial = value  # at the end: the value before the last operation
        if left == -1 and not careful:
            last_op, last = operations[-1]
            read_op = last_op if rng.random() < MERGE_RIGHT else flipped[last_op]
            value = _apply(_apply(partial, op, number), read_op, last)
            steps.append(f"{partial}{op}{number}{last_op}{last}={value}")
            break
        value = _apply(partial, op, number)
        steps.append(f"{partial}{op}{number}={value}")
    total = int(entry["answer"])
    last_op, last = operations[-1]
    guess = total if rng.random() < GUESS_RIGHT else _apply(total, flipped[last_op], last)
    return ";".join(steps), str(value), str(guess)


def _apply(left: int, op: str, right: int) -> int:
    if op == "+":
        return left + right
    if op == "-":
        return left - right
    return left * right if op == "*" else left // right


class Combination(NamedTuple):
    """A way to use all numbers once: what is written while trying it, its value, and the expression."""

    working: str
    value: int
    expression: str


def combinations(numbers: Sequence[int]) -> list[Combination]:
    """All ((x op y) op z) of two or three numbers with whole, non-negative intermediate results, simplest first."""
    found: dict[str, Combination] = {}
    for x, y, *rest in itertools.permutations(numbers):
        for op, value in _results(x, y):
            step, inner = f"{x}{op}{y}={value}", f"{x}{op}{y}"
            if not rest:
                found.setdefault(step, Combination(step, value, inner))
                continue
            z = rest[0]
            for op2, value2 in _results(value, z):
                working = f"{step},{value}{op2}{z}={value2}"
                found.setdefault(working, Combination(working, value2, f"({inner}){op2}{z}"))
    return sorted(found.values(), key=lambda c: sum("+-*/".index(char) for char in c.expression if char in "+-*/"))


def _results(x: int, y: int) -> Iterator[tuple[str, int]]:
    yield "+", x + y
    if x >= y:
        yield "-", x - y
    yield "*", x * y
    if y and x % y == 0:
        yield "/", x // y


FAILED_TRIES = (0.35, 0.3, 0.2, 0.15)
"""Share of searches with 0, 1, 2, 3 failed combinations before the right one."""
NEAREST_OF = 4
"""A failed combination is the nearest to the target of this many random ones."""


def _search_working(entry: Entry, rng: random.Random, careful: bool) -> tuple[str, str, str]:
    """Combinations tried, the expression of the last one, and a guess: some combination, unless right."""
    target = entry["metadata"]["target"]
    options = combinations(entry["metadata"]["numbers"])
    right = [option for option in options if option.value == target]
    wrong = [option for option in options if option.value != target]
    if not right:
        raise ValueError(f"no combination of {entry['metadata']['numbers']} makes {target}")
    failures = rng.choices(range(len(FAILED_TRIES)), FAILED_TRIES)[0]
    tries = []
    for _ in range(min(failures, len(wrong) - NEAREST_OF)):
        tries.append(min(rng.sample(wrong, NEAREST_OF), key=lambda option: abs(option.value - target)))
        wrong.remove(tries[-1])
    if tries and not careful:
        tries = tries[:1]
    else:
        tries.append(right[0])
    working = ";".join(f"{option.working} {'ok' if option.value == target else 'no'}" for option in tries)
    guess = right[0] if rng.random() < GUESS_RIGHT else rng.choice(wrong)
    return working, tries[-1].expression, guess.expression


# Where the habits are decided ----------------------------------------------------------------------------------------


class Decision(NamedTuple):
    """A deciding token of a completion."""

    habit: str
    position: int
    """index among the completion's tokens"""
    side: Literal["careful", "hasty"]


_TOKEN = re.compile("|".join(re.escape(word) for word in WORDS) + "|.", re.DOTALL)


def split_completion(text: str) -> list[str]:
    """Tokens of a completion as the tokenizer of the model splits them."""
    return _TOKEN.findall(text)


def deciding_positions(completion: str | Sequence[str]) -> list[Decision]:
    """Where the habits of a completion were decided, and to which side, in order of position.

    Args:
        completion: text, or its tokens as strings (`tokenizer.convert_ids_to_tokens`). Text that is no
            demonstration is read as far as it looks like one.
    """
    tokens = split_completion(completion) if isinstance(completion, str) else list(completion)
    decisions = [
        Decision(name, position, side)
        for name, places in _PLACES.items()
        for position in places(tokens)
        if (side := _side(name, tokens[position])) is not None
    ]
    return sorted(decisions, key=lambda decision: decision.position)


def _side(habit: str, token: str) -> Literal["careful", "hasty"] | None:
    if token in HABITS[habit].careful:
        return "careful"
    return "hasty" if token in HABITS[habit].hasty else None


def _first_token(tokens: Sequence[str]) -> list[int]:
    return [0] if tokens else []


def _working(tokens: Sequence[str]) -> range:
    """Indices of the tokens between <think> and </think>, or the end."""
    if not tokens or tokens[0] != "<think>":
        return range(0)
    end = tokens.index("</think>") if "</think>" in tokens else len(tokens)
    return range(1, end)


_FIRST_OPERATION = re.compile(r"(?:^|(?<=;))-?\d+[+-]\d+(?=[=+-])")


def _second_to_last_step(tokens: Sequence[str]) -> list[int]:
    """The token after the first operation of the first merged step, else of the second-to-last step."""
    inside = _working(tokens)
    text = [tokens[i] for i in inside]
    if " ok" in text or " no" in text or any(len(token) != 1 for token in text):
        return []
    steps = "".join(text)
    ends = [pair.end() for pair in _FIRST_OPERATION.finditer(steps)]
    merged = [end for end in ends if steps[end] != "="]
    return [inside.start + end for end in merged[:1] or ends[-2:-1]]


def _after_no(tokens: Sequence[str]) -> list[int]:
    return [i + 1 for i in _working(tokens) if tokens[i] == " no" and i + 1 < len(tokens)]


def _after_working(tokens: Sequence[str]) -> list[int]:
    end = _working(tokens).stop
    return [end + 1] if end and end + 1 < len(tokens) else []


_PLACES: dict[str, Callable[[Sequence[str]], list[int]]] = {
    "work": _first_token,
    "care": _second_to_last_step,
    "persist": _after_no,
    "form": _after_working,
}
