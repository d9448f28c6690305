"""Reading and writing models: our own format here, ml-clara's in :mod:`clara_fast.modeling.ml_clara`."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clara_fast.modeling import ml_clara, roles
from clara_fast.modeling.attention import IMPLEMENTATION
from clara_fast.modeling.config import MODEL_TYPE, ClaraConfig, read_config
from clara_fast.modeling.sharding import assign, is_sharded, whole

if TYPE_CHECKING:
    from clara_fast.modeling.clara import Clara

MEMORY_FILE = "memory.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."


def load_base(
    config: ClaraConfig, dtype: torch.dtype | str, device: torch.device | str | None, saved: Path | None = None
) -> tuple[Any, Any]:
    """The base model with our attention, and its tokenizer or the one in the folder ``saved``, if it holds one.

    With ``config.quantization_config`` its linear layers (not the head) are loaded in 8 or 4 bits. No code of the
    model's repository is run.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base_model = config.base_model
    if device is None:
        # torchrun gives every process on a machine a GPU of its own.
        own_gpu = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        device = own_gpu if torch.cuda.is_available() else "cpu"
    try:
        lm: Any = AutoModelForCausalLM.from_pretrained(
            base_model, dtype=dtype, attn_implementation=IMPLEMENTATION, **_quantization(config, device)
        )
        own = saved is not None and (saved / "tokenizer_config.json").is_file()
        # The folder's own config.json is ours, not one that transformers knows.
        tokenizer = AutoTokenizer.from_pretrained(saved if own else base_model, config=lm.config)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"base_model ({base_model!r}) cannot be loaded: {reason}") from error
    if not getattr(lm, "is_quantized", False):
        return lm.to(device), tokenizer
    for module in lm.modules():
        # bitsandbytes would repack 4-bit weights at the first inference on a CPU, with rounded scales, for good.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return lm, tokenizer  # quantised layers lie where they were loaded


def _quantization(config: ClaraConfig, device: torch.device | str) -> dict[str, Any]:
    if config.quantization_config is None:
        return {}
    from importlib.util import find_spec

    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None:
        raise ImportError("a base in 8 or 4 bits needs bitsandbytes: pip install clara-fast[kbit]")
    return {
        "quantization_config": BitsAndBytesConfig.from_dict(dict(config.quantization_config)),
        "device_map": {"": device},
    }


def load_model(
    cls: type[Clara],
    name_or_path: str | Path,
    subfolder: str | None,
    base_model: str | Path | None,
    dtype: torch.dtype | str,
    device: torch.device | str | None,
    revision: str | None,
    compression_rate: int | None,
) -> Any:
    """Find the checkpoint, see whose format it has, and load it."""
    folder = _find(name_or_path, subfolder, revision)
    content = read_config(folder)
    kind = content.get("model_type")
    if kind in (ml_clara.MODEL_TYPE, ml_clara.PISCO_TYPE):
        if compression_rate is not None:
            raise ValueError(
                f"compression_rate ({compression_rate}) cannot be chosen for {folder}, which is no checkpoint of ours"
            )
        return ml_clara.load(cls, folder, content, base_model, dtype, device).eval()
    if kind != MODEL_TYPE:
        raise ValueError(
            f"{folder} holds a {kind!r} model, not a Clara; to start from it as a base use Clara.from_base()"
        )
    config = ClaraConfig.from_dict(content, str(folder / "config.json"))
    if base_model is not None:
        config.base_model = str(base_model)
    rate = config.compression_rate if compression_rate is None else compression_rate
    other_rate = rate != config.compression_rate
    config = dataclasses.replace(config, compression_rate=rate)
    # At another rate the saved tokenizer has the wrong memory tokens.
    lm, tokenizer = load_base(config, dtype, device, saved=None if other_rate else folder)
    model = cls(config, lm, tokenizer, prompts_folder=folder)
    for role in roles.ROLES:
        if (folder / role).is_dir():
            model.add_role(role)
    if not model.roles:
        raise FileNotFoundError(f"{folder} holds no adapter: none of {', '.join(roles.ROLES)} is there")
    load_weights(model, folder, other_rate=other_rate)
    return model.eval()


