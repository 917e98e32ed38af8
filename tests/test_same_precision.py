"""The learner in the sampler's precision: equal to the shadow, straight-through gradients, and nothing left behind."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import linear as full_linear
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from rltok.correction import CorrectionConfig, rollout_weights
from rltok.quant import codes
from rltok.quant.codes import dequantize, quantize_weight, rounded_input, rounded_weight
from rltok.quant.same_precision import attach_same_precision, attached_precision
from rltok.quant.shadow import QuantizedShadow, lora_parts, merged_weight
from rltok.quant.spec import SKIP, RolloutQuantSpec

SHAPE = {
    "vocab_size": 29,
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
INT8 = RolloutQuantSpec(bits=8)
INT4 = RolloutQuantSpec(bits=4, group_size=16)
SPECS = [
    INT8,
    INT4,
    RolloutQuantSpec(bits=4, hold_dequantized=True),
    RolloutQuantSpec(bits=4, backend="aten_int4", group_size=32),
    RolloutQuantSpec(bits=4, backend="aten_int4"),
    RolloutQuantSpec(bits=8, backend="aten_int8"),
    RolloutQuantSpec(bits=8, backend="fp8"),
]
IDS = torch.tensor([[11, 12, 13, 14, 15, 3], [7, 8, 9, 10, 2, 4]])
PROJECTIONS = ["q_proj", "v_proj", "down_proj"]
KINDS = ["full", "lora", "dora", "gpt2", "gpt2-lora", "gpt2-dora"]


def label(spec):
    return f"{spec.backend}-{spec.bits}-{spec.group_size}{'-dense' if spec.hold_dequantized else ''}"


def build_policy(kind="full", dtype=torch.float32, **options):
    torch.manual_seed(0)
    if kind.startswith("gpt2"):
        config = GPT2Config(vocab_size=29, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3)
        config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
        policy, targets = GPT2LMHeadModel(config), ["c_attn", "c_proj"]
    else:
        policy, targets = Qwen3ForCausalLM(Qwen3Config(**SHAPE, tie_word_embeddings=True)), PROJECTIONS
    policy = policy.to(dtype)
    if kind.endswith(("lora", "dora")):
        options = {"r": 4, "lora_alpha": 8, "target_modules": targets, "use_dora": kind.endswith("dora")} | options
        policy = get_peft_model(policy, LoraConfig(**options, fan_in_fan_out=kind.startswith("gpt2")))
        fill_adapters(policy)
    return policy.train()


def fill_adapters(policy):
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
            if "magnitude" in name:
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


def gradients(policy, ids=IDS):
    policy.zero_grad()
    policy(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


@pytest.fixture(params=SPECS, ids=label)
def spec(request):
    return request.param


# of the CPU kernels, which are meant here
pytestmark = pytest.mark.filterwarnings("ignore:backend='aten_int:UserWarning")


# ---- equal to the sampler


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_learner_and_sampler_are_one_policy(kind, dtype, spec):
    policy = build_policy(kind, dtype)
    plain = logits(policy)
    before = QuantizedShadow(policy, spec)
    attached = attach_same_precision(policy, spec)
    after = QuantizedShadow(policy, spec)
    assert set(attached.layers) == set(before.layers) == set(after.layers)
    learner = logits(policy)
    assert attached.calls == len(attached.layers)
    assert torch.equal(learner, logits(before.module)) and torch.equal(learner, logits(after.module))
    assert not torch.equal(learner, plain)
    assert attached.calls == len(attached.layers)  # neither shadow ran through the learner's layers
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.5)
    gradients(policy)
    optimizer.step()
    before.sync()
    moved = logits(policy)
    assert torch.equal(moved, logits(before.module)) and not torch.equal(moved, learner)


@pytest.mark.parametrize("kind", ["full", "dora", "gpt2"])
def test_in_mixed_precision(kind, spec):
    """Float32 weights are rounded as such, and multiplied as the sampler does in the same autocast."""
    policy = build_policy(kind)
    shadow = QuantizedShadow(policy, spec)
    exact = logits(shadow.module)
    attach_same_precision(policy, spec)
    with torch.autocast("cpu", torch.bfloat16):
        low = logits(policy)
        assert torch.equal(low, logits(shadow.module))
        assert torch.equal(low, logits(QuantizedShadow(policy, spec).module))  # the merge is not in bfloat16
    assert low.dtype == torch.bfloat16 and not torch.equal(low.float(), exact)


def test_biases_and_other_families(spec):
    torch.manual_seed(0)
    policy = LlamaForCausalLM(LlamaConfig(**SHAPE, attention_bias=True))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    attach_same_precision(policy, spec)
    assert torch.equal(logits(policy), logits(QuantizedShadow(policy, spec).module))
    found = gradients(policy)
    rounded = copied_with_rounded_weights(policy, spec)
    expected = gradients(rounded)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_disabled_switched_and_merged_adapters(kind):
    policy = build_policy(kind)
    attach_same_precision(policy, INT4)
    adapted = logits(policy)
    with policy.disable_adapter():  # the reference policy
        base = logits(policy)
        assert torch.equal(base, logits(QuantizedShadow(policy, INT4).module))
    plain = build_policy()
    assert torch.equal(base, logits(QuantizedShadow(plain, INT4).module))
    assert not torch.equal(base, adapted)
    policy.merge_adapter()
    assert torch.equal(logits(policy), logits(QuantizedShadow(policy, INT4).module))
    policy.unmerge_adapter()
    if kind == "lora":
        policy.add_adapter("second", LoraConfig(r=2, target_modules=PROJECTIONS, init_lora_weights=False))
        for name in ("second", ["default", "second"]):
            policy.base_model.set_adapter(name)
            assert torch.equal(logits(policy), logits(QuantizedShadow(policy, INT4).module))
            assert not torch.equal(logits(policy), adapted)


def test_the_shadow_keeps_its_own_layers():
    """Another spec in the shadow than in the learner: its own precision, also where it leaves layers as they are."""
    policy, skipping = build_policy(), RolloutQuantSpec(bits=8, skip=(*SKIP, "down_proj"))
    exact, skipped = logits(policy), logits(QuantizedShadow(policy, skipping).module)
    attached = attach_same_precision(policy, INT4)
    assert torch.equal(logits(QuantizedShadow(policy, RolloutQuantSpec(bits=16)).module), exact)
    assert torch.equal(logits(QuantizedShadow(policy, skipping).module), skipped)
    assert attached.calls == 0 and attached_precision(QuantizedShadow(policy, skipping).module) is None
    assert torch.equal(logits(policy), logits(QuantizedShadow(policy, INT4).module))


# ---- straight-through


def copied_with_rounded_weights(policy, spec):
    """A plain model whose weights are the rounded ones: its gradients at them are the straight-through ones."""
    rounded = copy.deepcopy(policy)
    attached = attached_precision(rounded)
    names = attached.layers
    attached.remove()
    with torch.no_grad():
        for name in names:
            weight = rounded.get_submodule(name).weight
            turned = type(rounded.get_submodule(name)).__name__ == "Conv1D"
            value = rounded_weight(weight.t() if turned else weight, spec)
            weight.copy_(value.t() if turned else value)
    return rounded


class OneLayer(nn.Module):
    """What `QuantizedShadow` asks of a transformers model, around one layer."""

    def __init__(self, layer):
        super().__init__()
        self.config, self.layer = None, layer

    def get_input_embeddings(self):
        return nn.Identity()

    get_output_embeddings = get_input_embeddings

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize("bits", [4, 8])
def test_gradients_are_the_formula(bits):
    """dL/dW = g^T x, dL/dx = g Q(W), dL/db = sum g; a step of SGD moves W by lr times that."""
    torch.manual_seed(0)
    spec = RolloutQuantSpec(bits=bits)
    model = OneLayer(nn.Linear(8, 6, dtype=torch.float64))
    attach_same_precision(model, spec)
    weight, bias = model.layer.weight, model.layer.bias
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    target = torch.randn(2, 5, 6, dtype=torch.float64)
    y = model(x)
    rounded = dequantize(quantize_weight(weight.detach(), spec))
    torch.testing.assert_close(y, x @ rounded.t() + bias, atol=1e-12, rtol=0)
    (y - target).pow(2).sum().backward()
    g = 2 * (y - target).detach()
    slope = torch.einsum("btn,btk->nk", g, x.detach())
    torch.testing.assert_close(weight.grad, slope, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(x.grad, g @ rounded, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(bias.grad, g.sum((0, 1)), atol=1e-12, rtol=1e-12)
    assert not torch.allclose(x.grad, g @ weight.detach(), rtol=1e-3)
    old = weight.detach().clone()
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    torch.testing.assert_close(weight.detach(), old - 0.01 * slope, atol=1e-12, rtol=1e-12)
    assert not torch.equal(rounded_weight(weight.detach(), spec), weight.detach())  # the master weight is not rounded


@pytest.mark.parametrize("kind", ["full", "gpt2"])
def test_a_model_has_the_gradients_of_its_rounded_copy(kind, spec):
    policy = build_policy(kind)
    attach_same_precision(policy, spec)
    expected = gradients(copied_with_rounded_weights(policy, spec))
    found = gradients(policy)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("turned", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_adapters_have_the_gradients_of_the_merged_weight(dora, turned):
    """In float64 equal to autograd through the merge, with the base, the magnitude and two adapters."""
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    layer = Conv1D(6, 8) if turned else nn.Linear(8, 6)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["layer"], use_dora=dora, fan_in_fan_out=turned)
    model = get_peft_model(OneLayer(layer), config)
    if not dora:
        model.add_adapter("second", replace(config, lora_alpha=1))
        model.base_model.set_adapter(["default", "second"])
    model = model.double()
    fill_adapters(model)
    model.requires_grad_(True)
    attach_same_precision(model, INT8)
    adapted = model.get_base_model().layer
    tensors, merge = lora_parts(adapted)
    assert len(tensors) == (4 if dora else 5) and merge.dora == dora and merge.transposed == turned
    x = torch.randn(5, 8, dtype=torch.float64)
    target = torch.randn(5, 6, dtype=torch.float64)
    y = model(x)
    (y - target).pow(2).sum().backward()
    found = [tensor.grad.clone() for tensor in tensors]
    merged = merge(*tensors)
    assert torch.equal(merged.t() if turned else merged, merged_weight(adapted)) and merged.dtype == torch.float64
    torch.testing.assert_close(y, full_linear(x, rounded_weight(merged, INT8), layer.bias), atol=1e-12, rtol=0)
    expected = torch.autograd.grad(merged, tensors, 2 * (y - target).detach().t() @ x)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.abs().max() > 0
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("kind", ["lora", "dora", "gpt2-lora", "gpt2-dora"])
def test_adapters_learn_what_peft_would(kind):
    """At 8 bits close to the gradients of PEFT's own layers in full precision, in direction and in size."""
    policy = build_policy(kind)
    exact = gradients(policy)
    attach_same_precision(policy, INT8)
    found = gradients(policy)
    assert found.keys() == exact.keys() and all("lora_" in name for name in found)
    for name in exact:
        assert (found[name] - exact[name]).norm() < 0.15 * exact[name].norm(), name
        assert not torch.equal(found[name], exact[name])


