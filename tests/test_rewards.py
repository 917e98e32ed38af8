"""Rewards: verifiers agree with their libraries, failures are loud and saved, nothing can hang the run."""

import asyncio
import json
import math
import os
import pickle
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import reasoning_gym

from rltok.config import ConfigError, describe
from rltok.rewards import (
    REWARDS,
    AnswerFormat,
    Length,
    LenientAccuracy,
    MathEquivalence,
    OverlongPenalty,
    ReasoningGym,
    RewardError,
    StrictAccuracy,
    VerifierError,
    build_rewards,
    completion_text,
    decode_entry,
    encode_entry,
    extract_answer,
    guarded,
    lenient_candidates,
    math_equal,
)
from rltok.rewards import verify as verify_module
from rltok.rewards.answer import last_expression, last_number
from rltok.rewards.user import load_function

TASKS = (
    "chain_sum",
    "countdown",
    "puzzle24",
    "arc_agi",
    "rearc",
    "basic_arithmetic",
    "knights_knaves",
    "fraction_simplification",
    "gcd",
    "graph_color",
    "leg_counting",
    "mini_sudoku",
    "polynomial_equations",
    "prime_factorization",
    "propositional_logic",
    "word_sorting",
)


def tagged(answer: str) -> str:
    return f"I think so. <answer>{answer}</answer>"


def call(reward, completions, **columns):
    return reward(prompts=["p"] * len(completions), completions=completions, completion_ids=None, **columns)


def gym_columns(task: str, entries: list[dict], options: str = "{}") -> dict:
    return {
        "task": [task] * len(entries),
        "entry": [encode_entry(e) for e in entries],
        "task_options": [options] * len(entries),
    }


# ---------------------------------------------------------------- finding the answer


def test_text_of_plain_and_conversational_completions():
    assert completion_text("a <answer>") == "a <answer>"
    assert completion_text([{"role": "assistant", "content": "x"}]) == "x"
    turns = [
        {"role": "assistant", "content": "x"},
        {"role": "tool", "content": "5"},
        {"role": "assistant", "content": "y"},
    ]
    assert completion_text(turns) == "x\ny"
    assert completion_text([{"role": "assistant", "content": [{"type": "text", "text": "z"}]}]) == "z"
    with pytest.raises(TypeError, match="int"):
        completion_text(3)


@pytest.mark.parametrize(
    ("text", "form", "occurrence", "expected"),
    [
        ("<answer>1</answer> <answer>2</answer>", "answer_tag", "first", "1"),
        ("<answer>1</answer> <answer>2</answer>", "answer_tag", "last", "2"),
        ("use <answer> tags: <answer> 7\n</answer>", "answer_tag", "first", "7"),
        ("<answer>7", "answer_tag", "first", None),
        ("<answer> </answer>", "answer_tag", "first", None),
        (r"so \boxed{\frac{1}{2}} and \boxed{3}", "boxed", "first", r"\frac{1}{2}"),
        (r"so \boxed{\frac{1}{2}} and \boxed{3}", "boxed", "last", "3"),
        (r"\boxed{\{1,2\}}", "boxed", "first", r"\{1,2\}"),
        (r"\boxed{1", "boxed", "first", None),
        ("x\n#### 1,234 \ny", "hash", "first", "1,234"),
    ],
)
def test_extract_answer(text, form, occurrence, expected):
    assert extract_answer(text, form, occurrence) == expected


def test_unknown_form_lists_the_known_ones():
    with pytest.raises(ValueError, match="tag.*answer_tag, boxed, hash"):
        extract_answer("x", "tag")


@pytest.mark.parametrize(
    ("text", "number", "expression"),
    [
        ("the total is 1,234.", "1234", None),
        ("5-3 = 2, so -2.5", "-2.5", "5-3"),
        ("half is 3/4", "3/4", "3/4"),
        ("Then (6 + 61) × 4 - 94 = 174.", "174", "(6 + 61) * 4 - 94"),
        ("we get (3 + 4) * 2", "2", "(3 + 4) * 2"),
        ("(so 3 + 4)", "4", "3 + 4"),
        ("nothing here", None, None),
    ],
)
def test_last_number_and_expression(text, number, expression):
    assert last_number(text) == number
    assert last_expression(text) == expression


