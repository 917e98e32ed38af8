"""The quantised copy of a policy: what it shares, how it follows, what it records, and what it refuses."""

from __future__ import annotations

import copy
import functools
import types

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, VeraConfig, get_peft_model
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rltok.correction import CorrectionConfig, rollout_weights
from rltok.fast import LoopSettings, generate_rows, row_key
from rltok.quant.codes import dequantize, linear, quantize_weight, state_bytes
from rltok.quant.shadow import QuantizedShadow, checksum, merged_weight, noise_sigma, noise_stage
from rltok.quant.spec import SKIP, RolloutQuantSpec

VOCAB = 29
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
INT4 = RolloutQuantSpec(bits=4, group_size=16)
INT8 = RolloutQuantSpec(bits=8)
SPECS = [
    INT8,
    INT4,
    RolloutQuantSpec(bits=4, hold_dequantized=True),
    RolloutQuantSpec(bits=4, backend="aten_int4", group_size=32),
    RolloutQuantSpec(bits=8, backend="aten_int8"),
    RolloutQuantSpec(bits=8, backend="fp8"),
]
PROJECTIONS = ["q_proj", "v_proj", "down_proj"]
PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15]]


def label(spec):
    return f"{spec.backend}-{spec.bits}-{spec.group_size}{'-dense' if spec.hold_dequantized else ''}"


def build_policy(seed=0, tied=True, dtype=torch.float32):
    torch.manual_seed(seed)
    policy = Qwen3ForCausalLM(Qwen3Config(**SHAPE, tie_word_embeddings=tied)).to(dtype)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "norm" in name:  # gains of a trained model differ from 1
                parameter.add_(0.1 * torch.randn_like(parameter))
    return policy


def with_lora(policy, seed=1, name="default", **options):
    """An adapter that is no longer zero."""
    torch.manual_seed(seed)
    options = {"r": 4, "lora_alpha": 8, "target_modules": PROJECTIONS} | options
    adapted = get_peft_model(policy, LoraConfig(**options))
    with torch.no_grad():
        for parameter_name, parameter in adapted.named_parameters():
            if "lora_B" in parameter_name:
                parameter.normal_(0, 0.1)
    return adapted


def logits(model, ids=None):
    ids = torch.tensor([PROMPTS[2]]) if ids is None else ids
    with torch.no_grad():
        return model(input_ids=ids).logits


