"""A CUDA device that is simulated on the CPU: what runs on it computes real numbers, and obeys the rules of a GPU.

Tensors of the device are wrappers around CPU tensors. Python sees ``cuda:0`` on them, torch sees a private backend, so
that autograd, FSDP2, DTensor and optimizers take the ways they take on a GPU; every operator comes by here, where

* tensors of the device and of the CPU in one operator are the error that CUDA makes of it (a CPU scalar may take part
  in a pointwise operator, as on CUDA);
* what the host would wait for is written down, with the line of ours that asked: values read by the host (``.item()``,
  ``.tolist()``, ``bool()``), shapes that depend on values (``nonzero``, a mask as an index), copies from and to memory
  that is not pinned;
* operators that only a CPU has are refused, and those that only CUDA has (fused attention) are checked by their meta
  kernels, which know their signature and shapes, and computed by formula.

``LIMITS`` says what this cannot see. The private backend stays registered, so use it in a process of its own
(``tests.dist.harness.run_distributed``).
"""

import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[2]
OURS = tuple(str(ROOT / name) + "/" for name in ("acceleration", "opensora", "tests/device"))
CUDA = torch.device("cuda", 0)
BACKEND = "simulated"  # the name of torch's private backend while this runs
aten = torch.ops.aten

# What a run on this device does not show, and where to look for it. test_limits.py shows some that pass unnoticed.
LIMITS = {
    "numbers of GPU kernels": "tests/gpu",
    "order of streams and events": "tests/gpu: offloaded activations equal kept ones",
    "NCCL": "python -m opensora.cli.preflight on the machines",
    "memory: allocator, fragmentation, pinning that fails": "python -m benchmarks.gpu.all",
    "kernels that are not there for a dtype or a size": "tests/gpu",
    "what inductor and Triton make of a graph": "tests/gpu, python -m benchmarks.gpu.all",
    "strides that only one kernel refuses": "tests/gpu",
    "speed": "python -m benchmarks.gpu.all",
}
_raw_device = torch._C.TensorBase.device.__get__  # type: ignore[attr-defined]
_make_wrapper = torch.Tensor._make_wrapper_subclass


class WrongDevice(RuntimeError):
    """Tensors of two devices in one operator."""


class NoKernel(NotImplementedError):
    """An operator that the device does not have."""


@dataclass(frozen=True, order=True)
class Wait:
    """Something that a host waits for."""

    site: str  # "file:function" of the innermost of our frames, from the root of the project
    kind: str  # value: the host reads one; shape: an operator's output has as many rows as values say; download; upload
    operator: str
    phase: str  # of what a run does, as ``Ledger.enter`` was told


@dataclass
class Ledger:
    """What happened on the device."""

    waits: list[Wait] = field(default_factory=list)
    operators: int = 0
    phase: str = "build"

    def enter(self, phase: str) -> None:
        """``phase`` begins."""
        self.phase = phase


class DeviceTensor(Tensor):
    """A tensor of the simulated device."""

    @staticmethod
    def __new__(cls, held: Tensor) -> "DeviceTensor":
        return _make_wrapper(  # type: ignore[no-any-return, attr-defined]
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(BACKEND, 0),
        )

    def __init__(self, held: Tensor) -> None:
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _LEDGERS[-1].run(func, args, kwargs or {})

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"DeviceTensor({list(self.shape)}, {self.dtype})"


