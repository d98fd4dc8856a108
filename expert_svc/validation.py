"""Whether a router's request for a link can be taken: every field in its bounds.

Owns the bounds; nothing of a refused request is kept. Whether router and worker serve the same model is service's.
"""

from collegium.fabric.bounds import MAX_HOST, MAX_ID, MAX_PARTS, NamedTexts, Number, OutOfBoundsError, Text, Texts
from collegium.fabric.errors import InvalidArgument
from collegium.link.frame import MAX_ROWS
from collegium.v1 import expert_pb2

_MAX_DIGEST = 256  # characters; a digest has 64 at most
_WORD = Text(most=32, is_needed=True, form="a word")
BOUNDS = {
    "router_id": Text(most=MAX_ID, form="an id"),
    "model_digest": Text(most=_MAX_DIGEST, form="a digest"),
    "model_parts": NamedTexts(most_items=MAX_PARTS, each=Text(most=_MAX_DIGEST, form="a name or a digest")),
    "dtype": Text(most=32, form="a word"),
    "transports": Texts(most_items=8, each=_WORD),
    "max_rows": Number(least=1, most=MAX_ROWS),
    "host": Text(most=4 * MAX_HOST, form="a host's identity"),
}


def check_open_link(request: expert_pb2.OpenLinkRequest) -> None:
    """Check every field of a request that has a bound here. Raises InvalidArgument with the field and the bound."""
    try:
        for name, rule in BOUNDS.items():
            rule.check(name, getattr(request, name))
    except OutOfBoundsError as error:
        raise InvalidArgument(error.what, reason="OUT_OF_BOUNDS", field=error.field, remedy=error.remedy) from error