def train(policy, steps=1, fused=False, lr=1e-2):
    """Optimizer steps on a language-modelling loss."""
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=lr, fused=fused)
    ids = torch.tensor([PROMPTS[2]])
    for _ in range(steps):
        policy(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def codes_of(shadow):
    return {name: (layer.state.codes, layer.state.scale) for name, layer in shadow.layers.items()}


def assert_same_codes(shadow, other):
    mine, theirs = codes_of(shadow), codes_of(other)
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert all(torch.equal(a, b) for a, b in zip(mine[name], theirs[name], strict=True)), name


@pytest.fixture(params=SPECS, ids=label)
def spec(request):
    return request.param


def test_the_decoder_is_quantised_and_the_rest_is_shared(spec):
    policy = build_policy()
    shadow = QuantizedShadow(policy, spec)
    expected = {name for name, module in policy.named_modules() if type(module) is nn.Linear and name != "lm_head"}
    assert set(shadow.layers) == expected and len(expected) == 14
    theirs = dict(policy.named_parameters())
    for name, parameter in shadow.module.named_parameters():
        assert parameter is theirs[name], name
    left = {name for name in theirs if name.removesuffix(".weight") not in expected}
    assert {name for name, _ in shadow.module.named_parameters()} == left
    assert shadow.module.lm_head.weight is shadow.module.model.embed_tokens.weight is policy.lm_head.weight
    assert {id(b) for b in shadow.module.buffers()} == {id(b) for b in policy.buffers()}


def test_the_copy_is_a_model_with_dequantised_weights(spec):
    policy = build_policy()
    shadow, rounded = QuantizedShadow(policy, spec), copy.deepcopy(policy).eval()
    with torch.no_grad():
        for name in shadow.layers:
            module = rounded.get_submodule(name)
            module.weight.copy_(dequantize(quantize_weight(module.weight, spec)))
    torch.testing.assert_close(logits(shadow.module), logits(rounded), atol=1e-5, rtol=0)
    assert (logits(shadow.module) - logits(policy.eval())).abs().max() > 1e-3


def test_sync_is_a_fresh_shadow_in_the_same_buffers(spec):
    policy = build_policy()
    shadow = QuantizedShadow(policy, spec)
    places = [tensor.data_ptr() for pair in codes_of(shadow).values() for tensor in pair]
    old = {name: dequantize(layer.state).clone() for name, layer in shadow.layers.items()}
    train(policy)
    facts = shadow.sync()
    fresh = QuantizedShadow(policy, spec)
    assert_same_codes(shadow, fresh)
    assert torch.equal(logits(shadow.module), logits(fresh.module))
    assert [tensor.data_ptr() for pair in codes_of(shadow).values() for tensor in pair] == places
    assert facts.refreshed == facts.layers == 14 and 0 < facts.changed <= 1 and facts.seconds > 0
    assert any(not torch.equal(old[name], dequantize(layer.state)) for name, layer in shadow.layers.items())
    again = shadow.sync()
    assert again.refreshed == 0 and again.changed == 0
    forced = shadow.sync(force=True)
    assert forced.refreshed == 14 and forced.changed == 0


@pytest.mark.parametrize("how", ["fused", "data", "in place", "replaced", "loaded"])
def test_every_way_to_move_is_seen(how):
    """A fused optimizer, the default of transformers, leaves the version of a parameter as it is; so does `.data`."""
    policy = build_policy()
    shadow = QuantizedShadow(policy, INT8)
    weight = policy.model.layers[1].mlp.up_proj.weight
    if how == "fused":
        version = weight._version
        train(policy, fused=True)
        assert weight._version == version
    elif how == "data":
        weight.data[3, 5] += 0.5
    elif how == "in place":
        with torch.no_grad():
            weight[3, 5] += 0.5
    elif how == "replaced":
        policy.model.layers[1].mlp.up_proj.weight = nn.Parameter(weight.detach() * 1.5 + 0.01)
        policy.model.norm.weight = nn.Parameter(policy.model.norm.weight.detach() * 2)
    else:
        policy.load_state_dict(build_policy(seed=5).state_dict())
    facts = shadow.sync()
    assert facts.changed > 0
    assert facts.refreshed == (14 if how in ("fused", "loaded") else 1)
    fresh = QuantizedShadow(policy, INT8)
    assert_same_codes(shadow, fresh)
    assert torch.equal(logits(shadow.module), logits(fresh.module))


def test_what_is_shared_needs_no_sync():
    policy = build_policy()
    shadow = QuantizedShadow(policy, INT8)
    with torch.no_grad():
        policy.model.norm.weight.mul_(2)
        policy.model.embed_tokens.weight[5].add_(1)
    assert torch.equal(logits(shadow.module), logits(QuantizedShadow(policy, INT8).module))


def test_share_of_changed_codes_is_the_expected_flip_rate():
    policy = build_policy()
    shadow = QuantizedShadow(policy, INT8)
    expected, count = 0.0, 0
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, layer in shadow.layers.items():
            weight = policy.get_submodule(name).weight
            before = weight / layer.state.scale
            update = 1e-4 * torch.randn(weight.shape, generator=generator).sign()
            update.scatter_(1, weight.abs().argmax(1, keepdim=True), 0.0)
            weight += update
            expected += (weight / layer.state.scale - before).abs().sum().item()
            count += weight.numel()
    facts = shadow.sync()
    assert 0.01 < expected / count < 0.2
    assert facts.changed == pytest.approx(expected / count, rel=0.15)  # about 3 standard deviations


def test_the_policy_is_never_touched(spec):
    policy = build_policy().train()
    names = [name for name, _ in policy.named_modules()]
    classes = [type(module) for module in policy.modules()]
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    expected = copy.deepcopy(policy)
    shadow = QuantizedShadow(policy, spec)
    for sync in (shadow.sync, lambda: shadow.sync(force=True), lambda: shadow.sync(noise=0.1, seed=1)):
        sync()
        settings = LoopSettings(max_new_tokens=4)
        generate_rows(shadow.module, PROMPTS, [row_key(0, 0, str(p), 0) for p in PROMPTS], settings)
        shadow.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=3, do_sample=False)
    assert {name: tensor for name, tensor in policy.state_dict().items()}.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.state_dict().items())
    assert [name for name, _ in policy.named_modules()] == names
    assert [type(module) for module in policy.modules()] == classes
    assert all(module.training for module in policy.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in policy.parameters())
    train(policy, steps=2)
    train(expected, steps=2)
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), expected.parameters(), strict=True))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_sixteen_bits_are_the_policy(lora):
    policy = build_policy()
    policy = with_lora(policy) if lora else policy
    shadow = QuantizedShadow(policy, RolloutQuantSpec(bits=16))
    assert shadow.module is not policy
    assert torch.equal(logits(shadow.module), logits(policy.eval()))
    train(policy)
    facts = shadow.sync()
    assert (facts.layers, facts.refreshed, facts.changed, facts.nbytes) == (0, 0, 0.0, 0)
    assert torch.equal(logits(shadow.module), logits(policy.eval()))
    keys = [row_key(0, 0, str(prompt), 0) for prompt in PROMPTS]
    mine = generate_rows(shadow.module, PROMPTS, keys, LoopSettings(max_new_tokens=6))
    theirs = generate_rows(policy, PROMPTS, keys, LoopSettings(max_new_tokens=6))
    assert mine.ids == theirs.ids and mine.logps == theirs.logps


def test_rollouts_record_what_the_copy_sampled_with(spec):
    policy = build_policy()
    shadow = QuantizedShadow(policy, spec)
    keys = [row_key(0, 0, str(prompt), 0) for prompt in PROMPTS]
    result = generate_rows(shadow.module, PROMPTS, keys, LoopSettings(max_new_tokens=8))
    differences = []
    for prompt, ids, recorded in zip(PROMPTS, result.ids, result.logps, strict=True):
        row = torch.tensor([prompt + ids])
        for model, found in ((shadow.module, []), (policy.eval(), differences)):
            scores = logits(model, row)[0, len(prompt) - 1 : -1].log_softmax(-1)
            forced = scores.gather(1, torch.tensor(ids)[:, None])[:, 0]
            found.append((forced - torch.tensor(recorded)).abs().max().item())
            if model is shadow.module:
                assert found[0] < 1e-5
    assert max(differences) > 1e-3  # the policy itself would not have given these


