"""Every op on tensors as trainers have them: the same bits as on contiguous ones, or one line that says why not."""

from __future__ import annotations

import contextlib
import itertools
import random
import warnings

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from flowgrpo_fast import _C, ops
from flowgrpo_fast.ops import Fp8Rows, Nvfp4, reference
from tests.ops.op_table import bits, table

TABLE = table()
ARGUMENTS = [(op, name) for op, row in TABLE.items() for name in row.tensors]
ONE_LINE = r"\A[a-z0-9_]+: [^\n]+, must [^\n]+\Z"
HUGE = 1 << 44  # rows; no machine has memory for them


def slice_of_a_stack(t: Tensor) -> Tensor:
    axis = min(1, t.ndim)
    return torch.stack([t, t], axis).select(axis, 1)


def transposed(t: Tensor) -> Tensor:
    return t if t.ndim < 2 else t.transpose(0, -1).contiguous().transpose(0, -1)


def channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t


def expanded(t: Tensor) -> Tensor:
    return t[:1].expand_as(t) if t.ndim else t


def every_second(t: Tensor) -> Tensor:
    return torch.stack([t, t], -1).flatten(-2)[..., ::2] if t.ndim else t


def negated(t: Tensor) -> Tensor:
    return torch._neg_view(-t)


def imaginary(t: Tensor) -> Tensor:
    return torch.complex(torch.zeros_like(t), -t).conj().imag if t.dtype is torch.float32 else t


LAYOUTS = (slice_of_a_stack, transposed, channels_last, expanded, every_second, negated, imaginary)


def is_code(t: Tensor) -> bool:
    """Of eight or four bits: torch neither negates nor stacks these."""
    return t.dtype in (torch.float8_e4m3fn, torch.float4_e2m1fn_x2)


def laid_out(t: Tensor, layout) -> tuple[Tensor, Tensor]:
    """Of the same values: a tensor of the layout, and a contiguous one."""
    if not is_code(t):
        given = layout(t)
        return given, given.detach().resolve_neg().clone(memory_format=torch.contiguous_format)
    if layout in (negated, imaginary):
        return t, t
    given = layout(t.view(torch.uint8))
    return given.view(t.dtype), given.clone(memory_format=torch.contiguous_format).view(t.dtype)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("op", TABLE)
def test_every_argument_in_every_layout_gives_the_bits_of_a_contiguous_one(op, layout):
    row = TABLE[op]
    pairs = {name: laid_out(t, layout) for name, t in row.tensors.items()}
    plain = bits(row(**{name: copy for name, (_, copy) in pairs.items()}))
    for name, (given, copy) in pairs.items():
        alone = bits(row(**{name: copy}))
        before = bits([given])
        assert bits(row(**{name: given})) == alone, name
        assert bits([given]) == before
    assert bits(row(**{name: given for name, (given, _) in pairs.items()})) == plain


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_outputs_are_contiguous_in_the_graph_as_they_are_eager(layout):
    """What a compiled graph is told of an op's outputs: else what follows reads them by other strides."""
    row = TABLE["flow_step"]
    given = {name: laid_out(t, layout)[0] for name, t in row.tensors.items()}
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        traced = row(**{name: mode.from_tensor(t.resolve_neg()) for name, t in given.items()})
    assert [t.stride() for t in traced] == [t.stride() for t in row(**given)]


def mkldnn(t: Tensor) -> Tensor:
    return t.to_mkldnn()


def sparse(t: Tensor) -> Tensor:
    return t.to_sparse()


def compressed(t: Tensor) -> Tensor:
    return t.to_sparse_csr()


def quantised(t: Tensor) -> Tensor:
    return torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)


def meta(t: Tensor) -> Tensor:
    return t.to("meta")


def huge(t: Tensor) -> Tensor:
    return t[:1].expand(HUGE, *t.shape[1:]) if t.ndim else t.expand(HUGE)


def huge_columns(t: Tensor) -> Tensor:
    return t[..., :1].expand(*t.shape[:-1], HUGE) if t.ndim else t.expand(HUGE)


REFUSED = (mkldnn, sparse, compressed, quantised, meta, huge, huge_columns)


