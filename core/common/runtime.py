"""Where a program runs: device, precision, compilation and ranks, each chosen for a stated reason."""

import ctypes
import os
import platform
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache

import torch
import torch.distributed as distributed

from core.common.errors import UserError
from core.common.expressions import excerpt
from core.common.printing import counted

# Dense bfloat16 peak, operations per second, by vendors' data sheets; any other device is measured.
PEAK_RATES = {'H200': 989e12, 'H100': 989e12, 'A100': 312e12, 'L40S': 362e12, 'RTX 4090': 165e12}
PAYING_ITERATIONS = 200  # compiling costs about this many iterations of a small model
COMPILING_SECONDS = 60  # roughly, for a stage of training or the network of sampling; a line says so first
PAYING_WIDTH = 256  # a narrower model gains nothing from bfloat16 on a CPU with AMX
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


def resolve_device(name: str) -> str:
    """'auto' becomes 'cuda' if there is a CUDA GPU, 'mps' if there is an Apple GPU, else 'cpu'. UserError if the
    machine lacks the device."""
    present = {'cuda': torch.cuda.is_available(), 'mps': torch.backends.mps.is_available(), 'cpu': True}
    if name == 'auto':
        return next(kind for kind, there in present.items() if there)
    kind = name.split(':')[0]
    if kind not in present:
        raise UserError(f'device is {name!r}, but this program runs on cpu, cuda or mps; take --device=auto')
    if not present[kind]:
        raise UserError(f'device is {name!r}, but this machine has no usable GPU of that kind; take --device=cpu')
    if ':' in name and not name.removeprefix('cuda:').isdigit():
        raise UserError(f'device is {name!r}, but should be cpu, mps, cuda or cuda:0 and so on')
    if name.startswith('cuda:') and int(name[5:]) >= torch.cuda.device_count():
        raise UserError(f'device is {name!r}, but this machine has {torch.cuda.device_count()} GPUs')
    return name


def use_precision(device: torch.device, dtype: str) -> None:
    """Set how matrices are multiplied; every script calls this before its first product. dtype: its option. UserError
    if it is float16 and the device cannot compute in it. From now on a CUDA GPU multiplies float32 matrices as TF32,
    with a float32 sum."""
    if dtype == 'float16' and device.type != 'cuda':
        raise UserError("dtype is 'float16', but only CUDA GPUs compute in it; take --dtype=float32 or "
                        '--dtype=bfloat16')
    if device.type == 'cuda':
        torch.set_float32_matmul_precision('high')
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans again for every length, some 60 ms each time