def test_under_autocast(spec):
    """Where the policy samples under autocast, its copy does too, in the same dtype and about the same numbers."""
    policy = build_policy()
    shadow = QuantizedShadow(policy, spec)
    exact = logits(shadow.module)
    with torch.autocast("cpu", torch.bfloat16):
        low, theirs = logits(shadow.module), logits(policy.eval())
    assert low.dtype == theirs.dtype == torch.bfloat16
    assert (low.float() - exact).norm() / exact.norm() < 0.05


def test_bfloat16_policy(spec):
    policy = build_policy(dtype=torch.bfloat16)
    shadow = QuantizedShadow(policy, spec)
    assert logits(shadow.module).dtype == torch.bfloat16
    train(policy)
    shadow.sync()
    fresh = QuantizedShadow(policy, spec)
    assert_same_codes(shadow, fresh)
    assert torch.equal(logits(shadow.module), logits(fresh.module))


def test_greedy_generate_is_that_of_the_copy():
    policy = build_policy()
    shadow = QuantizedShadow(policy, INT4)
    out = shadow.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=6, do_sample=False, eos_token_id=None)
    row = torch.tensor([PROMPTS[0]])
    for _ in range(6):
        row = torch.cat([row, logits(shadow.module, row)[:, -1:].argmax(-1)], 1)
    assert torch.equal(out, row)


def test_settings_of_the_copy_are_its_own():
    policy = build_policy().train()
    shadow = QuantizedShadow(policy, INT8)
    shadow.module.config.use_cache = False
    shadow.module.generation_config.temperature = 0.3
    assert policy.config.use_cache and policy.generation_config.temperature != 0.3
    assert not any(module.training for module in shadow.module.modules())


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_merged_weight_is_quantised(dora, dtype):
    policy = with_lora(build_policy(), use_dora=dora).to(dtype)
    base = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    shadow = QuantizedShadow(policy, INT8)
    assert len(shadow.layers) == 14
    assert not any("lora" in name for name, _ in shadow.module.named_parameters())
    exact = copy.deepcopy(policy).float().merge_and_unload()
    for name, layer in shadow.layers.items():
        merged = exact.get_submodule(name).weight.detach()
        scale = (merged.abs().amax(1, keepdim=True) / 127.5).to(dtype)
        codes = (merged * (1 / scale.float())).round().clamp(-128, 127)
        torch.testing.assert_close(layer.state.scale, scale, atol=0, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5)
        assert (layer.state.codes.float() - codes).abs().max() <= (2 if dtype == torch.bfloat16 else 1)
        assert (layer.state.codes != codes).float().mean() < (0.02 if dtype == torch.bfloat16 else 0.005)
        assert layer.weight.dtype == dtype
    if dtype == torch.float32:
        rounded = copy.deepcopy(policy).merge_and_unload().eval()
        with torch.no_grad():
            for name in shadow.layers:
                module = rounded.get_submodule(name)
                module.weight.copy_(dequantize(quantize_weight(module.weight, INT8)))
        torch.testing.assert_close(logits(shadow.module), logits(rounded), atol=2e-2, rtol=0)  # a few ties
    assert all(torch.equal(tensor, base[name]) for name, tensor in policy.state_dict().items())
    train(policy)
    facts = shadow.sync()
    assert facts.refreshed == 6 and facts.changed > 0  # three projections of two layers
    assert_same_codes(shadow, QuantizedShadow(policy, INT8))
    trained = policy.state_dict()
    assert all(torch.equal(trained[name], base[name]) for name in base if "lora" not in name)


def test_merged_weight_is_the_formula():
    torch.manual_seed(0)
    policy = with_lora(build_policy(), use_rslora=True)
    layer = policy.get_base_model().model.layers[0].self_attn.q_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close(merged_weight(layer), layer.base_layer.weight + 8 / 4**0.5 * b @ a)
    policy.add_adapter("second", LoraConfig(r=2, lora_alpha=2, target_modules=PROJECTIONS, init_lora_weights=False))
    layer.set_adapter(["default", "second"])
    more = layer.lora_B["second"].weight @ layer.lora_A["second"].weight
    torch.testing.assert_close(merged_weight(layer), layer.base_layer.weight + 4 * b @ a + more)
    with policy.disable_adapter():
        assert torch.equal(merged_weight(layer), layer.base_layer.weight)
    policy.merge_adapter()
    assert torch.equal(merged_weight(layer), layer.base_layer.weight)


