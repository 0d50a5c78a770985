"""The flat view of a schema: dotted key → type, default, range, help; and what to say about a key that is not there."""

import dataclasses
import difflib
import types
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from backends.errors import UserError

# What other training programs call the same thing. They are hints in an error, not second names.
KNOWN_ELSEWHERE = {
    "samba_compile": "compile",
    "samba_run": "run",
    "learning_rate": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "warmup": "schedule.warmup_steps",
    "lr1": "optimizer.lr",
    "lr2": "schedule.final_ratio",
    "pef": "run.artifact",
    "output_folder": "compile.output_dir",
    "end_early_at_step": "training.max_steps",
    "max_tokens": "training.token_budget",
    "epochs": "training.num_epochs",
    "num_train_epochs": "training.num_epochs",
    "per_device_train_batch_size": "training.batch_size",
    "fp32_ln": "model.norm_dtype",
    "fp32_logits": "model.logits_dtype",
    "fp32_skip_add": "model.residual_dtype",
    "mixedp_attn": "model.compute_dtype",
    "wandb_project": "logging.project",
    "wandb_name": "logging.name",
    "run_name": "logging.name",
    "use_lora": "lora.r",
    "lora_r": "lora.r",
    "lora_alpha": "lora.alpha",
    "target_modules": "lora.match",
}


@dataclasses.dataclass(frozen=True)
class Key:
    """One setting. `default` is `dataclasses.MISSING` when it has to be given."""

    path: str
    type: Any
    default: Any
    help: str = ""
    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None
    allow_empty: bool = False

    @property
    def optional(self) -> bool:
        """Whether null is a value."""
        return types.NoneType in get_args(self.type)

    @property
    def plain_type(self) -> Any:
        """The type without `| None`."""
        if get_origin(self.type) not in (Union, types.UnionType):
            return self.type
        members = [member for member in get_args(self.type) if member is not types.NoneType]
        return members[0] if len(members) == 1 else self.type

    @property
    def choices(self) -> tuple[Any, ...]:
        """The allowed values of a Literal, else ()."""
        return get_args(self.plain_type) if get_origin(self.plain_type) is Literal else ()

    @property
    def members(self) -> tuple[Any, ...]:
        """The types a value may have, null aside."""
        is_union = get_origin(self.plain_type) in (Union, types.UnionType)
        return (
            tuple(kind for kind in get_args(self.plain_type) if kind is not types.NoneType)
            if is_union
            else (self.plain_type,)
        )

    @property
    def type_name(self) -> str:
        """The type as a person reads it: `int`, `cpu|cuda`, `list`."""
        if self.choices:
            return "|".join(map(str, self.choices))
        return " or ".join(_name(member) for member in self.members)

    @property
    def expected(self) -> str:
        """Type and range: `int, at least 1`."""
        bounds = {"above": self.above, "at least": self.at_least, "below": self.below, "at most": self.at_most}
        texts = {word: f"{limit:g}" if isinstance(limit, float) else limit for word, limit in bounds.items()}
        parts = [self.type_name, *(f"{word} {limit}" for word, limit in texts.items() if limit is not None)]
        return ", ".join(parts) + (" or null" if self.optional else "")


def _name(kind: Any) -> str:
    plain = get_origin(kind) or kind
    return getattr(plain, "__name__", str(plain))


KEY_METADATA = {field.name for field in dataclasses.fields(Key)} - {"path", "type", "default"}


def keys_of(schema: type, plugins: Mapping[str, str] | None = None, prefix: str = "") -> dict[str, Key]:
    """Every key of a (nested) dataclass. `plugins` names the plugin of a section ("optimizer": "adamw").

    A section may have a plugin: a field with metadata {"plugin": package}, whose `load(name).Config` gives more keys.
    """
    return {key.path: key for key in _walk(schema, plugins or {}, prefix)}


def _walk(schema: type, plugins: Mapping[str, str], prefix: str) -> Iterator[Key]:
    annotations = get_type_hints(schema)
    for field in dataclasses.fields(schema):
        path = prefix + field.name
        if dataclasses.is_dataclass(annotations[field.name]):
            yield from _walk(annotations[field.name], plugins, path + ".")
        elif "plugin" in field.metadata:
            name = plugins.get(prefix[:-1]) or schema.name  # type: ignore[attr-defined]
            yield from _walk(plugin_config(field.metadata["plugin"], name), plugins, prefix)
        elif not field.metadata.get("free"):
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            known = {name: field.metadata[name] for name in KEY_METADATA if name in field.metadata}
            yield Key(path, annotations[field.name], default, **known)


def plugin_packages(schema: type) -> dict[str, str]:
    """Section → the package its plugins lie in."""
    return {
        section.name: field.metadata["plugin"]
        for section in dataclasses.fields(schema)
        if dataclasses.is_dataclass(kind := get_type_hints(schema)[section.name])
        for field in dataclasses.fields(kind)
        if "plugin" in field.metadata
    }


def plugin_config(package: str, name: str) -> type:
    """The dataclass of settings that plugin `name` of `package` has; UserError for an unknown name."""
    config: type = import_module(package).load(name).Config
    return config


def sections_of(keys: Iterable[str]) -> tuple[str, ...]:
    """The sections that dotted `keys` lie in, in their order."""
    return tuple(dict.fromkeys(key.rpartition(".")[0] for key in keys if "." in key))


def unknown_key(path: str, keys: Mapping[str, Key], origin: str, can_add: bool) -> UserError:
    """The error for a key the schema lacks: the nearest ones by full path, or what its section holds."""
    section = path.rpartition(".")[0]
    near = _nearest(path, keys)
    if path in sections_of(keys):
        inside = _listed(key for key in keys if key.startswith(path + "."))
        return UserError(f"'{path}' is a section{origin}. Expected one of its keys: {inside}.")
    if near:
        hint = f" Did you mean {' or '.join(repr(key) for key in near)}?"
    elif section in sections_of(keys):
        hint = f" Section '{section}' has: {_listed(key for key in keys if key.startswith(section + '.'))}."
    elif sections_of(keys):
        hint = f" Sections: {_listed(sections_of(keys))}."
    else:
        hint = f" Settings: {_listed(keys)}."
    add = f" To add a setting of your own write +{path}=VALUE." if can_add else ""
    return UserError(f"Unknown setting '{path}'{origin}.{hint}{add} See --help.")


def _nearest(path: str, keys: Mapping[str, Key]) -> list[str]:
    """Up to three keys that `path` may stand for: a name known elsewhere, the same last part, or similar letters."""
    section, _, last = path.rpartition(".")
    renamed = f"{KNOWN_ELSEWHERE.get(section, section)}.{last}"
    elsewhere = [key for key in (KNOWN_ELSEWHERE.get(last), renamed) if key and key in keys]
    if elsewhere:
        return elsewhere[:1]
    same_last = [key for key in keys if key.rpartition(".")[2] == last]
    if same_last:
        return list(difflib.get_close_matches(path, same_last, n=3, cutoff=0.0))
    lasts = {key.rpartition(".")[2]: key for key in keys if not section or key.startswith(section + ".")}
    if not section:
        lasts |= {name: name for name in sections_of(keys)}
    near = [lasts[name] for name in difflib.get_close_matches(last, lasts, n=1, cutoff=0.65)]
    if near or section in sections_of(keys):
        return near
    return difflib.get_close_matches(path, [*keys, *sections_of(keys)], n=1, cutoff=0.7)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
