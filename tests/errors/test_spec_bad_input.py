"""SPEC section 6, sentence by sentence, for every public function with every argument it takes.

Each call below is valid; each test spoils one argument at a time and looks at what is said.
"""

import inspect
import warnings

import pytest
import torch
from support import assert_close, tune

import mapo_kernels as mk

V, H, B, T = 7, 5, 4, 3
CU = [0, 2, 3, 6, 9]


def floats(*shape):
    return torch.linspace(-2, -0.5, torch.Size(shape).numel()).reshape(shape)


def batch(shape, prefix):
    """Every tensor that a loss of tokens [shape] takes, but for what they come from."""
    tensors = {
        name: floats(*shape)
        for name in ("old_logprobs", "ref_logprobs", "rollout_logprobs", "token_weights")
    }
    tensors |= {"mask": torch.ones(shape), "normalizer": torch.tensor(5.0), **prefix}
    if len(shape) == 1:
        tensors["cu_seqlens"] = torch.tensor(CU)
    return tensors


GIVEN = {"advantages": torch.tensor([1.0, -0.5, 0.5, 2.0])}
GROUPED = {
    "rewards": torch.tensor([1.0, 0, 0, 1]),
    "success": torch.tensor([True, False, True, False]),
}
BY_ID = {**GROUPED, "group_ids": torch.tensor([3, 7, 3, 7])}
SPEC = mk.LossSpec(beta=0.1, rollout_cap=2.0, entropy_coef=0.0)
HEAD = {"lm_head_weight": floats(V, H), "bias": floats(V)}


def calls():
    """By name: a function and arguments that it takes."""
    found = {
        "group_advantages, size": (mk.group_advantages, {**GROUPED, "group_size": 2}),
        "group_advantages, ids": (mk.group_advantages, {**BY_ID}),
    }
    for layout, shape in (("padded", (B, T)), ("packed", (9,))):
        ids = (torch.arange(torch.Size(shape).numel()) % V).reshape(shape)
        leads = {
            mk.mapo_loss: {"logprobs": floats(*shape)},
            mk.mapo_loss_from_logits: {"logits": floats(*shape, V), "token_ids": ids},
            mk.mapo_loss_from_hidden: {"hidden": floats(*shape, H), "token_ids": ids, **HEAD},
        }
        temperature = {"temperature": torch.ones(B)}
        sources = {"advantages": GIVEN, "size": {**GROUPED, "group_size": 2}, "ids": BY_ID}
        for function, lead in leads.items():
            extra = {} if function is mk.mapo_loss else temperature
            for source, tensors in sources.items():
                if source == "size" and function is not mk.mapo_loss:
                    continue
                arguments = {**lead, **batch(shape, tensors), **extra, "spec": SPEC}
                found[f"{function.__name__}, {layout}, {source}"] = (function, arguments)
        plan = {
            k: v for k, v in batch(shape, BY_ID).items() if not k.endswith(("probs", "weights"))
        }
        found[f"make_plan, {layout}, ids"] = (mk.make_plan, {**plan, "spec": SPEC})
        plan = {k: plan[k] for k in plan if k not in BY_ID}
        found[f"make_plan, {layout}, advantages"] = (mk.make_plan, {**plan, **GIVEN})
        per_row = {"temperature": torch.ones(shape[0]), "mask": torch.ones(shape)}
        for function, lead in (
            (mk.token_logprobs, leads[mk.mapo_loss_from_logits]),
            (mk.token_logprobs_from_hidden, leads[mk.mapo_loss_from_hidden]),
        ):
            found[f"{function.__name__}, {layout}"] = (function, {**lead, **per_row})
    return found


CALLS = calls()
LEADS = ("logprobs", "logits", "hidden")


def on(device, arguments):
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


def message_of(error, function, arguments):
    with pytest.raises(error) as caught:
        function(**arguments)
    return str(caught.value)


def check_message(message, name):
    """The argument, what was expected, what came."""
    assert message.startswith(f"{name}: expected "), message
    assert ", got " in message, message


def tensors_of(arguments):
    return [name for name, value in arguments.items() if isinstance(value, torch.Tensor)]


def numbers_of(out):
    """The tensors of a result."""
    if isinstance(out, torch.Tensor):
        return [out]
    if isinstance(out, mk.Plan):
        return [out.advantages, out.normalizer, out.live]
    return [out.loss, out.advantages]


@pytest.mark.parametrize("name", CALLS)
def test_wrong_types(name, device, nothing_computes):
    function, arguments = CALLS[name]
    arguments = on(device, arguments)
    for argument in arguments:
        for wrong in ("x", [0.5], {}, object()):
            check_message(message_of(TypeError, function, {**arguments, argument: wrong}), argument)