def exists(t: Tensor, kind) -> bool:
    """Whether torch has this dtype and shape in this kind."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kind is going away
        try:
            kind(t)
        except (RuntimeError, TypeError, IndexError):
            return False
    return True


@pytest.mark.parametrize(
    ("op", "name", "kind"),
    [
        pytest.param(op, name, kind, id=f"{op}-{name}-{kind.__name__}")
        for op, name in ARGUMENTS
        for kind in REFUSED
        # What torch itself checks before an op's backward is asked: the shape, device and dtype of a gradient.
        if exists(TABLE[op].tensors[name], kind) and name != "grad"
    ],
)
def test_a_tensor_of_another_kind_is_one_line(op, name, kind):
    row = TABLE[op]
    if kind is quantised and op.endswith("_backward") and name in ("velocity", "negative"):
        op, row = op.removesuffix("_backward"), TABLE[op.removesuffix("_backward")]  # it has no gradient
    with pytest.raises(ValueError, match=ONE_LINE):
        row(**{name: kind(row.tensors[name])})


APART = ("compact", "dequantize_nvfp4", "merge_lora_quantize_ fp8", "merge_lora_quantize_ nvfp4")


@pytest.mark.parametrize("op", [op for op in TABLE if op not in APART and not op.endswith("_backward")])
def test_huge_shapes_that_agree_are_one_line(op):
    row = TABLE[op]
    batch = {name: huge(t) for name, t in row.tensors.items() if name != "coeffs"}
    with pytest.raises(ValueError, match=ONE_LINE):
        row(**batch)


@pytest.mark.parametrize(
    ("op", "name"),
    [
        (op, name)
        for op, name in ARGUMENTS
        if TABLE[op].tensors[name].is_floating_point() and not is_code(TABLE[op].tensors[name])
        # these are detached by the table
        if not (op.endswith("_backward") and name in ("velocity", "negative"))
    ],
)
def test_a_forward_mode_tangent_is_an_error_not_a_silent_zero(op, name):
    row = TABLE[op]
    t = row.tensors[name]
    with forward_ad.dual_level(), pytest.raises(ValueError, match="forward-mode tangent, must have none"):
        row(**{name: forward_ad.make_dual(t, torch.ones_like(t))})
    with forward_ad.dual_level():
        assert bits(row()) == bits(TABLE[op]())  # the level alone changes nothing


@pytest.mark.parametrize("through", ["eager", "library"])
@pytest.mark.parametrize("op", ["flow_log_prob", "flow_log_prob_extras", "matching", "implicit_matching"])
def test_a_second_derivative_is_an_error_not_a_silent_zero(op, through):
    row = TABLE["flow_log_prob"].tensors | TABLE["matching"].tensors
    velocity = row["velocity"].clone().requires_grad_()
    x, n, target, old = row["latents"], row["next_latents"], row["target"], row["old"]
    library = torch.ops.flowgrpo_fast
    state = (x, velocity, row["coeffs"], 1, None, None, 1.0, None, n)
    if through == "eager":
        first = {
            "flow_log_prob": lambda: ops.flow_log_prob(x, velocity, n, row["coeffs"], 1),
            "flow_log_prob_extras": lambda: (
                ops.flow_log_prob(x, velocity, n, row["coeffs"], 1, extras=ops.Extras(True)).mean
            ),
            "matching": lambda: ops.matching(velocity, target).error,
            "implicit_matching": lambda: ops.implicit_matching(velocity, target, old, 0.5).positive,
        }[op]()
    else:
        first = {
            "flow_log_prob": lambda: library.flow_log_prob(*state),
            "flow_log_prob_extras": lambda: library.flow_log_prob_extras(*state, True, None, None, 0)[1],
            "matching": lambda: library.matching(velocity, target, None, None, None, None)[0],
            "implicit_matching": lambda: library.matching(velocity, target, old, None, None, 0.5)[0],
        }[op]()
    (gradient,) = torch.autograd.grad(first.sum(), velocity, create_graph=True)
    penalty = gradient.square().sum() + velocity.square().sum()  # the second term alone would give a gradient
    with pytest.raises(
        ValueError, match=r"\A[a-z_]+: its gradient is differentiated, must be [^\n]*once only"
    ):
        penalty.backward()


def test_a_first_derivative_is_the_same_with_a_graph_of_it():
    row = TABLE["flow_log_prob"].tensors
    velocity = row["velocity"].clone().requires_grad_()

    def gradient(create_graph: bool) -> Tensor:
        out = ops.flow_log_prob(row["latents"], velocity, row["next_latents"], row["coeffs"], 1)
        return torch.autograd.grad(out.sum(), velocity, create_graph=create_graph)[0]

    assert torch.equal(gradient(True), gradient(False))


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap"])
def test_transforms_of_functions_are_one_line(transform):
    row = TABLE["flow_log_prob"].tensors

    def loss(velocity: Tensor) -> Tensor:
        return ops.flow_log_prob(row["latents"], velocity, row["next_latents"], row["coeffs"], 1).sum()

    velocity = row["velocity"]
    transformed = {
        "grad": lambda: torch.func.grad(loss)(velocity),
        "jvp": lambda: torch.func.jvp(loss, (velocity,), (velocity,)),
        "vmap": lambda: torch.func.vmap(loss)(velocity[None]),
    }[transform]
    with pytest.raises(ValueError, match=ONE_LINE):
        transformed()


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", TABLE)
def test_the_default_dtype_changes_nothing(op, dtype):
    plain = TABLE[op]()
    with default_dtype(dtype):
        found = TABLE[op]()
    assert [t.dtype for t in found] == [t.dtype for t in plain]
    assert bits(found) == bits(plain)


def written_to(op: str) -> tuple[list[Tensor], object]:
    """Room for an op's outputs, and the call that writes there."""
    if op == "compact":
        row = TABLE[op].tensors
        room = [torch.zeros(2, 4), torch.zeros(2, 2, 2, dtype=torch.int64)]
        return room, lambda out: ops.compact(row["indices"], row["first"], row["second"], out=tuple(out))
    x = TABLE["quantize_fp8_rows"].tensors["x"]
    w = TABLE["merge_lora_quantize_ fp8"].tensors
    is_fp8 = op.endswith("fp8")
    kind = Fp8Rows if is_fp8 else Nvfp4
    room = list(ops.quantize_fp8_rows(0 * x) if is_fp8 else ops.quantize_nvfp4(0 * x))
    if op.startswith("merge"):
        return room, lambda out: ops.merge_lora_quantize_(kind(*out), **w)
    quantize = ops.quantize_fp8_rows if is_fp8 else ops.quantize_nvfp4
    return room, lambda out: quantize(x, out=kind(*out))