def test_quantising_the_base_under_an_adapter_is_something_else():
    """256 x 256 int8 with rank 4: Q(W + B A) differs from Q(W) + B A by more than from W + B A itself."""
    torch.manual_seed(0)
    w, a, b = torch.randn(256, 256), torch.randn(4, 256), torch.randn(256, 4)
    update = 0.1 * b @ a
    merged = dequantize(quantize_weight(w + update, INT8))
    apart = dequantize(quantize_weight(w, INT8)) + update
    own = (merged - w - update).norm() / (w + update).norm()
    assert (merged - apart).norm() / (w + update).norm() > 1.2 * own


def test_adapters_outside_of_the_decoder_are_shared():
    policy = with_lora(build_policy(tied=False), target_modules=["q_proj", "lm_head", "embed_tokens"])
    shadow = QuantizedShadow(policy, RolloutQuantSpec(bits=8, hold_dequantized=True))
    names = {name.split(".")[0 if name.startswith("lm_head") else 1] for name, _ in shadow.module.named_parameters()}
    assert "lm_head" in names and "embed_tokens" in names
    with torch.no_grad():
        for name, layer in shadow.layers.items():
            module = policy.get_base_model().get_submodule(name)
            layer.state.dense.copy_(merged_weight(module) if hasattr(module, "base_layer") else module.weight)
    torch.testing.assert_close(logits(shadow.module), logits(policy.eval()), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_the_merge_is_not_made_in_autocast(dora):
    policy = with_lora(build_policy(), use_dora=dora)
    shadow = QuantizedShadow(policy, INT8)
    with torch.autocast("cpu", torch.bfloat16):
        fresh = QuantizedShadow(policy, INT8)
        shadow.sync(force=True)
    exact = QuantizedShadow(policy, INT8)
    assert_same_codes(shadow, exact)
    assert_same_codes(fresh, exact)


def test_transposed_weights_in_the_int8_kernel():
    policy = build_gpt2()
    with pytest.warns(UserWarning, match=r"'aten_int8' is several times slower .* bfloat16 \(model.dtype\)"):
        shadow = QuantizedShadow(policy, RolloutQuantSpec(bits=8, backend="aten_int8"))
    torch.testing.assert_close(logits(shadow.module), logits(QuantizedShadow(policy, INT8).module), atol=1e-4, rtol=0)


def test_the_kernels_pay_in_bfloat16_and_do_not_warn(recwarn):
    for backend, bits in (("aten_int8", 8), ("aten_int4", 4)):
        QuantizedShadow(build_policy(dtype=torch.bfloat16), RolloutQuantSpec(bits=bits, backend=backend))
    QuantizedShadow(build_policy(), INT8)
    assert not [w for w in recwarn if "slower" in str(w.message)]


def test_an_adapter_around_a_shadowed_policy_is_noticed():
    policy = build_policy()
    shadow = QuantizedShadow(policy, INT8)
    with_lora(policy)
    with pytest.raises(ValueError, match="make a new one"):
        shadow.sync()


def test_memory_as_documented():
    policy = build_policy(dtype=torch.bfloat16)
    weights = {name: policy.get_submodule(name).weight for name in QuantizedShadow(policy, INT8).layers}
    count, rows = sum(w.numel() for w in weights.values()), sum(w.size(0) for w in weights.values())
    facts = QuantizedShadow(policy, INT8).last
    assert facts.replaced_nbytes == 2 * count
    assert facts.nbytes == count + 2 * rows
    assert QuantizedShadow(policy, INT4).last.nbytes == count // 2 + 2 * count // 16
    shadow = QuantizedShadow(policy, INT8)
    gains = sum(p.numel() for name, p in policy.named_parameters() if "norm" in name)
    assert shadow.sync(noise=0.1, seed=0).nbytes == count + 2 * rows + 2 * gains
    assert sum(state_bytes(layer.state) for layer in shadow.layers.values()) == count + 2 * rows


@pytest.mark.parametrize("spec", [INT8, RolloutQuantSpec(bits=16)], ids=label)
def test_noise_is_around_the_clean_gain_and_of_the_copy_alone(spec):
    policy = build_policy()
    shadow = QuantizedShadow(policy, spec)
    clean = {name: p for name, p in policy.named_parameters() if "norm" in name}
    values = {name: p.clone() for name, p in clean.items()}
    assert len(clean) == 9

    def drawn():
        mine = dict(shadow.module.named_parameters())
        return torch.cat([(mine[name] - p).flatten() for name, p in clean.items()]).detach()

    quiet = logits(shadow.module)
    assert shadow.sync(noise=0.1, seed=1).noise == 0.1
    first = drawn()
    assert first.std().item() == pytest.approx(0.1, rel=0.15) and first.mean().abs() < 0.03
    assert not torch.equal(logits(shadow.module), quiet)
    shadow.sync(noise=0.1, seed=2)
    assert not torch.equal(drawn(), first)
    shadow.sync(noise=0.1, seed=1)
    assert torch.equal(drawn(), first)  # nothing of the draw before is left
    with torch.no_grad():
        policy.model.norm.weight.add_(1)
    shadow.sync(noise=0.1, seed=1)
    torch.testing.assert_close(drawn(), first, atol=1e-6, rtol=0)
    with torch.no_grad():
        policy.model.norm.weight.sub_(1)
    facts = shadow.sync()
    assert facts.noise == 0
    theirs = dict(policy.named_parameters())
    assert all(p is theirs[name] for name, p in shadow.module.named_parameters())
    torch.testing.assert_close(logits(shadow.module), quiet, atol=1e-5, rtol=0)
    assert all(torch.allclose(p, values[name], atol=1e-6) and p.requires_grad for name, p in clean.items())


def test_noise_schedule():
    assert noise_sigma(0) == 0.0
    expected = [1e-2 * (1e-2) ** (i / 8) for i in range(9)]
    assert [noise_sigma(stage) for stage in range(1, 10)] == pytest.approx(expected, rel=1e-12)
    assert noise_sigma(5) == pytest.approx(1e-3) and noise_sigma(9) == pytest.approx(1e-4)
    paper = [noise_sigma(stage, start=5e-2, end=5e-4, form="paper") for stage in range(11)]
    assert paper[0] == 0.0 and paper[1] == pytest.approx(5e-2) and paper[10] == pytest.approx(5e-4)
    assert paper[4] == pytest.approx(5e-2 * 1e-2 ** (3 / 9), rel=1e-12)
    assert [noise_stage(step, 25) for step in (0, 2, 3, 24, 25, 99)] == [0, 0, 1, 9, 9, 9]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: noise_sigma(10), r"stage=10 is not in 0\.\.9"),
        (lambda: noise_sigma(1, stages=2), "stages=2"),
        (lambda: noise_sigma(1, start=1e-4, end=1e-2), "0 < end <= start"),
        (lambda: noise_sigma(1, form="linear"), "form='linear'"),
        (lambda: noise_stage(-1, 10), "step=-1"),
        (lambda: QuantizedShadow(build_policy(), INT8).sync(noise=-1.0), "noise=-1.0"),
        (lambda: QuantizedShadow(build_policy(), INT8).sync(noise=0.1), "needs a seed"),
        (lambda: QuantizedShadow(build_gpt2(), INT8).sync(noise=0.1, seed=0), "no RMSNorm"),
    ],
)
def test_noise_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def build_gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3)
    return GPT2LMHeadModel(config)