def synchronize(device: torch.device) -> None:
    """Wait for `device`, so that a clock can be read."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    elif device.type == 'mps':
        torch.mps.synchronize()


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor`, which is on the processor, moved to `device`; to a CUDA GPU from pinned memory, without waiting."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == 'cuda' else tensor.to(device)


def has_foreach(device: torch.device) -> bool:
    """Whether torch has operations on lists of tensors for `device`."""
    return device.type != 'mps'


@dataclass
class Runtime:
    """The choices of one process. `reasons` are lines that say what was chosen and why."""

    device: torch.device
    dtype: torch.dtype
    compile: bool
    rank: int = 0
    world_size: int = 1
    reasons: list[str] = field(default_factory=list)

    @property
    def is_writer(self) -> bool:
        """Whether this rank prints and saves."""
        return self.rank == 0

    def autocast(self) -> AbstractContextManager:
        """Runs matrix products in `dtype`; does nothing in float32."""
        if self.dtype is torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def synchronize(self) -> None:
        """Wait for the device, so that a clock can be read."""
        synchronize(self.device)

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """`values` added over all ranks."""
        if self.world_size == 1:
            return values
        values = values.clone()
        distributed.all_reduce(values)
        return values

    def total_count(self, count: int) -> int:
        """A host-side count added over all ranks."""
        if self.world_size == 1:
            return count
        return int(self.total(torch.tensor([count], dtype=torch.int64, device=self.device)))

    def matrix_dtype(self) -> torch.dtype:
        """What the optimizer multiplies matrices in: bfloat16 if the forward pass uses it, else float32."""
        return torch.bfloat16 if self.dtype is torch.bfloat16 else torch.float32

    def matrix_rate(self) -> tuple[float, str]:
        """(operations per second that count as an mfu of 1, words that say where this figure comes from)."""
        if self.device.type == 'cuda' and self.dtype is not torch.float32:
            name = torch.cuda.get_device_name(self.device)
            for known, rate in PEAK_RATES.items():
                if known in name:
                    return rate, f"{name}'s peak of {rate / 1e12:.0f} TFLOP/s"
        rate = measure_matrix_rate(self.device, self.dtype)
        return rate, f"this machine's measured matrix rate of {rate / 1e9:.0f} GFLOP/s"


def start_runtime(device: str, dtype: str, compile: bool | None, *, width: int, iterations: int,
                  backend: str | None = None) -> Runtime:
    """Choose precision and compilation for a model of `width` channels and join the other ranks, if any.

    dtype 'auto' and compile None choose what is fastest; other values are used as they are. backend None: nccl on a
    GPU, gloo on a CPU. UserError if the machine cannot do it.
    """
    use_precision(torch.device(device), dtype)
    rank, world_size = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    if world_size > 1 and device == 'mps':
        raise UserError(f'device is mps, but {world_size} ranks cannot share an Apple GPU; start one, or take '
                        f'--device=cpu')
    if world_size > 1:
        backend = backend or ('nccl' if device.startswith('cuda') else 'gloo')
        if device == 'cuda':
            device = f'cuda:{os.environ["LOCAL_RANK"]}'
            torch.cuda.set_device(device)
        distributed.init_process_group(backend)
    runtime = Runtime(torch.device(device), torch.float32, False, rank, world_size)
    runtime.reasons.append(f'device {device}: {_described(runtime.device)}')
    runtime.dtype, reason = _choose_dtype(runtime.device, dtype, width)
    runtime.reasons.append(f'dtype {str(runtime.dtype).removeprefix("torch.")}: {reason}')
    runtime.compile, reason = _choose_compile(runtime.device, compile, iterations)
    runtime.reasons.append(f'compile {runtime.compile}: {reason}')
    if world_size > 1:
        runtime.reasons.append(f'{world_size} ranks over {backend}')
    if runtime.device.type == 'cpu':
        torch.set_flush_denormal(True)  # numbers near zero would cost a hundred times as much
        _keep_freed_memory()
    _repeat_exactly(runtime.device)
    return runtime


def _repeat_exactly(device: torch.device) -> None:
    """Let two runs of one seed on one machine be the same to the last bit, compiled or not.

    Otherwise sums are added in the order in which threads finish: the gradient of the embedding in a compiled step,
    and on a GPU also those of attention and of picked positions. cuBLAS needs its own workspace for this, and reads its
    size from the environment when it starts. cumsum has no deterministic variant on a GPU, but draws along short rows
    need none.
    """
    if device.type == 'cuda':
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        warnings.filterwarnings('ignore', message='cumsum_cuda_kernel does not have a deterministic implementation')
    if device.type in ('cpu', 'cuda'):
        torch.use_deterministic_algorithms(True, warn_only=device.type == 'cuda')
        torch.utils.deterministic.fill_uninitialized_memory = False  # a guard against bugs; it costs a pass


def _described(device: torch.device) -> str:
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    return 'Apple GPU; float64 on the processor' if device.type == 'mps' else f'{torch.get_num_threads()} threads'


def stop_runtime(runtime: Runtime) -> None:
    """Leave the other ranks and the process as it was before."""
    torch.set_flush_denormal(False)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    if runtime.world_size > 1:
        distributed.destroy_process_group()


# mallopt(3) of glibc: which freed blocks go back to the system at once, and how much may lie unused at the heap's end.
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
_LARGEST_KEPT, _MOST_KEPT = 1 << 30, 2 ** 31 - 1  # bytes; the latter is the most that mallopt takes


def _keep_freed_memory() -> None:
    """Let this process keep the memory that a step frees for the next step, unless the environment says otherwise.

    By default glibc returns every block of more than 32 MiB to the system. When the next step takes it, the system
    clears all its pages again: some 300,000 page faults a step of 6 layers and 384 channels (docs/performance.md).
    """
    if platform.libc_ver()[0] == 'glibc' and not {'MALLOC_MMAP_THRESHOLD_', 'MALLOC_TRIM_THRESHOLD_'} & set(os.environ):
        library = ctypes.CDLL(None)
        library.mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT)
        library.mallopt(_TRIM_THRESHOLD, _MOST_KEPT)


def is_lost_rank(error: RuntimeError) -> bool:
    """Whether `error` says that another rank has gone away or not answered in time. gloo and NCCL share no error class.
    """
    return isinstance(error, distributed.DistError) or any(words in str(error) for words in _LOST_RANK)


_LOST_RANK = ('Connection closed by peer', 'Connection reset by peer', 'Broken pipe', 'Timed out waiting', 'Socket ')


def is_compile_error(error: BaseException) -> bool:
    """Whether `error` comes from torch.compile, its compiler or its worker processes."""
    seen: BaseException | None = error
    while seen is not None:
        if type(seen).__module__.startswith(('torch._dynamo', 'torch._inductor', 'torch._functorch',
                                             'concurrent.futures',
                                             'subprocess')):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


@contextmanager
def handling(signals: Iterable[signal.Signals], handler: Callable[[int, object], None]) -> Iterator[None]:
    """Let `handler` handle the signals inside the block. A signal that was ignored when the process started stays
    ignored; nohup needs this when its window is closed. Ctrl-C is always handled."""
    before = {number: signal.getsignal(number) for number in signals}
    before = {number: old for number, old in before.items() if number == signal.SIGINT or old is not signal.SIG_IGN}
    try:
        for number in before:
            signal.signal(number, handler)
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the device is known to multiply bfloat16 matrices faster than float32 ones: a CUDA GPU since Ampere, a
    CPU with AMX."""
    if device.type == 'cuda':
        return torch.cuda.get_device_capability(device)[0] >= 8
    return device.type == 'cpu' and torch.cpu._is_amx_tile_supported()