@pytest.mark.parametrize(
    ("text", "form", "expected"),
    [
        ("work <answer>5</answer>\n", "answer_tag", 1.0),
        ("work <answer>5</answer> bye", "answer_tag", 0.0),
        ("<answer>4</answer> <answer>5</answer>", "answer_tag", 0.0),
        ("<answer> <answer>5</answer>", "answer_tag", 0.0),
        ("<answer></answer>", "answer_tag", 0.0),
        (r"so $\boxed{5}$.", "boxed", 1.0),
        (r"so \boxed{5} apples", "boxed", 0.0),
        ("#### 5", "hash", 1.0),
        ("#### 5\nmore", "hash", 0.0),
        ("", "answer_tag", 0.0),
    ],
)
def test_answer_format(text, form, expected):
    assert call(AnswerFormat(form), [text, [{"role": "assistant", "content": text}]]) == [expected, expected]


# ---------------------------------------------------------------- reasoning-gym


@pytest.mark.parametrize("task", TASKS)
def test_entries_survive_the_round_trip(task):
    entry = reasoning_gym.create_dataset(task, seed=3, size=1)[0]
    again = decode_entry(encode_entry(entry))
    assert again == entry and again["metadata"].keys() == json.loads(encode_entry(entry))["metadata"].keys()


def test_entry_tags_do_not_swallow_plain_data():
    entry = {"a": {1: (2, {3, 4})}, "b": {"__tuple__": [1]}, "c": [(), None, True, 1.5], "d": {"__map__": 1, "x": 2}}
    assert decode_entry(encode_entry(entry)) == entry
    with pytest.raises(TypeError, match="object"):
        encode_entry({"x": object()})


@pytest.mark.parametrize("task", TASKS)
def test_verifier_agrees_with_reasoning_gym(task):
    dataset = reasoning_gym.create_dataset(task, seed=7, size=2)
    entries = [dataset[0], dataset[1]]
    answers = [str(entries[0]["answer"] or "no answer"), str(entries[1]["answer"] or "no answer")]
    answers += [answers[1], "12", "not ( an answer"]
    rows = [entries[0], entries[1], entries[0], entries[1], entries[0]]
    expected = []
    for answer, entry in zip(answers, rows, strict=True):
        try:
            expected.append(float(dataset.score_answer(answer, entry)))
        except Exception:  # garbage for which this verifier raises counts 0
            expected.append(0.0)
    assert call(ReasoningGym(), [tagged(a) for a in answers], **gym_columns(task, rows)) == pytest.approx(expected)


def test_task_options_reach_the_verifier():
    entry = reasoning_gym.create_dataset("puzzle24", seed=1, size=1)[0]
    options = [json.dumps({"min_value": 2}), "{}"]
    columns = {"task": ["puzzle24"] * 2, "entry": [encode_entry(entry)] * 2, "task_options": options}
    assert call(ReasoningGym(), [tagged("6 * 4 + 1 - 1")] * 2, **columns) == [0.01, 1.0]


def test_no_answer_scores_zero_and_hostile_answers_are_counted():
    entry = reasoning_gym.create_dataset("countdown", seed=1, size=1)[0]
    answers = [
        f"<answer>{entry['answer']}</answer>",
        "no answer",
        tagged("__import__('time').sleep(60)"),
        tagged("9**9**9"),
    ]
    logged = {}
    started = time.monotonic()
    scores = call(
        ReasoningGym(timeout=0.5), answers, **gym_columns("countdown", [entry] * 4), log_metric=logged.__setitem__
    )
    assert scores == [1.0, 0.0, 0.0, 0.0]
    assert time.monotonic() - started < 10
    assert logged == {"reasoning_gym/verifier_timeouts": 2 / 3, "reasoning_gym/verifier_errors": 0.0}


