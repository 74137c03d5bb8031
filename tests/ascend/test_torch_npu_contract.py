"""What the backend asks of the vendor, held to the vendor's own wheel: schemas and shape rules, on meta tensors.

It proves names, kinds and dtypes of arguments and the shapes that come back, not numbers: nothing here runs on an NPU."""

import ast
import inspect

import pytest
import torch

from dsv3.plugin import LatentCache, Prepared
from dsv3_ascend import backend, cpu, experts, layouts, npu, pointwise, products, routing
from tests.ascend import contract
from tests.support import torch_npu_rules as rules
from tests.support import torch_npu_wheel

OPERATORS = sorted({call.func.attr for call in contract.vendor_calls(contract.sources()["npu.py"])})
KEYWORDS = [
    (function.name, call.func.attr, keyword.arg)
    for function in ast.parse(contract.sources()["npu.py"]).body
    if isinstance(function, ast.FunctionDef)
    for call in contract.vendor_calls(ast.unparse(function))
    for keyword in call.keywords
]


@pytest.fixture(scope="module")
def vendor(tmp_path_factory):
    try:
        wheel = torch_npu_wheel.download(tmp_path_factory.mktemp("torch_npu"))
    except (RuntimeError, OSError, torch_npu_wheel.subprocess.TimeoutExpired) as error:
        pytest.skip(f"the vendor's wheel torch-npu {torch_npu_wheel.VERSION} cannot be downloaded: {error}")
    return _vendor(wheel)


_MADE = {}


def _vendor(wheel):
    """Once a process: torch keeps what is defined."""
    if "vendor" not in _MADE:
        made = torch_npu_wheel.Vendor(wheel)
        for name, function in rules.OUTPUTS.items():
            assert name not in made.with_rule, f"the wheel has a shape rule for {name} now: leave ours out"
            made.rule(name, function)
        _MADE["vendor"] = made
    return _MADE["vendor"]


def test_every_vendor_call_is_in_one_module_and_held_to_the_wheel(vendor, capsys):
    stray = [name for name, text in contract.sources().items() if "torch.ops" in text and name != "npu.py"]
    others = [name for name, text in contract.sources().items() if "torch_npu.npu_" in text]
    assert not stray and not others, f"vendor calls outside npu.py: {stray} {others}"
    seen = set()
    for function in contract.functions(npu):
        seen |= set(contract.hold(function))
    assert sorted(seen) == OPERATORS, f"never called here: {sorted(set(OPERATORS) - seen)}"
    assert set(OPERATORS) == set(rules.RULES)
    with capsys.disabled():
        print(f"\ntorch_npu {vendor.version}, {len(vendor.schemas)} schemas; checked {len(OPERATORS)} operators:")
        for name in OPERATORS:
            print(f"  {name:36} {'its own shape rule' if name in vendor.with_rule else 'shape rule of ours'}, and its page")


def test_the_two_layers_have_the_same_functions():
    ours, theirs = contract.functions(cpu), contract.functions(npu)
    assert set(theirs) == set(contract.CALLS) == set(ours) - {"int4_unpack"}
    for name in theirs:
        assert inspect.signature(ours[name]) == inspect.signature(theirs[name])


@pytest.mark.parametrize("function, operator, keyword", KEYWORDS, ids=lambda word: word)
def test_a_misspelt_argument_is_found(vendor, function, operator, keyword):
    def misspell(tree):
        (body,) = (f for f in tree.body if getattr(f, "name", "") == function)
        for call in (c for c in ast.walk(body) if isinstance(c, ast.Call)):
            for k in call.keywords if ast.unparse(call.func) == f"torch.ops.npu.{operator}" else ():
                k.arg = keyword + "s" if k.arg == keyword else k.arg

    with pytest.raises((TypeError, RuntimeError), match=keyword + "s"):
        contract.hold(function, contract.mutated(misspell))


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_misspelt_operator_is_found(vendor, operator):
    def misspell(tree):
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr == operator:
                node.attr = operator + "_x"

    layer = contract.mutated(misspell)
    with pytest.raises(AttributeError, match=operator + "_x"):
        for function in contract.CALLS:
            contract.hold(function, layer)


def _replace(old, new):
    def change(tree):
        text = ast.unparse(tree)
        assert text.count(old), old
        tree.body = ast.parse(text.replace(old, new)).body

    return change


