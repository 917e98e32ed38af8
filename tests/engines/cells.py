"""The matrix method x engine: which methods, which engines, and what every cell is expected to show.

A cell is

    same      training gives what one process gives, within the engine's tolerance
    refused   the trainer raises ConfigError when it is built
    gpu       can be tried on a GPU only: a test marked `gpu` does
"""

from __future__ import annotations

from typing import Any

WORDS = {"words": ["1", "2", "3"], "variants": "bare"}

METHODS: dict[str, dict[str, Any]] = {
    "credit: group": {"credit": {"type": "group"}},
    "credit: token_group_average": {"credit": {"type": "token_group_average"}},
    "credit: entropy_shaping": {"credit": {"type": "entropy_shaping"}},
    "credit: preplan_anchor": {
        "credit": {"type": "preplan_anchor", "window": 2, "horizon_min": 1, "horizon_max": 4},
    },
    "credit: shuffled": {"credit": {"type": "shuffled"}},
    "objective: hapo": {"objective": {"type": "hapo"}, "credit": {"type": "token_group_average"}},
    "objective: gspo_token": {"objective": {"type": "gspo_token"}},
    # every candidate is silenced: which ones a smaller share draws depends on the number of processes
    "objective: clip_cov": {"objective": {"type": "clip_cov", "ratio": 1.0, "low": 0.02, "high": 5.0}},
    "objective: kl_cov": {"objective": {"type": "kl_cov", "ratio": 0.1}},
    "batching: balance": {"batching": {"balance": True}},
    "batching: balance, max_tokens, pack": {"batching": {"balance": True, "max_tokens": 48, "pack": True}},
    "selection: d3s": {
        "selection": {"type": "d3s", "rows_start": 0.6, "rows_end": 0.6, "tokens_start": 0.5, "tokens_end": 0.5}
    },
    "selection: pods": {"selection": {"type": "pods", "keep": 0.5}},
    "selection: random": {"selection": {"type": "random", "rows_start": 0.5, "rows_end": 0.5, "scope": "group"}},
    "rollout: adaptive_temperature": {"rollout": {"decoding": [{"type": "adaptive_temperature", "tau": 0.3}]}},
    "rollout: budget_forcing": {
        "rollout": {
            "decoding": [{"type": "budget_forcing", "min_tokens": 2, "max_tokens": 9, "ignore": 0, "wait_text": "w"}]
        }
    },
    "rollout: cyclic_reflex": {
        "rollout": {"decoding": [{"type": "cyclic_reflex", "amplitude": 2.0, "period": 6.0, **WORDS}]}
    },
    "rollout: reflection_suppression": {
        "rollout": {"decoding": [{"type": "reflection_suppression", "strength": 1.5, **WORDS}]}
    },
    "rollout: thought_switching": {
        "rollout": {"decoding": [{"type": "thought_switching", "alpha": 1.0, "beta": 3, **WORDS}]}
    },
    "rollout: steering": {"rollout": {"steering": {"path": "vectors.safetensors"}}},
    "rollout: kv": {"rollout": {"kv": {"policy": "h2o", "heavy": 4, "recent": 4, "interval": 2}}},
    # refreshed once: the largest weight of a row lies on a tie of the rounding, so that a refresh makes a step of the
    # codes of the last digit in which the sums of two processes differ
    "rollout: quant": {"rollout": {"quant": {"bits": 4, "refresh": 100}}},
    "rollout: correction": {"rollout": {"correction": {"mode": "truncate", "clip_max": 1.1, "batch_normalize": True}}},
    "rollout: dynamic_sampling": {"rollout": {"dynamic_sampling": {"metric": "even_length"}}},
    "rollout: prompt_skipping": {
        "rollout": {"prompt_skipping": {"metric": "even_length", "p_easy": 0.05, "p_hard": 0.05}}
    },
}
"""name -> the doors' sections, each the smallest that acts on the runs of the matrix"""

DRAWN = {"decoding", "steering", "kv", "quant"}
SAMPLED = tuple(name for name, doors in METHODS.items() if doors.get("rollout", {}).keys() & DRAWN)
"""methods that change how tokens are drawn; the others train on fixed completions"""

SHORT = ("credit: group", "objective: hapo", "selection: d3s", "rollout: cyclic_reflex", "rollout: dynamic_sampling")
"""methods that the default tests run on every engine; all methods run on `two processes`"""

ENGINES: dict[str, str] = {
    "two processes": "DDP over gloo",
    "four processes": "DDP over gloo",
    "gradient checkpointing": "one process",
    "bf16": "one process, autocast",
    "LoRA": "one process",
    "DoRA": "one process",
    "ZeRO-1": "two processes, DeepSpeed's engine",
    "ZeRO-2": "two processes, DeepSpeed's engine",
    "ZeRO-3": "two processes, DeepSpeed's engine",
    "FSDP2": "two processes, fully_shard",
    "QLoRA": "one GPU",
}

TOLERANCE: dict[str, float] = {
    "two processes": 1e-5,
    "four processes": 1e-5,
    "gradient checkpointing": 1e-6,
    "ZeRO-1": 1e-5,
    "ZeRO-2": 1e-5,
    "ZeRO-3": 1e-5,
    "FSDP2": 1e-5,
    "LoRA": 1e-4,
    "DoRA": 1e-4,
    "bf16": 0.1,
}
"""largest difference of a parameter after all steps; LoRA, DoRA: of the first gradient, and bf16: of the first update,
each relative to its norm"""

DEEPSPEED = ("ZeRO-1", "ZeRO-2", "ZeRO-3")


def expected(method: str, engine: str) -> str:
    """`same`, `refused` or `gpu`."""
    if engine == "QLoRA":
        return "gpu"
    if method in ("credit: preplan_anchor", "rollout: quant") and engine in ("ZeRO-3", "FSDP2"):
        return "refused"
    return "same"