def test_verifier_that_raises_counts_zero_and_is_logged():
    entry = {"question": "q", "answer": "1", "metadata": {}}
    entry_ok = reasoning_gym.create_dataset("polynomial_multiplication", seed=1, size=1)[0]
    broken = {**entry_ok, "metadata": {}, "answer": None}
    logged = {}
    columns = {"task": ["chain_sum", "word_sorting"], "entry": [encode_entry(entry), encode_entry(broken)]}
    scores = call(ReasoningGym(), [tagged("1"), tagged("a, b")], **columns, log_metric=logged.__setitem__)
    assert scores == [1.0, 0.0]
    assert logged["reasoning_gym/verifier_errors"] == 0.5


def test_unknown_task_is_a_fault_of_the_data_not_of_the_answer():
    with pytest.raises(VerifierError, match="nope"):
        call(ReasoningGym(), [tagged("1")], task=["nope"], entry=["{}"])
    with pytest.raises(ValueError, match="no column task and entry.*columns: answer"):
        call(ReasoningGym(), [tagged("1")], answer=["1"])


# ---------------------------------------------------------------- math equivalence


@pytest.mark.parametrize(
    ("answer", "gold", "equal"),
    [
        ("42", "42", True),
        ("1,234.0", "1234", True),
        ("0.5", r"\frac{1}{2}", True),
        ("1/2", "0.5", True),
        ("x^2 + 1", "1 + x**2", True),
        (r"2\sqrt{2}", r"\sqrt{8}", True),
        ("(1, 2)", "(1,2)", True),
        (r"\{1,2\}", r"\{2,1\}", True),
        ("2**10", "1024", True),
        ("$7$", "7", True),
        ("42", "43", False),
        ("x + 1", "x + 2", False),
        ("", "1", False),
        ("blue", "5", False),
    ],
)
def test_math_equivalence(answer, gold, equal):
    assert math_equal(answer, gold) is equal


def test_plain_numbers_need_no_verifier_process(monkeypatch):
    def refuse():
        raise AssertionError("the verifier process was asked")

    monkeypatch.setattr(verify_module, "_shared", refuse)
    assert math_equal("1,000", "1000") and math_equal("2/4", "0.5") and math_equal(r"\pi", r"\pi")
    assert not math_equal("7", "8") and not math_equal("1/0 " * 4000, "8")
    with pytest.raises(AssertionError, match="asked"):
        math_equal("x+1", "1+x")


def test_math_reward_finds_the_answer_where_the_form_says():
    text = r"First \boxed{1}, then \boxed{x+1}"
    assert call(MathEquivalence(), [text], answer=["1+x"]) == [1.0]
    assert call(MathEquivalence(occurrence="first"), [text], answer=["1+x"]) == [0.0]
    assert call(MathEquivalence(), ["so the sum is $12$", "I do not know", ""], answer=[12, "12", "12"]) == [
        1.0,
        0.0,
        0.0,
    ]
    assert call(MathEquivalence(form="hash"), ["#### 12", "12"], answer=["12", "12"]) == [1.0, 0.0]
    with pytest.raises(ValueError, match="no column answer"):
        call(MathEquivalence(), ["1"], solution=["1"])


@pytest.mark.parametrize("answer", [r"9^{9^{9^{9}}}", "10!!!!", r"\sum_{n=1}^{10000000} \sin(n)"])
def test_pathological_answer_is_wrong_in_bounded_time_and_the_next_is_judged(answer):
    started = time.monotonic()
    assert not math_equal(answer, "81", timeout=0.5)
    assert time.monotonic() - started < 8
    assert math_equal("x + 1", "1 + x", timeout=5.0)


def test_math_reward_logs_timeouts():
    logged = {}
    completions = [r"\boxed{10!!!!}", r"\boxed{1+x}"]
    scores = call(MathEquivalence(timeout=1.0), completions, answer=["x+1", "x+1"], log_metric=logged.__setitem__)
    assert scores == [0.0, 1.0]
    assert logged == {"math_equivalence/verifier_timeouts": 0.5, "math_equivalence/verifier_errors": 0.0}