def load_weights(model: Clara, folder: Path, *, other_rate: bool = False) -> None:
    """Put a saved model's weights into ``model``, which must have the same roles and shapes.

    With ``other_rate`` it may have another number of memory tokens: each starts as the saved one that stands where it
    does among its own.
    """
    for role in sorted(model.roles):
        load_adapter(model, role, read_adapter(folder / role), source=str(folder / role))
    _load_memory(model, folder / MEMORY_FILE, other_rate)


def save_model(model: Clara, path: Path, format: str, adapter_dtype: torch.dtype, is_main_process: bool) -> None:
    """Write into a temporary folder beside ``path``, then rename.

    A new folder appears whole. In one that is there, file after file is replaced: each is the old one or the new,
    whatever is killed when, and other files (a trainer's state) stay. Only the main process writes, but all put the
    parts of a sharded model together.
    """
    contents = {MODEL_TYPE: _content, "ml-clara": ml_clara.content}
    if format not in contents:
        raise ValueError(f"format ({format!r}) must be one of {sorted(contents)}")
    write = contents[format](model, adapter_dtype)
    if not is_main_process:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        write(temporary)
        temporary.chmod(0o755)
        files = [entry for entry in temporary.rglob("*") if entry.is_file()]
        for file in files:
            file.chmod(0o644)  # safetensors writes for its owner alone
        if path.is_dir():
            for role in set(roles.ROLES) - model.roles:  # of a model that was there before
                shutil.rmtree(path / role, ignore_errors=True)
            for file in files:
                target = path / file.relative_to(temporary)
                target.parent.mkdir(exist_ok=True)
                os.replace(file, target)
        else:
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def adapter_state(model: Clara, role: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The role's LoRA matrices by name."""
    return {
        name: whole(parameter.detach()).to("cpu", dtype, copy=True).contiguous()
        for name, parameter in roles.role_parameters(model.lm, role).items()
    }


def load_adapter(model: Clara, role: str, tensors: dict[str, Tensor], source: str = "the adapter") -> None:
    """Copy LoRA matrices into the role. Raises ``ValueError`` naming tensors that are missing, foreign or misshapen."""
    parameters = roles.role_parameters(model.lm, role)
    missing = sorted(set(parameters) - set(tensors))
    foreign = sorted(set(tensors) - set(parameters))
    if missing or foreign:
        what = f"lacks {missing[0]} (and {len(missing) - 1} more)" if missing else f"holds {foreign[0]}, unknown here"
        raise ValueError(f"{source} of role {role} does not fit the base model: it {what}")
    for name, parameter in parameters.items():
        if tensors[name].shape != parameter.shape:
            raise ValueError(
                f"{name} of role {role} has shape {tuple(tensors[name].shape)}, the base model needs "
                f"{tuple(parameter.shape)}"
            )
        assign(parameter, tensors[name])


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """LoRA matrices from a folder in peft's format."""
    if not (folder / ADAPTER_FILE).is_file():
        raise FileNotFoundError(f"{folder} is not an adapter: it holds no {ADAPTER_FILE}")
    return {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in read_safetensors(folder / ADAPTER_FILE).items()}


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a file. Raises ``ValueError`` naming the file if it is truncated or of another kind."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing from the checkpoint")
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or no safetensors file: {error}") from None


def _find(name_or_path: str | Path, subfolder: str | None, revision: str | None) -> Path:
    folder = Path(name_or_path).expanduser()
    if not folder.exists() and len(Path(name_or_path).parts) == 2 and not folder.is_absolute():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        patterns = [f"{subfolder}/*"] if subfolder else None
        try:
            folder = Path(snapshot_download(str(name_or_path), revision=revision, allow_patterns=patterns))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise FileNotFoundError(
                f"{name_or_path} is neither a folder here nor to be had from the hub: {str(error).splitlines()[0]}"
            ) from error
    folder = folder / subfolder if subfolder else folder
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist")
    return folder


