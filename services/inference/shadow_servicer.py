"""The part of the Models service that has to do with shadows: convert, call, convert."""

import asyncio

from services.inference.context import Context
from services.inference.engine import Engine
from services.inference.shadow import Shadow, Terms
from tandem.errors import InvalidName, InvalidRequest
from tandem.names import check_name
from tandem.wire.shadows import shadow_to_wire
from tandem.wire.v1 import inference_pb2 as pb


class ShadowServicer:
    """Start, read and stop; a base of ModelsServicer."""

    _engine: Engine

    async def StartShadow(self, request: pb.StartShadowRequest, context: Context) -> pb.StartShadowResponse:
        """Let a candidate see a share of an alias's calls."""
        del context
        # Also not a number is neither above 0 nor at most 1.
        if not 0 < request.share <= 1:
            raise InvalidRequest(f"share is {request.share:g}; it must be above 0 and at most 1", field="share")
        terms = Terms(_checked(request.name, "name"), _checked(request.alias, "alias"), request.share)
        shadow = await self._engine.shadows.start(terms, request.candidate)
        return pb.StartShadowResponse(shadow=await _told(shadow))

    async def GetShadows(self, request: pb.GetShadowsRequest, context: Context) -> pb.GetShadowsResponse:
        """What shadows have found."""
        del context
        shadows = self._engine.shadows
        shadows.check()
        found = [
            shadow
            for shadow in shadows.all()
            if request.name in ("", shadow.terms.name) and request.alias in ("", shadow.terms.alias)
        ]
        # One after another: each takes a core.
        return pb.GetShadowsResponse(shadows=[await _told(shadow) for shadow in found])

    async def StopShadow(self, request: pb.StopShadowRequest, context: Context) -> pb.StopShadowResponse:
        """End a shadow, and tell what it has found."""
        del context
        shadows = self._engine.shadows
        shadows.check()
        shadow = shadows.stop(_checked(request.name, "name"), _checked(request.alias, "alias"))
        return pb.StopShadowResponse(shadow=await _told(shadow))


async def _told(shadow: Shadow) -> pb.Shadow:
    # Not on the loop: of a million images it takes a good part of a second.
    return await asyncio.to_thread(lambda: shadow_to_wire(shadow.report()))


def _checked(name: str, field: str) -> str:
    try:
        return check_name(name, "model" if field == "name" else field)
    except InvalidName as error:
        raise InvalidName(str(error), field=field) from None