@pytest.mark.parametrize("dora", [None, False, True])
def test_gpt2_has_transposed_weights(dora):
    policy = build_gpt2()
    if dora is not None:
        policy = with_lora(policy, target_modules=["c_attn", "c_proj"], use_dora=dora, fan_in_fan_out=True)
    shadow = QuantizedShadow(policy, RolloutQuantSpec(bits=8, hold_dequantized=True))
    assert set(shadow.layers) == {
        f"transformer.h.{i}.{part}"
        for i in range(2)
        for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    torch.testing.assert_close(logits(shadow.module), logits(policy.eval()), atol=0.5, rtol=0)
    exact = copy.deepcopy(policy).merge_and_unload() if dora is not None else policy
    with torch.no_grad():
        for name, layer in shadow.layers.items():
            fresh = quantize_weight(exact.get_submodule(name).weight.t(), INT8)
            assert (fresh.codes.int() - layer.state.codes.int()).abs().max() <= 1  # ties, where the merge rounds apart
            layer.state.dense.copy_(exact.get_submodule(name).weight.t())
    torch.testing.assert_close(logits(shadow.module), logits(policy.eval()), atol=1e-4, rtol=0)


def test_other_families_sample():
    torch.manual_seed(0)
    policy = LlamaForCausalLM(LlamaConfig(**SHAPE, attention_bias=True))
    shadow = QuantizedShadow(policy, INT4)
    assert shadow.module.model.layers[0].self_attn.q_proj.bias is policy.model.layers[0].self_attn.q_proj.bias
    result = generate_rows(shadow.module, PROMPTS, None, LoopSettings(max_new_tokens=4, temperature=0))
    assert all(len(ids) <= 4 for ids in result.ids)


def build_moe():
    torch.manual_seed(0)
    shape = {key: value for key, value in SHAPE.items() if key != "head_dim"}
    return Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            **shape,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
            decoder_sparse_step=1,
        )
    )


def test_experts_in_one_tensor_are_refused_and_may_be_skipped():
    policy = build_moe()
    with pytest.raises(ValueError, match=r"experts\.\w+ holds several matrices .* add 'experts' to skip"):
        QuantizedShadow(policy, INT8)
    shadow = QuantizedShadow(policy, RolloutQuantSpec(bits=8, skip=(*SKIP, "experts")))
    assert all("gate." not in name and not name.endswith("shared_expert_gate") for name in shadow.layers)
    assert any("shared_expert.up_proj" in name for name in shadow.layers)
    theirs = dict(policy.named_parameters())
    routers = [name for name in theirs if ".gate." in name or "shared_expert_gate" in name]
    mine = dict(shadow.module.named_parameters())
    assert routers and all(mine[name] is theirs[name] for name in routers)
    assert logits(shadow.module).isfinite().all()


def wrapped_as_trl_and_accelerate_do(model):
    """A forward around the bound method of the model itself, marked with `functools.wraps`."""
    inner = model.forward

    @functools.wraps(type(model).forward)
    def fused(self, *args, fused_lm_head=False, **kwargs):
        return inner(*args, **kwargs)

    model.forward = types.MethodType(fused, model)

    @functools.wraps(fused)
    def outer(*args, **kwargs):
        return fused(*args, **kwargs)

    model.forward = types.MethodType(outer, model)
    return model


