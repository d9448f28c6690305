"""The two operator namespaces and the loading of the native library.

``torch.ops.clara_fast.*`` are the public operators: schema, fake, autograd and dispatch are Python, so they
exist without any native code. ``torch.ops.clara_fast_native.*`` are raw kernels: the schemas below are defined
here, and ``lib/clara_fast_cpu.so`` and ``lib/clara_fast_cuda.so`` implement those that they have. An operator
without its kernel runs in plain PyTorch. On GPUs the operators call those kernels or the launchers of
``clara_fast.triton_kernels``, imported at first use.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import torch
from torch._C._functorch import TransformType, maybe_current_level, peek_interpreter_stack
from torch.autograd import forward_ad

LAYOUT_SCHEMA = "Tensor q_start, Tensor q_len, Tensor kv_start, Tensor kv_len, Tensor contexts, float scale"
NATIVE_SCHEMAS = {
    "pool_memory_forward": (
        "(Tensor hidden, Tensor offsets, int num_memory, Tensor? norm_weight, float norm_eps) "
        "-> (Tensor, Tensor, Tensor)"
    ),
    "pool_memory_backward": (
        "(Tensor grad_memory, Tensor grad_mse, Tensor difference, Tensor hidden, Tensor offsets, int num_memory, "
        "Tensor? norm_weight, float norm_eps) -> (Tensor, Tensor)"
    ),
    "cosine_topk": "(Tensor queries, Tensor keys, int k, Tensor? key_scales) -> (Tensor, Tensor)",
    "cosine_topk_parts": (
        "(Tensor queries, Tensor[] keys, int k, Tensor[] key_scales, Tensor[] allowed, bool release) "
        "-> (Tensor, Tensor)"
    ),
    # For CUDA graphs: everything it writes is given, workspace in bytes (uint8 [cosine_topk_workspace(...)]).
    "cosine_topk_out": (
        "(Tensor queries, Tensor keys, int k, Tensor? key_scales, Tensor(a!) scores, Tensor(b!) indices, "
        "Tensor(c!) workspace) -> ()"
    ),
    "cosine_topk_workspace": "(Tensor queries, Tensor keys, int k) -> int",
    "select_memory_forward": (
        "(Tensor query, Tensor keys, Tensor memory, int k, float temperature, Tensor? valid) "
        "-> (Tensor, Tensor, Tensor)"
    ),
    "select_memory_backward": (
        "(Tensor grad_selected, Tensor grad_scores, Tensor query, Tensor keys, Tensor memory, "
        "Tensor indices, Tensor scores, float temperature, float taken_logit, Tensor? valid) "
        "-> (Tensor, Tensor, Tensor)"
    ),
    "cuda_has_image": "(Tensor probe) -> bool",
    "few_rows_linear": ("(Tensor x, Tensor weight, Tensor? bias, Tensor? down, Tensor? up, float scaling) -> Tensor"),
    "compressed_context_attention_forward": (
        f"(Tensor query, Tensor key, Tensor value, {LAYOUT_SCHEMA}, Tensor(a!)? lse) -> Tensor"
    ),
    "compressed_context_attention_backward": (
        "(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
        f"{LAYOUT_SCHEMA}, Tensor(a!) grad_query, Tensor(b!) grad_key, Tensor(c!) grad_value) -> ()"
    ),
}
KERNEL_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
FLOAT_DTYPES = KERNEL_DTYPES | {torch.float64}

library = torch.library.Library("clara_fast", "DEF")
_native_library = torch.library.Library("clara_fast_native", "DEF")
_missing_warned: set[str] = set()
_images: dict[int, bool] = {}


def define(
    schema: str,
    implementation: Callable,
    *,
    fake: Callable,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
) -> Callable:
    """Registers one operator of ``clara_fast`` for every device and returns its overload.

    One without ``backward`` is the gradient of another, and has none itself: asking for it is an error, since torch
    would go on without it.
    """
    name = schema.partition("(")[0]

    def no_second_derivative(ctx, *grads):
        raise RuntimeError(
            f"clara_fast::{name} has no derivative: differentiate once, or clara_fast.ops.reference's "
            f"{name.removesuffix('_backward')} as often as you like"
        )

    def no_batching(*args):
        raise RuntimeError(_no_transform(name, "vmap"))

    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, implementation, "CompositeExplicitAutograd")
    library.impl(name, no_batching, "FuncTorchBatched")
    torch.library.register_fake(f"clara_fast::{name}", fake, lib=library)
    torch.library.register_autograd(
        f"clara_fast::{name}", backward or no_second_derivative, setup_context=setup_context, lib=library
    )
    return getattr(torch.ops.clara_fast, name).default


def _find_binary(name: str) -> Path | None:
    # An editable install keeps the package's sources and its libraries in two folders.
    import clara_fast

    folders = (Path(__file__).parents[1], *map(Path, clara_fast.__path__))
    return next((path for folder in folders if (path := folder / "lib" / name).is_file()), None)


def _load_binary(name: str, device: str) -> dict[str, Callable]:
    """Loads one library of kernels, if it is there; the kernels that ``device`` has then."""
    path = _find_binary(name)
    if path is not None:
        try:
            torch.ops.load_library(path)
        except (OSError, RuntimeError) as error:
            warnings.warn(f"{path} does not load ({error}); its operators run in plain PyTorch", stacklevel=2)
    return {
        name: getattr(torch.ops.clara_fast_native, name).default
        for name in NATIVE_SCHEMAS
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"clara_fast_native::{name}", device)
    }


for _name, _signature in NATIVE_SCHEMAS.items():
    _native_library.define(_name + _signature)
native = _load_binary("clara_fast_cpu.so", "CPU")
native_cuda = _load_binary("clara_fast_cuda.so", "CUDA") if torch.version.cuda else {}


def check_tensors(names: str, *tensors: object) -> None:
    """Raises a TypeError for what is no tensor, and a ValueError for one on another device than the first."""
    device = getattr(tensors[0], "device", None)
    for tensor in tensors:
        if not isinstance(tensor, torch.Tensor) or tensor.device != device:
            break
    else:
        return
    for name, tensor in zip(names.split(), tensors, strict=True):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
        if tensor.device != device:
            raise ValueError(f"{name} must be on the device of {names.split()[0]} ({device}), is on {tensor.device}")


def autocasts(tensor: torch.Tensor) -> bool:
    """Whether autocast is on for the device of ``tensor``."""
    if not torch._C._is_any_autocast_enabled():
        return False
    return not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type)


def check_integer(name: str, value: object) -> None:
    if isinstance(value, float):
        raise TypeError(f"{name} must be an integer, got {value}")


def _no_transform(name: str, transform: str) -> str:
    return (
        f"clara_fast::{name} does not work under torch.func.{transform}: give it the whole batch, and differentiate "
        "with torch.autograd"
    )


def refuse_transforms(name: str, *tensors: torch.Tensor | None) -> None:
    """Says so where torch would drop a tangent or ask for what no operator can give.

    Raises:
        RuntimeError: under torch.func's transforms, and for tensors with a tangent of forward-mode differentiation.
    """
    if torch.compiler.is_compiling():
        return
    if maybe_current_level() is not None:
        transform = peek_interpreter_stack().key()
        if transform != TransformType.Functionalize:
            raise RuntimeError(_no_transform(name, transform.name.lower()))
    if forward_ad._current_level >= 0:
        for tensor in tensors:
            if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
                raise RuntimeError(f"clara_fast::{name} has no forward-mode derivative: use torch.autograd.grad")


def is_plain_inference(tensor: torch.Tensor) -> bool:
    """Whether an operator may call its implementation itself: nothing differentiates, transforms, traces or intercepts.

    The dispatcher's way to a Python implementation costs 8 us in inference mode and 24 us under no_grad.
    """
    return not (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or maybe_current_level() is not None
        or forward_ad._current_level >= 0
        or type(tensor) is not torch.Tensor
        or tensor.is_meta
        or torch._C._len_torch_dispatch_stack()
    )


def native_kernel(name: str, *tensors: torch.Tensor) -> Callable | None:
    """The CPU kernel ``name``, if there is one that takes these tensors: of one dtype that it knows."""
    dtype = tensors[0].dtype
    if dtype not in KERNEL_DTYPES or not tensors[0].is_cpu:
        return None
    kernel = native.get(name)
    if kernel is None:
        _warn_missing(name, "CPU")
        return None
    return kernel if _alike(dtype, tensors) else None


def cuda_kernel(name: str, *tensors: torch.Tensor) -> Callable | None:
    """The CUDA C++ kernel ``name``, if there is one for this GPU and these tensors: of one dtype that it knows."""
    dtype = tensors[0].dtype
    if dtype not in KERNEL_DTYPES or not tensors[0].is_cuda:
        return None
    kernel = native_cuda.get(name)
    if kernel is None:
        _warn_missing(name, "CUDA")
        return None
    return kernel if _has_image(tensors[0]) and _alike(dtype, tensors) else None


def triton_kernels(name: str, *tensors: torch.Tensor) -> ModuleType | None:
    """The module of Triton launchers ``name``, if Triton is there and takes these tensors: of one known dtype."""
    dtype = tensors[0].dtype
    if not tensors[0].is_cuda or dtype not in KERNEL_DTYPES or not _alike(dtype, tensors):
        return None
    return _import_triton_kernels(name)


@lru_cache(maxsize=8)
def _import_triton_kernels(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(f"clara_fast.triton_kernels.{name}")
    except ImportError as error:
        warnings.warn(f"Triton is missing ({error}): {name} runs in plain PyTorch on GPUs", stacklevel=4)
        return None


def _alike(dtype: torch.dtype, tensors: tuple[torch.Tensor, ...]) -> bool:
    # A loop, not all(): it is part of every call.
    for tensor in tensors:  # noqa: SIM110
        if tensor.dtype is not dtype or not tensor.numel():
            return False
    return True


def _has_image(tensor: torch.Tensor) -> bool:
    """Whether the CUDA library holds machine code for the GPU of ``tensor``; asked, and explained, once per GPU."""
    index = tensor.device.index
    if index not in _images:
        _images[index] = native_cuda["cuda_has_image"](tensor)
        if not _images[index]:
            from clara_fast import _native

            major, minor = torch.cuda.get_device_capability(index)
            warnings.warn(
                f"clara_fast's CUDA library was built for {' '.join(_native.build_info()['cuda_architectures'])} and "
                f"holds no code for GPU {index} (sm_{major}{minor}): its operators run in PyTorch there",
                stacklevel=5,
            )
    return _images[index]


def _warn_missing(name: str, device: str) -> None:
    if device not in _missing_warned:
        _missing_warned.add(device)
        warnings.warn(
            f"clara_fast's native {device} library has no kernel {name}: it and others like it run in PyTorch",
            stacklevel=4,
        )