# What numbers, flags, specs and groups refuse besides.
TYPES = {
    "plan": ("x", 1),
    "spec": ("clip", mk.AdvantageSpec(), None),
    "advantage_spec": ("mapo", mk.LossSpec(), None),
    "process_group": ("x", 1),
    "vocab_group": ("x", 1),
    "temperature": ("x", True, None, 1j),
    "inplace": (1, None, "x"),
    "return_entropy": (1, None, "x"),
    "return_stats": (1, None, "x"),
    "softcap": ("x", True, torch.ones(())),
    "logit_scale": ("x", True, None),
    "chunk_rows": ("x", True, 2.0),
    "group_size": (2.0, True, "2", torch.tensor(2)),
    "normalizer": ("x", True, 1j),
    "estimator": (1, None),
    "certainty": (None, True),
    "success_threshold": ("1", None, True),
    "std_correction": ("1", None, True),
    "eps": ("x", None, True),
    "apd": (1, None),
    "max_abs": ("x", True),
}


@pytest.mark.parametrize("name", CALLS)
def test_wrong_types_of_other_arguments(name, device, nothing_computes):
    function, arguments = CALLS[name]
    arguments = on(device, arguments)
    for argument in inspect.signature(function).parameters:
        for wrong in TYPES.get(argument, ()):
            if argument == "group_size" and argument not in arguments:
                continue
            message = message_of((TypeError, ValueError), function, {**arguments, argument: wrong})
            check_message(message, argument)


@pytest.mark.parametrize("name", CALLS)
def test_shape_mismatches(name, device, nothing_computes):
    function, arguments = CALLS[name]
    arguments = on(device, arguments)
    for argument in tensors_of(arguments):
        x = arguments[argument]
        wrong = [x[None].contiguous(), x.new_ones(()), x.new_ones((2, 2, 2, 2)), x.new_ones(0)]
        if x.dim():
            wrong.append(x[:-1])
            wrong.append(torch.cat([x, x[:1]]))
        if argument == "normalizer":
            wrong = [x.new_ones(2), x.new_ones(0), x.new_ones((2, 2))]
        if function is mk.make_plan and argument == "mask" and "cu_seqlens" in arguments:
            # How many tokens it should have is known to the device alone.
            wrong = [other for other in wrong if other.dim() != 1]
        for other in wrong:
            message = message_of(ValueError, function, {**arguments, argument: other})
            named = message.split(":")[0]
            # Of two that do not fit each other, one is named.
            reference = argument in (*LEADS, "token_ids", "cu_seqlens", "mask", "lm_head_weight")
            check_message(message, named if reference or argument == "rewards" else argument)
            assert named in arguments


@pytest.mark.parametrize("name", CALLS)
def test_tensors_on_different_devices(name, device, nothing_computes):
    function, arguments = CALLS[name]
    arguments = on(device, arguments)
    if len(tensors_of(arguments)) < 2:
        return
    for argument in tensors_of(arguments):
        other = {**arguments, argument: arguments[argument].to("meta")}
        message = message_of(ValueError, function, other)
        named = message.split(":")[0]
        leads = argument in (*LEADS, "mask", "cu_seqlens", "rewards")
        check_message(message, named if leads else argument)
        assert "expected a tensor on" in message and "got one on" in message
        assert named in arguments


@pytest.mark.parametrize("name", CALLS)
def test_constants_that_require_grad(name, device, nothing_computes):
    function, arguments = CALLS[name]
    arguments = on(device, arguments)
    free = (*LEADS, "mask", "lm_head_weight", "bias")
    for argument in tensors_of(arguments):
        x = arguments[argument]
        if argument in free or not x.is_floating_point():
            continue
        leaf = x.clone().requires_grad_()
        message = message_of(ValueError, function, {**arguments, argument: leaf})
        check_message(message, argument)
        assert "requires_grad=True" in message


WITH_GROUPS = [name for name in CALLS if name.endswith(("size", "ids"))]


@pytest.mark.parametrize("name", WITH_GROUPS)
def test_groups(name, device, nothing_computes):
    function, arguments = CALLS[name]
    arguments = on(device, arguments)
    free = {k: v for k, v in arguments.items() if k not in ("group_size", "group_ids")}
    both = {"group_size": 2, "group_ids": torch.tensor(BY_ID["group_ids"].tolist()).to(device)}
    check_message(message_of(ValueError, function, free), "group_size, group_ids")
    check_message(message_of(ValueError, function, {**free, **both}), "group_size, group_ids")
    for size in (3, 8, 0, -2):
        message = message_of(ValueError, function, {**free, "group_size": size})
        check_message(message, "group_size")
        assert message.endswith(f"got {size}")
    if function is mk.group_advantages:
        return
    message = message_of(ValueError, function, {**arguments, **on(device, GIVEN)})
    check_message(message, "rewards, advantages")
    assert message.endswith("got both")
    neither = {k: v for k, v in arguments.items() if k not in BY_ID and k != "group_size"}
    message = message_of(ValueError, function, neither)
    check_message(message, "rewards, advantages")
    assert message.endswith("got neither")