def test_a_wrapped_forward_does_not_lead_back_to_the_policy():
    policy = wrapped_as_trl_and_accelerate_do(build_policy())
    shadow = QuantizedShadow(policy, INT4)
    plain = QuantizedShadow(build_policy(), INT4)
    assert torch.equal(logits(shadow.module), logits(plain.module))
    assert not torch.equal(logits(shadow.module), logits(policy.eval()))
    assert "forward" in vars(policy)


def test_a_model_that_trl_prepared():
    from trl.trainer.utils import add_fused_lm_head

    policy = build_policy()
    add_fused_lm_head(policy, temperature=1.0, outputs=("log_probs",))
    shadow = QuantizedShadow(policy, INT4)
    assert torch.equal(logits(shadow.module), logits(QuantizedShadow(build_policy(), INT4).module))


def test_a_model_in_mixed_precision():
    """accelerate puts autocast into the model's forward; the copy samples under autocast instead, bit for bit."""
    from accelerate.utils import convert_outputs_to_fp32

    policy = build_policy()
    autocast = torch.autocast("cpu", torch.bfloat16)
    policy.forward = types.MethodType(convert_outputs_to_fp32(autocast(type(policy).forward)), policy)
    shadow = QuantizedShadow(policy, RolloutQuantSpec(bits=16))
    with torch.autocast("cpu", torch.bfloat16):
        mine = logits(shadow.module)
    assert torch.equal(mine.float(), logits(policy.eval()))
    assert not torch.equal(logits(shadow.module), mine.float())


@pytest.mark.parametrize("place", ["", "model.layers.0.mlp", "model.layers.0.mlp.up_proj"])
def test_a_replaced_forward_is_refused(place):
    policy = build_policy()
    module = policy.get_submodule(place)
    original = module.forward
    module.forward = lambda *args, **kwargs: original(*args, **kwargs)
    with pytest.raises(ValueError, match="forward of its own"):
        QuantizedShadow(policy, INT8)


def test_observers_stay_with_the_policy():
    policy, seen = build_policy(), []
    policy.model.layers[0].register_forward_hook(lambda module, args, output: seen.append(module))
    policy.enable_input_require_grads()
    shadow = QuantizedShadow(policy, INT8)
    logits(shadow.module)
    assert not seen
    logits(policy)
    assert seen == [policy.model.layers[0]]
    assert len(shadow.module.model.embed_tokens._forward_hooks) == 1  # of transformers
    assert len(shadow.module(torch.tensor([[5, 6]]), output_hidden_states=True).hidden_states) == 3


def test_hidden_states_after_the_policy_gave_them():
    policy = build_policy()
    policy(torch.tensor([[5, 6]]), output_hidden_states=True)
    shadow = QuantizedShadow(policy, INT8)
    with torch.no_grad():
        states = shadow.module(torch.tensor([[5, 6]]), output_hidden_states=True).hidden_states
    assert len(states) == 3


class OwnLinear(nn.Linear):
    """A linear layer with fake quantisation in its forward."""

    def forward(self, x):
        return linear(x, quantize_weight(self.weight, INT8), self.bias)


def with_own_linear(policy):
    for module in policy.modules():
        if type(module) is nn.Linear and module is not policy.lm_head:
            module.__class__ = OwnLinear
    return policy


def test_same_precision_in_learner_and_copy():
    policy = with_own_linear(build_policy())
    with pytest.raises(ValueError, match="q_proj is OwnLinear"):
        QuantizedShadow(policy, INT8)
    shadow = QuantizedShadow(policy, INT8, linear_types=(OwnLinear,))
    assert torch.equal(logits(shadow.module), logits(policy.eval()))


def test_quantised_and_sharded_weights_are_refused():
    class Linear4bit(nn.Linear):
        """Named as bitsandbytes names its layer."""

    policy = build_policy()
    policy.model.layers[0].mlp.up_proj.__class__ = Linear4bit
    with pytest.raises(ValueError, match=r"up_proj is Linear4bit of bitsandbytes"):
        QuantizedShadow(policy, INT8)

    policy = build_policy()
    policy.model.layers[0].mlp.up_proj.weight.ds_id = 3
    with pytest.raises(ValueError, match="up_proj.weight is sharded by DeepSpeed ZeRO-3"):
        QuantizedShadow(policy, INT8)

    policy = build_policy()
    policy.model.layers[0].mlp.up_proj.weight.data = torch.empty(0)
    with pytest.raises(ValueError, match="up_proj.weight holds no data"):
        QuantizedShadow(policy, INT8)

    with torch.device("meta"):
        policy = Qwen3ForCausalLM(Qwen3Config(**SHAPE))
    with pytest.raises(ValueError, match="holds no data"):
        QuantizedShadow(policy, INT8)

    class FSDPModule:
        """Mixed into a module's class by FSDP."""

    policy = build_policy()
    policy.__class__ = type("Sharded", (FSDPModule, type(policy)), {})
    with pytest.raises(ValueError, match="sharded by FSDP"):
        QuantizedShadow(policy, INT8)

    policy = build_policy()
    policy.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.ones(64, 32, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="already quantised"):
        QuantizedShadow(policy, INT8)