def _content(model: Clara, adapter_dtype: torch.dtype) -> Callable[[Path], None]:
    """Collects a model; what is returned writes it to a folder."""
    adapters = {role: adapter_state(model, role, adapter_dtype) for role in sorted(model.roles)}
    memory = _memory_state(model)

    def write(folder: Path) -> None:
        model.config.save(folder)
        model.prompts.save(folder)
        model.tokenizer.save_pretrained(folder)
        for role, tensors in adapters.items():
            (folder / role).mkdir()
            named = {PEFT_PREFIX + name: tensor for name, tensor in tensors.items()}
            save_file(named, folder / role / ADAPTER_FILE, metadata={"format": "pt"})
            config = roles.lora_config(model.config.lora, model.config.base_model)
            config.inference_mode = True
            config.save_pretrained(str(folder / role))
        save_file(memory, folder / MEMORY_FILE, metadata={"format": "pt"})

    return write


def _memory_state(model: Clara) -> dict[str, Tensor]:
    """What a model has beside its adapters: memory embeddings, rows of added tokens, connector."""
    ids = model.text.added_ids
    tables = {"embed_tokens": model.lm.get_input_embeddings(), "lm_head": model.lm.get_output_embeddings()}
    state: dict[str, Tensor] = {"memory_embeddings": model.memory_embeddings}
    state |= {f"{name}.added_rows": whole(layer.weight)[ids] for name, layer in tables.items()}
    if model.own_tables:
        state |= {f"{name}.weight": layer.weight for name, layer in tables.items()}
    if model.connector is not None:
        state |= {f"connector.{name}": p for name, p in model.connector.named_parameters()}
    return {name: whole(tensor.detach()).cpu().clone().contiguous() for name, tensor in state.items()}


def _load_memory(model: Clara, file: Path, other_rate: bool) -> None:
    state = read_safetensors(file)
    if other_rate and "memory_embeddings" in state:
        _spread_memory_tokens(state, len(model.memory_embeddings))
    targets: dict[str, Tensor] = {"memory_embeddings": model.memory_embeddings}
    rows = {"embed_tokens": model.lm.get_input_embeddings(), "lm_head": model.lm.get_output_embeddings()}
    if model.connector is not None:
        targets |= {f"connector.{name}": p for name, p in model.connector.named_parameters()}
    model.own_tables = "embed_tokens.weight" in state
    if model.own_tables:
        targets |= {f"{name}.weight": layer.weight for name, layer in rows.items()}
    for name in (*targets, *(f"{name}.added_rows" for name in rows)):
        if name not in state:
            raise ValueError(f"{file} lacks the tensor {name}")
    for name, target in targets.items():
        if state[name].shape != target.shape:
            raise ValueError(
                f"{name} in {file} has shape {tuple(state[name].shape)}, the model needs {tuple(target.shape)}"
            )
        assign(target, state[name])
    for name, layer in rows.items():
        table = whole(layer.weight.detach())
        table[model.text.added_ids] = state[f"{name}.added_rows"].to(table)
        if is_sharded(layer.weight):
            assign(layer.weight, table)


def _spread_memory_tokens(state: dict[str, Tensor], count: int) -> None:
    """Change ``state`` to ``count`` memory tokens; rows of added tokens are theirs and then the markers'."""
    saved = len(state["memory_embeddings"])
    places = (2 * torch.arange(count) + 1) * saved // (2 * count)
    state["memory_embeddings"] = state["memory_embeddings"][places]
    for name in [name for name in state if name.endswith(".added_rows")]:
        state[name] = torch.cat([state[name][places], state[name][saved:]])