@pytest.mark.parametrize(
    "function, old, new",
    [
        ("quant_matmul", "pertoken_scale=token_scale", "pertoken_scale=scale"),
        ("quant_matmul", "(q, weight, scale,", "(q, scale, weight,"),
        ("quant_matmul", "output_dtype=torch.bfloat16", "output_dtype=torch.float16"),
        ("dynamic_quant", "dst_type=torch.int8", "dst_type=torch.float16"),
        ("grouped_int8_matmul", "output_dtype=torch.int32", "output_dtype=torch.bfloat16"),
        ("grouped_matmul", "group_type=0", "group_type=1"),
        ("grouped_matmul", "group_list=ends", "group_list=ends.to(torch.int32)"),
        ("grouped_weight_quant_matmul", "weight.shape[2], dtype", "weight.shape[1], dtype"),
        ("dequant_swiglu_quant", "group_index=counts", "group_index=token_scale"),
        ("gating_top_k", "bias=bias", "bias=None if bias is None else bias[None]"),
        ("gating_top_k", "k_group=topk_group, group_count=n_group", "k_group=n_group, group_count=topk_group"),
        ("init_routing", "active_expert_range=[0, n_experts]", "active_expert_range=[n_experts, 0]"),
        ("init_routing", "expert_tokens_num_type=1", "expert_tokens_num_type=2"),
        ("transpose_batchmatmul", "perm_x1=[1, 0, 2]", "perm_x1=[2, 0, 1]"),
        ("latent_attention", "input_layout='TND'", "input_layout='BSND'"),
        ("latent_attention", "actual_seq_qlen=ends", "actual_seq_qlen=lengths"),
        ("latent_attention", "key_rope=kpe", "key_rope=ckv"),
        ("packed_attention", "return_softmax_lse=True", "return_softmax_lse=False"),
        ("rotary_mul", "'interleave'", "'interleaved'"),
    ],
)
def test_a_wrong_argument_is_found(vendor, function, old, new):
    with pytest.raises((TypeError, RuntimeError, AssertionError)):
        contract.hold(function, contract.mutated(_replace(old, new)))


# -- the kernels themselves, with weights as `prepare` makes them for an NPU