def build_qlora(folder, bits=4):
    """A policy as recipes load it: a base of bitsandbytes with LoRA beside it."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra qlora)")
    from rltok.models import LoraSettings, ModelConfig, QuantizationSettings, load_model

    torch.manual_seed(0)
    config = Qwen3Config(**SHAPE | {"hidden_size": 64, "head_dim": 16, "num_key_value_heads": 4})
    Qwen3ForCausalLM(config).save_pretrained(folder)
    quantised = QuantizationSettings(bits=bits, compute_dtype="float32")
    return with_lora(load_model(ModelConfig(str(folder), lora=LoraSettings(), quantization=quantised)))


def layers_of_bitsandbytes(model):
    return [module for module in model.modules() if type(module).__module__.startswith("bitsandbytes")]


def slopes(policy):
    policy.zero_grad()
    ids = torch.tensor([PROMPTS[2]])
    policy(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def test_noise_over_a_base_in_four_bits(tmp_path):
    """QeRL on QLoRA: the base is low-bit on both sides, the adapters stay unmerged, the copy has the noise alone."""
    policy = build_qlora(tmp_path).train()
    plain, before = logits(policy), slopes(policy)
    layers = layers_of_bitsandbytes(policy)
    data = [layer.weight.data.clone() for layer in layers]
    shadow = QuantizedShadow(policy, RolloutQuantSpec(bits=16))
    assert len(layers) == 14 and shadow.layers == {}
    mine = layers_of_bitsandbytes(shadow.module)
    assert len(mine) == 14 and all(a.weight is b.weight for a, b in zip(mine, layers, strict=True))
    assert all(a.weight.quant_state is b.weight.quant_state for a, b in zip(mine, layers, strict=True))
    assert torch.equal(logits(shadow.module), plain)
    assert shadow.sync(noise=0.1, seed=1).noise == 0.1
    noisy = logits(shadow.module)
    assert (noisy - plain).abs().max() > 1e-2
    keys = [row_key(0, 0, str(prompt), 0) for prompt in PROMPTS]
    generate_rows(shadow.module, PROMPTS, keys, LoopSettings(max_new_tokens=4))
    shadow.sync(noise=0.1, seed=2)
    assert not torch.equal(logits(shadow.module), noisy)
    assert torch.equal(logits(policy), plain) and policy.training
    assert all(torch.equal(layer.weight.data, old) for layer, old in zip(layers, data, strict=True))
    after = slopes(policy)  # in evaluation mode bitsandbytes packs weights on the CPU, and gradients end there
    assert before.keys() == after.keys() and len(after) == 12
    assert all(torch.equal(after[name], before[name]) for name in before)
    train(policy)
    shadow.sync()
    trained = logits(policy)
    assert torch.equal(logits(shadow.module), trained) and not torch.equal(trained, plain)


def test_noise_over_a_base_in_eight_bits(tmp_path):
    """The layer of LLM.int8 takes its codes from the weight when it is first run, here by the copy."""
    policy = build_qlora(tmp_path, bits=8).train()
    shadow = QuantizedShadow(policy, RolloutQuantSpec(bits=16))
    mine = logits(shadow.module)
    assert logits(policy).isfinite().all() and len(slopes(policy)) == 12
    assert torch.equal(logits(policy.eval()), mine)
    shadow.sync(noise=0.1, seed=1)
    assert (logits(shadow.module) - mine).abs().max() > 1e-2
    assert torch.equal(logits(policy), mine)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_base_in_few_bits_is_not_quantised_again(tmp_path, bits):
    policy = build_qlora(tmp_path)
    with pytest.raises(ValueError, match=r"Linear4bit of bitsandbytes.* set rollout\.quant\.bits=16 .* noise"):
        QuantizedShadow(policy, RolloutQuantSpec(bits=bits))


def test_torchao_weights_are_refused():
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    policy = build_policy(tied=False)
    quantize_(policy.model, Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match="already quantised"):
        QuantizedShadow(policy, INT8)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "adds virtual tokens"),
        (VeraConfig(r=2, target_modules=["q_proj"]), "allowed are LoRA and DoRA"),
        (LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True), "lora_bias=True"),
    ],
)
def test_other_adapters_are_refused(config, message):
    torch.manual_seed(0)
    policy = LlamaForCausalLM(LlamaConfig(**SHAPE, attention_bias=True))
    with pytest.raises(ValueError, match=message):
        QuantizedShadow(get_peft_model(policy, config), INT8)


def test_a_layer_that_cannot_be_quantised_is_named():
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj: group_size=24 does not divide"):
        QuantizedShadow(build_policy(), RolloutQuantSpec(bits=8, group_size=24))
    assert "lm_head" not in QuantizedShadow(build_policy(tied=False), RolloutQuantSpec(skip=())).layers
    with pytest.raises(ValueError, match="leaves no linear layer"):
        QuantizedShadow(build_policy(), RolloutQuantSpec(skip=("*",)))
    with pytest.raises(ValueError, match="Linear is not a transformers"):
        QuantizedShadow(nn.Linear(2, 2), INT8)
    shadow = QuantizedShadow(build_policy(), RolloutQuantSpec(skip=(*SKIP, "model.layers.0.*")))
    assert all(name.startswith("model.layers.1.") for name in shadow.layers) and len(shadow.layers) == 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checksum_sees_single_bits(dtype):
    torch.manual_seed(0)
    for tensor in (torch.randn(8, 6), torch.randn(7), torch.randn(20, 7)[3:], torch.randn(6, 8).t()):
        tensor = tensor.to(dtype)
        before = checksum(tensor)
        assert torch.equal(checksum(tensor.clone()), before)
        changed = tensor.clone()
        changed[-1] += changed[-1] * torch.finfo(dtype).eps * 2
        assert not torch.equal(checksum(changed), before)
        swapped = tensor.flip(-1)
        assert not torch.equal(checksum(swapped), before)


# ---- the correction of a quantised sampler


def three_tokens():
    """A policy of 3 tokens whose logits are one layer's, and its int4 copy."""
    torch.manual_seed(4)
    weight, x = torch.randn(3, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    exact = (weight @ x).log_softmax(-1)
    rounded = linear(x, quantize_weight(weight, RolloutQuantSpec(bits=4))).log_softmax(-1)
    return exact, rounded


@pytest.mark.parametrize("strength", [1.0, 40.0])
def test_the_corrected_expectation_is_exact_without_truncation(strength):
    """E_q[w f] = E_p[f] over all tokens; truncated at C = 2 it misses sum_a max(p - 2 q, 0) f."""
    exact, rounded = three_tokens()
    rounded = (exact + strength * (rounded - exact)).log_softmax(-1)
    p, q = exact.exp(), rounded.exp()
    f, mask = torch.tensor([1.0, -2.0, 5.0], dtype=torch.float64), torch.ones(3, 1)

    def expectation(**settings):
        weights = rollout_weights(exact[:, None], rounded[:, None], mask, CorrectionConfig(**settings)).weight[:, 0]
        return (q * weights * f).sum().item()

    truth = (p * f).sum().item()
    assert abs((q * f).sum().item() - truth) > 1e-2  # uncorrected: biased
    assert expectation(mode="truncate", clip_max=None) == pytest.approx(truth, abs=1e-12)
    bias = -((p - 2 * q).clamp(min=0) * f).sum().item()
    assert expectation(mode="truncate", clip_max=2.0) - truth == pytest.approx(bias, abs=1e-12)
    assert (abs(bias) > 1e-2) == (strength > 1)  # the strong mismatch is truncated, the plain one is not


PI_P = torch.tensor([[0.5, 0.2, 0.9]], dtype=torch.float64)
PI_Q = torch.tensor([[0.4, 0.05, 0.95]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"mode": "truncate"}, [[1.25, 2.0, 0.947368]]),
        ({"mode": "mask", "clip_min": 0.5}, [[1.25, 0.0, 0.947368]]),
        ({"mode": "truncate", "level": "sequence", "clip_max": None}, [[4.736842]]),
        ({"mode": "truncate", "level": "sequence"}, [[2.0]]),
        ({"mode": "mask", "level": "sequence", "clip_max": 3.0}, [[0.0]]),
    ],
)
def test_worked_weights(settings, expected):
    got = rollout_weights(PI_P.log(), PI_Q.log(), torch.ones(1, 3), CorrectionConfig(**settings)).weight
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)