@pytest.mark.parametrize("name", CALLS)
def test_no_sequence(name, device):
    function, arguments = CALLS[name]
    empty = {}
    for k, v in on(device, arguments).items():
        keeps = not isinstance(v, torch.Tensor) or k in ("lm_head_weight", "bias", "normalizer")
        empty[k] = v if keeps else v[:1] if k == "cu_seqlens" else v[:0]
    if function in (mk.token_logprobs, mk.token_logprobs_from_hidden):
        # Scoring is no loss: of nothing there are no log-probs.
        assert function(**empty).shape == empty["token_ids"].shape
        return
    message = message_of(ValueError, function, empty)
    assert "B >= 1" in message and ("got an empty batch" in message or "got [1]" in message)


@pytest.mark.parametrize("name", CALLS)
def test_no_token(name, device):
    function, arguments = CALLS[name]
    if function is mk.group_advantages:
        pytest.skip("has no tokens")
    empty = {}
    for k, v in on(device, arguments).items():
        empty[k] = v
        if isinstance(v, torch.Tensor) and v.dim() and v.shape[0] == 9:
            empty[k] = v[:0]
        elif isinstance(v, torch.Tensor) and v.dim() > 1 and v.shape[:2] == (B, T):
            empty[k] = v[:, :0]
        elif k == "cu_seqlens":
            empty[k] = torch.zeros_like(v)
    lead = next(iter(empty))
    if lead in LEADS:
        empty[lead] = empty[lead].detach().requires_grad_()
    out = function(**empty)
    if isinstance(out, mk.Plan):
        assert out.live_rows.numel() == 0
    elif isinstance(out, torch.Tensor):
        assert out.shape == empty["token_ids"].shape
    else:
        assert out.loss == 0
        (grad,) = torch.autograd.grad(out.loss, empty[lead])
        assert grad.shape == empty[lead].shape and not grad.count_nonzero()


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("aggregation", mk.spec.AGGREGATIONS)
def test_no_token_in_any_aggregation(aggregation, layout, device):
    spec = mk.LossSpec(aggregation=aggregation, max_tokens=3)
    bounds = None if layout == "padded" else torch.zeros(B + 1, dtype=torch.int64, device=device)
    logp = torch.zeros((B, 0) if bounds is None else 0, device=device).requires_grad_()
    given = {"rewards": GROUPED["rewards"].to(device), "group_size": 2, "cu_seqlens": bounds}
    loss = mk.mapo_loss(logp, spec=spec, **given).loss
    loss.backward()
    assert loss == 0 and logp.grad.shape == logp.shape


SETTINGS = [
    (mk.LossSpec, "eps_low", (0, 0.0, 1, 1.0, -0.1, 2, float("nan"), float("inf"))),
    (mk.LossSpec, "dual_clip", (1.2, 1.0, 0, -3.0, float("nan"), float("inf"))),
    (mk.LossSpec, "eps_high", (0, -0.1, float("nan"), float("inf"))),
    (mk.LossSpec, "max_tokens", (0, -1)),
    (mk.LossSpec, "trust_region", ("", "TV", "clip")),
    (mk.LossSpec, "trust_low", (0, -0.1, float("nan"), float("inf"))),
    (mk.LossSpec, "trust_high", (0, -0.1, float("nan"), float("inf"))),
    (mk.AdvantageSpec, "eps", (0, -1e-6, float("nan"), float("inf"))),
    (mk.AdvantageSpec, "max_abs", (0, -1.0, float("nan"), float("inf"))),
    (mk.AdvantageSpec, "difficulty_exponent", (float("nan"), float("inf"), 10**400)),
    (mk.AdvantageSpec, "difficulty", ("hard",)),
    (mk.AdvantageSpec, "certainty", (-0.1, 1.1, "cubic", float("nan"))),
]


@pytest.mark.parametrize(("spec", "name", "values"), SETTINGS)
def test_settings_out_of_range(spec, name, values):
    for value in values:
        message = message_of(ValueError, spec, {name: value})
        check_message(message, name)
        assert message.endswith(f"got {value!r}")
    assert mk.LossSpec(eps_high=0.5, dual_clip=1.6).dual_clip == 1.6
    check_message(
        message_of(ValueError, mk.LossSpec, {"eps_high": 0.5, "dual_clip": 1.5}), "dual_clip"
    )


