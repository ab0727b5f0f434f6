"""What is done to which layer: `LayerRecipe`, `Recipe`, their JSON form and the presets.

Owns the names of kinds and methods and the rules that say which go together. Knows nothing of how they are computed.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any, cast

from marlin.errors import message, require
from marlin.formats import GROUP_SIZES

METHODS: dict[str, tuple[str, ...]] = {
    "w4a16_sp24": ("sparsegpt", "sparsegpt_rtn", "wanda", "magnitude"),
    "w4a16_dense": ("gptq", "rtn"),
    "sp24": ("sparsegpt", "wanda", "magnitude"),
    "skip": ("none",),
}
"""Methods of each kind, the default first. Kind `sp24` prunes and leaves floating-point weights: it has no packed form
and serves to measure what pruning alone costs."""

PACKED = ("w4a16_sp24", "w4a16_dense")
ORDERS = ("natural", "activation")

HELPS: dict[str, Any] = {"order": "activation", "correct": 0.5, "refine": 3}
"""What lowers perplexity at the cost of some more time: the default of the sweeps that round, sparsegpt and gptq."""
PLAIN: dict[str, Any] = {"order": "natural", "correct": 0.0, "refine": 0}
"""The methods as published: the default of all others."""

SKIPPED = ("*lm_head", "*embed_*", "*wte", "*wpe", "*.gate", "*.router")


@dataclass(frozen=True)
class LayerRecipe:
    """What is done to one linear layer.

    kind: "w4a16_sp24" (2:4 INT4), "w4a16_dense" (INT4), "sp24" (2:4 only, not packable) or "skip".
    group_size: 32, 64, 128 or -1 (one scale per row), counted in dense columns.
    method: one of `METHODS[kind]`; None takes the first.
    damping: share of the mean of the Hessian's diagonal that is added to it, at least 0.
    search_steps: candidates of the clip search of each scale; 0 takes the range.
    order: "natural", or "activation": groups of columns, and fours within them, are swept by falling second moment.
    correct: share, 0..1, of the error that the layer's inputs already carry which its weights make up for.
    refine: passes of coordinate descent over mask, codes and scales after the sweep.
    order, correct and refine, where not given: `HELPS` for methods sparsegpt and gptq of the INT4 kinds, else `PLAIN`.
    low_rank: rank of the correction that is fitted to the remaining error and saved with the layer in 16 bits; 0: none.
    strict: raise where K is not a multiple of group_size, instead of taking the next smaller legal size with a note.
    """

    kind: str = "w4a16_sp24"
    group_size: int = 128
    method: str | None = None
    damping: float = 0.01
    search_steps: int = 20
    order: str = cast(str, None)
    correct: float = cast(float, None)
    refine: int = cast(int, None)
    low_rank: int = 0
    strict: bool = False

    def __post_init__(self) -> None:
        op = "LayerRecipe"
        require(self.kind in METHODS, op, f"kind must be one of {tuple(METHODS)}", repr(self.kind))
        if self.method is None:
            object.__setattr__(self, "method", METHODS[self.kind][0])
        rounds = self.kind in ("w4a16_sp24", "w4a16_dense") and self.method in ("sparsegpt", "gptq")
        for name, value in (HELPS if rounds else PLAIN).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        require(
            self.method in METHODS[self.kind],
            op,
            f"method must be one of {METHODS[self.kind]} for kind {self.kind!r}",
            repr(self.method),
        )
        require(
            self.group_size in GROUP_SIZES,
            op,
            f"group_size must be one of {GROUP_SIZES}",
            f"group_size={self.group_size}",
        )
        require(0 <= self.damping <= 1, op, "damping must lie in 0..1", f"damping={self.damping}")
        require(self.search_steps >= 0, op, "search_steps must be at least 0", f"search_steps={self.search_steps}")
        require(self.order in ORDERS, op, f"order must be one of {ORDERS}", repr(self.order))
        require(0 <= self.correct <= 1, op, "correct must lie in 0..1", f"correct={self.correct}")
        require(self.low_rank >= 0, op, "low_rank must be at least 0", f"low_rank={self.low_rank}")
        packed = self.kind in PACKED or self.low_rank == 0
        require(packed, op, f"only kinds {', '.join(PACKED)} take a low_rank", f"{self.kind}, low_rank={self.low_rank}")
        require(self.refine >= 0, op, "refine must be at least 0", f"refine={self.refine}")

    def with_method(self, method: str) -> LayerRecipe:
        """The same by another method, with order, correct and refine as they are by default."""
        unset: dict[str, Any] = dict.fromkeys(HELPS)
        return replace(self, method=method, **unset)

    @property
    def needs_hessian(self) -> bool:
        """Whether the method reads the calibration inputs."""
        if self.kind == "skip":
            return False
        corrects = self.refine > 0 or self.correct > 0 or self.low_rank > 0
        return self.method not in ("magnitude", "rtn") or corrects

    def group_size_for(self, name: str, n: int, k: int) -> tuple[int, str]:
        """The legal group size for a layer [n, k], and a note where it is not the one asked for.

        Raises: ValueError (n or k that no format takes, or a misfit under strict).
        """
        op = f"compress {name}"
        fix = "Give it kind 'skip' in the recipe."
        require(n % 8 == 0, op, "out_features must be a multiple of 8", f"{n}", fix)
        require(k % 32 == 0, op, "in_features must be a multiple of 32", f"{k}", fix)
        if self.group_size == -1 or k % self.group_size == 0:
            return self.group_size, ""
        require(
            not self.strict,
            op,
            f"in_features must be a multiple of group_size={self.group_size}",
            f"{k}",
            "Choose a smaller group_size, or set strict to false.",
        )
        size = max(g for g in GROUP_SIZES if 0 < g < self.group_size and k % g == 0)
        return size, f"group_size {size} instead of {self.group_size}: in_features is {k}"


@dataclass(frozen=True)
class Recipe:
    """An ordered list of rules (pattern, LayerRecipe); the first pattern that matches a module name decides.

    Patterns are shell-style (`fnmatch`, case-sensitive) and match the whole name, e.g. "*.mlp.down_proj". Layers that
    no rule names get `default`, except heads, embeddings and routers (`SKIPPED`), which are left alone unless a rule
    names them. Only linear layers inside the decoder blocks are compressed.
    """

    rules: tuple[tuple[str, LayerRecipe], ...] = ()
    default: LayerRecipe = LayerRecipe()

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", tuple((str(p), r) for p, r in self.rules))

    def layer(self, name: str) -> LayerRecipe:
        """The recipe of the module with this name."""
        for pattern, layer in self.rules:
            if fnmatchcase(name, pattern):
                return layer
        if any(fnmatchcase(name, pattern) for pattern in SKIPPED):
            return LayerRecipe(kind="skip")
        return self.default

    def to_json(self) -> str:
        """The JSON form, stable: equal recipes give equal text."""
        rules = [{"pattern": pattern, **asdict(layer)} for pattern, layer in self.rules]
        return json.dumps({"version": 1, "rules": rules, "default": asdict(self.default)}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Read the JSON form. Raises: ValueError that names the field at fault."""
        op = "Recipe.from_json"
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(message(op, "the recipe must be JSON", str(error))) from error
        require(isinstance(data, dict), op, "the recipe must be a JSON object", type(data).__name__)
        unknown = sorted(set(data) - {"version", "rules", "default"})
        require(not unknown, op, "fields must be version, rules, default", f"{unknown}")
        require(data.get("version", 1) == 1, op, "version must be 1", repr(data.get("version")))
        rules = data.get("rules", [])
        require(isinstance(rules, list), op, "rules must be a list", type(rules).__name__)
        parsed = []
        for index, rule in enumerate(rules):
            where = f"rules[{index}]"
            named = isinstance(rule, dict) and isinstance(rule.get("pattern"), str)
            require(named, op, f"{where} must have a pattern", repr(rule))
            parsed.append((rule["pattern"], _layer(op, where, {k: v for k, v in rule.items() if k != "pattern"})))
        return cls(tuple(parsed), _layer(op, "default", data.get("default", {})))


