"""Runs the Gluon kernels of `triton/hopper/` on a CPU, as they are written: Gluon itself has no interpreter.

The kernels' own Python is executed with stand-ins for what a device does. The partitions of a program are threads, of
which one runs at a time, in an order drawn at random. Copies by TMA land late and in any order; memory that one is on
its way to holds NaN. It fails on

* a deadlock, one arrival too many, copied bytes that a barrier was not told of;
* shared memory that is read before its copy landed, or written while a product still reads it;
* the result of an asynchronous product that is used before a wait which covers it;
* any address outside of a tensor that a mask lets through.

What it cannot show: layouts, swizzling, registers, fences, and how fast it is.
"""

from __future__ import annotations

import random
import threading
from types import FunctionType, ModuleType, SimpleNamespace

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper as device
from triton.runtime.jit import JITFunction


class Value(torch.Tensor):
    """What a register holds, a scalar as a tensor of no dimension."""

    type = SimpleNamespace(layout=None)


def value(x, dtype=None):
    return torch.as_tensor(x, dtype=dtype).as_subclass(Value)


class Pointer:
    """Into a contiguous tensor, one address or many."""

    def __init__(self, memory, offset=0):
        self.memory, self.offset = memory, offset

    def __add__(self, more):
        return Pointer(self.memory, self.offset + more)

    def places(self, mask):
        offset, mask = torch.broadcast_tensors(torch.as_tensor(self.offset), torch.as_tensor(mask))
        outside = mask & ((offset < 0) | (offset >= self.memory.numel()))
        assert not outside.any(), f"address {int(offset[outside][0])} of {self.memory.numel()}"
        return offset, mask


def load(pointer, mask=True, other=0):
    offset, mask = pointer.places(mask)
    found = pointer.memory[torch.where(mask, offset, 0)]
    return value(torch.where(mask, found, torch.as_tensor(other, dtype=found.dtype)))


def store(pointer, x, mask=True):
    offset, mask = pointer.places(mask)
    pointer.memory[offset[mask]] = torch.as_tensor(x).broadcast_to(mask.shape)[mask].as_subclass(torch.Tensor)


def atomic_add(pointer, x, sem):
    store(pointer, load(pointer) + x)


class Barrier:
    """An mbarrier: a phase ends when all have arrived and all bytes that were announced are there."""

    def __init__(self):
        self.count = self.pending = self.bytes = self.phase = 0

    def settle(self):
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase ^ 1, self.count

    def arrive(self, count, announced=0):
        assert self.pending >= count, "one arrival too many"
        self.pending, self.bytes = self.pending - count, self.bytes + announced
        self.settle()

    def landed(self, amount):
        assert self.bytes >= amount, "bytes that the barrier was not told of"
        self.bytes -= amount
        self.settle()