def test_math_equivalence_from_many_threads():
    def one(i: int) -> bool:
        assert threading.current_thread() is not threading.main_thread()
        return math_equal(f"x + {i}", f"{i} + x") and not math_equal(f"x + {i}", f"{i + 1} + x")

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(one, range(40)))


def test_a_process_killed_from_outside_costs_nobody_a_reward():
    assert math_equal("x + 1", "1 + x")
    os.kill(verify_module._shared().pid, 9)
    time.sleep(0.1)
    assert math_equal("x + 2", "2 + x")


def test_a_forked_child_judges_on_its_own():
    assert math_equal("x + 1", "1 + x")
    parent = verify_module._shared().pid
    child = os.fork()
    if child == 0:  # no exception may reach pytest in the child
        code = 1
        try:
            is_right = math_equal("x + 3", "3 + x") and verify_module._shared().pid not in (None, parent)
            verify_module._shared().close()
            code = 0 if is_right else 2
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert verify_module._shared().pid == parent and math_equal("x + 4", "4 + x")


def test_works_from_dash_c_beside_files_that_shadow_libraries(tmp_path):
    for name in ("rewards", "sympy", "math_verify", "reasoning_gym", "entries"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('shadowed')\n")
    code = "import sys; sys.path.pop(0); from rltok.rewards import math_equal; print(math_equal('x+1', '1+x'))"
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "True", done.stderr


def test_timeout_must_be_positive():
    with pytest.raises(ValueError, match="timeout=0"):
        MathEquivalence(timeout=0)


# ---------------------------------------------------------------- strict and lenient


def test_strict_and_lenient_on_reasoning_gym():
    entry = reasoning_gym.create_dataset("countdown", seed=5, size=1)[0]
    right = entry["answer"]
    target = entry["metadata"]["target"]
    completions = [
        tagged(right),
        f"So {right} = {target}.",  # right, but not in the form
        rf"So \boxed{{{right}}}",
        f"<answer>1 + 1</answer> I mean <answer>{right}</answer>",
        tagged(str(target)),  # the number without the expression
        "no idea",
    ]
    columns = gym_columns("countdown", [entry] * len(completions))
    assert call(StrictAccuracy(), completions, **columns) == [1, 0, 0, 0, 0, 0]
    assert call(LenientAccuracy(), completions, **columns) == [1, 1, 1, 1, 0, 0]
    assert call(StrictAccuracy(occurrence="last"), completions, **columns) == [1, 0, 0, 1, 0, 0]


def test_strict_and_lenient_on_math():
    completions = [
        r"\boxed{0.5}",
        r"\boxed{1} then 1/2",
        "1/2",
        "1/4 + 1/4",
        [{"role": "assistant", "content": r"\boxed{0.50}"}],
    ]
    answer = [r"\frac{1}{2}"] * len(completions)
    assert call(StrictAccuracy("boxed"), completions, answer=answer) == [1, 0, 0, 0, 1]
    # the fourth repeats an expression that equals the answer: not an answer
    assert call(LenientAccuracy("boxed"), completions, answer=answer) == [1, 1, 1, 0, 1]


def test_exact_verifier_and_auto():
    columns = {
        "task": ["chain_sum", None],
        "entry": [encode_entry({"answer": "7", "metadata": {}}), None],
        "answer": ["8", "8"],
    }
    assert call(StrictAccuracy(), [tagged("7"), tagged("7")], **columns) == [1, 0]
    assert call(StrictAccuracy(verifier="math"), [tagged("8.0"), tagged("8.0")], **columns) == [1, 1]
    assert call(StrictAccuracy(verifier="exact"), [tagged("8.0"), tagged("8")], **columns) == [0, 1]
    with pytest.raises(ValueError, match="row 1 has no column task and entry"):
        call(StrictAccuracy(verifier="reasoning_gym"), [tagged("8"), tagged("8")], **columns)
    with pytest.raises(ValueError, match="verifier='gym'.*reasoning_gym"):
        StrictAccuracy(verifier="gym")


def test_lenient_is_never_below_strict():
    rng = random.Random(0)
    pieces = ["<answer>", "</answer>", "3", " + 4", "7", r"\boxed{", "}", "####", " ", "\n", "(", "-"]
    completions = ["".join(rng.choices(pieces, k=rng.randint(0, 12))) for _ in range(300)]
    columns = {"answer": ["7"] * len(completions)}
    for form in ("answer_tag", "boxed", "hash"):
        strict = call(StrictAccuracy(form), completions, **columns)
        lenient = call(LenientAccuracy(form), completions, **columns)
        assert all(a <= b for a, b in zip(strict, lenient, strict=True))
        assert sum(strict) > 0 and sum(lenient) > sum(strict)


def test_candidates_come_once_and_in_order():
    assert lenient_candidates(r"<answer>7</answer> \boxed{8} 3 + 4 = 7") == ["7", "8", "3 + 4"]
    assert lenient_candidates("3 + 4", expressions=False) == ["4"]


# ---------------------------------------------------------------- length


def test_overlong_penalty_worked_numbers():
    ids = [[0] * n for n in (20, 24, 28, 32, 40, 41, 400)]
    penalty = OverlongPenalty(max_tokens=40, cache_tokens=16)
    assert penalty([], [], ids) == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0, -1.0]
    assert OverlongPenalty(40, 16, factor=0.5)([], [], ids) == [0.0, 0.0, -0.125, -0.25, -0.5, -0.5, -0.5]
    assert OverlongPenalty(40, 16, factor=0.0)([], [], ids) == [0.0] * 7


