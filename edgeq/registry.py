"""Names to implementations: built-ins by dotted name, third parties by entry point, one door.

A registry imports an implementation only when it is asked for. Duplicate names are refused and an
unknown name is answered with the nearest known one.
"""

import dataclasses
import difflib
import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from edgeq.errors import RecipeError, RegistryError


@dataclass(frozen=True)
class Plugin:
    """One entry: `target` is ``module:attribute``, `origin` the distribution that brought it."""

    name: str
    target: str
    origin: str


class Registry:
    """The implementations of one entry-point group.

    Parameters
    ----------
    group : entry-point group, such as ``edgeq.quantizers``
    builtins : name → ``module:attribute`` of what edgeq itself brings
    """

    def __init__(self, group: str, builtins: Mapping[str, str]) -> None:
        self.group = group
        self._builtins = dict(builtins)

    @functools.cached_property
    def plugins(self) -> dict[str, Plugin]:
        """Every entry by name, sorted.

        Raises
        ------
        RegistryError
            Two distributions bring the same name.
        """
        found: dict[str, Plugin] = {}
        for name, target in self._builtins.items():
            self._add(found, Plugin(name, target, "edgeq"))
        for entry in metadata.entry_points(group=self.group):
            origin = entry.dist.name if entry.dist is not None else "unknown"
            self._add(found, Plugin(entry.name, entry.value, origin))
        return dict(sorted(found.items()))

    def _add(self, found: dict[str, Plugin], plugin: Plugin) -> None:
        other = found.get(plugin.name)
        if other is not None:
            raise RegistryError(
                f"{self.group}: {plugin.name!r} is brought by both {other.origin} and "
                f"{plugin.origin}. Uninstall one of them."
            )
        found[plugin.name] = plugin

    def names(self) -> list[str]:
        """Return the known names, sorted."""
        return list(self.plugins)

    def get(self, name: str) -> Any:
        """Import and return the implementation called `name`.

        Raises
        ------
        RegistryError
            The name is unknown, or its module cannot be imported.
        """
        plugin = self.plugins.get(name)
        kind = self.group.rpartition(".")[2].removesuffix("s")
        if plugin is None:
            raise RegistryError(unknown_name(kind, name, self.names()))
        module, _, attribute = plugin.target.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise RegistryError(
                f"{kind} {name!r} of {plugin.origin}: {plugin.target} cannot be imported "
                f"({error}). Reinstall {plugin.origin}."
            ) from error

    def make(self, flag: str, spec: str) -> Any:
        """Return an instance of what ``NAME`` or ``NAME:key=value,...`` names.

        Parameters
        ----------
        flag : of the command line, for messages

        Raises
        ------
        RegistryError
            The name is unknown, or its module cannot be imported.
        RecipeError
            It has no such setting, or the value is none of its type or range.
        """
        name, _, settings = spec.partition(":")
        made = self.get(name)
        if not settings:
            return made()
        known = (
            {f.name: f for f in dataclasses.fields(made)} if dataclasses.is_dataclass(made) else {}
        )
        values: dict[str, object] = {}
        for setting in settings.split(","):
            key, _, text = setting.partition("=")
            if not known:
                raise RecipeError(f"{flag} {spec}: {name} has no settings. Give {name} alone.")
            if key not in known:
                raise RecipeError(f"{flag} {spec}: {unknown_name('setting', key, list(known))}")
            values[key] = _parsed(f"{flag} {spec}: {key}", text, type(known[key].default))
        return made(**values)

    def origin_of(self, spec: str) -> str:
        """Return the distribution that brings what a spec names.

        Raises
        ------
        RegistryError
            The name is unknown.
        """
        name = spec.partition(":")[0]
        self.get(name)
        return self.plugins[name].origin


def _parsed(where: str, text: str, kind: type) -> object:
    """Return a setting's value as the type of its default."""
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        return kind(text)
    except (KeyError, ValueError) as error:
        wanted = "true or false" if kind is bool else f"a value like {kind()!r}"
        raise RecipeError(f"{where} is {text!r}, expected {wanted}.") from error


def unknown_name(kind: str, name: str, known: list[str]) -> str:
    """Return the message for an unknown name, with the nearest known one."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {name!r}; known: {', '.join(known)}.{hint}"
