"""Calls into `_C`, written down while tests run, and repeated without torch.

A sanitizer wants a process of instrumented code and exact allocations. So the calls are recorded under pytest, bytes
and all, and repeated by a Python that has the sanitizer preloaded and no torch:

    LD_PRELOAD=libasan.so python -S recorded_calls.py module.so calls.pickle [--cuda] [--threads N] [--planted KIND]

Every array is an allocation of its own and exactly as long as it must be, as far from 16-byte alignment as it was, and
must hold the recorded bits afterwards.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.machinery
import importlib.util
import pickle
import sys
import threading
from dataclasses import dataclass, field
from typing import Any

CPU, CUDA = 1, 2
MAX_BYTES = 1 << 18  # of an array in a recorded call


class DataType(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class TensorView(ctypes.Structure):
    """DLPack's DLTensor."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("dtype", DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


ViewFunction = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(TensorView))
StreamFunction = ctypes.PYFUNCTYPE(
    ctypes.c_int, ctypes.c_int32, ctypes.c_int32, ctypes.POINTER(ctypes.c_void_p)
)


class ExchangeApi(ctypes.Structure):
    """DLPack's DLPackExchangeAPI."""

    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("previous", ctypes.c_void_p),
        ("unused", ctypes.c_void_p * 3),
        ("view_of_object", ViewFunction),
        ("current_work_stream", StreamFunction),
    ]


CAPSULE = b"dlpack_exchange_api"
_kept_alive: list[Any] = []


def capsule_of(view: Any) -> Any:
    """A capsule `__dlpack_c_exchange_api__` whose tensors are what `view(object, out)` says."""

    def guarded(value: Any, out: Any) -> int:
        try:
            view(value, out[0])
        except Exception:
            return -1
        return 0

    def stream(device_type: int, device_id: int, out: Any) -> int:
        out[0] = None
        return 0

    api = ExchangeApi(1, 3, None, (None, None, None), ViewFunction(guarded), StreamFunction(stream))
    _kept_alive.append(api)
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return new(ctypes.addressof(api), CAPSULE, None)


def view_function(capsule: Any) -> Any:
    """The function of such a capsule that reads a tensor."""
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return ExchangeApi.from_address(get(capsule, CAPSULE)).view_of_object


def api_that_says_cuda(capsule: Any) -> Any:
    """The same tensors, said to be on the first CUDA device."""
    original = view_function(capsule)

    def view(value: Any, out: TensorView) -> None:
        if original(value, ctypes.byref(out)):
            raise ValueError("not readable")
        out.device_type = CUDA

    return capsule_of(view)


@dataclass
class Array:
    """What a tensor of a call was before and after it."""

    shape: tuple[int, ...]
    dtype: tuple[int, int, int]
    shift: int  # of the address, from a multiple of 16
    before: bytes
    after: bytes = b""


@dataclass
class Place:
    """Stands for an array in the arguments of a call."""

    index: int


@dataclass
class Call:
    op: str
    arguments: tuple[Any, ...]
    arrays: list[Array] = field(default_factory=list)


