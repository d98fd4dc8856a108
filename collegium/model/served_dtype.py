"""In which type weights are served unless a service is told: the one that holds every stored weight exactly.

Owns the choice and its one line. float16 has more digits than bfloat16 and a smaller range, so neither holds the other:
float16 weights are widened to float32. A service's --dtype overrides it. Every service of a cluster chooses alike,
because each goes by the manifest alone.
"""

from collections.abc import Collection, Mapping

_EXACT = {"F32": "float32", "BF16": "bfloat16", "F16": "float32"}
_WORDS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}


def auto_dtype(stored: Collection[str]) -> str:
    """Choose "float32" or "bfloat16" for experts stored in these types (safetensors' names)."""
    return "bfloat16" if {_EXACT[one] for one in stored} == {"bfloat16"} else "float32"


def tell_dtype(stored: Mapping[str, Collection[str]], dtype: str) -> str:
    """Say in one line how weights are served where `auto` chose a type that is not the stored one; else "".

    `stored`: types of the "experts" and of the "router" matrices, as in the manifest.
    """
    experts, router = set(stored.get("experts", ())), set(stored.get("router", ()))
    if dtype == "float32" and experts & {"F16", "BF16"}:
        return (
            f"the experts are stored as {_listed(experts)} and served as float32, which holds them exactly in up to "
            "twice the memory; --dtype bfloat16 takes half of it, and rounds float16 weights"
        )
    if dtype == "bfloat16" and router - {"BF16"}:
        return (
            f"some of the attention and gate matrices are stored as {_listed(router - {'BF16'})} and rounded to "
            "bfloat16, the experts' type; --dtype float32 serves every weight as it is stored"
        )
    return ""


def _listed(stored: Collection[str]) -> str:
    return " and ".join(sorted(_WORDS.get(one, one) for one in stored))
