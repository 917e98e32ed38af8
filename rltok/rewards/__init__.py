"""Rewards: plain functions `f(prompts, completions, completion_ids, **columns) -> list[float]`, as TRL calls them.

Completions are strings or lists of messages. Every entry of `REWARDS` is a frozen dataclass: its fields are the
options, its instances the functions.
"""

from rltok.rewards.accuracy import LenientAccuracy, StrictAccuracy
from rltok.rewards.answer import completion_text, ends_with_form, extract_answer, lenient_candidates
from rltok.rewards.answer_format import AnswerFormat
from rltok.rewards.build import REWARDS, RewardSet, build_rewards
from rltok.rewards.entries import decode_entry, encode_entry
from rltok.rewards.guard import RewardError, guarded
from rltok.rewards.length import Length, OverlongPenalty
from rltok.rewards.math_equivalence import MathEquivalence
from rltok.rewards.random_reward import RandomReward
from rltok.rewards.reasoning import ReasoningGym
from rltok.rewards.verify import VerifierError, math_equal

__all__ = [
    "REWARDS",
    "AnswerFormat",
    "Length",
    "LenientAccuracy",
    "MathEquivalence",
    "OverlongPenalty",
    "RandomReward",
    "ReasoningGym",
    "RewardError",
    "RewardSet",
    "StrictAccuracy",
    "VerifierError",
    "build_rewards",
    "completion_text",
    "decode_entry",
    "encode_entry",
    "ends_with_form",
    "extract_answer",
    "guarded",
    "lenient_candidates",
    "math_equal",
]