def numel(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def is_dense(view: TensorView) -> bool:
    expected = 1
    for axis in reversed(range(view.ndim)):
        if view.strides and view.shape[axis] != 1 and view.strides[axis] != expected:
            return False
        expected *= view.shape[axis]
    return True


class Recorder:
    """Stands for a module `_C`, and writes down what goes through; each kind of call `most` times."""

    def __init__(self, module: Any, most: int) -> None:
        self.module, self.most = module, most
        self.seen: dict[Any, int] = {}
        self.calls: list[Call] = []

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.module, name)

        def call(*arguments: Any) -> Any:
            recorded, addresses = self.begun(name, arguments)
            result = function(*arguments)
            if recorded is not None:
                for array, address in zip(recorded.arrays, addresses, strict=True):
                    array.after = ctypes.string_at(address, len(array.before))
                self.calls.append(recorded)
            return result

        return call if callable(function) and name != "build_info" else function

    def begun(self, name: str, arguments: tuple[Any, ...]) -> tuple[Call | None, list[int]]:
        views: dict[int, TensorView] = {}

        def replaced(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(replaced, value))
            api = getattr(type(value), "__dlpack_c_exchange_api__", None)
            if api is None:
                return value
            if id(value) not in views:
                view = TensorView()
                if view_function(api)(value, ctypes.byref(view)):
                    raise ValueError("not readable")
                views[id(value)] = view
            return Place(list(views).index(id(value)))

        try:
            call = Call(name, replaced(arguments))
        except (ValueError, RuntimeError):  # a tensor the exchange API cannot tell of
            return None, []
        call.arrays, addresses = [], []
        for view in views.values():
            shape = tuple(view.shape[: view.ndim])
            dtype = (view.dtype.code, view.dtype.bits, view.dtype.lanes)
            address = (view.data or 0) + view.byte_offset
            size = numel(shape) * (view.dtype.bits * view.dtype.lanes // 8)
            if not is_dense(view) or size > MAX_BYTES:
                return None, []
            call.arrays.append(Array(shape, dtype, address % 16, ctypes.string_at(address, size)))
            addresses.append(address)
        kind = kind_of(call)
        self.seen[kind] = self.seen.get(kind, 0) + 1
        return (call, addresses) if self.seen[kind] <= self.most else (None, [])


def kind_of(call: Call) -> Any:
    """Calls of a kind take the same way through the code, as far as that can be told from outside."""

    def kind(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(kind, value))
        if isinstance(value, Place):
            array = call.arrays[value.index]
            count = numel(array.shape)
            return array.dtype, array.shift, count % 8 == 0, count > 4096, array.shape[-1:] > (1024,)
        return value if value is None or isinstance(value, bool) else type(value).__name__

    return call.op, kind(call.arguments)


_libc = ctypes.CDLL(None)  # with a sanitizer preloaded, its allocator
_libc.malloc.restype, _libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
_libc.free.argtypes = [ctypes.c_void_p]


class Tensor:
    """An allocation of its own, offered as torch offers its tensors."""

    device_type = CPU
    dtype = device = layout = "recorded"  # as an error would print them

    def __init__(self, array: Array, missing: int = 0) -> None:
        """`missing` bytes fewer are allocated than the shape needs."""
        self.array, self.size = array, len(array.before) - missing
        self.block = _libc.malloc(array.shift + self.size)
        ctypes.memmove(self.block + array.shift, array.before, self.size)
        self.shape = (ctypes.c_int64 * max(len(array.shape), 1))(*array.shape)

    def view(self, out: TensorView) -> None:
        out.data, out.byte_offset = self.block + self.array.shift, 0
        out.device_type, out.device_id = self.device_type, 0
        out.ndim, out.dtype = len(self.array.shape), DataType(*self.array.dtype)
        out.shape = ctypes.cast(self.shape, ctypes.POINTER(ctypes.c_int64))
        out.strides = None

    def content(self) -> bytes:
        return ctypes.string_at(self.block + self.array.shift, self.size)

    def free(self) -> None:
        _libc.free(self.block)


Tensor.__dlpack_c_exchange_api__ = capsule_of(Tensor.view)


def with_tensors(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, tuple):
        return tuple(with_tensors(item, tensors) for item in value)
    return tensors[value.index] if isinstance(value, Place) else value


def repeat(module: Any, call: Call, num_threads: int, missing: int = 0) -> list[bytes] | None:
    """What the arrays of a call are after it; None where the module refuses it. The last argument of every op is the
    number of threads. The first array that the call changes lacks `missing` bytes."""
    changed = next((i for i, array in enumerate(call.arrays) if array.after != array.before), None)
    tensors = [Tensor(array, missing if i == changed else 0) for i, array in enumerate(call.arrays)]
    try:
        getattr(module, call.op)(*with_tensors(call.arguments[:-1], tensors), num_threads)
        return [tensor.content() for tensor in tensors]
    except ValueError:
        return None
    finally:
        for tensor in tensors:
            tensor.free()


# By DLPack's code and bits: how memoryview calls integers of that width, and the bits of infinity.
FLOATS = {
    (2, 16): ("H", 0x7C00),
    (4, 16): ("H", 0x7F80),
    (2, 32): ("I", 0x7F800000),
    (2, 64): ("Q", 0x7FF << 52),
}


def same(array: Array, content: bytes) -> bool:
    """Whether an array holds the recorded bits. Which NaN an operation gives, compilers may choose."""
    if content == array.after or array.dtype[:2] not in FLOATS:
        return content == array.after
    letter, infinity = FLOATS[array.dtype[:2]]
    magnitude = (1 << array.dtype[1] - 1) - 1
    pairs = zip(memoryview(content).cast(letter), memoryview(array.after).cast(letter), strict=True)
    return all(a == b or min(a & magnitude, b & magnitude) > infinity for a, b in pairs)


def race(module: Any, call: Call) -> None:
    """Two threads make the same call on the same arrays."""
    tensors = [Tensor(array) for array in call.arrays]
    arguments = with_tensors(call.arguments[:-1], tensors)
    threads = [
        threading.Thread(target=lambda: [getattr(module, call.op)(*arguments, 1) for _ in range(20)])
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("module")
    parser.add_argument("calls")
    parser.add_argument(
        "--cuda", action="store_true", help="CUDA on the host: results must be the recorded bits"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--planted", choices=("short", "race"), help="a defect the sanitizer must find")
    options = parser.parse_args()
    Tensor.device_type = CUDA if options.cuda else CPU
    loader = importlib.machinery.ExtensionFileLoader("kernels_on_host._C", options.module)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    with open(options.calls, "rb") as file:
        calls = pickle.load(file)
    if options.planted == "race":
        race(module, max(calls, key=lambda call: sum(len(array.before) for array in call.arrays)))
    for call in calls:
        contents = repeat(module, call, options.threads, missing=1 if options.planted == "short" else 0)
        if contents is None or not all(map(same, call.arrays, contents)):
            sys.exit(f"{call.op} gave other bits than when it was recorded")
    print(f"{module.build_info()['isa']}: {len(calls)} calls repeated")


if __name__ == "__main__":
    sys.modules["recorded_calls"] = sys.modules["__main__"]  # the pickle names its classes so
    main()