@pytest.mark.parametrize("name", [x for x in CALLS if "logits" in CALLS[x][1]])
def test_integer_logits(name, device, nothing_computes):
    function, arguments = CALLS[name]
    for dtype in (torch.int64, torch.int8, torch.bool):
        spoilt = {**on(device, arguments), "logits": arguments["logits"].to(device, dtype)}
        message = message_of(TypeError, function, spoilt)
        check_message(message, "logits")
        assert message.endswith(f"got {dtype}")


def strided(x):
    """The same values, none adjacent to the next in memory."""
    if x.dim() == 0:
        return x
    wide = torch.empty((*x.shape, 2), dtype=x.dtype, device=x.device)
    wide.view(torch.uint8).fill_(255)
    wide[..., 0] = x
    return wide[..., 0]


@pytest.mark.parametrize("name", CALLS)
def test_tensors_that_are_not_contiguous(name, device):
    function, arguments = CALLS[name]
    arguments = on(device, arguments)
    lead = next(iter(arguments))

    def results(given):
        given = dict(given)
        if lead in LEADS:
            given[lead] = given[lead].detach().requires_grad_()
        out = function(**given)
        found = numbers_of(out)
        if isinstance(out, mk.LossOutput):
            found += torch.autograd.grad(out.loss, given[lead])
        return found

    expected = results(arguments)
    assert all([x.isfinite().all() for x in expected])
    weight = {k: strided(v) for k, v in arguments.items() if k == "lm_head_weight"}
    others = {k: strided(arguments[k]) for k in tensors_of(arguments) if k != "lm_head_weight"}
    with warnings.catch_warnings():
        # Not of numpy, in the interpreter of an older Triton.
        warnings.simplefilter("error", UserWarning)
        found = results({**arguments, **others})
    for a, e in zip(found, expected, strict=True):
        assert torch.equal(a, e)
    if weight:
        # A matrix library takes another way through a transposed weight.
        for a, e in zip(results({**arguments, **weight}), expected, strict=True):
            assert_close(a, e, 1e-6)


def test_a_large_copy_is_stated(device, monkeypatch):

    function, arguments = CALLS["mapo_loss_from_logits, padded, advantages"]
    arguments = on(device, arguments)
    arguments["logits"] = strided(arguments["logits"])
    tune(monkeypatch, "LOGITS", large_copy=4 * B * T * V)
    copies = mk.resolve_backend(device.type) == "triton"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function(**arguments)
    said = [str(x.message) for x in caught if str(x.message).startswith("logits: expected adj")]
    assert len(said) == copies
    if copies:
        assert said[0].endswith(f"got stride 2: every launch copies {4 * B * T * V} bytes")


# Where advantages come from makes no difference to them.
FROM_IDS = [name for name, (_, arguments) in CALLS.items() if "token_ids" in arguments]
FROM_IDS = [name for name in FROM_IDS if not name.endswith(("size", "ids"))]


@pytest.mark.parametrize("name", FROM_IDS)
def test_token_ids_outside_the_vocabulary(name, device, monkeypatch):
    function, arguments = CALLS[name]
    arguments = on(device, arguments)
    masked = arguments["mask"].clone()
    masked.view(-1)[2:6] = 0
    expected = numbers_of(function(**{**arguments, "mask": masked}))
    wrong = (V, -1, 2**40, -(2**63))
    # The interpreter takes its time: all of them at once.
    eager = mk.resolve_backend(device.type) == "eager"
    for tokens in zip(wrong) if eager else [wrong]:
        ids = arguments["token_ids"].clone()
        ids.view(-1)[2 : 2 + len(tokens)] = torch.tensor(tokens, device=device)
        spoilt = {**arguments, "token_ids": ids}
        out = function(**spoilt)
        if isinstance(out, torch.Tensor):
            places = ((ids < 0) | (ids >= V)).reshape(out.shape)
            assert torch.equal(out.isnan(), places)
        else:
            assert out.loss.isnan()
        with monkeypatch.context() as patch:
            patch.setenv("MAPO_KERNELS_VALIDATE", "1")
            message = message_of(ValueError, function, spoilt)
            check_message(message, "token_ids")
            assert f"[0, {V})" in message and str(tokens[-1]) in message
            found = numbers_of(function(**{**spoilt, "mask": masked}))
        for a, e in zip(found, expected, strict=True):
            assert torch.equal(a, e)