def clipped_loss(advantage, upper=1.2):
    ratio = torch.tensor([[0.6, 0.25, 0.9]], dtype=torch.float64) / PI_P
    bounded = torch.minimum(ratio.clamp(min=0.8), torch.as_tensor(upper, dtype=torch.float64))
    return -torch.minimum(ratio * advantage, bounded * advantage)


def test_worked_loss():
    weight = rollout_weights(PI_P.log(), PI_Q.log(), torch.ones(1, 3), CorrectionConfig(mode="truncate")).weight
    assert (weight * clipped_loss(1.0)).mean().item() == pytest.approx(-1.615789, abs=1e-6)
    assert clipped_loss(weight).mean().item() == pytest.approx(-1.615789, abs=1e-6)  # folded into the advantages
    kept = (2.0 / (PI_P / PI_Q)).clamp(max=1.0)
    assert (weight * clipped_loss(1.0, 1.2 / kept)).mean().item() == pytest.approx(-1.649123, abs=1e-6)


def test_missing_log_probabilities_and_sixteen_bits_weigh_one():
    log_q = PI_Q.log().clone()
    log_q[0, 1] = torch.nan
    weight = rollout_weights(PI_P.log(), log_q, torch.ones(1, 3), CorrectionConfig(mode="truncate")).weight
    assert weight[0, 1] == 1
    policy = build_policy()
    shadow = QuantizedShadow(policy, RolloutQuantSpec(bits=16))
    ids = torch.tensor([PROMPTS[2]])
    pair = [
        logits(model, ids)[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        for model in (policy, shadow.module)
    ]
    result = rollout_weights(*pair, torch.ones(1, 4), CorrectionConfig(mode="truncate"))
    assert torch.equal(result.weight, torch.ones(1, 4)) and result.metrics["k3"] == 0