class _Operators(TorchDispatchMode):
    """Every operator, factories included."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, Tensor) and kind not in _PLAIN for kind in types):
            return NotImplemented  # a DTensor: what it is made of comes by here
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        leaves: list[Any] = []
        _collect((args, kwargs), leaves)
        ours = [x for x in leaves if isinstance(x, DeviceTensor)]
        asked = kwargs.get("device")
        if not ours and (asked is None or not _is_ours(asked)):
            return _on_cpu(func, args, kwargs)
        self.ledger.operators += 1
        on_device = bool(ours) if asked is None else _is_ours(asked)
        if func in _COPIES:
            self._note_copy(func, args, kwargs, bool(ours), on_device)
        else:
            _check_together(func, leaves)
            _check_has_kernel(func)
            self._note_wait(func, args)
        held = {id(x.held): x for x in ours}
        pin = not on_device and (kwargs.get("pin_memory") or (func in _COPIES and kwargs.get("non_blocking")))
        kwargs = {key: _on_host(x) for key, x in kwargs.items() if key != "pin_memory"}
        found = _compute(func, _changed(_unwrap, args), kwargs)
        if pin:
            return _pinned(found)
        if func is aten._local_scalar_dense.default or func is aten.equal.default:
            return found
        return _changed(lambda x: _wrapped(x, held), found) if on_device else found

    def _note_wait(self, func: Any, args: Any) -> None:
        if func in _READS_VALUES:
            self._note("value", func)
        elif func in _SHAPED_BY_VALUES or (func in _INDEXING and _has_mask(args[1])):
            self._note("shape", func)
        elif func in _INDEXING and any(isinstance(x, Tensor) and not isinstance(x, DeviceTensor) for x in args[1]):
            self._note("upload", func)

    def _note_copy(self, func: Any, args: Any, kwargs: dict[str, Any], from_device: bool, to_device: bool) -> None:
        if func is aten.copy_.default:
            target, source = args[:2]
            from_device, to_device = (isinstance(x, DeviceTensor) for x in (source, target))
            non_blocking = (args[2] if len(args) > 2 else kwargs.get("non_blocking")) or False
            host = target if from_device else source
        else:
            host, non_blocking = args[0], kwargs.get("non_blocking") or False
            if non_blocking and from_device:  # CUDA makes pinned memory of what it copies to without waiting
                return
        if from_device == to_device or (non_blocking and _is_pinned(host)):
            return
        if host.numel():
            self._note("download" if from_device else "upload", func)

    def _note(self, kind: str, func: Any) -> None:
        self.ledger.waits.append(Wait(_site(), kind, str(func), self.ledger.phase))


class _Names(TorchFunctionMode):
    """``cuda``, as the code says it, is the private backend to torch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.pin_memory:
            return args[0] if _is_pinned(args[0]) else _pinned(args[0].clone())
        if func is torch.Tensor.is_pinned:
            return _is_pinned(args[0])
        if func is torch.Tensor.tolist and isinstance(args[0], DeviceTensor):
            return args[0].cpu().tolist()  # as C++ does, but for subclasses
        if func in (torch.tensor, torch.as_tensor) and _is_ours(kwargs.get("device") or "cpu"):
            made = func(*args, **{key: x for key, x in kwargs.items() if key != "device"})
            return made.to(CUDA)
        if func is torch.device or not any(map(_names_device, (*args, *kwargs.values()))):
            return func(*args, **kwargs)
        return func(*map(_renamed, args), **{key: _renamed(x) for key, x in kwargs.items()})


def _names_device(x: Any) -> bool:
    return (type(x) is torch.device and x.type == "cuda") or (type(x) is str and x in ("cuda", "cuda:0"))


def _renamed(x: Any) -> Any:
    return torch.device(BACKEND, 0) if _names_device(x) else x


def _is_ours(device: Any) -> bool:
    return torch.device(device).type in (BACKEND, "cuda")


def _collect(x: Any, leaves: list[Any]) -> None:
    """Every tensor in the arguments of an operator."""
    if isinstance(x, Tensor):
        leaves.append(x)
    elif isinstance(x, (tuple, list)):
        for part in x:
            _collect(part, leaves)
    elif isinstance(x, dict):
        _collect(list(x.values()), leaves)


def _changed(change: Callable[[Tensor], Any], x: Any) -> Any:
    """The same structure with ``change`` of every tensor in it."""
    if isinstance(x, Tensor):
        return change(x)
    return type(x)(_changed(change, part) for part in x) if type(x) in (tuple, list) else x


def _unwrap(x: Tensor) -> Tensor:
    return x.held if isinstance(x, DeviceTensor) else x


def _on_host(x: Any) -> Any:
    if isinstance(x, (torch.device, str)) and not isinstance(x, DeviceTensor):
        return torch.device("cpu") if str(x).split(":")[0] in (BACKEND, "cuda") else x
    return _changed(_unwrap, x)


def _wrapped(x: Tensor, held: dict[int, DeviceTensor]) -> Tensor:
    """The tensor that was given, where an operator returns what it wrote to."""
    return held[id(x)] if id(x) in held else DeviceTensor(x.resolve_conj().resolve_neg())