def test_overlong_penalty_refuses_bad_limits():
    with pytest.raises(ValueError, match="cache_tokens=50.*max_tokens=40"):
        OverlongPenalty(40, 50)
    with pytest.raises(ValueError, match="factor=-1"):
        OverlongPenalty(40, 10, -1)


def test_length_price():
    assert Length(coef=0.5)([], [], [[1, 2, 3], []]) == [-1.5, 0.0]
    with pytest.raises(ValueError, match="length counts tokens"):
        Length()([], [], None)


# ---------------------------------------------------------------- guard


def failing(prompts, completions, **columns):
    return [1 / (len(c) - 3) for c in completions]


def fine(prompts, completions, **columns):
    return [0.5, None]


PROMPTS = [[{"role": "user", "content": "first"}], [{"role": "user", "content": "second"}]]


def test_a_reward_that_raises_is_named_and_its_completion_saved(tmp_path):
    guard = guarded(failing, "mine", tmp_path / "errors")
    with pytest.raises(RewardError, match=r"'mine' raised ZeroDivisionError.*row 1 of 2") as caught:
        guard(prompts=PROMPTS, completions=["four", "abc"], completion_ids=[[1], [2]], trainer_state=None)
    record = json.loads(caught.value.file.read_text())
    assert caught.value.row == 1 and caught.value.file.parent == tmp_path / "errors"
    assert record["completion"] == "abc" and record["prompt"] == PROMPTS[1] and record["function"] == "mine"
    assert "ZeroDivisionError" in record["traceback"] and "failing" in record["traceback"]


@pytest.mark.parametrize("value", [math.nan, math.inf, "0.5", [1.0], {}])
def test_values_that_are_not_finite_numbers_stop(value, tmp_path):
    guard = guarded(lambda prompts, completions, **_: [1.0, value], "odd", tmp_path)
    with pytest.raises(RewardError, match=r"'odd' returned .*row 1 of 2") as caught:
        guard(prompts=PROMPTS, completions=["x", "y"])
    assert json.loads(caught.value.file.read_text())["completion"] == "y"