def test_gradients_in_mixed_precision():
    """As autocast's own linear layer, with the rounded weight in place of the weight: same products, same dtypes."""
    torch.manual_seed(0)
    model = OneLayer(nn.Linear(32, 16))
    attach_same_precision(model, INT8)
    x = torch.randn(10, 32, requires_grad=True)
    leaf = rounded_weight(model.layer.weight.detach(), INT8).requires_grad_()
    other = x.detach().clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y, reference = model(x), full_linear(other, leaf)
    (y.float() * 3).sin().sum().backward()
    reference = reference + model.layer.bias.detach().to(reference.dtype)
    (reference.float() * 3).sin().sum().backward()
    assert y.dtype == torch.bfloat16 and torch.equal(y, reference)
    assert model.layer.weight.grad.dtype == x.grad.dtype == torch.float32
    torch.testing.assert_close(model.layer.weight.grad, leaf.grad)
    torch.testing.assert_close(x.grad, other.grad)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["full", "dora"])
def test_gradient_checkpointing(kind, reentrant):
    policy = build_policy(kind)
    attached = attach_same_precision(policy, INT4)
    policy.enable_input_require_grads()
    expected = gradients(policy)
    calls = attached.calls
    policy.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = gradients(policy)
    assert attached.calls - calls == 2 * calls  # forward, and again in backward
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_no_dequantised_weight_is_kept_for_backward():
    """Saved for backward: inputs and parameters, and nothing else of a weight's size."""
    policy = build_policy()
    attach_same_precision(policy, INT8)
    parameters = {p.data_ptr() for p in policy.parameters()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = policy(input_ids=IDS, labels=IDS).loss
    shapes = {p.shape for name, p in policy.named_parameters() if "proj" in name}
    matrices = [t for t in saved if t.shape in shapes or t.shape[::-1] in shapes]
    assert len(matrices) >= 14 and all(t.data_ptr() in parameters for t in matrices)
    loss.backward()


def test_a_weight_that_moved_before_backward_is_noticed():
    policy = build_policy()
    attach_same_precision(policy, INT8)
    loss = policy(input_ids=IDS, labels=IDS).loss
    with torch.no_grad():
        policy.model.layers[1].mlp.up_proj.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- nothing else changes


@pytest.mark.parametrize("kind", ["full", "dora"])
def test_the_model_is_otherwise_the_same(kind, tmp_path):
    policy = build_policy(kind)
    state = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    parameters, modules = list(policy.parameters()), list(policy.named_modules())
    policy.save_pretrained(tmp_path / "plain")
    attach_same_precision(policy, INT8)
    policy.save_pretrained(tmp_path / "attached")
    assert list(policy.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in policy.state_dict().items())
    assert all(a is b for a, b in zip(policy.parameters(), parameters, strict=True))
    assert list(policy.named_modules()) == modules
    files = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "attached").iterdir())
    for name in files:
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "attached" / name).read_bytes()