def _on_cpu(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operator of CPU tensors; what it is to make in pinned memory is remembered as such."""
    found = func(*args, **{key: x for key, x in kwargs.items() if key != "pin_memory"})
    return _pinned(found) if kwargs.get("pin_memory") else found


def _pinned(x: Tensor) -> Tensor:
    storage = x.untyped_storage()
    _PINNED[storage.data_ptr()] = storage  # kept, so that no other memory gets the same address
    return x


def _is_pinned(x: Tensor) -> bool:
    return not isinstance(x, DeviceTensor) and x.untyped_storage().data_ptr() in _PINNED


def _check_together(func: Any, leaves: list[Any]) -> None:
    strangers = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, DeviceTensor)]
    pointwise = torch.Tag.pointwise in func.tags or "_foreach" in str(func) or func in _TAKES_CPU_SCALARS
    if func in _INDEXING:
        strangers = [x for x in strangers if x.dtype not in (torch.int64, torch.int32)]  # CUDA fetches these
    if _reads_no_values(func) or str(func).startswith(("c10d.", "fsdp.")):
        return
    if all(x.dim() == 0 and pointwise for x in strangers):
        return
    raise WrongDevice(
        f"{func}: Expected all tensors to be on the same device, but found at least two devices, cuda:0 and "
        f"{strangers[0].device}, at {_site()}"
    )


def _reads_no_values(func: Any) -> bool:
    """Whether an operator reads no values of the tensor that it is given, as ``zeros_like``."""
    name = str(func).split(".")[1]
    return name.endswith("_like") or name.startswith("new_")


def _check_has_kernel(func: Any) -> None:
    if "_for_cpu" in str(func) or "mkldnn" in str(func):
        raise NoKernel(f"Could not run '{func}' with arguments from the 'CUDA' backend, at {_site()}")


def _has_mask(indices: Any) -> bool:
    return any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in indices)


def _site() -> str:
    """The innermost frame of ours; else of FSDP2, which backward calls; else unknown."""
    frame: Any = sys._getframe(1)
    of_torch = "unknown"
    while frame is not None:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if file.startswith(OURS) and file != __file__:
            return f"{Path(file).relative_to(ROOT)}:{name}"
        if "_fully_shard" in file and of_torch == "unknown":
            of_torch = f"torch/{Path(file).name}:{name}"
        frame = frame.f_back
    return of_torch


_PINNED: dict[int, Any] = {}
_PLAIN = (Tensor, DeviceTensor, torch.nn.Parameter)
_COPIES = {aten._to_copy.default, aten.copy_.default}
_READS_VALUES = {aten._local_scalar_dense.default, aten.equal.default}
_SHAPED_BY_VALUES = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_consecutive.default,
    aten.unique_dim.default,
    aten.bincount.default,
    aten.repeat_interleave.Tensor,
}
_INDEXING = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
}
_TAKES_CPU_SCALARS = {aten.lerp_.Scalar, aten.fill_.Tensor, aten.index_put_.default, aten.index_put.default}


# Operators that only CUDA has: their meta kernels say whether the call fits and what comes of it.


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if func not in _EMULATED:
        return func(*args, **kwargs)
    described = func(*_changed(_to_meta, args), **{key: _changed(_to_meta, x) for key, x in kwargs.items()})
    found = _EMULATED[func](described, *args, **kwargs)
    for got, wanted in zip(found, described, strict=True):
        assert not isinstance(wanted, Tensor) or (got.shape, got.dtype) == (wanted.shape, wanted.dtype), func
    return found


def _to_meta(x: Tensor) -> Tensor:
    return torch.empty_like(x, device="meta")


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """(B, H, L, Dh) each -> the output and the log-sum-exp (B, H, L), in fp32."""
    scores = q.float() @ k.float().mT / math.sqrt(q.shape[-1])
    scores = scores if bias is None else scores + bias.float()
    lse = scores.logsumexp(dim=-1)
    return (scores - lse[..., None]).exp() @ v.float(), lse


def _attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bias: Tensor | None
) -> tuple[Tensor, ...]:
    scores = q.float() @ k.float().mT / math.sqrt(q.shape[-1])
    scores = scores if bias is None else scores + bias.float()
    p = (scores - lse.float()[..., None]).exp()
    d = grad.float()
    ds = p * (d @ v.float().mT - (d * out.float()).sum(dim=-1, keepdim=True)) / math.sqrt(q.shape[-1])
    return (ds @ k.float()).to(q.dtype), (ds.mT @ q.float()).to(k.dtype), (p.mT @ d).to(v.dtype)


def _with_results(described: Any, **at: Tensor) -> tuple[Any, ...]:
    """As the meta kernel describes it, with these results by their place; the rest are zeros."""
    whole = [torch.zeros(x.shape, dtype=x.dtype) if isinstance(x, Tensor) else x for x in described]
    for place, result in at.items():
        index = int(place[1:])
        like = whole[index]
        if like.shape != result.shape:  # a log-sum-exp that is padded to the alignment of its kernel
            like[..., : result.shape[-1]] = result
        else:
            whole[index] = result.to(like.dtype)
    return tuple(whole)


def _flash(described: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **named: Any) -> tuple[Any, ...]:
    out, lse = _attend(q, k, v, None)
    return _with_results(described, _0=out, _1=lse)


def _flash_backward(described: Any, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **named: Any) -> Any:
    dq, dk, dv = _attend_backward(grad, q, k, v, rest[0], rest[1], None)
    return _with_results(described, _0=dq, _1=dk, _2=dv)


def _efficient(
    described: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *rest: Any, **named: Any
) -> tuple[Any, ...]:
    out, lse = _attend(q, k, v, bias)
    return _with_results(described, _0=out, _1=lse)


def _efficient_backward(
    described: Any, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Any, out: Tensor, lse: Tensor, *_: Any
) -> tuple[Any, ...]:
    dq, dk, dv = _attend_backward(grad, q, k, v, out, lse[..., : q.shape[2]], bias)
    return _with_results(described, _0=dq, _1=dk, _2=dv)  # the bias is never trained


def _cudnn(described: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **named: Any) -> tuple[Any, ...]:
    out, lse = _attend(q, k, v, None)
    return _with_results(described, _0=out, _1=lse[..., None] if described[1].dim() == 4 else lse)


def _cudnn_backward(described: Any, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *_: Any):  # type: ignore[no-untyped-def]
    dq, dk, dv = _attend_backward(grad, q, k, v, out, lse[..., 0] if lse.dim() == 4 else lse, None)
    return _with_results(described, _0=dq, _1=dk, _2=dv)


def _spans(ends: Tensor) -> list[slice]:
    marks = ends.tolist()
    return [slice(start, stop) for start, stop in pairwise(marks)]


def _varlen(described: Any, q: Tensor, k: Tensor, v: Tensor, ends: Tensor, *rest: Any) -> tuple[Any, ...]:
    parts = [_attend(*(x[span].transpose(0, 1)[None] for x in (q, k, v)), None) for span in _spans(ends)]
    out = torch.cat([out[0].transpose(0, 1) for out, _ in parts])
    return _with_results(described, _0=out, _1=torch.cat([lse[0] for _, lse in parts], dim=-1))


def _varlen_backward(
    described: Any, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, ends: Tensor, *_: Any
) -> tuple[Any, ...]:
    parts = []
    for span in _spans(ends):
        given = (x[span].transpose(0, 1)[None] for x in (grad, q, k, v, out))
        parts.append([x[0].transpose(0, 1) for x in _attend_backward(*given, lse[None][..., span], None)])
    dq, dk, dv = (torch.cat(column) for column in zip(*parts, strict=True))
    return _with_results(described, _0=dq, _1=dk, _2=dv)


def _scaled_dot_product_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    """Through the fused kernel that CUDA takes: flash for half precision without a mask, memory-efficient for masks and
    fp32. For a private backend torch itself computes by formula, and holds all scores. What the kernels cannot read
    (fp64, odd widths), and calls with other options, are computed by formula on CUDA, too. As in torch, the kernels and
    the formula are given the bias that a mask stands for: they would add its True and False as 1 and 0."""
    bias = attn_mask
    if bias is not None and bias.dtype == torch.bool:
        bias = torch.zeros_like(bias, dtype=q.dtype).masked_fill(~bias, -math.inf)
    is_aligned = q.dtype != torch.float64 and q.shape[-1] * q.element_size() % 16 == 0
    if not is_aligned or args or kwargs:
        return aten._scaled_dot_product_attention_math(q, k, v, bias, *args, **kwargs)[0]
    bias = bias if bias is None else bias.expand(*q.shape[:3], k.shape[2])
    return _Fused.apply(q, k, v, bias)


class _Fused(torch.autograd.Function):
    """The operators that autograd on CUDA calls, and what it keeps for them."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        if bias is None and q.dtype != torch.float32:
            out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v)
        else:
            out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, bias, True)
        ctx.save_for_backward(q, k, v, bias, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, bias, out, lse = ctx.saved_tensors
        seed = offset = torch.zeros((), dtype=torch.int64, device=q.device)  # no dropout: nothing was drawn
        if bias is None and q.dtype != torch.float32:
            lengths = q.shape[2], k.shape[2]
            found = aten._scaled_dot_product_flash_attention_backward(
                grad, q, k, v, out, lse, None, None, *lengths, 0.0, False, seed, offset
            )
        else:
            found = aten._scaled_dot_product_efficient_attention_backward(
                grad, q, k, v, bias, out, lse, seed, offset, 0.0, [True, True, True, False]
            )
        return *found[:3], None


_KERNELS = torch.library.Library("aten", "IMPL")
_EMULATED: dict[Any, Callable[..., Any]] = {
    aten._scaled_dot_product_flash_attention.default: _flash,
    aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
    aten._scaled_dot_product_efficient_attention.default: _efficient,
    aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
    aten._scaled_dot_product_cudnn_attention.default: _cudnn,
    aten._scaled_dot_product_cudnn_attention_backward.default: _cudnn_backward,
    aten._flash_attention_forward.default: _varlen,
    aten._flash_attention_backward.default: _varlen_backward,
}


# torch.cuda, as far as the code and FSDP2 use it.


class _Stream:
    """Streams and events order nothing here: everything is done when it is asked for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = CUDA

    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, event: Any = None) -> "_Event":
        return event or _Event()

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *error: object) -> None: ...


class _Event:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, stream: Any = None) -> None: ...
    def wait(self, stream: Any = None) -> None: ...
    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...
    def elapsed_time(self, end: "_Event") -> float:
        return 1.0  # ms


_LEDGERS: list[_Operators] = []
_STREAM = _Stream()
_TORCH_CUDA: dict[str, Any] = {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": lambda device: None,
    "synchronize": lambda device=None: None,
    "_lazy_init": lambda: None,
    "Stream": _Stream,
    "Event": _Event,
    "current_stream": lambda device=None: _STREAM,
    "default_stream": lambda device=None: _STREAM,
    "stream": lambda stream: stream or contextlib.nullcontext(),
    "max_memory_allocated": lambda device=None: 0,
    "reset_peak_memory_stats": lambda device=None: None,
    "get_device_name": lambda device=None: "simulated",
}


@contextlib.contextmanager
def simulated_cuda() -> Iterator[Ledger]:
    """Run what is inside on the simulated device; it stays usable for this process."""
    _register()
    ledger = Ledger()
    operators = _Operators(ledger)
    with contextlib.ExitStack() as stack:
        for name, value in _TORCH_CUDA.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(torch.accelerator, "current_stream", lambda device=None: _STREAM))
        stack.enter_context(mock.patch.object(torch.Tensor, "device", property(_device), create=True))
        stack.enter_context(mock.patch.object(torch.Tensor, "is_cuda", property(_is_cuda), create=True))
        stack.enter_context(mock.patch.object(torch.Tensor, "is_cpu", property(_is_cpu), create=True))
        stack.enter_context(mock.patch.object(torch.Tensor, "_make_wrapper_subclass", staticmethod(_renaming_make)))
        _LEDGERS.append(operators)
        stack.callback(_LEDGERS.pop)
        stack.enter_context(_Names())
        stack.enter_context(operators)
        yield ledger


def _renaming_make(*args: Any, **kwargs: Any) -> Tensor:
    return _make_wrapper(*args, **{key: _renamed(x) for key, x in kwargs.items()})  # type: ignore[no-any-return, attr-defined]


def _device(x: Tensor) -> torch.device:
    device: torch.device = _raw_device(x)
    return CUDA if device.type == BACKEND else device


def _is_cuda(x: Tensor) -> bool:
    return _device(x).type == "cuda"


def _is_cpu(x: Tensor) -> bool:
    return _device(x).type == "cpu"


def _register() -> None:
    from torch.utils import backend_registration as backends

    class Module(backends._DummyBackendModule):
        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.bfloat16, torch.float16]

    if torch._C._get_privateuse1_backend_name() != BACKEND:
        _KERNELS.impl("scaled_dot_product_attention", _scaled_dot_product_attention, "AutogradPrivateUse1")
        backends._setup_privateuseone_for_python_backend(BACKEND, backend_module=Module())