class Shared:
    """A part of shared memory, seen as `shape`: tiles of 64 columns, those of one row next to one another."""

    def __init__(self, memory, state, start, size, shape, dtype):
        self.memory, self.state, self.start, self.size = memory, state, start, size
        self.shape, self.dtype = shape, dtype
        self.transposed = False

    def index(self, at):
        size = self.size // self.shape[0]
        assert 0 <= int(at) < self.shape[0], f"place {int(at)} of {self.shape[0]}"
        return Shared(self.memory, self.state, self.start + int(at) * size, size, self.shape[1:], self.dtype)

    def _reinterpret(self, dtype, shape, _layout):
        assert dtype == self.dtype and torch.Size(shape).numel() == self.size
        return Shared(self.memory, self.state, self.start, self.size, list(shape), dtype)

    def reshape(self, shape):
        return self._reinterpret(self.dtype, shape, None)

    def permute(self, _order):
        turned = Shared(self.memory, self.state, self.start, self.size, self.shape, self.dtype)
        turned.transposed = not self.transposed
        return turned

    def overlaps(self, others):
        return any(self.start < stop and start < self.start + self.size for start, stop in others)

    def load(self, _layout=None):
        assert not self.overlaps(self.state.copies), "read before its copy landed"
        flat = self.memory[self.start : self.start + self.size]
        if len(self.shape) == 1:
            return value(flat.clone())
        rows, columns = self.shape
        x = flat.view(columns // 64, rows, 64).transpose(0, 1).reshape(rows, columns)
        return value((x.T if self.transposed else x).clone())


class Pending:
    """The result of a product that is under way."""

    def __init__(self, result, operands):
        self.result, self.operands, self.done = result, operands, False


class Run:
    """One program: its partitions, its copies, and whose turn it is."""

    def __init__(self, seed):
        self.random, self.flights = random.Random(seed), []
        self.baton, self.error = threading.Condition(), None
        self.turn, self.blocked, self.products = None, {}, {}

    # ------------------------------------------------------------------ partitions

    def specialize(self, partitions):
        threads = [
            threading.Thread(target=self._partition, args=(number, function, arguments), daemon=True)
            for number, (function, arguments) in enumerate(partitions)
        ]
        self.blocked = {number: None for number in range(len(threads))}
        for thread in threads:
            thread.start()
        while self.blocked:
            while self.flights and self.random.random() < 0.3:
                self._land()
            able = [n for n, ready in self.blocked.items() if ready is None or ready()]
            if able:
                self._let(self.random.choice(able))
            elif self.flights:
                self._land()
            else:
                raise AssertionError("deadlock")
        assert not self.flights, "a program ended with copies on their way"

    def _let(self, number):
        with self.baton:
            self.turn = number
            self.baton.notify_all()
            self.baton.wait_for(lambda: self.turn is None)
        if self.error is not None:
            raise self.error

    def _partition(self, number, function, arguments):
        with self.baton:
            self.baton.wait_for(lambda: self.turn == number)
        threading.current_thread().number = number
        self.products[number] = []
        try:
            function(*arguments)
            assert not self.products[number], "a partition ended with products under way"
        except BaseException as error:
            self.error = error
        with self.baton:
            del self.blocked[number]
            self.turn = None
            self.baton.notify_all()

    def pause(self, ready=None):
        """Let others go on; come back at some time, when `ready` is true."""
        number = getattr(threading.current_thread(), "number", None)
        if number is None:  # the part of a program before it is specialised
            return
        with self.baton:
            self.blocked[number], self.turn = ready, None
            self.baton.notify_all()
            self.baton.wait_for(lambda: self.turn == number)

    # ---------------------------------------------------------------- copies

    def copy(self, source, place, barrier, target):
        box = source.block_shape
        assert target.size == torch.Size(box).numel() and target.dtype == source.base.dtype
        span = (target.start, target.start + target.size)
        assert not target.overlaps(target.state.reads), "overwritten while a product reads it"
        assert not target.overlaps(target.state.copies), "two copies to one place"
        target.state.copies.append(span)
        target.memory[span[0] : span[1]] = torch.nan
        self.flights.append((_box(source, [int(x) for x in place]), span, barrier, target))
        self.pause()

    def _land(self):
        data, span, barrier, target = self.flights.pop(self.random.randrange(len(self.flights)))
        target.memory[span[0] : span[1]] = data.reshape(-1)
        target.state.copies.remove(span)
        barrier.landed(data.numel() * data.element_size())

    # -------------------------------------------------------------- products

    def product(self, a, b, acc, use_acc=True, is_async=False):
        assert is_async
        operands = [x for x in (a, b) if isinstance(x, Shared)]
        left, right = (x.load() if isinstance(x, Shared) else x for x in (a, b))
        result = left.float() @ right.float()
        pending = Pending(value(acc + result if use_acc else result), operands)
        for x in operands:
            x.state.reads.append((x.start, x.start + x.size))
        self.products[threading.current_thread().number].append(pending)
        self.pause()
        return pending

    def wait_products(self, outstanding, deps):
        for _ in range(self.random.randrange(4)):  # products take their time
            self.pause()
        products = self.products[threading.current_thread().number]
        while len(products) > outstanding:
            first = products.pop(0)
            first.done = True
            for x in first.operands:
                x.state.reads.remove((x.start, x.start + x.size))
        assert all(x.done for x in deps if isinstance(x, Pending)), "the result of a product that may be under way"
        found = [x.result if isinstance(x, Pending) else x for x in deps]
        return found[0] if len(found) == 1 else tuple(found)


def _box(source, place):
    """The box of a descriptor at a place, zeros where the tensor ends."""
    x = torch.as_strided(source.base, source.shape, source.strides, source.base.storage_offset())
    data = torch.zeros(source.block_shape, dtype=x.dtype)
    inside, here = [], []
    for at, size, length in zip(place, source.block_shape, source.shape, strict=True):
        begin, end = max(at, 0), min(at + size, length)
        if begin >= end:
            return data
        inside.append(slice(begin, end))
        here.append(slice(begin - at, end - at))
    data[tuple(here)] = x[tuple(inside)]
    return data


class Interpreter:
    """Stands in for :func:`astbench_kernels.triton.launch.launch_gluon`; programs run one after the other."""

    def __init__(self, seed=0):
        self.seed, self.run, self.program, self.programs = seed, None, 0, 0
        self.kernels, self.launched, self.worlds = {}, [], {}

    def __call__(self, kernel, programs, arguments, constants, tile, most_registers):
        function, self.programs = self.function(kernel), programs
        dtypes = {gl.bfloat16: torch.bfloat16, gl.float16: torch.float16}
        constants = constants | {"DTYPE": dtypes[constants["DTYPE"]]}
        given = {n: Pointer(x.view(-1)) if isinstance(x, torch.Tensor) else x for n, x in arguments.items()}
        expected = set(kernel.arg_names)
        assert expected == {*given, *constants}, expected ^ {*given, *constants}
        self.launched.append((kernel.fn.__name__, programs, tile))
        for self.program in range(programs):
            self.seed += 1
            self.run = Run(self.seed)
            function(**given, **constants)

    def function(self, kernel):
        """A kernel's Python, with stand-ins for all that it names."""
        if kernel not in self.kernels:
            world = self.world(kernel.fn.__globals__)
            raw = kernel.fn
            self.kernels[kernel] = FunctionType(raw.__code__, world, raw.__name__, raw.__defaults__, raw.__closure__)
        return self.kernels[kernel]

    def world(self, names):
        key = names["__name__"]
        if key not in self.worlds:
            world = self.worlds[key] = {"__builtins__": names["__builtins__"], "range": self._range}
            world |= {name: self._stand_in(x) for name, x in names.items() if not name.startswith("__")}
        return self.worlds[key]

    @staticmethod
    def _range(*bounds):
        return (value(n) for n in range(*(int(x) for x in bounds)))

    def _stand_in(self, x):
        if isinstance(x, JITFunction):
            return lambda *args, **kwargs: self.function(x)(*args, **kwargs)
        if isinstance(x, gl.constexpr):
            return x.value
        if isinstance(x, ModuleType):
            return {gl: self._language(), device.mbarrier: self._barriers(), device.tma: self._copies()}.get(x, x)
        return (
            {
                device.warpgroup_mma: lambda *args, **kwargs: self.run.product(*args, **kwargs),
                device.warpgroup_mma_wait: lambda outstanding, deps: self.run.wait_products(outstanding, deps),
                device.fence_async_shared: lambda: None,
            }.get(x, x)
            if callable(x)
            else x
        )

    def _language(self):
        def of_two(of_tensors, of_numbers):
            def function(a, b):
                if torch.is_tensor(a) or torch.is_tensor(b):
                    return of_tensors(torch.as_tensor(a), torch.as_tensor(b))
                return of_numbers(a, b)

            return function

        def layout(*_):
            return None

        return SimpleNamespace(
            program_id=lambda axis: value(self.program),
            num_programs=lambda axis: value(self.programs),
            static_range=range,
            load=load,
            store=store,
            atomic_add=atomic_add,
            full=lambda shape, x, dtype, _: value(torch.full(tuple(shape), x, dtype=dtype)),
            arange=lambda start, stop, _: value(torch.arange(start, stop)),
            where=lambda condition, a, b: value(torch.where(condition, a, b)),
            minimum=of_two(torch.minimum, min),
            maximum=of_two(torch.maximum, max),
            max=lambda x, axis: x.amax(axis),
            sum=lambda x, axis: x.sum(axis),
            exp2=torch.exp2,
            log2=torch.log2,
            reshape=lambda x, shape: x.reshape(shape),
            convert_layout=lambda x, _: x,
            allocate_shared_memory=self._shared,
            warp_specialize=lambda partitions, warps, registers: self.run.specialize(partitions),
            float32=torch.float32,
            int32=torch.int32,
            int64=torch.int64,
            **{
                name: layout
                for name in ("NVMMADistributedLayout", "DotOperandLayout", "SliceLayout", "NVMMASharedLayout")
            },
        )

    @staticmethod
    def _shared(dtype, shape, layout):
        if dtype == torch.int64:  # barriers
            rows = [Barrier() for _ in range(shape[0])]
            return rows[0] if len(shape) == 1 else SimpleNamespace(index=lambda at: rows[int(at)])
        size = torch.Size(shape).numel()
        memory = torch.full((size,), torch.nan, dtype=dtype)
        return Shared(memory, SimpleNamespace(copies=[], reads=[]), 0, size, list(shape), dtype)

    def _barriers(self):
        def init(barrier, count):
            barrier.count = barrier.pending = count

        def wait(barrier, phase):
            self.run.pause(lambda: barrier.phase != phase)

        def expect(barrier, amount):
            barrier.arrive(1, amount)
            self.run.pause()

        def arrive(barrier, count):
            barrier.arrive(count)
            self.run.pause()

        return SimpleNamespace(init=init, wait=wait, expect=expect, arrive=arrive, MBarrierLayout=lambda: "barrier")

    def _copies(self):
        return SimpleNamespace(async_copy_global_to_shared=lambda *args: self.run.copy(*args))