def _choose_dtype(device: torch.device, dtype: str, width: int) -> tuple[torch.dtype, str]:
    if dtype != 'auto':
        return DTYPES[dtype], 'as asked for'
    if not has_fast_bfloat16(device):
        return torch.float32, 'this processor has no fast bfloat16'
    if device.type == 'cpu' and width < PAYING_WIDTH:
        return torch.float32, f'bfloat16 gains nothing below {PAYING_WIDTH} channels on a CPU'
    return torch.bfloat16, 'this processor has fast bfloat16'


def _choose_compile(device: torch.device, wanted: bool | None, iterations: int) -> tuple[bool, str]:
    if wanted is False:
        return False, 'as asked for'
    if wanted is None and device.type == 'mps':
        return False, 'torch.compile is new on Apple GPUs (ask for it with --compile=True)'
    if wanted is None and iterations < PAYING_ITERATIONS:
        return False, f'{counted(iterations, "iteration")} {"is" if iterations == 1 else "are"} over before compiling pays'
    problem = compile_problem(device.type)
    if problem is not None:
        return False, problem
    return True, 'as asked for' if wanted else 'fuses element-wise work'


def compile_problem(device: str) -> str | None:
    """Why torch.compile does not work on 'cpu' or 'cuda', or None if it works. Compiles a tiny kernel once to find out.

    A compiler may exist and still lack something: Python's headers, OpenMP's headers, a folder that it can write to.
    """
    if device == 'cpu' and not has_compiler():
        return 'there is no C++ compiler (install g++ for faster steps)'
    return _kernel_problem(device)


@cache
def _kernel_problem(device: str) -> str | None:
    try:
        from torch._inductor.utils import fresh_cache  # a kernel from an earlier day would prove nothing

        with fresh_cache():
            torch.compile(_tiny_kernel, dynamic=False)(torch.ones(64, 64, device=device))
    except Exception as error:
        return f'torch.compile does not work here ({_compiler_words(error)}); install what it lacks for faster steps'
    return None


def _tiny_kernel(numbers: torch.Tensor) -> torch.Tensor:
    return (numbers.sin() + 1).exp()


def _compiler_words(error: Exception) -> str:
    """The line of a compiler's output that says what is wrong."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return excerpt(next((line for line in lines if 'error:' in line), lines[0]))


def has_compiler() -> bool:
    """Whether a C++ compiler is at hand for torch.compile on the CPU."""
    return any(shutil.which(name) for name in (os.environ.get('CXX'), 'g++', 'clang++') if name)


def measure_matrix_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Operations per second of square matrix products in `dtype`: the median of as many as fit into `seconds`."""
    size = {'cuda': 8192, 'mps': 4096}.get(device.type, 1024)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times, begin = [], time.perf_counter()
    while time.perf_counter() - begin < seconds or len(times) < 4:
        start = time.perf_counter()
        left @ right
        synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * size ** 3 / sorted(times[1:])[len(times[1:]) // 2]