@pytest.mark.parametrize("kind", ["full", "dora", "gpt2"])
def test_removed_and_suspended_are_the_plain_model(kind):
    policy = build_policy(kind)
    exact, slopes = logits(policy), gradients(policy)
    attributes = [set(vars(module)) for module in policy.modules()]
    attached = attach_same_precision(policy, INT4)
    with attached.suspended():
        with attached.suspended():
            pass
        assert torch.equal(logits(policy), exact)
        inside = gradients(policy)
    assert attached.calls == 0 and all(torch.equal(inside[name], slopes[name]) for name in slopes)
    assert not torch.equal(logits(policy), exact)
    with pytest.raises(KeyError), attached.suspended():
        raise KeyError("the way out")
    assert not torch.equal(logits(policy), exact)
    attached.remove()
    attached.remove()
    assert attached.layers == () and attached_precision(policy) is None
    assert [set(vars(module)) for module in policy.modules()] == attributes
    assert torch.equal(logits(policy), exact)
    after = gradients(policy)
    assert all(torch.equal(after[name], slopes[name]) for name in slopes)
    attach_same_precision(policy, INT8)
    assert torch.equal(logits(policy), logits(QuantizedShadow(policy, INT8).module))


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_sixteen_bits_are_the_plain_model(kind):
    policy, plain = build_policy(kind), build_policy(kind)
    attached = attach_same_precision(policy, RolloutQuantSpec(bits=16))
    assert attached.layers == () and attached_precision(policy) is None
    assert not any("forward" in vars(module) for module in policy.modules())
    mine, theirs = gradients(policy), gradients(plain)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert torch.equal(logits(policy), logits(plain)) and attached.calls == 0


