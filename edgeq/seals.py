"""Hashes of all that a file holds, in its metadata, and a signature over them.

``edgeq.tensors_sha256`` covers every tensor's name, type, shape and data. The signature, Ed25519,
covers that and every other metadata field, the chat template included: a signed file cannot be
changed in any way that llama.cpp would notice. Alignment, order and parts are not covered.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGUFValueType

from converters.gguf_fields import pack_value
from converters.gguf_file import Field, GgufFile, TensorSource
from edgeq.errors import EdgeqError

TENSORS_KEY = "edgeq.tensors_sha256"
SIGNATURE_KEY = "edgeq.signature"
PUBLIC_KEY_KEY = "edgeq.signature_key"
_DOMAIN = "edgeq signature 1"


class SealError(EdgeqError):
    """A key that cannot be used."""


@dataclass(frozen=True)
class Seal:
    """What a file's hashes and signature show.

    Attributes
    ----------
    signed_by : public key, hexadecimal; None: not signed
    lines : what was found, for people
    problems : what does not hold
    """

    signed_by: str | None
    lines: tuple[str, ...]
    problems: tuple[str, ...]


def tensors_sha256(tensors: Iterable[TensorSource]) -> str:
    """Return the hash over names, types, shapes and data of tensors, in any order; hexadecimal."""
    lines = []
    for tensor in tensors:
        data = np.ascontiguousarray(tensor.load()).reshape(-1).view(np.uint8)
        digest = hashlib.sha256(data.data).hexdigest()
        lines.append(json.dumps([tensor.name, tensor.qtype.name, list(tensor.shape), digest]))
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def statement(fields: Mapping[str, Field]) -> bytes:
    """Return what is signed: canonical JSON of the hashes of every field but the signature's."""
    hashes = {
        key: hashlib.sha256(bytes([field.type]) + pack_value(field)).hexdigest()
        for key, field in fields.items()
        if key not in (SIGNATURE_KEY, PUBLIC_KEY_KEY) and not key.startswith("split.")
    }
    content = {"domain": _DOMAIN, "fields": hashes}
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def sealed(
    fields: Mapping[str, Field], tensors: Sequence[TensorSource], key: Path | None
) -> dict[str, Field]:
    """Return metadata with the hash of the tensors, and signed if there is a key.

    Parameters
    ----------
    tensors : each is loaded once
    key : private key, see ``read_private_key``

    Raises
    ------
    SealError
        The key cannot be used.
    """
    string = GGUFValueType.STRING
    out = {k: v for k, v in fields.items() if k not in (SIGNATURE_KEY, PUBLIC_KEY_KEY)}
    out[TENSORS_KEY] = Field(tensors_sha256(tensors), string)
    if key is not None:
        private = read_private_key(key)
        out[SIGNATURE_KEY] = Field(private.sign(statement(out)).hex(), string)
        out[PUBLIC_KEY_KEY] = Field(private.public_key().public_bytes_raw().hex(), string)
    return out


def read_private_key(path: Path) -> Any:
    """Return the Ed25519 private key of a PEM file without a password.

    Raises
    ------
    SealError
        There is none in it, or ``cryptography`` is not installed.
    """
    return _read_key(path, "private", "--sign", "openssl genpkey -algorithm ed25519 -out key.pem")


def read_public_key(path: Path) -> Any:
    """Return the Ed25519 public key of a PEM file.

    Raises
    ------
    SealError
        There is none in it, or ``cryptography`` is not installed.
    """
    return _read_key(
        path, "public", "--public-key", "openssl pkey -in key.pem -pubout -out pub.pem"
    )


def _read_key(path: Path, kind: str, flag: str, hint: str) -> Any:
    ed25519, serialization = _cryptography()
    wanted = getattr(ed25519, f"Ed25519{kind.capitalize()}Key")
    try:
        data = path.read_bytes()
        key = (
            serialization.load_pem_private_key(data, None)
            if kind == "private"
            else serialization.load_pem_public_key(data)
        )
    except OSError as error:
        raise SealError(f"{flag} {path}: cannot be read ({error.strerror or error}).") from error
    except (ValueError, TypeError) as error:  # TypeError: it has a password
        raise SealError(
            f"{flag} {path}: no {kind} key, expected PEM without a password. Make one: {hint}"
        ) from error
    if not isinstance(key, wanted):
        raise SealError(f"{flag} {path}: a key of another kind, expected Ed25519. Make one: {hint}")
    return key


def _cryptography() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise SealError(
            "Signatures need the package cryptography: pip install 'edgeq[sign]'"
        ) from error
    return ed25519, serialization


def check_seal(file: GgufFile, public_key: Path | None) -> Seal:
    """Compare a file with the hash and the signature that it has.

    Parameters
    ----------
    public_key : of whom the signature has to be; None: whether there is one, and it fits, is told

    Raises
    ------
    SealError
        The key cannot be used, or there is a signature and ``cryptography`` is not installed.
    """
    lines, problems = [], []
    recorded = file.value(TENSORS_KEY)
    if recorded is None:
        lines.append("tensor data: no hash of it is recorded")
    elif recorded != tensors_sha256(_sources(file)):
        problems.append("tensor data: is not what the file's own hash says")
    else:
        lines.append("tensor data: as the file's own hash says")
    signature, signer = file.value(SIGNATURE_KEY), file.value(PUBLIC_KEY_KEY)
    if signature is None:
        told = "signature: there is none"
        (lines if public_key is None else problems).append(told)
        return Seal(None, tuple(lines), tuple(problems))
    ed25519, _ = _cryptography()
    expected = None if public_key is None else read_public_key(public_key)
    if expected is not None and expected.public_bytes_raw().hex() != signer:
        problems.append(f"signature: is of {signer}, not of {public_key}")
    elif recorded is None or not _is_valid(ed25519, signer, signature, statement(file.fields)):
        problems.append("signature: does not fit; the metadata was changed after it was made")
    elif expected is None:
        lines.append(f"signature: fits, of {signer}; give --public-key to check whose that is")
    else:
        lines.append(f"signature: fits, of {public_key}")
    return Seal(str(signer), tuple(lines), tuple(problems))


def _is_valid(ed25519: Any, signer: object, signature: object, message: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        key = ed25519.Ed25519PublicKey.from_public_bytes(bytes.fromhex(str(signer)))
        key.verify(bytes.fromhex(str(signature)), message)
    except (InvalidSignature, ValueError):
        return False
    return True


def _sources(file: GgufFile) -> list[TensorSource]:
    return [
        TensorSource(name, tensor.qtype, tensor.shape, lambda name=name: file.read_bytes(name))  # type: ignore[misc]
        for name, tensor in file.tensors.items()
    ]