WRITING = ("compact", "quantize fp8", "quantize nvfp4", "merge fp8", "merge nvfp4")


@pytest.mark.parametrize(
    "layout", [slice_of_a_stack, transposed, every_second], ids=lambda layout: layout.__name__
)
@pytest.mark.parametrize("op", WRITING)
def test_outputs_are_written_wherever_they_lie(op, layout):
    room, call = written_to(op)
    call(room)
    scattered, _ = written_to(op)
    scattered = [laid_out(t, layout)[0] for t in scattered]
    versions = [t._version for t in scattered]
    call(scattered)
    assert bits(scattered) == bits(room)
    assert all(t._version > before for t, before in zip(scattered, versions, strict=True))


@pytest.mark.parametrize("op", WRITING)
def test_outputs_that_share_memory_are_one_line(op):
    room, call = written_to(op)
    for place, t in enumerate(room):
        bad = list(room)
        if t.ndim:
            codes = t.view(torch.uint8) if is_code(t) else t
            bad[place] = codes[:1].expand_as(codes).view(t.dtype)
            with pytest.raises(ValueError, match="must have memory of its own for every element"):
                call(bad)
    shared = torch.zeros(4096, dtype=torch.uint8)
    bad = [shared[: t.numel() * t.itemsize].view(t.dtype).view(t.shape) for t in room]
    with pytest.raises(ValueError, match="shares memory with another argument, must be memory of its own"):
        call(bad)


def test_an_output_on_its_input_is_one_line_and_the_next_slice_of_a_stack_is_not():
    x = torch.randn(6, 32)
    codes = x.view(torch.uint8).view(-1)[:192].view(6, 32).view(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="codes shares memory with another argument"):
        ops.quantize_fp8_rows(x, out=Fp8Rows(codes, torch.zeros(6, 1)))
    stack = torch.zeros(4, 3, 5)
    stack[:, 0] = torch.arange(20.0).view(4, 5)
    ops.compact(torch.tensor([3, 1, 1, 0]), stack[:, 0], stack[:, 0], out=(stack[:, 1], stack[:, 2]))
    assert torch.equal(stack[:, 1], stack[[3, 1, 1, 0], 0])
    assert torch.equal(stack[:, 2], stack[:, 1])
    with pytest.raises(ValueError, match=r"out\[0\] shares memory"):
        ops.compact(torch.tensor([3, 1, 1, 0]), stack[:, 0:2], out=(stack[:, 1:3],))


def private_calls(op: str, monkeypatch) -> list[tuple[str, tuple]]:
    """What an op of the table hands to the compiled module."""
    calls = []

    def recorded(name, function):
        def call(*arguments):
            calls.append((name, arguments))
            return function(*arguments)

        return call

    for name in dir(_C):
        if callable(getattr(_C, name)) and not name.startswith("_"):
            monkeypatch.setattr(_C, name, recorded(name, getattr(_C, name)))
    TABLE[op]()
    monkeypatch.undo()
    return calls