@pytest.mark.parametrize("result", [[1.0], [], None, 3.0])
def test_wrong_length_stops(result, tmp_path):
    guard = guarded(lambda prompts, completions, **_: result, "short", tmp_path)
    with pytest.raises(RewardError, match=r"'short' returned .*(rewards for 2|not a list)") as caught:
        guard(prompts=PROMPTS, completions=["x", "y"])
    assert json.loads(caught.value.file.read_text())["completions"] == ["x", "y"]


def test_failure_is_loud_even_where_it_cannot_be_saved(tmp_path):
    (tmp_path / "taken").write_text("a file, not a folder")
    with pytest.raises(RewardError, match="could not be saved"):
        guarded(failing, "mine", tmp_path / "taken")(prompts=PROMPTS, completions=["abc", "abc"])


def test_search_for_the_row_leaves_no_trace_in_the_logs(tmp_path):
    logged = []

    def logs_then_fails(prompts, completions, log_metric, answer, **_):
        log_metric("seen", len(completions))
        assert len(answer) == len(completions)
        return [1 / int(a) for a in answer]

    with pytest.raises(RewardError, match="row 2 of 3"):
        guarded(logs_then_fails, "f", tmp_path)(
            prompts=["p"] * 3, completions=["c"] * 3, answer=["1", "2", "0"], log_metric=lambda *a: logged.append(a)
        )
    assert logged == [("seen", 3)]


def test_none_passes_and_the_guard_keeps_its_name_when_pickled(tmp_path):
    guard = guarded(fine, "applies_sometimes", tmp_path)
    assert guard(prompts=PROMPTS, completions=["x", "y"]) == [0.5, None]
    again = pickle.loads(pickle.dumps(guard))
    assert again.__name__ == "applies_sometimes" and again(prompts=PROMPTS, completions=["x", "y"]) == [0.5, None]


def test_async_functions_stay_async(tmp_path):
    async def slow(prompts, completions, **_):
        await asyncio.sleep(0)
        return [1 / (len(c) - 3) for c in completions]

    guard = guarded(slow, "slow", tmp_path)
    assert asyncio.iscoroutinefunction(type(guard).__call__)
    assert asyncio.run(guard(prompts=PROMPTS, completions=["four", "four"])) == [1.0, 1.0]
    with pytest.raises(RewardError, match="row 0 of 2"):
        asyncio.run(guard(prompts=PROMPTS, completions=["abc", "four"]))


# ---------------------------------------------------------------- the section of a recipe


USER_FILE = """
from dataclasses import dataclass

def score(prompts, completions, *, any_option=1, **columns):
    return [float(any_option * len(c)) for c in completions]

def narrow(completions, answer, scale: float = 2.0):
    return [scale * (c == a) for c, a in zip(completions, answer)]

async def later(completions, bonus=0, **columns):
    return [bonus for _ in completions]

@dataclass(frozen=True)
class Priced:
    price: float = 1.0
    def __call__(self, prompts, completions, completion_ids=None, **columns):
        return [self.price for _ in completions]

number = 3
"""


def test_build_rewards(tmp_path):
    (tmp_path / "rewards.py").write_text(USER_FILE)
    section = {
        "strict": {"function": "strict_accuracy", "weight": 1.0, "form": "boxed"},
        "mine": {"function": "rewards.py:score", "weight": 0.5, "any_option": 3},
        "narrow": {"function": "rewards.py:narrow"},
        "priced": {"function": "./rewards.py:Priced", "price": 4},
        "later": {"function": "rewards.py:later", "bonus": 2, "weight": -1},
    }
    rewards = build_rewards(section, base_dir=tmp_path, save_dir=tmp_path / "errors")
    assert rewards.names == [f.__name__ for f in rewards.functions] == ["strict", "mine", "narrow", "priced", "later"]
    assert rewards.weights == [1.0, 0.5, 1.0, 1.0, -1.0]
    arguments = {
        "prompts": ["p"],
        "completions": ["ab"],
        "completion_ids": [[1]],
        "answer": ["ab"],
        "trainer_state": None,
    }
    assert [f(**arguments) for f in rewards.functions[:4]] == [[0.0], [6.0], [2.0], [4.0]]
    assert asyncio.run(rewards.functions[4](**arguments)) == [2.0]
    assert pickle.loads(pickle.dumps(rewards.functions[1]))(**arguments) == [6.0]
    import rltok.rewards

    assert Path(rltok.rewards.__file__).name == "__init__.py" and str(tmp_path) not in sys.path