def _weight(quant, *shape):
    codes, scale = torch.zeros(*shape, dtype=torch.int8), torch.zeros(*shape[:-1], 1)
    if quant == "int4-w4a16":
        codes, scale = torch.zeros(*shape[:-1], shape[-1] // 2, dtype=torch.uint8), torch.zeros(*shape[:-1], shape[-1] // 128)
    tensors = {"weight": torch.zeros(*shape, dtype=torch.bfloat16)} if quant == "none" else {"weight": codes, "scale": scale}
    return Prepared("canonical", quant, shape, contract.to_meta(tensors))


def _zeros(*shape, dtype=torch.bfloat16):
    return torch.zeros(*shape, dtype=dtype, device="meta")


def _kernels(to_nz=layouts.to_nz):
    """Every kernel that calls the vendor and reads nothing on the host, on meta tensors, as it would be called on an NPU."""
    x, rows, ids = _zeros(6, 256), _zeros(9, 256), _zeros(6, 3, dtype=torch.int32)
    weights, offsets = _zeros(6, 3, dtype=torch.float32), _zeros(5, dtype=torch.int32)
    yield "rms_norm", pointwise.rms_norm(x=x, weight=x[0], eps=1e-6)
    yield "silu_mul", pointwise.silu_mul(x=x)
    yield "add_rms_norm", pointwise.add_rms_norm(x=x.float(), residual=x.float(), weight=x[0], eps=1e-6)
    heads, table = x.view(6, 4, 64), _zeros(32, 64, dtype=torch.float32)
    yield "apply_rope", pointwise.apply_rope(x=heads, positions=ids[:, 0], cos_sin=table, interleaved=True)
    yield "quant_int8", pointwise.quant_int8(x=x, amax_floor=1e-10)
    yield "grouped_topk", routing.grouped_topk(logits=x.float(), bias=None, n_group=8, topk_group=4, topk=8)
    yield "bmm", products.transposing_bmm(x=x.view(6, 2, 128), weight=_zeros(2, 128, 512))
    a, b = _zeros(6, 256, dtype=torch.int8), _zeros(72, 256, dtype=torch.int8)
    s, t = (_zeros(n, 1, dtype=torch.float32) for n in (6, 72))
    yield "int8_scaled_mm", products.int8_scaled_mm(a=a, a_scale=s, b=b, b_scale=t, out_dtype="bfloat16")
    yield "quant_linear w8a8", products.quant_linear_w8a8(x=x, w=to_nz(_weight("int8-w8a8", 72, 256), False))
    yield "quant_linear w8a16", products.quant_linear_w8a16(x=x, w=_weight("int8-w8a16", 72, 256))
    yield "quant_linear w4a16", products.quant_linear_w4a16(x=x, w=layouts.to_int4(_weight("int4-w4a16", 72, 256), False))
    for quant in ("none", "int8-w8a16", "int8-w8a8"):
        w, w13, w2 = (_weight(quant, *shape) for shape in ((4, 72, 256), (4, 128, 256), (4, 256, 64)))
        if quant == "int8-w8a8":
            w, w13, w2 = (to_nz(one, False) for one in (w, w13, w2))
        yield f"grouped_linear {quant}", experts.grouped_linear(x=rows, w=w, offsets=offsets)
        fused = experts.fused_experts_w8a8 if quant == "int8-w8a8" else experts.fused_experts
        yield f"fused_experts {quant}", fused(x=x, weights=weights, ids=ids, w13=w13, w2=w2)


def test_kernels_run_through_the_vendors_rules(vendor):
    with contract.Watch() as watch:
        made = {name: contract.outline(found) for name, found in _kernels()}
    for scheme in ("w8a8", "w8a16", "w4a16"):
        assert made[f"quant_linear {scheme}"] == [((6, 72), "torch.bfloat16")]
    assert made["fused_experts int8-w8a8"] == made["fused_experts none"] == [((6, 256), "torch.bfloat16")]
    assert made["grouped_linear int8-w8a8"] == [((9, 72), "torch.bfloat16")]
    left = set(OPERATORS) - set(watch.seen)
    assert left == {"npu_fused_infer_attention_score_v2"}, "its kernels read lengths on the host: their calls are above"


def test_a_weight_that_was_not_transposed_is_found(vendor, monkeypatch):
    source = inspect.getsource(layouts).replace('to_nz(tensors["weight"].transpose(-1, -2)', 'to_nz(tensors["weight"]')
    assert source != inspect.getsource(layouts)
    changed = {"__name__": "layouts"}
    exec(compile(source, "layouts.py", "exec"), changed)
    found = []
    run = _kernels(changed["to_nz"])
    with contract.Watch(), pytest.raises((RuntimeError, AssertionError)):
        for name, _ in run:
            found.append(name)
    assert found[-1] == "int8_scaled_mm", f"the first weight of the kind is that of quant_linear; got as far as {found[-1]}"


@pytest.mark.parametrize("kernel", ["grouped_linear", "fused_experts"])
def test_expert_weights_that_were_not_transposed_are_found(vendor, kernel):
    w, w13, w2 = (_weight("int8-w8a8", *shape) for shape in ((4, 72, 256), (4, 128, 256), (4, 256, 64)))
    scales = [one.tensors["scale"].squeeze(-1) for one in (w, w13, w2)]
    flat = [
        Prepared("nz", one.quant, one.shape, {**one.tensors, "scale": s}) for one, s in zip((w, w13, w2), scales, strict=True)
    ]
    x, ids = _zeros(6, 256), _zeros(6, 3, dtype=torch.int32)
    with contract.Watch(), pytest.raises(AssertionError, match="not \\[E, K, N\\]"):
        if kernel == "grouped_linear":
            experts.grouped_linear(x=x, w=flat[0], offsets=_zeros(5, dtype=torch.int32))
        else:
            experts.fused_experts_w8a8(x=x, weights=_zeros(6, 3, dtype=torch.float32), ids=ids, w13=flat[1], w2=flat[2])


def test_attention_kernels_call_what_was_checked(monkeypatch):
    """mla_decode and mla_prefill with real lengths: these are the arguments that reach the vendor's functions."""
    from dsv3_ascend import attention

    seen = []

    def recorded(name):
        def call(*arguments):
            seen.append((name, arguments))
            return getattr(cpu, name)(*arguments)

        return call

    layer = type("Layer", (), {name: staticmethod(recorded(name)) for name in ("latent_attention", "packed_attention")})
    monkeypatch.setattr(attention.vendor, "of", lambda x: layer)
    cache = LatentCache(contract._real(4, 128, 512), contract._real(4, 128, 64))
    table = torch.tensor([[2, 0], [1, -7]], dtype=torch.int32)
    q, rope = contract._real(5, 8, 512), contract._real(5, 8, 64)
    lengths, cu = torch.tensor([140, 7]), torch.tensor([0, 3, 4])
    attention.mla_decode(
        q_c=q, q_pe=rope, cache=cache, block_table=table, seq_lens=lengths, cu_q=cu, max_q=3, max_k=140, scale=0.1, start=0
    )
    (q_seen, _, _, _, table_seen, ends, kv, _) = seen[0][1]
    assert (ends, kv) == ([3, 4], [140, 7]) and q_seen.shape[0] == 4 and table_seen.tolist() == [[2, 0], [1, 0]]
    packed = contract._real(12, 4, 192)
    attention.mla_prefill(
        q=packed[:9], k=packed, v=contract._real(12, 4, 128), cu_q=torch.tensor([0, 5, 9]), cu_k=torch.tensor([0, 5, 12]),
        max_q=5, max_k=7, scale=0.1, causal=True,
    )  # fmt: skip
    assert seen[1][1][3:5] == ([5, 9], [5, 12])
    assert backend.cache_spec(backend.devices("default")[0], "bfloat16").page_size == 128
