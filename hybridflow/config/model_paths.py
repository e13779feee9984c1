"""Names of models and tokenizers: a folder, or a hub id that is brought here once, before any rank asks for it."""

import re
from collections.abc import Sequence
from pathlib import Path

from hybridflow.errors import ConfigError

_PART = r"\w[\w.-]*"
HUB_ID = re.compile(f"{_PART}(/{_PART})?")
TOKENIZER_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
MODEL_FILES = (*TOKENIZER_FILES, "*.safetensors")
VALUE_HEAD_FILE = "value_head.safetensors"
"""What makes a language model's folder that of a reward model (or of a critic)."""


def could_be_hub_id(name: str) -> bool:
    """`name` or `organisation/name`, unless there is a file or folder of that name here."""
    return HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def local_model(name: str, key: str) -> Path:
    """The folder called `name`, or the hub's snapshot of it. Raises ConfigError naming `key`."""
    folder = _folder(name, key, MODEL_FILES)
    for pattern in ("config.json", "*.safetensors"):
        if folder != Path(name) and not any(folder.glob(pattern)):
            found = f"found {name!r}, whose snapshot {folder} has no {pattern}"
            raise ConfigError(f"{key}: {found}; download it again, or convert its weights to safetensors")
    return folder


def local_tokenizer(name: str, key: str) -> Path:
    """As `local_model`, without the weights."""
    return _folder(name, key, TOKENIZER_FILES)


def _folder(name: str, key: str, files: Sequence[str]) -> Path:
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except (OSError, ValueError) as error:  # no network and not in the cache; no such repository; no valid name
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"{key}: found {name!r}; there is no such folder, and the hub gave no such model ({reason}). Give a "
            f"folder, or run `hf download {name}` where there is a network and bring the cache here (HF_HOME)"
        ) from error