_FIELD_TYPES: dict[str, tuple[type, ...]] = {
    "kind": (str,),
    "group_size": (int,),
    "method": (str, type(None)),
    "damping": (int, float),
    "search_steps": (int,),
    "order": (str,),
    "correct": (int, float),
    "refine": (int,),
    "low_rank": (int,),
    "strict": (bool,),
}


def _layer(op: str, where: str, data: Any) -> LayerRecipe:
    require(isinstance(data, dict), op, f"{where} must be a JSON object", type(data).__name__)
    known = [f.name for f in fields(LayerRecipe)]
    unknown = sorted(set(data) - set(known))
    require(not unknown, op, f"{where} may have the fields {known}", f"{unknown}")
    for key, value in data.items():
        fits = isinstance(value, _FIELD_TYPES[key]) and (key == "strict" or not isinstance(value, bool))
        names = " or ".join("null" if t is type(None) else t.__name__ for t in _FIELD_TYPES[key])
        require(fits, op, f"{where}.{key} must be {names}", repr(value))
    return LayerRecipe(**data)


PRESETS: dict[str, dict[str, Any]] = {
    "sp24-int4": {"kind": "w4a16_sp24"},
    "int4": {"kind": "w4a16_dense"},
    "sp24-int4-fast": {"kind": "w4a16_sp24", "correct": 0.0},
    "int4-rtn": {"kind": "w4a16_dense", "method": "rtn"},
    "sp24": {"kind": "sp24"},
    "sp24-int4-wanda": {"kind": "w4a16_sp24", "method": "wanda"},
    "sp24-int4-magnitude": {"kind": "w4a16_sp24", "method": "magnitude"},
}


def preset(name: str, group_size: int = 128) -> Recipe:
    """A named recipe for all decoder linears. Raises: ValueError (name, group_size)."""
    require(name in PRESETS, "preset", f"name must be one of {tuple(PRESETS)}", repr(name))
    return Recipe(default=LayerRecipe(group_size=group_size, **PRESETS[name]))