def test_user_function_of_an_installed_module():
    assert load_function("os.path:basename", Path("."), "rewards.x.function") is os.path.basename


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"function": "strict_acuracy"}, r"rewards\.r\.function: .*'strict_acuracy'.*did you mean 'strict_accuracy'"),
        ({"function": "strict_accuracy", "fomr": "boxed"}, r"rewards\.r\.fomr: .*did you mean 'form'.*occurrence"),
        ({"function": "strict_accuracy", "wieght": 1}, r"rewards\.r\.wieght: .*did you mean 'weight'"),
        ({"function": "strict_accuracy", "form": "box"}, r"rewards\.r\.form: 'box'.*did you mean 'boxed'"),
        ({"function": "strict_accuracy", "timeout": "5"}, r"rewards\.r\.timeout: '5' is not a valid float"),
        ({"function": "strict_accuracy", "weight": "big"}, r"rewards\.r\.weight: 'big'"),
        ({"function": "strict_accuracy", "weight": math.inf}, r"rewards\.r\.weight: inf"),
        ({"function": "overlong_penalty", "cache_tokens": 4}, r"rewards\.r\.max_tokens: missing"),
        ({"function": "overlong_penalty", "max_tokens": 4, "cache_tokens": 8}, r"rewards\.r: cache_tokens=8"),
        ({"weight": 1.0}, r"rewards\.r\.function: missing; known: reasoning_gym"),
        ("strict_accuracy", r"rewards\.r: 'strict_accuracy' is not a mapping"),
        ({"function": "u.py:scor"}, r"rewards\.r\.function: u\.py has no 'scor'; did you mean 'score'"),
        ({"function": "u.py:number"}, r"rewards\.r\.function: .* int, not a function"),
        ({"function": "u.py:score", "any_optoin": 1}, r"rewards\.r\.any_optoin: .*did you mean 'any_option'"),
        ({"function": "u.py:Priced", "price": "x"}, r"rewards\.r\.price: 'x'"),
        ({"function": "v.py:score"}, r"rewards\.r\.function: there is no file .*v\.py"),
        ({"function": "broken.py:score"}, r"rewards\.r\.function: broken\.py cannot be loaded: NameError"),
        (
            {"function": "no_such_module:score"},
            r"rewards\.r\.function: module 'no_such_module'.*no_such_module\.py:function",
        ),
    ],
)
def test_bad_sections_are_refused(options, message, tmp_path):
    (tmp_path / "u.py").write_text(USER_FILE)
    (tmp_path / "broken.py").write_text("undefined\n")
    with pytest.raises(ConfigError, match=message):
        build_rewards({"r": options}, base_dir=tmp_path)


def test_an_option_may_not_hide_a_column(tmp_path):
    (tmp_path / "u.py").write_text(USER_FILE)
    reward = build_rewards({"r": {"function": "u.py:score", "any_option": 3}}, tmp_path, tmp_path).functions[0]
    with pytest.raises(RewardError, match="'any_option' is both an option"):
        reward(prompts=["p"], completions=["c"], any_option=[1])


def test_no_reward_at_all_is_refused():
    with pytest.raises(ConfigError, match="names no reward"):
        build_rewards({})


@pytest.mark.parametrize("name", REWARDS)
def test_every_reward_is_documented_named_and_picklable(name):
    required = {"overlong_penalty": {"max_tokens": 8, "cache_tokens": 4}}
    reward = REWARDS[name](**required.get(name, {}))
    assert reward.__name__ == name and pickle.loads(pickle.dumps(reward)) == reward
    assert REWARDS[name].__doc__ and all(option.doc for option in describe(REWARDS[name]))