@pytest.mark.parametrize("op", TABLE)
def test_a_short_tuple_of_a_private_call_is_an_error_not_a_crash(op, monkeypatch):
    calls = private_calls(op, monkeypatch)
    tried = 0
    for name, arguments in calls:
        for place, argument in enumerate(arguments):
            if not isinstance(argument, tuple):
                continue
            for length in range(len(argument)):
                if length == 0 and name.startswith("flow_log_prob") and place == 3:
                    continue  # no extras is a call of its own
                short = tuple(argument)[:length]
                tried += 1
                with pytest.raises((ValueError, IndexError, TypeError, RuntimeError)):
                    getattr(_C, name)(*arguments[:place], short, *arguments[place + 1 :])
    assert calls
    assert tried or not any(isinstance(a, tuple) for _, arguments in calls for a in arguments)


def fuzz(rounds: int, seed: int) -> None:
    """Random ops whose arguments each have a random layout or a random value at random places, now and then cut."""
    draw = random.Random(seed)
    values = (float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e38, 1e-42)
    for _ in range(rounds):
        row = TABLE[draw.choice(list(TABLE))]
        given, plain = {}, {}
        for name, t in row.tensors.items():
            t = t.clone()
            if t.dtype is torch.float32 and name != "coeffs" and draw.random() < 0.3:
                t.view(-1)[draw.randrange(t.numel())] = draw.choice(values)
            if t.ndim and name != "grad" and draw.random() < 0.05:
                t = t[: draw.randrange(t.shape[0] + 1)]
            given[name], plain[name] = laid_out(t, draw.choice([*LAYOUTS, lambda t: t]))
        found = []
        for arguments in (given, plain):
            try:
                found.append(bits(row(**arguments)))
            except ValueError as error:
                found.append(["one line", "several lines"]["\n" in str(error)])
        assert found[0] == found[1], (row.name, given)
        assert found[0] != "several lines", row.name


@pytest.mark.parametrize("seed", range(2))
def test_random_layouts_and_values_give_the_bits_of_contiguous_ones(seed):
    fuzz(100, seed)


@pytest.mark.torture
@pytest.mark.parametrize("seed", range(2, 12))
def test_many_random_layouts_and_values_give_the_bits_of_contiguous_ones(seed):
    fuzz(5000, seed)


def test_the_binding_itself_takes_tensors_in_order_alone(monkeypatch):
    ((name, (transition, *rest)),) = private_calls("flow_step", monkeypatch)
    latents = transition.latents.transpose(1, 3)
    with pytest.raises(
        ValueError, match=r"\Aflow_step: latents is not contiguous: shape [^\n]*, must be contiguous"
    ):
        getattr(_C, name)(transition._replace(latents=latents), *rest)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("seed", range(4))
def test_references_rank_nan_and_infinities_as_the_ops_do(seed):
    generator = torch.Generator().manual_seed(seed)
    pool = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 1.0, 2.0, 2.0])
    rewards = pool[torch.randint(0, 8, (40, 9), generator=generator)]
    for num_top, num_bottom in ((3, 2), (0, 4), (9, 0), (4, 5)):
        expected = reference.top_bottom(rewards, num_top, num_bottom)
        assert torch.equal(ops.top_bottom(rewards, num_top, num_bottom), expected)
    for k in (1, 4, 9):
        assert torch.equal(ops.best_variance_subset(rewards, k), reference.best_variance_subset(rewards, k))
    objectives = pool[torch.randint(0, 8, (40, 9, 2), generator=generator)]
    assert torch.equal(ops.pareto_fronts(objectives), reference.pareto_fronts(objectives))


@pytest.mark.parametrize("eps", [0.0, 1e-4])
@pytest.mark.parametrize(
    ("aggregate", "std"),
    [*itertools.product(["sum", "per_objective", "separate"], ["group", "batch"]), ("gdpo", "group")],
)
def test_references_give_equal_rewards_nothing_as_the_op_does(aggregate, std, eps):
    ids = torch.arange(9) % 3
    rewards = torch.randn(9, 2, generator=torch.Generator().manual_seed(1)).double()
    rewards[ids == 1] = torch.tensor([0.1, 0.7], dtype=torch.float64)  # whose mean rounds
    for given in (rewards, torch.full_like(rewards, 0.1), torch.zeros_like(rewards)):
        ours = ops.group_advantages(given, ids, 3, [0.3, 0.6], aggregate, std, eps)
        expected = reference.group_advantages(given, ids, 3, [0.3, 0.6], aggregate, std, eps)
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)
    assert (ours == 0).all()
    rewards[0] = NAN
    ours = ops.group_advantages(rewards, ids, 3, None, aggregate, std, eps)
    expected = reference.group_advantages(rewards, ids, 3, None, aggregate, std, eps)
    assert torch.equal(ours.isnan(), expected.isnan())