@pytest.mark.parametrize("kind", ["full", "dora"])
def test_a_deep_copy_works_by_itself(kind):
    policy = build_policy(kind)
    attached = attach_same_precision(policy, INT8)
    with attached.suspended():
        other = copy.deepcopy(policy)
        assert torch.equal(logits(other), logits(QuantizedShadow(policy, INT8).module))  # not suspended with it
    mine = logits(policy)
    calls = attached.calls
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    theirs = logits(other)
    assert attached.calls == calls and torch.equal(logits(policy), mine) and not torch.equal(theirs, mine)
    assert torch.equal(theirs, logits(QuantizedShadow(other, INT8).module))
    handle = attached_precision(other)
    assert set(handle.layers) == set(attached.layers) and handle.calls > 0
    attached.remove()
    assert torch.equal(logits(other), theirs)
    handle.remove()
    assert not torch.equal(logits(other), theirs)


def test_pickling_is_refused():
    policy = build_policy()
    attached = attach_same_precision(policy, INT8)
    with pytest.raises(TypeError, match="call remove"):
        pickle.dumps(policy)
    attached.remove()
    assert torch.equal(logits(pickle.loads(pickle.dumps(policy))), logits(policy))


def test_data_parallel(tmp_path):
    """Gradients reach DistributedDataParallel's hooks; here of one rank, so they must be those without it."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        policy = build_policy("lora")
        attach_same_precision(policy, INT8)
        expected = gradients(policy)
        wrapped = nn.parallel.DistributedDataParallel(policy)
        found = gradients(wrapped)
    finally:
        torch.distributed.destroy_process_group()
    assert len(found) == len(expected) == 12
    assert all(torch.equal(found[f"module.{name}"], expected[name]) for name in expected)


# ---- refused


def test_attaching_twice_is_refused():
    policy = build_policy("lora")
    attach_same_precision(policy, INT8)
    with pytest.raises(ValueError, match="already: call remove"):
        attach_same_precision(policy, INT4)


def test_dropout_in_an_adapter_is_refused():
    policy = build_policy("lora", lora_dropout=0.1)
    with pytest.raises(ValueError, match=r"q_proj: adapter 'default' has lora_dropout=0\.1, .*model\.lora\.dropout"):
        attach_same_precision(policy, INT8)
    assert attached_precision(policy) is None
    later = build_policy("lora")
    attach_same_precision(later, INT8)
    config = LoraConfig(r=2, target_modules=PROJECTIONS, lora_dropout=0.2, init_lora_weights=False)
    later.add_adapter("second", config)
    logits(later)
    later.set_adapter("second")
    with pytest.raises(ValueError, match=r"lora_dropout=0\.2"):
        logits(later)
    assert torch.equal(logits(later.eval()), logits(QuantizedShadow(later, INT8).module))


def test_layers_are_checked_before_any_is_changed():
    policy = build_policy()
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj: group_size=24 does not divide"):
        attach_same_precision(policy, RolloutQuantSpec(bits=8, group_size=24))
    with pytest.raises(ValueError, match="leaves no linear layer"):
        attach_same_precision(policy, RolloutQuantSpec(skip=("*",)))
    with pytest.raises(ValueError, match=r"backend='fp8_scaled_mm' needs a GPU .* set backend='fp8'"):
        attach_same_precision(policy, RolloutQuantSpec(backend="fp8_scaled_mm"))
    with pytest.raises(ValueError, match="unwrap it first"):
        attach_same_precision(nn.Sequential(policy), INT8)
    assert attached_precision(policy) is None and not any("forward" in vars(m) for m in policy.modules())
    with torch.no_grad():
        policy.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    attach_same_precision(policy, INT8)
    with pytest.raises(ValueError, match="not finite"):
        logits(policy)


def test_adapters_around_an_attached_policy_are_noticed():
    policy = build_policy()
    attached = attach_same_precision(policy, INT8)
    adapted = get_peft_model(policy, LoraConfig(r=4, target_modules=PROJECTIONS))
    with pytest.raises(ValueError, match="was adapted after the policy was attached"):
        QuantizedShadow(adapted, INT8)
    attached.remove()
    attach_same_precision(adapted, INT8)
    assert torch.equal(logits(adapted), logits(QuantizedShadow(adapted, INT8).module))


def test_slow_kernels_are_named():
    with pytest.warns(UserWarning, match="backend='aten_int8' in the learner"):
        attach_same_precision(build_policy(), RolloutQuantSpec(backend="aten_int8"))


def test_one_adapter_serves_a_batch():
    policy = build_policy("lora").eval()
    attach_same_precision(policy, INT8)
    with pytest.raises(ValueError, match="one adapter serves a whole batch"):
        policy(input_ids=IDS, adapter_names=["default", "__base__"])


# ---- codes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounded_weight_is_the_dequantised_one(dtype, spec):
    torch.manual_seed(0)
    weight = torch.randn(32, 64).to(dtype)
    weight[0] = 0
    expected, found = dequantize(quantize_weight(weight, spec)), rounded_weight(weight, spec)
    assert found.dtype == dtype and torch.equal(found, expected)
    assert torch.equal(found.signbit(), expected.signbit())  # of zeros too
    assert torch.equal(rounded_weight(weight.float(), spec, dtype), expected)
    assert rounded_input(weight, spec) is weight


def test_rounded_inputs(monkeypatch):
    """fp8_scaled_mm: its kernel stands in by the product of what it multiplies, since it needs a GPU."""
    spec = RolloutQuantSpec(backend="fp8_scaled_mm")
    backend = codes.BACKENDS["fp8_scaled_mm"]
    monkeypatch.setattr(type(backend), "check", lambda *_: None)
    monkeypatch.setattr(
        type(backend), "multiply", lambda self, x, s: full_linear(rounded_input(x, spec).to(x.dtype), self.decode(s))
    )
    torch.manual_seed(0)
    x = torch.randn(7, 32, requires_grad=True)
    rounded = rounded_input(x.detach(), spec)
    assert 0.005 < (rounded - x.detach()).norm() / x.detach().norm() < 0.05
    assert torch.equal(rounded_input(rounded, spec), rounded)
    model = OneLayer(nn.Linear(32, 16, bias=False))
    attach_same_precision(model, spec)
    y = model(x)
    g = torch.randn(7, 16)
    y.backward(g)
    weight = rounded_weight(model.layer.weight.detach(), spec)
    torch.testing.assert_close(y, rounded @ weight.t())
    torch.testing.assert_close(model.layer.weight.grad, g.t() @ rounded)
    torch.testing.assert_close(x.grad, g @ weight)


# ---- the cure


@pytest.mark.parametrize("bits", [4, 8])
def test_the_cure_leaves_nothing_to_correct(bits):
    """Three tokens: E_q[w f] = E_p[f]; w = 1 with the learner in the sampler's precision, and not without."""
    torch.manual_seed(4)
    model = OneLayer(nn.Linear(8, 3, dtype=torch.float64))
    x, f = torch.randn(8, dtype=torch.float64), torch.tensor([1.0, -2.0, 5.0], dtype=torch.float64)
    spec, correction = RolloutQuantSpec(bits=bits), CorrectionConfig(mode="truncate", clip_max=None)
    sampler = QuantizedShadow(model, spec).module

    def weights_and_means():
        with torch.no_grad():
            log_p, log_q = model(x).log_softmax(-1), sampler(x).log_softmax(-1)
        weight = rollout_weights(log_p[:, None], log_q[:, None], torch.ones(3, 1), correction).weight[:, 0]
        return weight, (log_q.exp() * weight * f).sum(), (log_p.exp() * f).sum()

    weight, corrected, truth = weights_and_means()
    assert (weight - 1).abs().max() > 1e-4
    assert corrected.item() == pytest.approx(truth.item(), abs=1e-12)
    attach_same_precision(model, spec)
    weight, corrected, truth = weights_and_means()
    assert torch.equal(weight, torch.ones_like(weight)) and torch.equal(corrected, truth)
